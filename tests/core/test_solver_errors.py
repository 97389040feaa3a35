"""What solvers refuse before the first step, and how they report that they diverged."""

import math

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.errors import Diverged
from dmap_core.operators import Inpainting
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import sample_dmap, sample_dps

SIGMAS = [9.0, 4.0, 2.0, 1.0, 0.3, 0.0]
NAN, INF = math.nan, math.inf
both = pytest.mark.parametrize("sample", [sample_dps, sample_dmap])


class Counting:
    """A Gaussian prior that returns NaN for one sample, or for all, from a given call on."""

    def __init__(self, nan_at=None, sample=slice(None)):
        self.inner = GaussianMixture(torch.zeros(1, 1, 4, 4), 0.5)
        self.nan_at, self.sample, self.calls = nan_at, sample, 0

    def denoise(self, z, sigma):
        out = self.inner.denoise(z, sigma)
        if self.calls == self.nan_at:
            out = out.clone()
            out[self.sample] = NAN
        self.calls += 1
        return out

    def decode(self, z0):
        return z0

    def networks(self):
        return ()

    def free_memory(self):
        return INF


def problem(prior=None, batch=1):
    f = Inpainting(torch.eye(4))
    y = f(torch.full((batch, 1, 4, 4), 0.2))
    return Posterior(prior or Counting(), f, y), 9 * torch.randn(batch, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def refused(sample, message, sigmas=SIGMAS, **settings):
    posterior, z = problem()
    with pytest.raises(ValueError, match=message):
        sample(posterior, z, sigmas, **{"zeta": 0.5, **settings})
    assert posterior.prior.calls == 0


@both
@pytest.mark.parametrize("zeta", [0, 0.0, -1.0, NAN, INF, -INF])
def test_zeta_must_be_above_0(sample, zeta):
    refused(sample, f"zeta is {zeta}; the step size must be above 0", zeta=zeta)


@both
@pytest.mark.parametrize("eta", [-0.1, 1.01, NAN, INF])
def test_eta_must_lie_between_0_and_1(sample, eta):
    refused(sample, f"eta is {eta}; it must lie between 0", eta=eta)


def test_dmap_has_no_sphere_at_eta_0():
    refused(sample_dmap, "eta is 0.*sphere shrinks to a point.*DPS", eta=0.0)


@pytest.mark.parametrize("K", [0, -1, 1.5, 0.5, NAN, INF])
def test_k_must_be_a_whole_number(K):
    refused(sample_dmap, f"K is {K}; it must be a whole number of at least 1", K=K)


@both
@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([0.0, 1.0, 4.0], "step 0 goes from 0 to 1; do not flip"),
        ([4.0, 1.0, 2.0, 0.0], "step 1 goes from 1 to 2"),
        ([4.0, 4.0, 0.0], "step 0 goes from 4 to 4"),
        ([4.0, 1.0], "must end at 0, but end at 1"),
        ([4.0], "at least two"),
        ([], "at least two"),
        ([4.0, NAN, 0.0], "NaN or infinite"),
        ([INF, 1.0, 0.0], "NaN or infinite"),
    ],
)
def test_sigmas_must_fall_to_0(sample, sigmas, message):
    refused(sample, f"sigmas .*{message}", sigmas=sigmas)
    refused(sample, f"sigmas .*{message}", sigmas=torch.tensor(sigmas))


@both
def test_the_number_of_generators_must_fit(sample):
    posterior, z = problem(batch=3)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        sample(posterior, z, SIGMAS, zeta=0.5, generator=generators(0, 2))


@pytest.mark.parametrize("call", range(5))
def test_dps_names_the_step_that_became_nan(call):
    posterior, z = problem(Counting(nan_at=call))
    steps = []
    with pytest.raises(
        Diverged, match=rf"step {call + 1} of 5: NaN or infinity in sample 0 of the batch, residual nan; lower zeta \(now 0.5\)"
    ):
        sample_dps(posterior, z, SIGMAS, zeta=0.5, callback=lambda step, *_: steps.append(step))
    assert steps == list(range(call))


# with K = 2 every step but the last takes three calls
@pytest.mark.parametrize("call, step", [(0, 1), (1, 1), (2, 1), (3, 2), (5, 2), (11, 4), (12, 5)])
def test_dmap_names_the_step_that_became_nan(call, step):
    posterior, z = problem(Counting(nan_at=call))
    with pytest.raises(
        Diverged, match=rf"step {step} of 5: NaN or infinity in sample 0 of the batch, residual nan; lower zeta \(now 0.5\)"
    ):
        sample_dmap(posterior, z, SIGMAS, zeta=0.5, K=2)


@both
def test_diverged_names_the_sample(sample):
    posterior, z = problem(Counting(nan_at=3, sample=2), batch=4)
    with pytest.raises(Diverged, match="in sample 2 of the batch"):
        sample(posterior, z, SIGMAS, zeta=0.5)


@both
def test_a_zeta_far_too_large_diverges(sample):
    posterior, z = problem()
    with pytest.raises(Diverged, match=r"step 1 of 5: NaN or infinity in sample 0 of the batch, residual .*; lower zeta \(now 1e\+39\)"):
        sample(posterior, z, SIGMAS, zeta=1e39)


def test_diverged_is_an_arithmetic_error():
    assert issubclass(Diverged, ArithmeticError)
