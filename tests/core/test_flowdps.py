"""FlowDPS against its rule in flow coordinates, where it was published, on a prior whose velocity is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting, SuperResolution, centred_box
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import FlowDPS
from dmap_core.solvers.flowdps import NOISES, WEIGHTS, late, weights_of

SHAPE = (3, 8, 8)
TIMES = [0.95, 0.8, 0.6, 0.35, 0.1, 0.0]
SIGMAS = [t / (1 - t) for t in TIMES]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = 0.3 * randn(3, *SHAPE)
PRIOR = GaussianMixture(MEANS, std=0.3)
F = SuperResolution(2)


def problem(batch=2):
    y = F(MEANS[:1] + 0.3 * randn(batch, *SHAPE, seed=1))
    return Posterior(PRIOR, F, y), randn(batch, *SHAPE, seed=2)


def velocity(x, t):
    """E[e - z0 | x_t] of the mixture under x_t = (1 - t) z0 + t e, from the Gaussians themselves."""
    std, a = PRIOR.std, 1 - t
    variance = a**2 * std**2 + t**2
    offsets = x.unsqueeze(1) - a * MEANS  # (B, K, ...)
    weights = torch.softmax(-offsets.flatten(2).square().sum(2) / (2 * variance), 1)[..., None, None, None]
    z0 = (weights * (MEANS + a * std**2 / variance * offsets)).sum(1)
    e = (weights * (t / variance * offsets)).sum(1)
    return e - z0


def by_hand(y, x, generators, zeta=None, strength=0.7, inner=3, weight="constant", noise="published", eta=1.0):
    """x_t after every step, in float64."""
    steps, trace = len(TIMES) - 1, []
    matrix = F(torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)).flatten(1).mT
    for i, (t, t_next) in enumerate(pairwise(TIMES)):
        v = velocity(x, t)
        z0, e = x - t * v, x + (1 - t) * v
        u = i / (steps - 1)
        scale = {"published": 1, "constant": 1, "rising": 0.2 + 0.8 * u, "falling": (250 + (50 - 250) * u) / 250 * (0.25 + 0.75 * t**2)}[
            weight
        ]
        z_y = z0.flatten(1)
        for _ in range(inner):
            error = z_y @ matrix.mT - y.flatten(1)
            r = error.norm(dim=1, keepdim=True)
            grad = error / r @ matrix
            norm = grad.norm(dim=1, keepdim=True)
            longest = math.sqrt(math.prod(SHAPE)) * t / (1 - t)
            z_y = z_y - scale * (zeta or (strength * r / norm).clamp(max=longest) / norm) * grad
        z_y = z_y.view_as(z0)
        blend = t if weight == "published" else 1.0
        z0 = (1 - blend) * z0 + blend * z_y
        a = math.sqrt(1 - t_next) if noise == "published" else 1 - (math.exp(15 * u) - 1) / (math.exp(15) - 1)
        fresh = torch.stack([torch.randn(SHAPE, generator=g).double() for g in generators]) if t_next * a * eta > 0 else 0.0
        x = (1 - t_next) * z0 + t_next * (math.sqrt(1 - (eta * a) ** 2) * e + eta * a * fresh)
        trace.append(x)
    return trace


VARIANTS = [
    {},
    {"zeta": 0.3},
    {"inner": 1, "eta": 0.0},
    {"weight": "published", "eta": 0.5},
    {"weight": "rising", "zeta": 0.2},
    {"weight": "falling", "noise": "falling", "inner": 6},
    {"noise": "falling", "strength": 1.0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_whole_run_by_hand(settings):
    """In VE space and in flow coordinates, z = x_t / (1 - t): the same latents after every step."""
    posterior, x = problem()
    seen = []
    solver = FlowDPS(**settings)
    solver(posterior, x / (1 - TIMES[0]), SIGMAS, generator=generators(5, 2), callback=lambda i, d, z, r: seen.append(z))
    expected = by_hand(posterior.y, x, generators(5, 2), **settings)
    for ours, theirs, t in zip(seen, expected, TIMES[1:], strict=True):
        torch.testing.assert_close((1 - t) * ours, theirs, rtol=0, atol=2e-5)  # residuals are float32


def test_the_runs_by_hand_tell_the_variants_apart():
    posterior, x = problem()
    ends = [by_hand(posterior.y, x, generators(5, 2), **settings)[-1] for settings in VARIANTS]
    assert min((a - b).abs().max() for i, a in enumerate(ends) for b in ends[:i]) > 1e-3


def test_published_noise_keeps_its_length():
    """sqrt(t') e + sqrt(1 - t') eps of independent unit Gaussians is one: a run without guidance keeps the prior's marginals, up to discretisation."""
    t_next = 0.35
    assert math.sqrt(t_next) ** 2 + math.sqrt(1 - t_next) ** 2 == pytest.approx(1)
    mean, std, batch = MEANS[:1], 0.3, 40
    prior = GaussianMixture(mean, std)
    z = mean + math.hypot(SIGMAS[0], std) * randn(batch, *SHAPE, seed=3)
    seen = []
    y = F(mean).expand(batch, -1, -1, -1)
    FlowDPS(zeta=1e-12)(Posterior(prior, F, y), z, SIGMAS, generator=generators(1, batch), callback=lambda i, d, z, r: seen.append(z))
    v = SIGMAS[0] ** 2 + std**2
    for (sigma, sigma_next), (_, t), latent in zip(pairwise(SIGMAS), pairwise(TIMES), seen, strict=True):
        shrink = std**2 / (std**2 + sigma**2)
        v = (shrink + sigma_next * math.sqrt(t) / sigma * (1 - shrink)) ** 2 * v + sigma_next**2 * (1 - t)
        assert float((latent - mean).std()) == pytest.approx(math.sqrt(v), rel=0.04)  # 7680 draws: known to 0.8 %


