"""Flow models as VE ones: levels and times, the closed forms written both ways, and whole runs of every solver on both."""

import pytest
import torch
from variants import some_at_once

from dmap_core.backends.flow import FlowPrior
from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.restore import restore
from dmap_core.schedule import FLOW_FIRST, SPACINGS, check_sigmas, flow_levels, flow_sigma, flow_sigmas, flow_time, generators
from dmap_core.solvers import DMAP, DPS, SOLVERS

SHAPE = (3, 8, 8)
SETTINGS = {  # of solvers that have to be told something, or whose defaults are for more steps than there are here
    "PSLD": {"zeta": 0.5, "gamma": 0.3},
    "FreeDoM": {"K": 3, "first": 1, "last": 3},
    "ReSample": {"first": 0, "last": 4, "every": 2, "iterations": 3, "learning_rate": 0.05},
    "DSG": {"zeta": 0.3},
    "DMAP": {"K": 2},
}
SPHERES = ("DSG", "DMAP")  # which have none at eta 0


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifted(shift, steps=1000):
    """A model's times, rising to 1 (Esser et al. 2024, Eq. 23)."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return shift * t / (1 + (shift - 1) * t)


MIXTURE = GaussianMixture(0.4 * randn(3, *SHAPE), 0.3, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
GAUSSIAN = GaussianMixture(0.4 * randn(1, *SHAPE, seed=3), 0.5)


def velocity_of(prior):
    """E[eps - z0 | x_t] of a mixture, derived in flow coordinates: x_t given component k is N((1 - t) m_k, ((1 - t)^2 s^2 + t^2) I)."""
    log_weights = (torch.ones(len(prior.means)) if prior.weights is None else prior.weights).to(prior.means).log()

    def velocity(x, t):
        t = t.view(-1, *[1] * (x.ndim - 1))
        variance = (1 - t) ** 2 * prior.std**2 + t**2
        offset = x.unsqueeze(1) - (1 - t).unsqueeze(1) * prior.means
        weights = torch.softmax(log_weights - offset.flatten(2).square().sum(2) / (2 * variance.flatten(1)), 1)
        z0 = prior.means + ((1 - t) * prior.std**2 / variance).unsqueeze(1) * offset
        eps = (t / variance).unsqueeze(1) * offset
        return torch.einsum("bk,bk...->b...", weights, eps - z0)

    return velocity


def as_flow(prior):
    return FlowPrior(velocity_of(prior), prior)


@pytest.mark.parametrize("prior", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 3.0, 199.0])
def test_the_denoiser_of_a_velocity_is_the_ve_one(prior, sigma):
    z = prior.means[:1] + sigma * randn(4, *SHAPE, seed=1)
    torch.testing.assert_close(as_flow(prior).denoise(z, sigma), prior.denoise(z, sigma), rtol=1e-9, atol=1e-9)


def test_levels_of_each_latent():
    sigma = torch.tensor([0.1, 2.0, 50.0], dtype=torch.float64)
    z = randn(3, *SHAPE) * sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(as_flow(MIXTURE).denoise(z, sigma), MIXTURE.denoise(z, sigma), rtol=1e-9, atol=1e-9)


def problem(prior, batch=2):
    f = SuperResolution(2)
    return Posterior(prior, f, f.measure(0.4 * randn(batch, *SHAPE, seed=4)), "fast")


ALL = [(name, eta, spacing) for name in SOLVERS for eta in (0, 0.5, 1) for spacing in SPACINGS if eta or name not in SPHERES]
AT_ONCE = [("DPS", 1, "exponential"), ("DMAP", 0.5, "paper")]


@pytest.mark.parametrize("case", some_at_once(ALL, AT_ONCE), ids=str)
def test_a_flow_restores_the_same_picture(case):
    """To rounding, in float64: 1e-13 and less for most, 1e-6 where an automatic step makes much of little (FreeDoM, DPS)."""
    name, eta, spacing = case
    given = {**SETTINGS.get(name, {}), **({"eta": eta} if "eta" in SOLVERS[name].described() else {})}
    sigmas = SPACINGS[spacing](flow_sigmas(shifted(3.0)), 6)
    z = float(sigmas[0]) * randn(2, *SHAPE, seed=2)
    ve, flow = (SOLVERS[name](**given)(problem(prior), z, sigmas, generator=generators(5, 2)) for prior in (MIXTURE, as_flow(MIXTURE)))
    torch.testing.assert_close(flow, ve, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["DPS", "DMAP"])
def test_it_does_not_matter_where_a_run_begins(name):
    """As long as the first level is one of noise: of 30 steps that begin at t = 0.99, 0.995 and 0.999 the pictures differ by 0.2 % of their spread."""
    found, noise = [], randn(2, *SHAPE, seed=2)
    rest = SPACINGS["exponential"](flow_sigmas(shifted(3.0)), 30)[1:]
    rest = rest[rest < flow_sigma(0.985)]
    for first in (0.99, FLOW_FIRST, 0.999):
        sigma = flow_sigma(first)
        solver = DPS() if name == "DPS" else DMAP(K=2)
        z = solver(problem(as_flow(GAUSSIAN)), sigma * noise, [sigma, *rest.tolist()], generator=generators(5, 2))
        found.append(z)
    spread = GAUSSIAN.std
    for z in (found[0], found[2]):
        assert float((z - found[1]).square().mean().sqrt()) < 0.01 * spread


# times and levels


def test_times_and_levels_are_each_others_inverse():
    sigma = torch.logspace(-2, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(flow_sigma(flow_time(sigma)), sigma, rtol=1e-9, atol=0)
    assert flow_time(1.0) == 0.5 and flow_sigma(0.5) == 1.0


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_schedules_of_a_flow(shift, spacing):
    """The model's own times, without those of pure noise and of none."""
    table = flow_sigmas(shifted(shift))
    assert len(flow_sigmas(shifted(shift).float())) == len(table)
    assert (table[1:] > table[:-1]).all() and 0.02 < float(table[0]) < 0.03 and 150 < float(table[-1]) < 199.01
    sigmas = SPACINGS[spacing](table, 12)
    assert check_sigmas(sigmas)[0] == pytest.approx(float(table[-1]), rel=1e-5)


@pytest.mark.parametrize("times, first", [([1.0, 0.9, 0.0], FLOW_FIRST), ([1.0, 0.999, 0.5, 0.0], 0.9995), ([0.97, 0.5, 0.0], 0.97)])
def test_a_first_level_of_pure_noise_becomes_finite(times, first):
    found = flow_levels(torch.tensor(times, dtype=torch.float64))
    assert found.tolist() == pytest.approx([first, *times[1:]])
    assert torch.isfinite(flow_sigma(found)).all() and (found[1:] < found[:-1]).all()


def test_a_whole_restoration_is_the_same():
    """And the picture explains what was measured."""
    f, solver = SuperResolution(2), DMAP(K=2)
    y = f.measure(0.4 * randn(1, *SHAPE, seed=4)).float()
    sigmas = SPACINGS["exponential"](flow_sigmas(shifted(3.0)), 30)
    prior = GaussianMixture(GAUSSIAN.means.float(), 0.5)
    ve, flow = (restore(p, f, y, SHAPE, sigmas, solver, [3]) for p in (prior, as_flow(prior)))
    torch.testing.assert_close(flow.image, ve.image, rtol=0, atol=2e-3)
    assert float((f(flow.image) - y).square().mean().sqrt()) < 0.05
