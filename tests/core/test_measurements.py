"""Measurements: those of a wrong shape are refused before any work, and what nobody knows of one counts nowhere."""

import pytest
import torch
from variants import some_at_once

from dmap_core.operators import (
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    Jpeg,
    KernelBlur,
    MotionBlur,
    Noisy,
    NonlinearBlur,
    Segmentation,
    SuperResolution,
)
from dmap_core.operators.base import squared_norm
from dmap_core.operators.nonlinear_blur import random_kernel_wizard
from dmap_core.operators.segmentation import random_room_layout
from dmap_core.posterior import Posterior
from dmap_core.restore import restore
from dmap_core.schedule import generators
from dmap_core.solvers import SOLVERS, Unguided
from dmap_core.solvers.psld import transposed

LATENT, IMAGE = (2, 16, 24), (32, 48)
SIGMAS = [9.0, 3.0, 1.0, 0.3, 0.0]
RESAMPLE = {"zeta": 0.5, "first": 0, "last": 3, "iterations": 2, "learning_rate": 0.05}
CASES = {
    "DPS": ("DPS", {"zeta": 0.5}),
    "DPS adam": ("DPS", {"zeta": 0.05, "optimizer": "adam"}),
    "PSLD": ("PSLD", {"zeta": 0.5, "gamma": 0.3}),
    "PSLD published": ("PSLD", {"zeta": 0.5, "gamma": 0.3, "transpose": "published"}),
    "FreeDoM": ("FreeDoM", {"zeta": 0.5, "K": 2, "first": 0, "last": 2}),
    "ReSample pixel": ("ReSample", {**RESAMPLE, "every": 1, "space": "pixel"}),
    "ReSample latent": ("ReSample", {**RESAMPLE, "every": 1, "space": "latent"}),
    "DSG": ("DSG", {"zeta": 0.3}),
    "DMAP": ("DMAP", {"zeta": 0.5, "K": 2}),
}
every_case = pytest.mark.parametrize("case", CASES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def prior(conv_autoencoder):
    return conv_autoencoder()


def solve(case, prior, f, y, batch=1):
    name, settings = CASES[case]
    posterior = Posterior(prior, f, y, "fast")
    residuals = []
    z = SIGMAS[0] * randn(batch, *LATENT, seed=2)
    noise = generators(3, batch)
    out = SOLVERS[name](**settings)(posterior, z, SIGMAS, generator=noise, callback=lambda i, d, z, r: residuals.append(r))
    return out, torch.stack(residuals), posterior


# ---- wrong shapes


WRONG = {
    "two measurements for one latent": (SuperResolution(2), (2, 3, 16, 24), 1, "2 measurements for a batch of 1"),
    "two measurements for three latents": (SuperResolution(2), (2, 3, 16, 24), 3, "2 measurements for a batch of 3"),
    "gray for colour": (SuperResolution(2), (1, 1, 16, 24), 1, r"shape \(1, 1, 16, 24\), and Super-Resolution \(scale 2\) makes \(1, 3, 16, 24\)"),
    "one row": (SuperResolution(2), (1, 3, 1, 24), 1, r"shape \(1, 3, 1, 24\)"),
    "one column of a blur": (GaussianBlur(5, 1.0), (1, 3, 32, 1), 1, r"shape \(1, 3, 32, 1\)|too small"),
    "no batch axis": (GaussianBlur(5, 1.0), (3, 32, 48), 1, "measurement"),
    "gray for noisy colour": (Noisy(SuperResolution(2), 0.02), (1, 1, 16, 24), 1, r"shape \(1, 1, 16, 24\)"),
    "colour for Compose's gray": (Compose([Grayscale(), SuperResolution(2)]), (1, 3, 16, 24), 1, r"shape \(1, 3, 16, 24\)"),
}  # fmt: skip


@every_case
@pytest.mark.parametrize("name", WRONG)
def test_a_measurement_of_the_wrong_shape_is_refused(prior, case, name):
    f, shape, batch, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        solve(case, prior, f, randn(*shape), batch)
    if "batch" in message:  # known before the first call of a network
        assert not prior.denoised_at and not prior.decoded


def test_unguided_sampling_too(prior):
    posterior = Posterior(prior, SuperResolution(2), randn(2, 3, 16, 24))
    with pytest.raises(ValueError, match="2 measurements for a batch of 1"):
        Unguided()(posterior, randn(1, *LATENT), SIGMAS)


@pytest.mark.parametrize("name", WRONG)
def test_a_whole_restoration_finds_out_before_any_work(prior, name):
    f, shape, batch, _ = WRONG[name]
    with pytest.raises(ValueError, match="measurement|measurements|too small|SuperResolution"):
        restore(prior, f, randn(*shape), LATENT, torch.tensor(SIGMAS), SOLVERS["DPS"](zeta=0.5), seeds=range(batch))
    assert not prior.denoised_at and not prior.decoded


@every_case
def test_one_measurement_serves_a_batch(prior, case):
    f, y = SuperResolution(2), randn(1, 3, 16, 24, seed=1)
    one, residuals, _ = solve(case, prior, f, y, 2)
    each, expected, _ = solve(case, prior, f, y.expand(2, -1, -1, -1), 2)
    assert torch.equal(one, each) and torch.equal(residuals, expected)


ADJOINT = [
    SuperResolution(2),
    GaussianBlur(5, 1.0),
    KernelBlur([[1, 2, 1]]),
    MotionBlur(40, 20.0),
    Grayscale(),
    Inpainting(torch.eye(48)[:32]),
]


@pytest.mark.parametrize("f", ADJOINT, ids=lambda f: f.name)
@pytest.mark.parametrize("size", [(1, 48), (32, 1), (33, 48), (8, 12)])
def test_an_adjoint_of_another_size_is_refused(f, size):
    big = (64, 96)
    size = tuple(2 * n for n in size) if f.name == "MotionBlur" else size
    with pytest.raises(ValueError, match=r"^measurement: it is |^Inpainting: the mask is"):
        f.adjoint(randn(1, f.channels(), *size), big if f.name == "MotionBlur" else IMAGE)


# ---- what nobody knows

HOLE = torch.zeros(IMAGE)
HOLE[:21, 6:35] = 1  # with a whole block of JPEG's colours, 16x16, at (0, 16)
COLOUR, GRAY = Inpainting(HOLE), Grayscale()
SMALL = Inpainting(torch.nn.functional.max_pool2d(HOLE[None, None], 2)[0, 0])
HOLES = {
    "Inpainting": COLOUR,
    "Noisy": Noisy(COLOUR, 0.01),
    "last of a Compose": Compose([GRAY, COLOUR]),
    "first of a Compose": Compose([COLOUR, GRAY]),
    "before super-resolution": Compose([COLOUR, SuperResolution(2)]),
    "after super-resolution": Compose([SuperResolution(2), SMALL]),
    "before a Gaussian blur": Compose([COLOUR, GaussianBlur(5, 1.0)]),
    "before a kernel": Compose([COLOUR, KernelBlur([[0, 1, 0], [1, 0, 3], [0, 0, 0]])]),
    "before a motion": Compose([COLOUR, MotionBlur(7, 30.0)]),
    "before a JPEG": Compose([COLOUR, Jpeg(30)]),
    "a gray JPEG": Compose([GRAY, COLOUR, Jpeg(30)]),
    "a sharp JPEG": Compose([COLOUR, Jpeg(30, "4:4:4")]),
    "two holes": Compose([COLOUR, GRAY, Inpainting(HOLE.flip(1))]),
    "nested": Noisy(Compose([Compose([COLOUR, GRAY]), Compose([SuperResolution(2)])]), 0.01),
}
every_hole = pytest.mark.parametrize("f", HOLES.values(), ids=HOLES.keys())


def not_depending(f):
    """(1, 1, h, w), where f's value does not change with the image, found out by trying: no code in common with `hidden`."""
    images = 0.9 * torch.rand(40, 3, *IMAGE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 2
    images *= torch.where(torch.arange(40) % 2 == 0, 1, -1).view(-1, 1, 1, 1)
    values = f(images)
    return ((values - values[:1]).abs().amax((0, 1), keepdim=True) == 0).double()


@every_hole
def test_what_is_hidden_is_what_does_not_depend_on_the_image(f):
    hidden = f.hidden()
    assert torch.equal(hidden.double(), not_depending(f))
    assert 0 < hidden.mean() < 1


def painted(f, value):
    """The measurement of a picture, and what `value` in all that is hidden makes of it."""
    y = f.measure(randn(1, 3, *IMAGE, seed=1).tanh() * 0.9)
    return y, torch.where(f.hidden().bool(), torch.full_like(y, value), y)


@pytest.mark.parametrize("case", some_at_once(CASES, ["DMAP", "PSLD"]))
@every_hole
def test_a_hole_counts_for_no_solver(prior, case, f):
    """White against 0, and against what was measured there."""
    if case.startswith("PSLD") and not f.linear:
        return
    measured, white = painted(f, 1.0)
    _, black = painted(f, 0.0)
    assert (white - black).abs().max() == 1
    results = [solve(case, prior, f, y)[:2] for y in (measured, white, black)]
    for latent, residuals in results[1:]:
        assert torch.equal(latent, results[0][0])
        assert torch.equal(residuals, results[0][1])


@every_hole
def test_a_hole_counts_nowhere_else(f):
    _, white = painted(f, 1.0)
    _, black = painted(f, 0.0)
    y_hat = f(randn(1, 3, *IMAGE, seed=7).tanh())
    assert torch.equal(f.hint(white), f.hint(black))
    assert torch.equal(f.distance(y_hat, white), f.distance(y_hat, black))
    assert torch.equal(f.seen(white), f.seen(black))
    assert torch.equal(f.elements(white), f.elements(black))
    assert float(f.elements(white)) == float((1 - f.hidden()).sum() * white.shape[1])
    if f.linear:
        assert torch.equal(f.adjoint(white, IMAGE), f.adjoint(black, IMAGE))
        for kind in ("adjoint", "published"):
            back = transposed(f, IMAGE, white, kind)
            assert torch.equal(back(f.seen(white)), back(f.seen(black)))
        assert torch.equal(squared_norm(f, IMAGE, white), squared_norm(f, IMAGE, black))


def test_a_hole_before_a_large_kernel():
    """Fourier transforms mix all pixels, by rounding; what is hidden is set to 0 before."""
    hole = torch.zeros(128, 128)
    hole[10:100, 12:110] = 1
    f = Compose([Inpainting(hole), MotionBlur(41, 30.0)])
    hidden = f.hidden()
    small = Compose([Inpainting(hole), KernelBlur(MotionBlur(41, 30.0).kernel_tensor().tolist())])
    assert torch.equal(hidden, small.hidden()) and 0.1 < hidden.mean() < 0.5
    y = f(randn(1, 3, 128, 128))
    white = torch.where(hidden.bool(), torch.ones_like(y), y)
    y_hat = f(randn(1, 3, 128, 128, seed=4))
    assert torch.equal(f.distance(y_hat, white), f.distance(y_hat, y)) and torch.equal(f.hint(white), f.hint(y))
    assert (y * hidden).abs().max() < 1e-12


def test_one_mask_for_each_sample_of_a_batch(prior):
    masks = torch.stack([HOLE, HOLE.flip(0), HOLE.flip(1)]).unsqueeze(1)
    f = Compose([Inpainting(masks), Grayscale()])
    y = f(randn(3, 3, *IMAGE, seed=1).tanh())
    white = torch.where(f.hidden().bool(), torch.ones_like(y), y)
    assert torch.equal(solve("DPS", prior, f, y, 3)[0], solve("DPS", prior, f, white, 3)[0])
    with pytest.raises(ValueError, match="Compose: 3 masks for a batch of 2"):
        f.hint(y[:2])
    with pytest.raises(ValueError, match="Compose: the measurement is 24x16; with this mask it must be 48x32"):
        f.seen(randn(3, 1, 16, 24))


def test_networks_hide_nothing():
    """Every pixel of theirs depends on some that are known."""
    hole = torch.zeros(128, 128)
    hole[30:90, 40:100] = 1
    assert Compose([Inpainting(hole), NonlinearBlur(random_kernel_wizard(0, width=4, front=1, back=1))]).hidden() is None
    assert Compose([Inpainting(hole), Segmentation(random_room_layout(layers=(1, 1, 1, 1), width=4, bottleneck=4))]).hidden() is None


def test_a_compose_without_hole_is_as_it_was(prior):
    f = Compose([GRAY, SuperResolution(2)])
    y = f(randn(2, 3, *IMAGE, seed=1))
    assert f.hidden() is None and f.seen(y) is y
    assert torch.equal(f.distance(0.5 * y, y), SuperResolution(2).distance(0.5 * y, y))


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad])
def test_a_hole_that_was_first_seen_under_inference_mode(outer):
    """The cache outlives it, and a gradient is taken later."""
    f = Compose([Inpainting(HOLE), Grayscale()])
    with outer():
        y = f(randn(1, 3, *IMAGE)).clone()
        f.hint(y)
    x = randn(1, 3, *IMAGE, seed=2).requires_grad_()
    f.distance(f(x), y.clone()).sum().backward()
    assert torch.isfinite(x.grad).all()