def test_a_measurement_is_reached_with_constant_weights():
    """The last step ends at the guided latent. Of a mask Polyak's step takes the strength's part of the residual away, at every inner step."""
    f = Inpainting(centred_box((8, 8), (4, 4)))
    posterior, x = problem()
    posterior = Posterior(PRIOR, f, f(PRIOR.means[:2]))
    z = x / (1 - TIMES[0])
    seen = []
    end = FlowDPS(weight="constant", strength=0.5, inner=4)(
        posterior, z, SIGMAS, generator=generators(5, 2), callback=lambda i, d, z, r: seen.append(r)
    )
    torch.testing.assert_close(posterior.distance(end), 0.5**4 * seen[-1], rtol=1e-4, atol=0)


def test_trips_schedules():
    """At 28 steps: 250 to 50 over six inner steps, and (1/4 + 3/4 t^2); the noise is whole for most of the way and gone at the end."""
    for i in (0, 9, 27):
        u, t = i / 27, 1 - i / 28
        assert weights_of("falling", u, t) == (pytest.approx((250 - 200 * u) * (0.25 + 0.75 * t * t) / 250), 1.0)
        assert weights_of("rising", u, t)[0] == pytest.approx(0.2 + 0.8 * u)
        assert weights_of("constant", u, t) == (1.0, 1.0) and weights_of("published", u, t) == (1.0, t)
    assert late(0) == 1 and late(1) == 0 and late(0.5) > 0.999 and late(0.95) == pytest.approx(1 - math.exp(-0.75), rel=1e-5)
    assert WEIGHTS[0] == "constant" and NOISES[0] == "published"


def test_what_people_are_told():
    assert FlowDPS().describe() == "FlowDPS (automatic step 0.7, 3 inner steps, constant weight)"
    told = FlowDPS(zeta=2.0, inner=6, weight="falling", noise="falling", eta=0.5).describe()
    assert told == "FlowDPS (zeta 2, 6 inner steps, falling weight, falling noise, eta 0.5)"
