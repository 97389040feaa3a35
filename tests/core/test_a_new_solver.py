"""Adding a solver: this class, its test and an entry in the table `solvers.SOLVERS` are all that a contributor writes (ARCHITECTURE.md).

The class is one that nobody needs. Everything else follows from it: specs, costs, tables, and the node (tests/nodes/test_a_new_solver.py).
"""

import json
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from dmap_core import solvers
from dmap_core.evaluate import config as table
from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.presets import MODELS, Preset
from dmap_core.restore import restore
from dmap_core.solvers.base import Cost, Solver, check_zeta, setting, zeta_setting
from dmap_core.solvers.checks import check_finite, check_problem


@dataclass(frozen=True, kw_only=True)
class Steepest(Solver):
    """z0 <- z0(z) - zeta grad_{z0} ||f(D(z0)) - y||, `inner` times at every level, noised again without randomness."""

    zeta: float = zeta_setting(0.5)
    inner: int = setting("Steps on the clean latent at every noise level.", default=2, least=1, most=20)

    def __post_init__(self):
        check_zeta(self.zeta)

    def cost(self, steps: int) -> Cost:
        return Cost(denoiser=steps, denoiser_gradients=0, decoder=steps * self.inner, decoder_gradients=steps * self.inner)

    @torch.no_grad()
    def __call__(self, posterior, z, sigmas, generator=None, callback=None):
        levels = check_problem(self, posterior, z, sigmas)
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            z0 = denoised = posterior.denoise(z, sigma)
            for _ in range(self.inner):
                grad, residual = posterior.gradient_z0(z0)
                z0 = z0 - self.zeta * grad
            z = z0 + sigma_next / sigma * (z - denoised)
            check_finite(i, len(levels) - 1, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z


@pytest.fixture(autouse=True)
def entered(monkeypatch):
    """As if its line stood in solvers/__init__.py."""
    monkeypatch.setitem(solvers.SOLVERS, Steepest.name(), Steepest)
    monkeypatch.setattr(table, "NAMES", (*table.NAMES, Steepest.name()))


SIGMAS = torch.tensor([4.0, 1.0, 0.3, 0.0])


def test_it_runs_and_costs_what_it_says(conv_prior):
    prior = conv_prior(dtype=torch.float32, trainable=False)
    y = torch.linspace(-1, 1, 3 * 16).view(1, 3, 4, 4)
    solver = Steepest(zeta=0.05)
    posterior = Posterior(prior, SuperResolution(2), y)
    z = 4 * torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    residuals = []
    solver(posterior, z, SIGMAS, callback=lambda i, d, z, r: residuals.append(float(r)))
    cost = solver.cost(3)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (cost.denoiser, cost.decoder)
    assert len(residuals) == 3
    done = restore(prior, SuperResolution(2), y, (2, 4, 4), SIGMAS, solver, [0])
    assert done.image.shape == (1, 3, 8, 8)


def test_it_is_written_down_and_read_again():
    solver = Steepest(zeta=0.25, inner=3)
    assert solvers.from_spec(json.loads(json.dumps(solver.spec()))) == solver
    assert solver.describe() == "Steepest (zeta 0.25, inner 3)"
    assert solver.rescaled(0.5, 10) == Steepest(zeta=0.5, inner=3)
    with pytest.raises(ValueError, match="zeta is 0"):
        solvers.from_spec({"solver": "Steepest", "zeta": 0})


def test_tables_take_it():
    row = {"operator": "sr", "solver": "Steepest", "steps": 5, "spacing": "karras", "settings": {"zeta": 0.25}}
    config = table.make_config({"operators": {"sr": {"operator": "SuperResolution", "scale": 8}}, "rows": [row]})
    assert config.plan(config.rows[0]) == Preset(Steepest(zeta=0.25), 5, "karras", "config")
    with pytest.raises(ValueError, match="Steepest has no setting K; it has zeta, inner"):
        table.make_config({"operators": {"sr": {"operator": "SuperResolution", "scale": 8}}, "rows": [row | {"settings": {"K": 1}}]})


def test_without_a_preset_its_settings_have_to_be_given():
    config = table.make_config(
        {"operators": {"sr": {"operator": "SuperResolution", "scale": 8}}, "rows": [{"operator": "sr", "solver": "Steepest"}]}
    )
    with pytest.raises(ValueError, match=f"no settings of Steepest are known for {MODELS[0]}; give its zeta, steps and spacing"):
        config.plan(config.rows[0])
