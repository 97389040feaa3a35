"""Operators, gradients and whole DPS updates against deepinv, a library of inverse problems that shares no code with this one.

deepinv has no DSG; that step is held against its equations, written down once more in numpy.
"""

import numpy as np
import pytest
import torch
from host import import_torchvision

import_torchvision()  # deepinv imports it

import deepinv  # noqa: E402

from dmap_core.backends.mixture import GaussianMixture  # noqa: E402
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, KernelBlur, MotionBlur, Noisy, SuperResolution  # noqa: E402
from dmap_core.operators.colour import LUMA  # noqa: E402
from dmap_core.posterior import Posterior  # noqa: E402
from dmap_core.schedule import ancestral_step, randn_like  # noqa: E402
from dmap_core.solvers import DPS, DSG, guided_denoised  # noqa: E402
from dmap_core.solvers.psld import squared_norm  # noqa: E402

SIZE = (16, 24)
SLANTED = [[0.1, 0.0, 0.3], [0.2, 0.5, 0.0], [0.0, 0.4, 0.7], [0.0, 0.0, 0.2], [0.6, 0.0, 0.1]]


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def hole():
    return (torch.rand(SIZE, generator=torch.Generator().manual_seed(5)) < 0.3).float()


def their_blur(kernel):
    """deepinv convolves, which turns the kernel round; this library correlates."""
    return deepinv.physics.Blur(filter=kernel.flip(-2, -1)[None, None], padding="reflect")


def gaussian_kernel(sigma, radius):
    taps = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    return torch.outer(taps, taps) / taps.sum() ** 2


def their_mask():
    return deepinv.physics.Inpainting((3, *SIZE), mask=1 - hole()[None].double())


def their_grey():
    grey = deepinv.physics.Decolorize(srf=list(LUMA)).double()
    grey.srf = torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1)  # its constructor rounds to float32
    grey.mask = torch.linalg.vector_norm(grey.srf, dim=1, keepdim=True)
    return grey


def ours_as_theirs(f, size):
    return deepinv.physics.LinearPhysics(A=lambda x, **_: f(x), A_adjoint=lambda y, **_: f.adjoint(y, size))


LINEAR = {
    "super-resolution x2": SuperResolution(2),
    "super-resolution x4": SuperResolution(4),
    "gaussian blur": GaussianBlur(61, 1.3),
    "kernel blur": KernelBlur(SLANTED),
    "motion blur": MotionBlur(7, 30),
    "inpainting": Inpainting(hole()),
    "grayscale": Grayscale(),
    "old photo": Compose((Grayscale(), KernelBlur(SLANTED), SuperResolution(4))),
    "noisy": Noisy(Compose((Inpainting(hole()), GaussianBlur(5, 2.0))), 0.1),
}

PAIRS = {
    "gaussian blur": (GaussianBlur(61, 1.3), lambda: their_blur(gaussian_kernel(1.3, 5))),
    "gaussian blur, cut": (GaussianBlur(5, 3.0), lambda: their_blur(gaussian_kernel(3.0, 2))),
    "kernel blur": (KernelBlur(SLANTED), lambda: their_blur(torch.tensor(SLANTED, dtype=torch.float64) / np.sum(SLANTED))),
    "motion blur": (MotionBlur(7, 30), lambda: their_blur(MotionBlur(7, 30).kernel_tensor())),
    "inpainting": (Inpainting(hole()), their_mask),
    "grayscale": (Grayscale(), their_grey),
    "compose": (
        Compose((Inpainting(hole()), Grayscale(), MotionBlur(5, 60))),
        lambda: deepinv.physics.compose(their_mask(), their_grey(), their_blur(MotionBlur(5, 60).kernel_tensor())),
    ),
}


