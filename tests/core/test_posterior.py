"""The two-stage gradient against the chain rule in one go, against finite differences, and under every memory plan."""

import weakref

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.gradient import STRATEGIES
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, SuperResolution, centred_box
from dmap_core.posterior import Posterior

LATENT, IMAGE = (4, 6), (8, 12)
OPERATORS = [SuperResolution(2), Inpainting(centred_box(IMAGE, (4, 5))), Compose([Grayscale(), GaussianBlur(5, 1.0)])]
every_operator = pytest.mark.parametrize("f", OPERATORS, ids=lambda f: f.name)
every_plan = pytest.mark.parametrize("plan", STRATEGIES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(prior, f, batch=2, memory="fast"):
    y = f(randn(batch, 3, *IMAGE, seed=1).tanh())
    return Posterior(prior, f, y, memory), 1.5 * randn(batch, 2, *LATENT, seed=2)


def chain(posterior, z, sigma):
    """The residual in float64, with nothing between it and z but the prior and the operator."""
    y_hat = posterior.operator(posterior.prior.decode(posterior.prior.denoise(z, sigma)))
    return (y_hat - posterior.y).flatten(1).square().sum(1).sqrt()


@every_operator
@every_plan
@pytest.mark.parametrize("sigma", [0.05, 1.0, 10.0])
def test_gradient_equals_autograd_of_the_whole_chain(conv_prior, f, plan, sigma):
    posterior, z = problem(conv_prior(), f, memory=plan)
    grad, denoised, residual = posterior.gradient(z, sigma)

    leaf = z.clone().requires_grad_()
    z0 = posterior.prior.denoise(leaf, sigma)
    distance = f.distance(f(posterior.prior.decode(z0)), posterior.y)
    (expected,) = torch.autograd.grad(distance.sum(), leaf)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(denoised, z0.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(residual, distance.detach(), rtol=0, atol=0)


@every_operator
@every_plan
def test_gradient_equals_finite_differences(conv_prior, f, plan):
    posterior, z = problem(conv_prior(), f, memory=plan)
    grad, _, residual = posterior.gradient(z, 0.7)
    torch.testing.assert_close(residual.double(), chain(posterior, z, 0.7).detach(), rtol=1e-6, atol=0)
    step = 1e-5
    for seed in range(4):
        direction = randn(*z.shape, seed=10 + seed)
        difference = (chain(posterior, z + step * direction, 0.7) - chain(posterior, z - step * direction, 0.7)).detach() / (2 * step)
        # the residual's own gradient is rounded to float32
        torch.testing.assert_close((grad * direction).flatten(1).sum(1), difference, rtol=1e-5, atol=1e-6)


@every_operator
def test_all_plans_agree(conv_prior, f):
    results = []
    for plan in STRATEGIES:
        posterior, z = problem(conv_prior(), f, memory=plan)
        results.append(posterior.gradient(z, 0.7))
        assert posterior.plan == plan
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_plan
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_weights_get_no_gradient_whatever_they_ask_for(conv_prior, plan, trainable, outer):
    prior = conv_prior(trainable=trainable)
    posterior, z = problem(prior, SuperResolution(2), memory=plan)
    expected = problem(conv_prior(), SuperResolution(2))[0].gradient(z, 0.7)[0]
    with outer():
        results = posterior.gradient(z, 0.7)
    torch.testing.assert_close(results[0], expected, rtol=1e-12, atol=1e-12)
    parameters = [p for network in prior.networks() for p in network.parameters()]
    assert all(p.grad is None and p.requires_grad is trainable for p in parameters)
    assert not any(r.requires_grad or r.grad_fn for r in results)
    assert not z.requires_grad
    assert z.grad is None


@every_plan
def test_a_latent_that_requires_grad_is_left_alone(conv_prior, plan):
    posterior, z = problem(conv_prior(), SuperResolution(2), memory=plan)
    z.requires_grad_()
    results = posterior.gradient(z, 0.7)
    assert z.grad is None
    assert not any(r.requires_grad for r in results)


@every_plan
@every_operator
def test_a_batch_is_as_many_single_runs(conv_prior, f, plan):
    posterior, z = problem(conv_prior(), f, batch=3, memory=plan)
    whole = posterior.gradient(z, 0.7)
    assert whole[0].shape == whole[1].shape == z.shape
    assert whole[2].shape == (3,)
    for i in range(3):
        alone = Posterior(posterior.prior, f, posterior.y[i : i + 1], plan).gradient(z[i : i + 1], 0.7)
        for ours, theirs in zip(alone, whole, strict=True):
            torch.testing.assert_close(ours[0], theirs[i], rtol=1e-6 if ours[0].ndim == 0 else 1e-12, atol=1e-8)


def test_one_sample_with_a_zero_residual_does_not_disturb_the_others(conv_prior):
    f = SuperResolution(2)
    posterior, z = problem(conv_prior(), f)
    expected = posterior.gradient(z, 0.7)[0]
    posterior.y = posterior.y.clone()
    posterior.y[0] = f(posterior.prior.decode(posterior.prior.denoise(z, 0.7)))[0].detach()
    grad, _, residual = posterior.gradient(z, 0.7)
    assert residual[0] == 0
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad[1], expected[1], rtol=1e-10, atol=1e-12)


@every_plan
def test_evaluations_are_counted(conv_prior, plan):
    posterior, z = problem(conv_prior(), SuperResolution(2), memory=plan)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (0, 0)
    posterior.gradient(z, 0.7)
    posterior.gradient(z, 0.6)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (2, 2)
    posterior.denoise(z, 0.5)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (3, 2)
    posterior.residual(z, 0.5)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (4, 3)
    posterior.residual(z, 0.0)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (4, 4)


@pytest.mark.parametrize("plan, denoised", [("fast", [True]), ("lean", [False, True]), ("checkpoint", [True])])
def test_what_a_gradient_asks_of_the_prior(conv_prior, plan, denoised):
    posterior, z = problem(conv_prior(), SuperResolution(2), memory=plan)
    posterior.gradient(z, 0.7)
    assert posterior.prior.denoised_at == [(0.7, with_gradient) for with_gradient in denoised]
    assert posterior.prior.decoded == 1


def test_denoise_and_residual_build_no_graph(conv_prior):
    posterior, z = problem(conv_prior(), SuperResolution(2))
    z.requires_grad_()
    denoised, residual, last = posterior.denoise(z, 0.7), posterior.residual(z, 0.7), posterior.residual(z, 0.0)
    assert not any(t.requires_grad for t in (denoised, residual, last))
    torch.testing.assert_close(denoised, posterior.prior.denoise(z, 0.7).detach(), rtol=0, atol=0)
    torch.testing.assert_close(residual.double(), chain(posterior, z, 0.7).detach(), rtol=1e-6, atol=0)
    y_hat = posterior.operator(posterior.prior.decode(z))
    torch.testing.assert_close(last.double(), (y_hat - posterior.y).flatten(1).norm(dim=1).detach(), rtol=1e-6, atol=0)


def test_a_measurement_made_under_inference_mode(conv_prior):
    f = SuperResolution(2)
    expected = problem(conv_prior(), f)[0]
    with torch.inference_mode():
        y = expected.y.clone()
    z = 1.5 * randn(2, 2, *LATENT, seed=2)
    assert torch.equal(Posterior(conv_prior(), f, y, "fast").gradient(z, 0.7)[0], expected.gradient(z, 0.7)[0])


def test_an_unknown_plan_is_named(conv_prior):
    with pytest.raises(ValueError, match="memory is 'tiny'; it must be one of auto, fast, lean, checkpoint"):
        problem(conv_prior(), SuperResolution(2), memory="tiny")


def test_gaussian_prior_in_closed_form():
    """One Gaussian, f = mask: z0 = m + s (z - m), so the gradient is s times the unit residual of the known pixels."""
    mean = randn(1, 1, 4, 4)
    f = Inpainting(centred_box((4, 4), (2, 2)))
    y, z = f(randn(2, 1, 4, 4, seed=1)), randn(2, 1, 4, 4, seed=2)
    grad, denoised, residual = Posterior(GaussianMixture(mean, 0.5), f, y).gradient(z, 2.0)
    s = 0.25 / (0.25 + 4)
    z0 = mean + s * (z - mean)
    error = f(z0) - y
    norm = error.flatten(1).norm(dim=1)
    torch.testing.assert_close(denoised, z0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(residual.double(), norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, s * error / norm.view(-1, 1, 1, 1), rtol=1e-6, atol=1e-7)


class Spy:
    """A prior whose graph's saved tensors can be counted, at the moment when either network's backward pass starts."""

    def __init__(self, prior):
        self.prior = prior
        self.saved = {"denoiser": weakref.WeakSet(), "decoder": weakref.WeakSet()}
        self.started = []  # (whose backward starts, saved tensors alive of the denoiser, of the decoder)

    def _watched(self, name, network, *inputs):
        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor

        def pack(tensor):
            kept = Kept(tensor.detach())
            self.saved[name].add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            out = network(*inputs)
        if out.requires_grad:
            out.register_hook(lambda grad: self.started.append((name, len(self.saved["denoiser"]), len(self.saved["decoder"]))))
        return out

    def denoise(self, z, sigma):
        return self._watched("denoiser", self.prior.denoise, z, sigma)

    def decode(self, z0):
        return self._watched("decoder", self.prior.decode, z0)

    def networks(self):
        return self.prior.networks()

    def blocks(self):
        return self.prior.blocks()


@every_plan
def test_nothing_of_the_decoder_is_alive_when_the_denoisers_backward_starts(conv_prior, plan):
    spy = Spy(conv_prior())
    posterior, z = problem(spy, SuperResolution(2), memory=plan)
    posterior.gradient(z, 0.7)
    (first, denoiser_then, decoder_then), (second, denoiser_later, decoder_later) = spy.started
    assert (first, second) == ("decoder", "denoiser")
    assert decoder_then > 0
    assert decoder_later == 0
    assert denoiser_later > 0
    assert (denoiser_then > 0) is (plan != "lean")
    assert not spy.saved["denoiser"]
    assert not spy.saved["decoder"]


def test_checkpointing_keeps_fewer_tensors(conv_prior):
    kept = {}
    for plan in ("fast", "checkpoint"):
        spy = Spy(conv_prior(denoiser_depth=6))
        posterior, z = problem(spy, SuperResolution(2), memory=plan)
        posterior.gradient(z, 0.7)
        kept[plan] = spy.started[1][1]
    assert kept["checkpoint"] < kept["fast"] / 2
