"""What all solvers promise alike: batches, seeds, callbacks, calls, interrupts, errors and what they refuse."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from dmap_core.errors import Diverged
from dmap_core.operators import GaussianBlur, Inpainting, Jpeg, SuperResolution
from dmap_core.operators.base import Operator
from dmap_core.posterior import Posterior
from dmap_core.schedule import SPACINGS, generators
from dmap_core.solvers import SOLVERS

LATENT, IMAGE = (2, 4, 6), (8, 12)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]
STEPS = len(SIGMAS) - 1
NAN, INF = math.nan, math.inf
CASES = {
    "DPS": ("DPS", {"zeta": 0.5}),
    "DPS adam": ("DPS", {"zeta": 0.05, "optimizer": "adam"}),
    "PSLD": ("PSLD", {"zeta": 0.5, "gamma": 0.3}),
    "PSLD published": ("PSLD", {"zeta": 0.5, "gamma": 0.3, "transpose": "published"}),
    "FreeDoM": ("FreeDoM", {"zeta": 0.5, "K": 3, "first": 1, "last": 3}),
    "FreeDoM published": ("FreeDoM", {"zeta": 0.5, "K": 3, "first": 1, "last": 3, "travel": "published"}),
    # steps 0 and 2 in pixels, step 4 in the latent
    "ReSample": ("ReSample", {"zeta": 0.5, "first": 0, "last": 4, "every": 2, "iterations": 3, "learning_rate": 0.05}),
    "DSG": ("DSG", {"zeta": 0.3}),
    "DMAP": ("DMAP", {"zeta": 0.5, "K": 2}),
    "DMAP adam": ("DMAP", {"zeta": 0.05, "K": 2, "optimizer": "adam"}),
}
GRADIENTS = {"DPS": 6, "DPS adam": 6, "PSLD": 6, "PSLD published": 6, "FreeDoM": 12, "FreeDoM published": 12, "ReSample": 6, "DSG": 5}
GRADIENTS |= {"DMAP": 10, "DMAP adam": 10}
every_case = pytest.mark.parametrize("case", CASES)


def test_every_solver_has_a_case():
    assert {name for name, _ in CASES.values()} == set(SOLVERS)
    assert CASES.keys() == GRADIENTS.keys()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def autoencoder(conv_prior):
    class Autoencoder(conv_prior):
        """The random prior with a random encoder; `before` may do something before every call of a network."""

        def __init__(self, before=lambda name, *inputs: None, **settings):
            super().__init__(**settings)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.encoder = nn.Conv2d(3, self.latent_channels, 3, stride=2, padding=1).double()
            self.before = before

        def denoise(self, z, sigma):
            self.before("denoise", z, sigma)
            return super().denoise(z, sigma)

        def decode(self, z0):
            self.before("decode", z0)
            return super().decode(z0)

        def encode(self, image):
            self.before("encode", image)
            return self.encoder(image).tanh()

    return Autoencoder


class Recording(Posterior):
    """Keeps every gradient: (z, sigma, denoised, residual)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gradients = []

    def gradient(self, z, sigma, extra=None):
        grad, denoised, residual = super().gradient(z, sigma, extra)
        self.gradients.append((z.clone(), sigma, denoised, residual))
        return grad, denoised, residual


def problem(prior, batch=1, f=None):
    f = f or SuperResolution(2)
    y = f.measure(randn(batch, 3, *IMAGE, seed=1).tanh())
    return Recording(prior, f, y, "fast"), SIGMAS[0] * randn(batch, *LATENT, seed=2)


def solve(case, posterior, z, sigmas=SIGMAS, **more):
    name, settings = CASES[case]
    return SOLVERS[name](posterior, z, sigmas, **{**settings, **more})


def masks(batch):
    return (torch.rand(batch, 1, *IMAGE, generator=torch.Generator().manual_seed(4)) < 0.3).float()


