"""What training minimises, against the definitions in float64."""

import copy

import pytest
import torch
from torch import nn

from dmap_core.cse.loss import batch_loss, denoising_loss, in_range, make_hint, noised
from dmap_core.cse.settings import TrainingSettings
from dmap_core.operators import Grayscale, Jpeg, Noisy, SuperResolution

SIGMAS = torch.tensor([0.03, 0.4, 1.0, 5.0, 14.6])
SHAPE = (len(SIGMAS), 4, 6, 5)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n=3, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def reference(prediction):
    """(denoised, z0, the network's error per sample) from the VP definitions, for a network that is wrong by some tenths."""
    z0, eps, error = (normal(i, *SHAPE).double() for i in range(3))
    s = SIGMAS.double().view(-1, 1, 1, 1)
    alpha, sigma_vp = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    x = alpha * z0 + sigma_vp * eps
    torch.testing.assert_close(x, (z0 + s * eps) / (1 + s**2).sqrt())
    if prediction == "eps":
        eps_hat = eps + 0.3 * error
        return (x - sigma_vp * eps_hat) / alpha, z0, (eps_hat - eps).square().mean((1, 2, 3))
    if prediction == "flow":
        t = s / (1 + s)
        velocity = eps - z0
        velocity_hat = velocity + 0.3 * error
        return (1 - t) * z0 + t * eps - t * velocity_hat, z0, (velocity_hat - velocity).square().mean((1, 2, 3))
    v = alpha * eps - sigma_vp * z0
    v_hat = v + 0.3 * error
    return alpha * x - sigma_vp * v_hat, z0, (v_hat - v).square().mean((1, 2, 3))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_loss_is_the_error_of_the_networks_own_target(prediction):
    denoised, z0, wanted = reference(prediction)
    for gamma in (None, 0.0):
        found = denoising_loss(denoised, z0, SIGMAS, prediction, gamma)
        assert found.shape == (len(SIGMAS),) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(denoising_loss(denoised.float(), z0.float(), SIGMAS, prediction).double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights(prediction, gamma):
    """Hang et al. 2023: min(SNR, gamma) / SNR on the error of eps, min(SNR, gamma) / (SNR + 1) on that of v."""
    denoised, z0, error = reference(prediction)
    snr = SIGMAS.double() ** -2
    wanted = error * snr.clamp(max=gamma) / (snr + (prediction == "v"))
    torch.testing.assert_close(denoising_loss(denoised, z0, SIGMAS, prediction, gamma).double(), wanted, rtol=1e-5, atol=0)


def test_noise_of_a_sample_depends_on_its_seed_alone():
    z0, seeds = normal(0, *SHAPE), [5, 2**62 - 1, 0, 5, 9]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = noised(z0, SIGMAS, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    for i, seed in enumerate(seeds):
        alone = noised(z0[i : i + 1], SIGMAS[i : i + 1], [seed])
        assert torch.equal(alone[0], together[i])
        eps = normal(seed, *SHAPE[1:])
        torch.testing.assert_close(together[i], z0[i] + SIGMAS[i] * eps, rtol=1e-6, atol=0)
    noise = (together - z0) / SIGMAS.view(-1, 1, 1, 1)
    torch.testing.assert_close(noise[0], noise[3], rtol=0, atol=1e-4)
    assert not torch.allclose(noise[0], noise[1], atol=0.5)
    assert noised(z0.double(), SIGMAS.double(), seeds).dtype == torch.float64


@pytest.mark.parametrize("operator", [SuperResolution(4), Grayscale(), Jpeg(20)], ids=lambda o: o.name)
def test_a_hint_is_the_degraded_picture(operator):
    image = images()
    hint = make_hint(operator, image, [0, 1, 2], "-1..1")
    assert hint.shape == image.shape
    assert torch.equal(hint, operator.hint(operator.measure(image)))
    assert torch.equal(make_hint(operator, image, [7, 8, 9], "-1..1"), hint)
    torch.testing.assert_close(make_hint(operator, image, [0, 1, 2], "0..1"), (hint + 1) / 2, rtol=0, atol=1e-7)
    assert not torch.allclose(hint, image, atol=0.1)


def test_hint_ranges():
    hint = torch.tensor([-1.0, 0.0, 1.0, 1.2])
    torch.testing.assert_close(in_range(hint, "0..1"), torch.tensor([0.0, 0.5, 1.0, 1.1]))  # overshoot stays
    assert torch.equal(in_range(hint, "-1..1"), hint)
    grey = make_hint(Grayscale(), torch.full((1, 3, 8, 8), -1.0), [0], "0..1")
    torch.testing.assert_close(grey, torch.zeros(1, 3, 8, 8), rtol=0, atol=1e-6)


def test_a_noisy_measurement_has_its_noise_per_seed():
    clean, operator = SuperResolution(2), Noisy(SuperResolution(2), 0.1)
    image, seeds = images(size=32), [4, 11, 4]
    hint = make_hint(operator, image, seeds, "-1..1")
    y = clean(image)
    for i, seed in enumerate(seeds):
        wanted = y[i : i + 1] + operator.noise * normal(seed, *y.shape[1:])
        torch.testing.assert_close(hint[i : i + 1], operator.hint(wanted), rtol=0, atol=1e-5)
        assert torch.equal(make_hint(operator, image[i : i + 1], [seed], "-1..1")[0], hint[i])
    assert not torch.equal(make_hint(operator, image, [5, 12, 5], "-1..1"), hint)


def test_a_hint_has_no_graph():
    assert not make_hint(SuperResolution(2), images().requires_grad_(), [0, 1, 2], "0..1").requires_grad


class TinyBase:
    """Latents are pooled pictures; the frozen network is a convolution, to whose output the ControlNet's is added."""

    def __init__(self, prediction="eps"):
        self.prediction, self.sigmas = prediction, torch.linspace(0.05, 10, 20)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.network = nn.Conv2d(3, 2, 4, 4).requires_grad_(False), nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
            self.controlnet = nn.Conv2d(3, 2, 4, 4)

    def encode(self, image):
        return self.encoder(image)

    def decode(self, z0):
        raise AssertionError("training decodes nothing")

    def controlled(self, controlnet, hint):
        found = copy.copy(self)
        found.shown = controlnet(hint)
        return found

    def denoise(self, z, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return z / (1 + s**2) + s / (1 + s**2) * (self.network(z / (1 + s**2).sqrt()) + self.shown)


def batch(*rows):
    image = images(4)
    rows = rows or range(4)
    return {
        "image": image[list(rows)],
        "timestep": torch.tensor([[0, 3, 12, 19][i] for i in rows]),
        "noise_seeds": [10 + i for i in rows],
        "measurement_seeds": [20 + i for i in rows],
    }


def settings(**changed):
    return TrainingSettings(batch_size=4, size=16, **changed)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("changed", [{}, {"hint_range": "-1..1"}, {"snr_gamma": 1.0}], ids=str)
def test_the_loss_of_a_batch(prediction, changed):
    base, operator, b = TinyBase(prediction), Noisy(SuperResolution(2), 0.1), batch()
    found = batch_loss(base, base.controlnet, operator, b, settings(**changed))
    y = operator(b["image"]) + operator.noise * torch.stack([normal(seed, 3, 8, 8) for seed in b["measurement_seeds"]])
    hint = operator.hint(y)
    hint = hint if changed.get("hint_range") else (hint + 1) / 2
    sigma, z0 = base.sigmas[b["timestep"]], base.encoder(b["image"])
    z = z0 + sigma.view(-1, 1, 1, 1) * torch.stack([normal(seed, 2, 4, 4) for seed in b["noise_seeds"]])
    wanted = denoising_loss(
        base.controlled(base.controlnet, hint).denoise(z, sigma), z0, sigma, prediction, changed.get("snr_gamma")
    ).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_a_batch_is_its_samples():
    base, operator = TinyBase(), Noisy(SuperResolution(2), 0.1)
    together = batch_loss(base, base.controlnet, operator, batch(), settings())
    alone = [batch_loss(base, base.controlnet, operator, batch(i), settings()) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0)
    assert len({loss.item() for loss in alone}) == 4


def test_only_the_controlnet_gets_a_gradient():
    base = TinyBase()
    b = batch()
    loss = batch_loss(base, base.controlnet, SuperResolution(2), b, settings())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in base.controlnet.parameters())
    assert all(p.grad is None for network in (base.encoder, base.network) for p in network.parameters())
    weight = base.controlnet.weight
    gradient = weight.grad.clone()
    with torch.no_grad():
        weight -= 0.1 * gradient / gradient.norm()
    assert batch_loss(base, base.controlnet, SuperResolution(2), b, settings()) < loss