@pytest.mark.filterwarnings("ignore:At least one input physics is a DecomposablePhysics")
@pytest.mark.parametrize("name", PAIRS)
def test_operator_and_adjoint(name):
    f, make = PAIRS[name]
    physics, x = make(), picture(2, 3, *SIZE)
    y = f(x)
    torch.testing.assert_close(y, physics.A(x), rtol=0, atol=1e-13)
    y = picture(*y.shape, seed=1)
    torch.testing.assert_close(f.adjoint(y, SIZE), physics.A_adjoint(y), rtol=0, atol=1e-13)


def test_a_kernel_is_not_turned_round():
    """The other convention would be seen: the kernel of these tests is not symmetric."""
    kernel = torch.tensor(SLANTED, dtype=torch.float64) / np.sum(SLANTED)
    x = picture(1, 3, *SIZE)
    turned = deepinv.physics.Blur(filter=kernel[None, None], padding="reflect")
    assert (KernelBlur(SLANTED)(x) - turned.A(x)).abs().max() > 0.1


@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_gaussian_kernel(sigma):
    """deepinv cuts its own Gaussian elsewhere, so both are compared on the smaller of the supports, scaled to sum 1."""
    theirs = deepinv.physics.functional.blur.gaussian_blur(sigma=(sigma, sigma)).squeeze().double()
    radius = min(len(theirs) // 2, int(4 * sigma + 0.5))
    middle = len(theirs) // 2
    theirs = theirs[middle - radius : middle + radius + 1, middle - radius : middle + radius + 1]
    impulse = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    impulse[..., 20, 20] = 1
    ours = GaussianBlur(2 * radius + 1, sigma)(impulse)[0, 0, 20 - radius : 21 + radius, 20 - radius : 21 + radius]
    torch.testing.assert_close(ours, theirs / theirs.sum(), rtol=0, atol=1e-7)


def test_deepinvs_own_grey_has_the_same_weights_to_four_digits():
    x = picture(2, 3, *SIZE)
    torch.testing.assert_close(Grayscale()(x), deepinv.physics.Decolorize().double().A(x), rtol=0, atol=2e-4)


def bicubic(scale, size):
    physics = deepinv.physics.Downsampling(img_size=(3, *size), filter="bicubic", factor=scale, padding="circular")
    return physics.double()


@pytest.mark.parametrize("scale, size", [(2, (24, 20)), (4, (32, 48)), (8, (64, 80))])
def test_super_resolution_inside_the_border(scale, size):
    """deepinv keeps every scale-th pixel from the first, so its samples lie scale / 2 - 1 pixels to the left of and above the blocks' centres.

    Rolled by that much, even scales agree where neither border is seen; the kernels reach 2 measured pixels to either side.
    """
    f, physics, shift = SuperResolution(scale), bicubic(scale, size), scale // 2 - 1
    x = picture(2, 3, *size)
    ours, theirs = f(x), physics.A(x.roll((-shift, -shift), (-2, -1)))
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], rtol=0, atol=1e-6)
    assert (ours - theirs).abs().max() > 1e-2  # they differ in the border: symmetric reflection here, circular there

    y = torch.zeros_like(ours)
    y[..., 2:-2, 2:-2] = picture(*y[..., 2:-2, 2:-2].shape, seed=1)
    torch.testing.assert_close(f.adjoint(y, size), physics.A_adjoint(y).roll((shift, shift), (-2, -1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8])
def test_super_resolution_samples_the_middle_of_its_blocks(scale):
    """On a ramp cubic interpolation is exact: ours reads the ramp at (scale - 1) / 2, deepinv's at 1 / 2, whatever the scale."""
    size = (8 * scale, 8 * scale)
    ramp = torch.arange(size[1], dtype=torch.float64).expand(1, 3, *size)
    start = torch.arange(8, dtype=torch.float64)[2:-2] * scale
    ours, theirs = SuperResolution(scale)(ramp)[..., 2:-2, 2:-2], bicubic(scale, size).A(ramp)[..., 2:-2, 2:-2]
    torch.testing.assert_close(ours, (start + (scale - 1) / 2).expand_as(ours), rtol=0, atol=1e-12)
    torch.testing.assert_close(theirs, (start + 0.5).expand_as(ours), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LINEAR)
def test_deepinvs_test_of_adjoints(name):
    physics = ours_as_theirs(LINEAR[name], SIZE)
    error = physics.adjointness_test(img_size=(3, *SIZE), num_samples=3, dtype=torch.float64)
    assert float(error) < 1e-12


def test_deepinvs_test_of_adjoints_sees_a_wrong_one():
    f = KernelBlur(SLANTED)
    physics = deepinv.physics.LinearPhysics(A=lambda x, **_: f(x), A_adjoint=lambda y, **_: y)
    assert float(physics.adjointness_test(img_size=(3, *SIZE), num_samples=3, dtype=torch.float64)) > 0.1


@pytest.mark.parametrize("name", LINEAR)
def test_squared_norm(name):
    """Both iterate and come from below; deepinv's goes on until nothing changes any more, ours stops after 30 iterations."""
    f = LINEAR[name]
    y = torch.zeros(1, f.channels(), *f.measurement_size(SIZE), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = ours_as_theirs(f, SIZE).compute_sqnorm(picture(1, 3, *SIZE), max_iter=2000, tol=1e-6, verbose=False)
    assert 0.97 * float(theirs) < float(squared_norm(f, SIZE, y)) < 1.01 * float(theirs)


MIXTURE = GaussianMixture(picture(3, 3, *SIZE, seed=2) * 0.5, std=0.1, weights=torch.tensor([0.5, 0.2, 0.3]))


class Wrapped(deepinv.models.Denoiser):
    """A prior's denoiser for deepinv, which hands over float32."""

    def __init__(self, prior):
        super().__init__()
        self.denoise = prior.denoise

    def forward(self, x, sigma, **_):
        return self.denoise(x.double(), float(sigma))


@pytest.mark.filterwarnings("ignore:At least one input physics is a DecomposablePhysics")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sigma", [3.0, 0.3])
def test_gradient_of_the_residual(name, sigma):
    """deepinv's guidance "norm" is this gradient itself (factor 1); "annealed" has the squared norm / (2 sigma^2), so its is r / sigma^2 as long."""
    f, make = PAIRS[name]
    physics, denoiser = make(), Wrapped(MIXTURE)
    z = (MIXTURE.means[:2] + sigma * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))).double()
    y = f(picture(2, 3, *SIZE, seed=4))
    grad, denoised, residual = Posterior(MIXTURE, f, y).gradient(z, sigma)

    norm = deepinv.sampling.DPSDataFidelity(denoiser, guidance="norm")
    theirs, their_denoised = norm.grad(z.clone(), y, physics, sigma, get_model_outputs=True)
    scale = float(grad.abs().max())
    torch.testing.assert_close(grad, theirs, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(denoised, their_denoised, rtol=0, atol=1e-5)
    torch.testing.assert_close(residual.double(), norm(z, y, physics, sigma).detach(), rtol=1e-5, atol=0)

    annealed = deepinv.sampling.DPSDataFidelity(denoiser, guidance="annealed").grad(z.clone(), y, physics, sigma)
    factor = (residual / sigma**2).view(-1, 1, 1, 1)
    torch.testing.assert_close(factor * grad, annealed, rtol=0, atol=1e-5 * float(annealed.abs().max()))


@pytest.mark.parametrize("memory", ["fast", "lean", "checkpoint"])
def test_gradient_through_a_decoder(conv_prior, memory):
    """deepinv knows no decoder; the operator after the decoder is a nonlinear physics to it."""
    prior, f = conv_prior(), KernelBlur(SLANTED)
    blur = their_blur(f.kernel_tensor())
    physics = deepinv.physics.Physics(A=None)
    physics.A = lambda x, **_: blur.A(prior.decoder(x))
    z = torch.randn(2, prior.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = f(picture(2, 3, 16, 16))
    ours, _, residual = Posterior(prior, f, y, memory=memory).gradient(z, 0.7)
    fidelity = deepinv.sampling.DPSDataFidelity(Wrapped(prior))
    torch.testing.assert_close(ours, fidelity.grad(z.clone(), y, physics, 0.7), rtol=0, atol=1e-5 * float(ours.abs().max()))
    torch.testing.assert_close(residual.double(), fidelity(z, y, physics, 0.7).detach(), rtol=1e-5, atol=0)


class OurNoise:
    """Mixed into a solver of deepinv: its noise from a generator, as this library draws it."""

    generator = None

    def randn_like(self, input, seed=None):  # noqa: A002 (deepinv's name)
        return randn_like(input, self.generator)


class Ancestral(OurNoise, deepinv.sampling.AncestralSolver):
    pass


def schedule(sde, times):
    return [float(sde.sigma_t(t)) for t in times], [float(sde.scale_t(t)) for t in times]


SDES = {"vp": deepinv.sampling.VariancePreservingDiffusion, "ve": deepinv.sampling.VarianceExplodingDiffusion}


def dps_of_deepinv(kind, times, eta):
    sde = SDES[kind](dtype=torch.float64)
    fidelity = deepinv.sampling.DPSDataFidelity(Wrapped(MIXTURE))
    solver = Ancestral(timesteps=times, eta=eta)
    diffusion = deepinv.sampling.PosteriorDiffusion(fidelity, Wrapped(MIXTURE), sde, solver, minus_one_one=False)
    return diffusion, fidelity, solver


F = KernelBlur(SLANTED)
Y = F(picture(2, 3, *SIZE, seed=7) * 0.5)


@pytest.mark.parametrize("kind", SDES)
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("t", [0.9, 0.5, 0.2])
def test_one_dps_update(kind, eta, t):
    """deepinv adds the gradient to the score, with a weight: a step zeta = weight (sigma^2 - sigma_next^2) in VE units at eta = 1 (Prop. 1)."""
    times = torch.tensor([t, t - 0.1], dtype=torch.float64)
    diffusion, fidelity, solver = dps_of_deepinv(kind, times, eta)
    (sigma, sigma_next), (scale, scale_next) = schedule(diffusion.sde, times)
    zeta = 0.05 * sigma
    # the share of the score that the step takes: 1 - sigma_next^2 / sigma^2 if ancestral, 1 - sigma_next / sigma if deterministic
    ratio = sigma_next / sigma
    fidelity.weight = zeta / (sigma**2 * (1 - ratio * (1 - eta**2 * (1 - ratio**2)) ** 0.5))

    z = MIXTURE.means[:2] + sigma * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3)).double()
    solver.generator = torch.Generator().manual_seed(8)
    theirs, _ = solver.step(diffusion.posterior, times[0], times[1], scale * z, y=Y, physics=their_blur(F.kernel_tensor()))

    latents = []
    DPS(zeta=zeta, eta=eta)(
        Posterior(MIXTURE, F, Y),
        z,
        [sigma, sigma_next, 0.0],
        generator=torch.Generator().manual_seed(8),
        callback=lambda i, denoised, z, residual: latents.append(z),
    )
    torch.testing.assert_close(latents[0], theirs / scale_next, rtol=0, atol=1e-6 * sigma + 1e-7)  # deepinv rounds to float32


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_a_whole_run_of_dps(eta):
    """Ten steps of deepinv's VP sampler, whose weight follows the step so that zeta stays the same in VE units."""
    times = torch.linspace(0.9, 0, 11, dtype=torch.float64)
    diffusion, fidelity, solver = dps_of_deepinv("vp", times, eta)
    sigmas, scales = schedule(diffusion.sde, times)
    z = sigmas[0] * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3)).double()

    theirs, solver.generator, zeta = scales[0] * z, torch.Generator().manual_seed(8), 0.3
    for i in range(10):
        fidelity.weight = zeta / (sigmas[i] ** 2 * (1 - (sigmas[i + 1] / sigmas[i]) ** (1 + eta)))
        theirs, _ = solver.step(diffusion.posterior, times[i], times[i + 1], theirs, y=Y, physics=their_blur(F.kernel_tensor()))

    ours = DPS(zeta=zeta, eta=eta)(Posterior(MIXTURE, F, Y), z, sigmas, generator=torch.Generator().manual_seed(8))
    unguided = MIXTURE.denoise(z, sigmas[0])
    assert (ours - unguided).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_deepinvs_dps_is_the_guided_denoiser_under_an_ancestral_sampler(solver):
    """Its class DPS as it is, with one weight for the whole run: `guided_denoised` with zeta = weight (sigma^2 - sigma_next^2) at every step."""
    weight, times = 0.02, torch.linspace(1, 0, 13, dtype=torch.float64)
    their_class = {"ddpm": deepinv.sampling.DDPMSolver, "ddim": deepinv.sampling.DDIMSolver}[solver]
    steps = type("Solver", (OurNoise, their_class), {})(timesteps=times)
    dps = deepinv.sampling.DPS(Wrapped(MIXTURE), solver=steps, weight=weight, minus_one_one=False)
    sigmas, scales = schedule(dps.sde, times)
    z = sigmas[0] * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3)).double()
    steps.generator = torch.Generator().manual_seed(8)
    theirs = dps(Y, their_blur(F.kernel_tensor()), x_init=scales[0] * z)

    posterior, noise = Posterior(MIXTURE, F, Y), torch.Generator().manual_seed(8)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        grad, denoised, _ = posterior.gradient(z, sigma)
        assert denoised.abs().max() < 1  # deepinv clips it there
        denoised = guided_denoised(denoised, grad, weight * (sigma**2 - sigma_next**2), sigma, sigma_next)
        z, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta=1.0 if solver == "ddpm" else 0.0)
        if sigma_up > 0:
            z = z + sigma_up * randn_like(z, noise)
    torch.testing.assert_close(z, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("zeta", [0.08, 0.5, 1.0])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_a_dsg_run_by_its_equations(zeta, eta):
    """Yang et al. 2024 in numpy, for a Gaussian prior, whose denoiser and gradient are matrices."""
    rng = np.random.default_rng(0)
    shape, matrix = (2, 3, 4, 5), GaussianBlur(5, 1.0)
    mean, std, y = rng.normal(size=shape[1:]), 0.4, rng.normal(size=shape)
    rows, columns = (matrix.matrix(n).numpy() for n in shape[2:])

    def blurred(x):
        return rows @ x @ columns.T

    sigmas = [5.0, 2.0, 0.8, 0.3, 0.0]
    start = 5 * rng.normal(size=shape)
    draws = torch.Generator().manual_seed(4)
    z = start
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        shrink = std**2 / (std**2 + sigma**2)
        denoised = mean + shrink * (z - mean)
        # DDPM's posterior in VE units, its deviation times eta, the rest of the variance left where z points
        deviation = eta * sigma_next * np.sqrt(1 - sigma_next**2 / sigma**2)
        mu = denoised + np.sqrt(sigma_next**2 - deviation**2) / sigma * (z - denoised)
        if sigma_next == 0:
            z = mu
            break
        noise = deviation * torch.randn(shape, generator=draws).double().numpy()
        z = np.empty(shape)
        for b in range(shape[0]):
            difference = blurred(denoised[b]) - y[b]
            gradient = shrink * (rows.T @ difference @ columns) / np.sqrt((difference**2).sum())
            radius = np.sqrt(gradient.size) * deviation
            best = -radius * gradient / np.sqrt((gradient**2).sum())
            mixed = noise[b] + zeta * (best - noise[b])
            z[b] = mu[b] + radius * mixed / np.sqrt((mixed**2).sum())

    prior = GaussianMixture(torch.from_numpy(mean)[None], std)
    posterior = Posterior(prior, matrix, torch.from_numpy(y))
    ours = DSG(zeta=zeta, eta=eta)(posterior, torch.from_numpy(start), sigmas, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(ours.numpy(), z, rtol=0, atol=2e-6)