@every_case
@pytest.mark.parametrize("f", [SuperResolution(2), Inpainting(masks(3)), GaussianBlur(5, 1.0)], ids=lambda f: f.name)
def test_a_batch_is_as_many_single_runs(autoencoder, case, f):
    posterior, z = problem(autoencoder(), 3, f)
    whole = solve(case, posterior, z, generator=generators(11, 3))
    for i in range(3):
        f_i = Inpainting(f.mask[i : i + 1]) if isinstance(f, Inpainting) else f
        alone = Posterior(posterior.prior, f_i, posterior.y[i : i + 1], "fast")
        out = solve(case, alone, z[i : i + 1], generator=generators(11, 3)[i : i + 1])
        # residuals and spheres are rounded to float32
        torch.testing.assert_close(out, whole[i : i + 1], rtol=1e-5, atol=1e-5)


@every_case
def test_seeds_decide_and_nothing_outside_changes(autoencoder, case):
    posterior, z = problem(autoencoder(), 2)
    before, y, state = z.clone(), posterior.y.clone(), torch.get_rng_state()
    first, second = (solve(case, posterior, z, generator=generators(1, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(z, before)
    assert torch.equal(posterior.y, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert (solve(case, posterior, z, generator=generators(2, 2)) - first).abs().max() > 1e-3
    assert all(p.grad is None for network in posterior.prior.networks() for p in network.parameters())


@every_case
@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_gradients_outside_do_not_matter(autoencoder, case, outer):
    posterior, z = problem(autoencoder())
    expected = solve(case, posterior, z, generator=generators(1, 1))
    with outer():
        out = solve(case, posterior, z, generator=generators(1, 1))
    assert torch.equal(out, expected)
    assert not out.requires_grad


@every_case
def test_float32_stays_float32(autoencoder, case):
    prior = autoencoder(dtype=torch.float32)
    prior.encoder = prior.encoder.float()
    posterior, z = problem(prior)
    posterior.y = posterior.y.float()
    assert solve(case, posterior, z.float(), generator=generators(1, 1)).dtype == torch.float32


@every_case
def test_the_callback_sees_every_step(autoencoder, case):
    """denoised and residual are those of the step's last gradient: at z before the step, in DMAP at the new noise level.

    DMAP and DSG take none at the last step, which ends at z0: denoised is z0, and the residual is its.
    """
    posterior, z = problem(autoencoder(), 2)
    seen = []

    def callback(step, denoised, z, residual):
        assert denoised.shape == z.shape == (2, *LATENT)
        assert residual.shape == (2,)
        assert not any(t.requires_grad for t in (denoised, z, residual))
        seen.append((step, denoised.clone(), z.clone(), residual.clone(), len(posterior.gradients)))

    out = solve(case, posterior, z, generator=generators(1, 2), callback=callback)
    assert [step for step, *_ in seen] == list(range(STEPS))
    assert torch.equal(seen[-1][2], out)
    dmap, spherical = case.startswith("DMAP"), case[:3] in ("DMA", "DSG")
    for step, denoised, latent, residual, gradients in seen[: STEPS - 1 if spherical else STEPS]:
        at, sigma, last_denoised, last_residual = posterior.gradients[gradients - 1]
        assert sigma == SIGMAS[step + 1 if dmap else step]
        assert torch.equal(denoised, last_denoised)
        assert torch.equal(residual, last_residual)
        torch.testing.assert_close(residual, posterior.residual(at, sigma), rtol=1e-6, atol=0)
        if not dmap and not (case.startswith("FreeDoM") and 1 <= step <= 3):
            assert torch.equal(at, seen[step - 1][2] if step else z)
        assert not torch.equal(latent, at)
    if spherical:
        assert torch.equal(seen[-1][1], out)
        torch.testing.assert_close(seen[-1][3], posterior.residual(out, 0.0), rtol=1e-6, atol=0)


@every_case
def test_calls_of_the_denoiser(autoencoder, case):
    prior = autoencoder()
    posterior, z = problem(prior)
    solve(case, posterior, z)
    gradients, rest = GRADIENTS[case], STEPS if case.startswith("DMAP") else 1 if case == "DSG" else 0
    assert posterior.denoiser_calls == len(prior.denoised_at) == gradients + rest
    assert len(posterior.gradients) == sum(with_gradient for _, with_gradient in prior.denoised_at) == gradients
    # ReSample: D and E once for each of two pictures, D at every iteration in the latent; DMAP, DSG: the last residual
    more = 2 + 3 if case == "ReSample" else 1 if case[:3] in ("DMA", "DSG") else 0
    assert posterior.decoder_calls == prior.decoded == gradients + more


class Interrupted(Exception):
    """What a host raises when a person presses Cancel."""


@every_case
@pytest.mark.parametrize("where", ["denoise", "decode", "encode", "callback"])
def test_an_exception_from_outside_passes_through(autoencoder, case, where):
    if where == "encode" and CASES[case][0] not in ("PSLD", "ReSample"):
        where = "decode"
    calls = []

    def interrupt(name, *_):
        calls.append(name)
        if calls.count(where) == 2:
            raise Interrupted

    posterior, z = problem(autoencoder(interrupt))
    with pytest.raises(Interrupted):
        solve(case, posterior, z, callback=lambda *_: interrupt("callback"))
    assert calls.count(where) == 2
    assert calls[-1] == where


@every_case
def test_only_two_solvers_need_an_encoder(conv_prior, case):
    posterior, z = problem(conv_prior())
    if CASES[case][0] in ("PSLD", "ReSample"):
        with pytest.raises(NotImplementedError):
            solve(case, posterior, z)
    else:
        assert torch.isfinite(solve(case, posterior, z)).all()


@every_case
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_in_the_prior_names_step_sample_and_zeta(autoencoder, case, value):
    prior = autoencoder()
    clean = prior.denoise

    def denoise(z, sigma):
        out = clean(z, sigma)
        return torch.cat([out[:1], out[1:] * value]) if sigma == 2.0 else out

    prior.denoise = denoise
    posterior, z = problem(prior, 2)
    steps = []
    # DMAP's gradients are taken one level lower
    step = 2 if case.startswith("DMAP") else 3
    zeta = CASES[case][1]["zeta"]
    with pytest.raises(Diverged, match=rf"^step {step} of 6: NaN or infinity in sample 1 of the batch, .*lower zeta \(now {zeta:g}\)"):
        solve(case, posterior, z, generator=generators(1, 2), callback=lambda step, *_: steps.append(step))
    assert steps == list(range(step - 1))


INVALID = [
    *((case, {"zeta": zeta}, f"zeta is {zeta}") for case in CASES for zeta in (0, -1.0, NAN, INF)),
    *((case, {"eta": eta}, f"eta is {eta}") for case in CASES for eta in (-0.1, 1.1, NAN)),
    ("DSG", {"eta": 0.0}, "eta is 0"),
    ("DSG", {"eta": 0}, "eta is 0"),
    ("DMAP", {"eta": 0.0}, "eta is 0"),
    ("DSG", {"zeta": 1.01}, "zeta is 1.01.*mix rate"),
    *((case, {"K": K}, f"K is {K}") for case in ("FreeDoM", "DMAP", "DMAP adam") for K in (0, -1, 1.5, NAN)),
    *((case, {"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of gradient, adam") for case in ("DPS", "DMAP")),
    *(("PSLD", {"gamma": gamma}, f"gamma is {gamma}") for gamma in (-0.1, NAN)),
    ("PSLD", {"transpose": "inverse"}, "transpose is 'inverse'; it must be one of adjoint, published"),
    ("FreeDoM", {"travel": "back"}, "travel is 'back'; it must be one of forward, published"),
    *((case, {"first": 3, "last": 2}, "first is 3 and last 2") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": -1, "last": 2}, "first is -1") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 1.5, "last": 2}, "first is 1.5") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": -3, "last": -2}, "first is -3") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 0, "last": 2.5}, "last is 2.5") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 0, "last": 6}, "last is 6, but the schedule has the steps 0 to 5") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 25, "last": 50}, "last is 50, but") for case in ("FreeDoM", "ReSample")),
    ("ReSample", {"space": "image"}, "space is 'image'; it must be one of both, latent, pixel"),
    ("ReSample", {"tweedie": "wrong"}, "tweedie is 'wrong'; it must be one of correct, published"),
    *(("ReSample", {name: value}, f"{name} is {value}") for name in ("iterations", "every") for value in (0, -1, 1.5)),
    *(
        ("ReSample", {name: value}, f"{name} is? ?{value}|{name} {value}")
        for name in ("learning_rate", "factor")
        for value in (0, -1.0, NAN)
    ),
    *((case, {"sigmas": [4.0, 1.0, 2.0, 0.0]}, "sigmas must fall at every step, but step 1 goes from 1 to 2") for case in CASES),
    *((case, {"sigmas": [0.0, 1.0, 4.0]}, "sigmas must fall at every step") for case in CASES),
    *((case, {"sigmas": [4.0, 2.0, 1.5, 1.2, 1.1, 1.0]}, "sigmas must end at 0, but end at 1") for case in CASES),
    *((case, {"sigmas": [4.0, NAN, 0.0]}, "sigmas holds NaN") for case in CASES),
    *((case, {"sigmas": [4.0]}, "sigmas holds 1 noise levels") for case in CASES),
]


