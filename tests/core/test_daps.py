"""DAPS: its chain against the rule by hand and against Gaussian algebra, what it tends to, and the step that sets itself."""

import math
from itertools import pairwise

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Noisy, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import DAPS, Cost
from dmap_core.solvers.daps import FIRST_PROBES, largest, probability_flow, quotient

LATENT, IMAGE = (2, 4, 6), (8, 12)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]
# The closed form: 3x2x2 pictures of which f keeps the mean, 3 values of 12.
MEAN, STD, TAU, SHAPE = 0.3, 0.5, 0.2, (3, 2, 2)  # TAU in the units of [-1, 1], twice those of Noisy
GAUSSIAN = GaussianMixture(torch.full((1, *SHAPE), MEAN, dtype=torch.float64), STD)
F = SuperResolution(2)
Y = torch.tensor([0.9, -0.4, 0.1], dtype=torch.float64).view(1, 3, 1, 1)
A = F(torch.eye(12, dtype=torch.float64).view(12, *SHAPE)).flatten(1).mT


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def autoencoder(conv_autoencoder):
    return conv_autoencoder


def problem(prior, batch=2):
    f = SuperResolution(2)
    return Posterior(prior, f, f(randn(batch, 3, *IMAGE, seed=1).tanh()), "fast"), SIGMAS[0] * randn(batch, *LATENT, seed=2)


# The rule by hand


def slope(posterior, at, start, sigma, tau, picture):
    """grad U by autograd, of the energy itself."""
    leaf = at.clone().requires_grad_()
    with torch.enable_grad():
        misfit = posterior.operator(leaf if picture else posterior.prior.decode(leaf)) - posterior.y
        energy = (leaf - start).square().sum() / (2 * sigma**2) + misfit.square().sum() / (2 * tau**2)
    return torch.autograd.grad(energy, leaf)[0]


def by_hand(posterior, z, generator, *, zeta, iterations, ode, noisy, momentum, tau, decay, pixels, eta):
    """Alg. 1 with the PF-ODE as dz / dsigma = (z - z0(z)) / sigma, and the damped Hamiltonian steps of `cores/mcmc.py` with their own velocity."""
    prior, steps = posterior.prior, len(SIGMAS) - 1
    draw = lambda like: torch.randn(like.shape, generator=generator).to(like)  # noqa: E731
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        grid = torch.linspace(sigma ** (1 / 7), SIGMAS[-2] ** (1 / 7), ode + 1, dtype=torch.float64)[:-1] ** 7
        clean = z
        for here, there in pairwise([*grid.tolist(), 0.0]) if sigma > SIGMAS[-2] else [(sigma, 0.0)]:
            clean = clean + (there - here) * (clean - prior.denoise(clean, here).detach()) / here
        step = zeta * (1 + i / steps * (decay - 1))
        start = prior.decode(clean).detach() if pixels else clean
        x, velocity = start, draw(start) if noisy and momentum else 0.0
        for _ in range(iterations):
            push = math.sqrt(2 * (1 - momentum)) * draw(x) if noisy else 0.0
            velocity = momentum * velocity - math.sqrt(step) * slope(posterior, x, start, sigma, tau, pixels) + push
            x = x + math.sqrt(step) * velocity
        x = prior.encode(x).detach() if pixels else x
        kept = math.sqrt(1 - eta**2) * (z - clean) / sigma
        z = x + sigma_next * (kept + eta * draw(x)) if sigma_next else x
    return z


