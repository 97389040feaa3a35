"""The model alone, on priors in closed form."""

import math

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.errors import Diverged
from dmap_core.posterior import Posterior
from dmap_core.solvers import Unguided

N = 4000
SIGMA = 20.0
TWO = GaussianMixture(
    torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64), std=0.3, weights=torch.tensor([1.0, 3.0], dtype=torch.float64)
)
ONE = GaussianMixture(torch.tensor([[0.5, -2.0]], dtype=torch.float64), std=0.3)


def posterior(prior, operator, n=N):
    return Posterior(prior, operator, torch.zeros(n, 2, dtype=torch.float64))


def start(n=N):
    """Points of TWO at the first noise level."""
    generator = torch.Generator().manual_seed(2)
    means = TWO.means[torch.multinomial(TWO.weights, n, replacement=True, generator=generator)]
    return means + math.hypot(TWO.std, SIGMA) * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_the_priors(first_coordinate, karras, eta):
    """3/4 of them in the upper mode; mean 0.5, variance 0.3^2 + 0.75 and covariance 0.75."""
    generator = torch.Generator().manual_seed(1)
    x = Unguided(eta=eta)(posterior(TWO, first_coordinate), start(), karras(150, 0.01, SIGMA), generator=generator)
    upper = (x.sum(1) > 0).double().mean()
    assert float(upper) == pytest.approx(0.75, abs=0.025)
    assert x.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.06)
    covariance = torch.cov(x.T)
    assert covariance.flatten().tolist() == pytest.approx([0.84, 0.75, 0.75, 0.84], abs=0.06)
    for mode in (x[x.sum(1) > 0] - 1, x[x.sum(1) < 0] + 1):
        assert mode.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02)


def test_the_probability_flow_of_one_gaussian(first_coordinate, karras):
    """z - mean shrinks by sqrt(std^2 + sigma^2) / std: the solution of the ODE."""
    z = start(5)
    x = Unguided(eta=0.0)(posterior(ONE, first_coordinate, 5), z, karras(1000, 0.001, SIGMA))
    wanted = ONE.means + (z - ONE.means) * ONE.std / math.sqrt(ONE.std**2 + SIGMA**2)
    assert torch.allclose(x, wanted, atol=0.003)


def test_without_eta_nothing_is_drawn(first_coordinate, karras):
    levels, generator = karras(10, 0.01, SIGMA), torch.Generator().manual_seed(3)
    before = generator.get_state()
    x = Unguided(eta=0.0)(posterior(TWO, first_coordinate, 5), start(5), levels, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(x, Unguided(eta=0.0)(posterior(TWO, first_coordinate, 5), start(5), levels))
    drawn = Unguided(eta=1.0)(posterior(TWO, first_coordinate, 5), start(5), levels, generator=generator)
    assert not torch.equal(drawn, x) and not torch.equal(generator.get_state(), before)


def test_calls_and_the_callback(first_coordinate, karras):
    levels, seen = karras(10, 0.01, SIGMA), []
    quiet, told = posterior(TWO, first_coordinate, 5), posterior(TWO, first_coordinate, 5)
    x = Unguided(eta=0.0)(quiet, start(5), levels)
    assert (quiet.denoiser_calls, quiet.decoder_calls) == (10, 0)
    y = Unguided(eta=0.0)(told, start(5), levels, callback=lambda *given: seen.append(given))
    assert (told.denoiser_calls, told.decoder_calls) == (10, 10) and torch.equal(x, y)
    assert [step for step, *_ in seen] == list(range(10)) and torch.equal(seen[-1][2], x)
    assert torch.allclose(seen[3][3], seen[3][1][:, 0].abs().float())  # the residual of the denoised point: y is 0


def test_what_is_refused(first_coordinate, karras):
    with pytest.raises(ValueError, match="eta is 2"):
        Unguided(eta=2)(posterior(TWO, first_coordinate, 5), start(5), karras(10, 0.01, SIGMA))
    with pytest.raises(ValueError, match="sigmas must end at 0"):
        Unguided()(posterior(TWO, first_coordinate, 5), start(5), karras(10, 0.01, SIGMA)[:-1])
    broken = start(5)
    broken[3, 0] = math.nan
    with pytest.raises(Diverged, match="step 1 of 10: .*sample 3"):
        Unguided(eta=0.0)(posterior(TWO, first_coordinate, 5), broken, karras(10, 0.01, SIGMA))