@pytest.mark.parametrize("case, settings, message", INVALID, ids=lambda value: str(value).replace(" ", ""))
def test_settings_without_meaning_are_refused_before_the_first_call(autoencoder, case, settings, message):
    posterior, z = problem(autoencoder())
    with pytest.raises(ValueError, match=message):
        solve(case, posterior, z, **settings)
    assert posterior.denoiser_calls == posterior.decoder_calls == 0


@every_case
def test_the_number_of_generators_must_fit(autoencoder, case):
    posterior, z = problem(autoencoder(), 3)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        solve(case, posterior, z, generator=generators(0, 2))


@pytest.mark.parametrize("case, eta", [(case, eta) for case in CASES for eta in (0, 0.5, 1) if eta or case[:3] not in ("DSG", "DMA")])
def test_every_eta_runs_and_means_something(autoencoder, case, eta):
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, eta=eta, generator=generators(1, 1))
    assert torch.isfinite(out).all()
    other = solve(case, posterior, z, eta=0.7, generator=generators(1, 1))
    assert (out - other).abs().max() > 1e-3
    draws = solve(case, posterior, z, eta=eta, generator=generators(2, 1))
    # at eta 0 only going back in time and resampling draw noise
    assert torch.equal(out, draws) is (eta == 0 and CASES[case][0] in ("DPS", "PSLD"))