RULES = {
    "Langevin": {},
    "Hamiltonian": {"momentum": 0.45},
    "gradient": {"noisy": False},
    "heavy ball": {"noisy": False, "momentum": 0.9},
    "decay": {"decay": 0.2},
    "picture": {"pixels": True},
    "kept noise": {"eta": 0.6},
    "one denoiser call": {"ode": 1},
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_by_hand(autoencoder, name):
    posterior, z = problem(autoencoder())
    rule = {
        "zeta": 0.002,
        "iterations": 3,
        "ode": 3,
        "noisy": True,
        "momentum": 0.0,
        "tau": 0.2,
        "decay": 1.0,
        "pixels": False,
        "eta": 1.0,
    } | RULES[name]
    expected = by_hand(posterior, z, torch.Generator().manual_seed(3), **rule)
    rule |= {"move": "langevin" if rule.pop("noisy") else "gradient", "space": "pixel" if rule.pop("pixels") else "latent"}
    out = DAPS(**rule)(posterior, z, SIGMAS, torch.Generator().manual_seed(3))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    if name != "Langevin":  # what the tolerance allows is far below what the settings do
        plain = DAPS(zeta=0.002, iterations=3, ode=3, tau=0.2)(posterior, z, SIGMAS, torch.Generator().manual_seed(3))
        assert (out - plain).abs().max() > 1e-3


def test_the_flow_is_the_one_in_closed_form():
    """Of a Gaussian the PF-ODE is known: it shrinks what is left of the noise by std / sqrt(std^2 + sigma^2). One step is Tweedie's estimate."""
    z, sigma = 3 * randn(2, *SHAPE), 2.0
    torch.testing.assert_close(probability_flow(GAUSSIAN.denoise, z, sigma, 0.01, 1), GAUSSIAN.denoise(z, sigma))
    exact = MEAN + (z - MEAN) * STD / math.sqrt(STD**2 + sigma**2)
    errors = [float((probability_flow(GAUSSIAN.denoise, z, sigma, 1e-6, steps) - exact).abs().max()) for steps in (1, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 and errors[0] > 0.5


# What it samples: everything is Gaussian, so the rule's mean and covariance are a recursion of matrices.


def run(solver, sigmas, batch, f=None, noise=1):
    posterior = Posterior(GAUSSIAN, f or Noisy(F, TAU / 2), Y.expand(batch, -1, -1, -1).clone())
    z = sigmas[0] * randn(batch, *SHAPE, seed=5) + MEAN
    return solver(posterior, z, sigmas, torch.Generator().manual_seed(noise)).flatten(1)


def moments(solver, sigmas):
    """(mean (12,), covariance (12, 12)) of z0 after the rule with automatic steps and ode 1: Euler-Maruyama of a linear equation, level by level."""
    eye, y = torch.eye(12, dtype=torch.float64), Y.flatten()
    mean, cov = torch.full((12,), MEAN, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(A.mT @ A)[-1])
    for sigma in sigmas[:-1]:
        shrink = STD**2 / (STD**2 + sigma**2)
        mean, cov = MEAN + shrink * (mean - MEAN), shrink**2 * (cov + sigma**2 * eye)
        precision = eye / sigma**2 + A.mT @ A / TAU**2
        step = solver.strength / (1 / sigma**2 + top / TAU**2)
        once, pull = eye - step * precision, step * (mean / sigma**2 + A.mT @ y / TAU**2)
        # the start is random as well, and pulls through all of the chain
        gain, spread = eye.clone(), torch.zeros_like(eye)
        for _ in range(solver.iterations):
            mean, gain = once @ mean + pull, once @ gain + step / sigma**2 * eye
            spread = once @ spread @ once.mT + 2 * step * eye
        cov = gain @ cov @ gain.mT + spread
    return mean, cov


SLOWLY = [*torch.logspace(math.log10(3), math.log10(0.15), 40, dtype=torch.float64).tolist(), 0.0]
SAMPLES = 2000


def test_mean_and_covariance_are_those_of_the_rule_and_tend_to_the_posterior():
    solver = DAPS(strength=0.2, iterations=10)
    mean, cov = moments(solver, SLOWLY)
    out = run(solver, SLOWLY, SAMPLES)
    deviation = cov.diagonal().sqrt()
    assert ((out.mean(0) - mean).abs() < 4.5 * deviation / math.sqrt(SAMPLES)).all()
    spread = (cov.diagonal().outer(cov.diagonal()) + cov**2).sqrt() / math.sqrt(SAMPLES)
    assert ((out.mT.cov() - cov).abs() < 4.5 * spread).all()

    _, means, covariance = GAUSSIAN.posterior(A, Y.flatten(), TAU)
    apart = [(mean - means[0]).abs().max() / STD, torch.linalg.matrix_norm(cov - covariance) / torch.linalg.matrix_norm(covariance)]
    assert apart[0] < 0.03 and apart[1] < 0.15
    rough_mean, rough = moments(DAPS(strength=0.7, iterations=4), [*SLOWLY[:-1:10], 0.0])
    assert (rough_mean - means[0]).abs().max() / STD > 2 * apart[0]
    assert torch.linalg.matrix_norm(rough - covariance) > 2 * torch.linalg.matrix_norm(cov - covariance)


def test_without_noise_it_ends_at_the_maximum():
    """One level: the maximum of N(z0_hat, sigma^2) N(f(z0); y, tau^2) has a closed form."""
    sigma, batch = 0.4, 3
    z = sigma * randn(batch, *SHAPE, seed=5) + MEAN
    expected = GAUSSIAN.denoise(z, sigma).flatten(1)
    precision = torch.eye(12, dtype=torch.float64) / sigma**2 + A.mT @ A / TAU**2
    expected = torch.linalg.solve(precision, (expected / sigma**2 + Y.flatten() @ A / TAU**2).mT).mT
    posterior = Posterior(GAUSSIAN, Noisy(F, TAU / 2), Y.expand(batch, -1, -1, -1).clone())
    for settings in ({}, {"momentum": 0.5}, {"zeta": 0.02}):
        out = DAPS(move="gradient", iterations=120, **settings)(posterior, z, [sigma, 0.0])
        torch.testing.assert_close(out.flatten(1), expected, rtol=1e-6, atol=1e-6)


def test_the_picture_is_the_latent_where_the_decoder_is_the_identity():
    for move in ("langevin", "gradient"):
        a, b = (run(DAPS(move=move, space=space), SIGMAS, 3) for space in ("latent", "pixel"))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tau_is_the_operators_noise_or_the_published_one():
    known = run(DAPS(), SIGMAS, 3)
    assert torch.equal(known, run(DAPS(tau=TAU), SIGMAS, 3, F))
    assert torch.equal(run(DAPS(), SIGMAS, 3, F), run(DAPS(tau=0.01), SIGMAS, 3))
    assert not torch.equal(known, run(DAPS(), SIGMAS, 3, F))


# The step that sets itself


def test_curvatures_against_the_jacobian(autoencoder):
    """The largest eigenvalue of the Hessian, and of J^T J, by autograd; the quotient of a residual is never above the second."""
    posterior, _ = problem(autoencoder())
    z0 = randn(2, *LATENT, seed=5)
    grad, residual = posterior.gradient_z0(z0, squared=True)

    def gradient(at):
        return posterior.gradient_z0(at, squared=True)

    found, direction = largest(gradient, z0, grad, None)
    for _ in range(20):
        more, direction = largest(gradient, z0, grad, direction)
    for i in range(2):
        y = posterior.y[i]

        def half_square(z):
            return (posterior.operator(posterior.prior.decode(z[None])) - y).square().sum() / 2  # noqa: B023 (called here)

        hessian = torch.autograd.functional.hessian(half_square, z0[i]).view(z0[i].numel(), -1)
        top = float(torch.linalg.eigvalsh(hessian).abs().max())
        jacobian = torch.autograd.functional.jacobian(lambda z: posterior.operator(posterior.prior.decode(z[None])).flatten(), z0[i])
        assert float(more[i]) == pytest.approx(top, rel=0.03)
        assert float(found[i]) > top / 2  # a step of strength 0.7 is stable then, as it is below 2
        assert float(quotient(grad, residual)[i]) < torch.linalg.matrix_norm(jacobian.flatten(1), 2) ** 2


def test_nothing_to_measure_is_a_step_of_the_prior():
    zero = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    assert float(quotient(zero, torch.zeros(1))) == 0
    curvature, _ = largest(lambda at: (torch.zeros_like(at), None), zero, zero, None)
    assert float(curvature) == 0


def test_a_step_has_no_unit():
    """y, tau and pictures in other units: the same run, which a zeta would not be."""
    posterior = Posterior(GAUSSIAN, Noisy(F, TAU / 2), Y)
    z = 5 * randn(1, *SHAPE)

    class Scaled(GaussianMixture):
        def decode(self, z0):
            return 7 * z0

    scaled = Posterior(Scaled(GAUSSIAN.means, STD), F, 7 * Y)
    for move in ("langevin", "gradient"):
        a = DAPS(move=move)(posterior, z, SIGMAS, torch.Generator().manual_seed(0))
        b = DAPS(move=move, tau=7 * TAU)(scaled, z, SIGMAS, torch.Generator().manual_seed(0))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # residuals are float32


# What it costs, and what it refuses


@pytest.mark.parametrize(
    "settings, probes",
    [
        ({"ode": 3}, 6 + FIRST_PROBES - 1),
        ({"space": "both"}, FIRST_PROBES),
        ({"space": "pixel", "ode": 2}, 0),
        ({"move": "gradient"}, 0),
        ({"zeta": 0.001}, 0),
    ],
)
def test_cost(autoencoder, settings, probes):
    """Six levels; of "both" the last is in the latent."""
    prior = autoencoder()
    posterior, z = problem(prior)
    solver = DAPS(iterations=3, **settings)
    seen = []
    solver(posterior, z, SIGMAS, generators(1, 2), lambda i, denoised, z, residual: seen.append(residual))
    pictures = {"both": 5, "pixel": 6}.get(solver.space, 0)
    gradients = 3 * (6 - pictures) + probes
    cost = Cost(
        denoiser=5 * solver.ode + 1, denoiser_gradients=0, decoder=gradients + pictures, decoder_gradients=gradients, encoder=pictures
    )
    assert solver.cost(6) == cost
    assert (posterior.denoiser_calls, posterior.decoder_calls, prior.encoded) == (cost.denoiser, cost.decoder, cost.encoder)
    assert (prior.decoded_with_gradient, prior.encoded_with_gradient) == (cost.decoder_gradients, cost.encoder_gradients)
    assert len(seen) == 6


def test_what_a_report_says():
    assert DAPS().describe() == "DAPS (automatic step 0.7, 4 langevin steps, ode 1)"
    told = DAPS(zeta=1e-4, iterations=30, ode=2, momentum=0.45, space="both", eta=0.0).describe()
    assert told == "DAPS (zeta 0.0001, 30 langevin steps, ode 2, momentum 0.45, space both, eta 0.0)"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and below 1"),
        ({"momentum": math.nan}, "momentum is nan"),
        ({"tau": -0.1}, "tau is -0.1; it must be above 0, or 0 for the operator's own noise"),
        ({"tau": math.inf}, "tau is inf"),
        ({"decay": 0.0}, "decay is 0.0; it must be above 0 and at most 1"),
        ({"ode": 0}, "ode is 0"),
        ({"iterations": 1.5}, "iterations is 1.5"),
        ({"move": "hmc"}, "move is 'hmc'; it must be one of langevin, gradient"),
        ({"space": "image"}, "space is 'image'; it must be one of both, latent, pixel"),
        ({"strength": 2.5}, "strength is 2.5"),
    ],
)
def test_settings_without_meaning(settings, message):
    with pytest.raises(ValueError, match=message):
        DAPS(**settings)
