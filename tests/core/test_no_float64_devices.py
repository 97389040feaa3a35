"""Everything that runs on the device of a model runs on one without float64, such as Apple's MPS.

No such device is here. The stand-in is torch's "meta" device under a dispatch mode: what would make a float64 tensor there raises MPS's own error,
and what comes from there to the CPU is filled with ones. So it shows what is asked of a device, not values.
"""

import pytest
import torch
from host import import_torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from dmap_core import consistency
from dmap_core.metrics.reference import psnr
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
    SuperResolution,
)
from dmap_core.operators.nonlinear_blur import random_kernel_wizard
from dmap_core.posterior import Posterior
from dmap_core.restore import initial_latent
from dmap_core.schedule import SPACINGS, generators, randn_like
from dmap_core.solvers import SOLVERS, Unguided
from dmap_core.studies import score
from dmap_core.studies.diversity import diversity

import_torchvision()  # which torchmetrics and diffusers want

LATENT, IMAGE = (4, 8, 8), (64, 64)
SIGMAS = [9.0, 3.0, 1.0, 0.0]


class NoFloat64(TorchDispatchMode):
    truth = False  # what is read of truths that are there, such as whether an iteration goes on

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_meta]
        if here and function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            return {torch.bool: self.truth}.get(here[0].dtype, 1)
        if here and function.overloadpacket is torch.ops.aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if here and function.overloadpacket is torch.ops.aten.nonzero:
            return torch.zeros(0, here[0].ndim, dtype=torch.int64, device="meta")
        found = function(*args, **kwargs)

        def check(t):
            if isinstance(t, torch.Tensor) and t.is_meta and t.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64 ({function})")

        tree_map(check, found)
        return found


@pytest.fixture
def device():
    with NoFloat64():
        yield torch.device("meta")


@pytest.fixture
def device_of_truths():
    with NoFloat64() as mode:
        mode.truth = True
        yield torch.device("meta")


def size_for(f):
    return (128, 128) if f is BLURS else IMAGE


class TinyPrior:
    """Latents (B, 4, h, w), images (B, 3, 8h, 8w)."""

    def __init__(self, device):
        with torch.device(device):
            self.up, self.down = nn.ConvTranspose2d(4, 3, 8, 8), nn.Conv2d(3, 4, 8, 8)

    def denoise(self, z, sigma):
        return z / (1 + sigma**2)

    def decode(self, z0):
        return self.up(z0)

    def encode(self, image):
        return self.down(image)

    def networks(self):
        return (self.up, self.down)

    def free_memory(self):
        return float("inf")


MASK = torch.eye(64)
OPERATORS = [
    SuperResolution(4),
    GaussianBlur(9, 1.5),
    KernelBlur([[1.0, 2.0, 1.0]]),
    MotionBlur(7, 20.0),
    MotionBlur(41, 20.0),
    Inpainting(MASK),
    Compose([Inpainting(MASK), Grayscale(), SuperResolution(2)]),
    Compose([Grayscale(), GaussianBlur(5, 1.0)]),
    Noisy(Compose([Inpainting(MASK), MotionBlur(41, 20.0)]), 0.02),
    Jpeg(20),
    Jpeg(20, "4:4:4", "cubic"),
]
BLURS = Compose([NonlinearBlur(random_kernel_wizard(0, 2, 1, 1)), SuperResolution(4)])
CASES = {
    "DPS": {"zeta": 0.5, "optimizer": "adam"},
    "PSLD": {"zeta": 0.5, "gamma": 0.1},
    "FreeDoM": {"zeta": 0.5, "first": 0, "last": 1},
    "ReSample": {"zeta": 0.5, "first": 0, "last": 2, "every": 1, "iterations": 1},
    "DSG": {"zeta": 0.3},
    "DMAP": {"zeta": 0.5},
}


def test_the_stand_in_refuses_what_mps_refuses(device):
    on_it = torch.ones(3, device=device)
    for attempt in (
        lambda: on_it.double(),
        lambda: on_it.double().cpu(),
        lambda: torch.as_tensor(on_it, dtype=torch.float64),
        lambda: torch.tensor(1.0, dtype=torch.float64, device=device).log(),
        lambda: torch.ones(3, dtype=torch.float64).to(device),
    ):
        with pytest.raises(TypeError, match="MPS"):
            attempt()
    assert torch.equal(on_it.cpu().double(), torch.ones(3, dtype=torch.float64))
    assert torch.ones(3, dtype=torch.float64).to(on_it).dtype == torch.float32
    assert float(on_it[0]) == 1