def stable_diffusion_sigmas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    return ((1 - abar) / abar).sqrt()


@every_case
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_runs(autoencoder, case, spacing):
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, SPACINGS[spacing](stable_diffusion_sigmas(), 6), generator=generators(1, 1))
    assert torch.isfinite(out).all()
    assert out.abs().max() < 1e3


@dataclass(frozen=True)
class Labels(Operator):
    """The brightest channel of every pixel, which has no gradient."""

    linear = False

    def __call__(self, image):
        return image.argmax(1, keepdim=True).to(image)


@dataclass(frozen=True)
class Detached(Operator):
    """Linear, with an adjoint, but computed where no gradient passes."""

    def __call__(self, image):
        return 0.5 * image.detach()

    def adjoint(self, y, size):
        return 0.5 * y


@every_case
@pytest.mark.parametrize("f", [Labels(), Detached()], ids=lambda f: f.name)
def test_an_operator_without_gradient_is_named(autoencoder, case, f):
    posterior, z = problem(autoencoder(), f=f)
    what = "is not linear" if case.startswith("PSLD") and not f.linear else "is not differentiable"
    with pytest.raises(ValueError, match=rf"^operator: {f.name}\(\) {what}"):
        solve(case, posterior, z)


@pytest.mark.parametrize("case", ["DMAP", "DSG"])
def test_the_last_step_of_a_sphere_takes_no_gradient(autoencoder, case):
    """There is no sphere to move on: the operator need not be differentiable, and the result is the denoised latent."""
    posterior, z = problem(autoencoder(), f=Labels())
    out = solve(case, posterior, z, [4.0, 0.0])
    assert torch.equal(out, posterior.denoise(z, 4.0))


