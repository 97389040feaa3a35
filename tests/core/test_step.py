"""The step that sets itself: Polyak's rule, its bound, what it does not depend on, and the gradient without the denoiser's Jacobian."""

import math
from dataclasses import replace

import pytest
import torch

from dmap_core.gradient import STRATEGIES
from dmap_core.operators import GaussianBlur, Inpainting, Jpeg, Noisy, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import DMAP, DPS, SOLVERS, FreeDoM, ReSample
from dmap_core.solvers.step import STRENGTH, step_size

LATENT, IMAGE = (2, 4, 6), (8, 12)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(prior, f=None, batch=1, memory="fast"):
    f = f or SuperResolution(2)
    return Posterior(prior, f, f.measure(randn(batch, 3, *IMAGE, seed=1).tanh()), memory), SIGMAS[0] * randn(batch, *LATENT, seed=2)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0, 2.0])
def test_a_residual_that_falls_linearly_falls_by_the_strength(strength):
    """r(z) = a z + b, whose least value is 0: after Polyak's step |1 - strength| r is left."""
    a, z = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    r = torch.tensor([0.3, 2.0, 40.0], dtype=torch.float64)
    moved = z - step_size(None, strength, a, r, math.inf) * a
    left = r + (a * (moved - z)).flatten(1).sum(1)
    torch.testing.assert_close(left, (1 - strength) * r)


def test_it_never_passes_the_nearest_solution_of_a_convex_residual():
    """||A z - y|| of a consistent system: at strength 1 and below every step comes closer to each solution (Polyak 1969)."""
    A, solution = randn(6, 10), randn(10, seed=1)
    for seed in range(20):
        z = randn(10, seed=10 + seed).requires_grad_()
        r = torch.linalg.vector_norm(A @ (z - solution))
        (g,) = torch.autograd.grad(r, z)
        for strength in (0.25, 0.5, 1.0):
            t = step_size(None, strength, g.view(1, 1, 1, -1), r.detach().view(1), math.inf)
            assert torch.linalg.vector_norm(z - t.flatten() * g - solution) < torch.linalg.vector_norm(z - solution)


def test_a_step_is_no_longer_than_the_radius():
    grad, r = randn(2, 1, 3, 3), torch.tensor([1e6, 1e-6], dtype=torch.float64)
    lengths = (step_size(None, 1.0, grad, r, 2.5) * grad).flatten(1).norm(dim=1)
    assert lengths[0] == pytest.approx(2.5)
    assert lengths[1] == pytest.approx(float(1e-6 / grad[1].norm()))


def test_nothing_is_divided_by_zero():
    grad = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(1, 2, 2)])
    size = step_size(None, 0.5, grad, torch.tensor([3.0, 0.0, 0.0]), 10.0)
    assert size.flatten().tolist() == [0, 0, 0]


def test_zeta_is_itself():
    assert step_size(4.8, 0.5, randn(1, 1, 2, 2), torch.ones(1), 0.1) == 4.8


@pytest.mark.parametrize(
    "solver", [DPS(), DMAP(K=2), DMAP(K=2, jacobian="none"), FreeDoM(K=2, first=1, last=2)], ids=lambda s: s.describe()
)
def test_it_has_no_unit(conv_prior, solver):
    """The residual in other units, a thousandth of it say, makes the same picture; with zeta it makes another."""

    class Scaled(SuperResolution):
        def distance(self, y_hat, y):
            return super().distance(y_hat, y) / 1000

    made = []
    for f in (SuperResolution(2), Scaled(2)):
        posterior, z = problem(conv_prior(), f)
        made.append([replace(solver, zeta=zeta)(posterior, z, SIGMAS, generator=generators(3, 1)) for zeta in (None, 0.5)])
    torch.testing.assert_close(made[0][0], made[1][0], rtol=1e-4, atol=1e-4)  # residuals are rounded to float32
    assert (made[0][1] - made[1][1]).abs().max() > 1e-2


@pytest.mark.parametrize("solver", [DPS(), DMAP(K=2), DMAP(K=2, jacobian="none")], ids=lambda s: s.describe())
@pytest.mark.parametrize(
    "f", [SuperResolution(2), GaussianBlur(5, 1.0), Jpeg(20), Inpainting((randn(*IMAGE) > 0.5).float())], ids=lambda f: f.name
)
def test_it_lowers_the_residual_of_every_operator(conv_prior, solver, f):
    """With one and the same strength; the unguided end is where no gradient is taken."""
    from dmap_core.solvers import Unguided

    posterior, z = problem(conv_prior(), f, batch=4)
    guided, plain = (s(posterior, z, SIGMAS, generator=generators(3, 4)) for s in (solver, Unguided()))
    assert (posterior.residual(guided, 0.0) < posterior.residual(plain, 0.0)).all()


def test_it_stops_at_the_noise(conv_prior):
    """Where the residual is at its noise's floor there is no step: the run is the unguided one, as far as the noise of every level goes."""
    posterior, z = problem(conv_prior(), Noisy(SuperResolution(2), 100.0))
    z0 = DPS()(posterior, z, SIGMAS, generator=generators(3, 1))
    from dmap_core.solvers import Unguided

    assert torch.equal(z0, Unguided()(posterior, z, SIGMAS, generator=generators(3, 1)))


@pytest.mark.parametrize("memory", STRATEGIES)
def test_without_the_jacobian_it_is_the_gradient_at_z0(conv_prior, memory):
    posterior, z = problem(conv_prior(), batch=2, memory=memory)
    grad, denoised, residual = posterior.gradient(z, 2.0, jacobian="none")
    expected, expected_residual = posterior.gradient_z0(posterior.denoise(z, 2.0))
    assert torch.equal(grad, expected) and torch.equal(residual, expected_residual)
    assert torch.equal(denoised, posterior.denoise(z, 2.0))
    exact = posterior.gradient(z, 2.0)[0]
    assert (exact - grad).abs().max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("name", ["DPS", "FreeDoM", "ReSample", "DMAP"])
def test_what_is_refused(name):
    for strength in (0.0, -1.0, 2.01, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"strength is {strength}; it must be above 0 and at most 2"):
            SOLVERS[name](strength=strength)
    with pytest.raises(ValueError, match="jacobian is 'half'; it must be one of exact, none"):
        SOLVERS[name](jacobian="half")
    if name in ("DPS", "DMAP"):
        with pytest.raises(ValueError, match="optimizer is 'adam', which has no gradient that the automatic step could measure"):
            SOLVERS[name](optimizer="adam")


def test_how_it_is_told():
    assert DMAP().describe() == f"DMAP (K 2, automatic step {STRENGTH:g})"
    assert DMAP(zeta=9.6).describe() == "DMAP (K 2, zeta 9.6)"
    assert DPS(jacobian="none").describe() == f"DPS (automatic step {STRENGTH:g}, no Jacobian)"
    assert DPS(zeta=0.1, optimizer="adam").describe() == "DPS (zeta 0.1, Adam)"
    assert DMAP().told() == f"strength {STRENGTH:g}, K 2" and DMAP(zeta=2.0, strength=0.1).told() == "zeta 2, K 2"
    assert FreeDoM().describe() == f"FreeDoM (automatic step {STRENGTH:g}, K 2 in steps 25 to 50)"
    assert ReSample(zeta=1.0).describe() == "ReSample (zeta 1, steps 50 to 100 every 50)"


def test_another_number_of_steps_needs_no_other_step():
    assert DMAP(K=3, strength=0.7).rescaled(0.1, 5) == DMAP(K=3, strength=0.7)
    assert DMAP(zeta=2.0).rescaled(0.5, 5).zeta == 4.0