@pytest.mark.parametrize("f", [*OPERATORS, BLURS], ids=lambda f: f.describe()[:30])
def test_operators(device, f):
    f, size = f.to(device), size_for(f)
    x = torch.zeros(2, 3, *size, device=device).requires_grad_()
    y_hat = f(x)
    y = f.measure(x).detach()
    f.distance(y_hat, y).sum().backward()
    f.hint(y), f.picture(y), f.seen(y), f.elements(y)
    if f.linear:
        assert f.adjoint(y, size).is_meta


@pytest.mark.parametrize("f", [*OPERATORS, BLURS], ids=lambda f: f.describe()[:30])
def test_match(device_of_truths, monkeypatch, f):
    """Truths are true, so that rounds go on; a few show all that is asked of the device."""
    for rounds in ("ROUNDS", "FILE_ROUNDS", "NEWTON"):
        monkeypatch.setattr(consistency, rounds, 2)
    solve = consistency.solve
    monkeypatch.setattr(consistency, "solve", lambda *problem: solve(*problem[:4], 2))
    f, x = f.to(device_of_truths), torch.zeros(2, 3, *size_for(f), device=device_of_truths)
    taken = consistency.match(f, x, f.measure(x), feather=2.0)
    assert taken.image.is_meta and taken.image.dtype == torch.float32


@pytest.mark.parametrize("name, settings", [*CASES.items(), ("DPS", {}), ("DMAP", {}), ("DMAP", {"zeta": 0.5, "jacobian": "none"})])
@pytest.mark.parametrize("f", [SuperResolution(4), Noisy(Compose([Inpainting(MASK), MotionBlur(41, 20.0)]), 0.02)], ids=lambda f: f.name)
def test_solvers(device, name, settings, f):
    y = torch.zeros(2, 3, *f.measurement_size(IMAGE), device=device)
    posterior = Posterior(TinyPrior(device), f, y, "fast")
    z = initial_latent(LATENT, SIGMAS[0], [0, 1], device)
    out = SOLVERS[name](**settings)(posterior, z, SIGMAS, generator=generators(0, 2), callback=lambda *_: None)
    assert out.is_meta and out.shape == (2, *LATENT)
    assert Unguided()(posterior, z, SIGMAS, callback=lambda *_: None).is_meta


@pytest.mark.parametrize("spacing", SPACINGS)
def test_schedules(device, spacing):
    """One step, since the stand-in has but one noise level."""
    assert SPACINGS[spacing](torch.linspace(0.03, 14.6, 1000).to(device), 1).device.type == "cpu"


def test_the_score_studies(device):
    prior = TinyPrior(device)
    posterior = Posterior(prior, SuperResolution(4), torch.zeros(2, 3, 16, 16, device=device), "fast")
    z0 = torch.zeros(2, *LATENT, device=device)
    points = score.score_points(posterior, z0, SIGMAS, generators(0, 2))
    errors = score.score_errors(points, [point.denoised for point in points], [0.5])
    assert errors.unconditional.dtype == errors.dps.dtype == torch.float64
    mean = score.ScoreMean()
    mean.update(points[0].grad)
    assert mean.mean.dtype == torch.float64
    assert score.plain_score_mean(prior.denoise, LATENT, 9.0, k=2, device=device).k == 2
    model_sigmas = torch.linspace(0.03, 14.6, 1000)
    assert len(score.timesteps(torch.tensor([1.0, 0.5]), model_sigmas)) == 2
    for sigmas, table in (([1.0, 1.0], model_sigmas), (torch.tensor([1.0, 1.0]).to(device), model_sigmas)):
        assert score.timesteps(sigmas, table).dtype == torch.float64


def test_pictures_of_the_studies_and_metrics(device):
    images = torch.ones(3, 3, 16, 16, device=device)
    assert diversity(images).mean.shape == (3, 16, 16)
    assert psnr(images, images).dtype == torch.float64


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_prior_without_comfyui(device):
    called = []

    def unet(x, timestep, **_):
        called.append(timestep)
        return (x,)

    with _disable_current_modes():
        from dmap_core.backends.diffusers import DiffusersPrior

    prior = DiffusersPrior(
        unet, None, torch.zeros(1, 1, 1, device=device), torch.linspace(0.03, 14.6, 1000).to(device), "eps", "name", "fingerprint"
    ).sized(IMAGE)
    prior.denoise(randn_like(torch.zeros(2, *LATENT, device=device), generators(0, 2)), 1.0)
    assert called[0].shape == (2,) and called[0].is_meta