@every_case
def test_a_nonlinear_operator_stops_only_psld(autoencoder, case):
    f = Jpeg(30)
    posterior, z = problem(autoencoder(), f=f)
    if CASES[case][0] != "PSLD":
        assert torch.isfinite(solve(case, posterior, z)).all()
        return
    with pytest.raises(ValueError, match=r"^operator: Jpeg\(.*\) is not linear, and PSLD needs its transpose; use DMAP, DPS"):
        solve(case, posterior, z)
    assert posterior.denoiser_calls == 0


# What turns the others into DPS

EQUAL_TO_DPS = {
    "PSLD without gluing": ("PSLD", {"gamma": 0}),
    "PSLD published without gluing": ("PSLD", {"gamma": 0.0, "transpose": "published"}),
    "FreeDoM of one pass": ("FreeDoM", {"K": 1, "first": 0, "last": 5}),
    "DPS by name": ("DPS", {"optimizer": "gradient"}),
}


@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("name", EQUAL_TO_DPS)
def test_what_equals_dps(autoencoder, name, eta):
    posterior, z = problem(autoencoder(), 2)
    expected = SOLVERS["DPS"](posterior, z, SIGMAS, zeta=0.5, eta=eta, generator=generators(1, 2))
    solver, settings = EQUAL_TO_DPS[name]
    out = SOLVERS[solver](posterior, z, SIGMAS, zeta=0.5, eta=eta, generator=generators(1, 2), **settings)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case, first", [("FreeDoM", 3), ("FreeDoM published", 3), ("ReSample", 3)])
def test_a_window_changes_nothing_before_it(autoencoder, case, first):
    posterior, z = problem(autoencoder(), 2)
    latents = {"DPS": [], case: []}
    for name, settings in (("DPS", {}), (case, {"first": first, "last": 4})):
        solve(name, posterior, z, **settings, generator=generators(1, 2), callback=lambda i, d, z, r, name=name: latents[name].append(z))
    for i, (ours, dps) in enumerate(zip(latents[case], latents["DPS"], strict=True)):
        assert torch.equal(ours, dps) is (i < first)


@pytest.mark.parametrize("case", ["FreeDoM", "ReSample"])
def test_a_window_at_the_last_step(autoencoder, case):
    """sigma_next is 0 there: FreeDoM goes back to the full noise level, ReSample returns the consistent latent."""
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, first=5, last=5, generator=generators(1, 1))
    assert torch.isfinite(out).all()
    assert (out - solve("DPS", posterior, z, generator=generators(1, 1))).abs().max() > 1e-3


@every_case
def test_dps_like_solvers_take_gradients_at_the_levels_of_the_schedule(autoencoder, case):
    posterior, z = problem(autoencoder())
    solve(case, posterior, z)
    expected = []
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        if case.startswith("DMAP"):
            expected += [sigma_next] * (2 if sigma_next else 0)
        elif case != "DSG" or sigma_next:
            expected += [sigma] * (3 if case.startswith("FreeDoM") and 1 <= i <= 3 else 1)
    assert [sigma for _, sigma, *_ in posterior.gradients] == expected
