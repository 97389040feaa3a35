"""diffusers' networks as a prior, on a base model as small as its blocks allow."""

import math

import numpy as np
import pytest
import torch
from host import import_torchvision
from safetensors.torch import save_file
from tiny_models import tiny_checkpoint, tiny_cse

from dmap_core.cse.metadata import CSEMetadata
from dmap_core.cse.settings import HINT_RANGES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SIZE = (32, 32)


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    import_torchvision()


@pytest.fixture(scope="module")
def checkpoint(torchvision, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def base(checkpoint):
    from dmap_core.backends.diffusers_files import open_base

    return open_base(checkpoint)


@pytest.fixture(scope="module")
def cse(base, checkpoint, tmp_path_factory):
    from dmap_core.cse.use import open_cse

    path = tiny_cse(tmp_path_factory.mktemp("cse") / "cse.safetensors", checkpoint, prediction="eps", base="base.safetensors")
    return open_cse(path, base)[0]


@pytest.fixture(scope="module")
def prior_of(base):
    def prior_of(size=SIZE, *control):
        return base.sized(size).controlled(*control) if control else base.sized(size)

    return prior_of


def denoised_by_hand(base, z, sigma, t):
    """z0 = z - sigma eps(z / sqrt(1 + sigma^2), t)"""
    eps = base.unet(z / (1 + torch.tensor(sigma) ** 2).sqrt(), t, encoder_hidden_states=base.context.expand(len(z), -1, -1)).sample
    return z - sigma * eps


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_at_timesteps_it_is_the_base_model(base, prior_of, t):
    sigma = float(base.sigmas[t])
    z = sigma * noise(2, 4, 4, 4)
    with torch.no_grad():
        wanted = denoised_by_hand(base, z, sigma, t)
        assert torch.allclose(prior_of().denoise(z, sigma), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(wanted, z, atol=1e-3 * sigma)


def test_the_denoised_latent_of_eps(base, prior_of):
    """z0 = z - sigma eps(z / sqrt(1 + sigma^2), t), with the UNet called by hand."""
    sigma = float(base.sigmas[300])
    z = sigma * noise(1, 4, 4, 4)
    with torch.no_grad():
        eps = base.unet(z / math.sqrt(1 + sigma**2), 300, encoder_hidden_states=base.context).sample
        assert torch.allclose(prior_of().denoise(z, sigma), z - sigma * eps, atol=1e-5)


@pytest.mark.parametrize(("part", "nearest"), [(0.49, 400), (0.51, 401)])
def test_between_timesteps_the_nearest_by_log_sigma_stands_in(base, prior_of, part, nearest):
    low, high = float(base.sigmas[400]), float(base.sigmas[401])
    sigma = low * (high / low) ** part
    seen, prior = [], prior_of()
    z = sigma * noise(1, 4, 4, 4)
    prior.unet = lambda x, timestep, **more: seen.append(timestep.tolist()) or base.unet(x, timestep, **more)
    with torch.no_grad():
        found = prior.denoise(z, sigma)
        assert seen == [[nearest]]
        assert torch.allclose(found, denoised_by_hand(base, z, sigma, nearest), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("sigma", "nearest"), [(1e-4, 0), (1e4, 999)])
def test_beyond_the_timesteps_the_last_one_stands_in(base, prior_of, sigma, nearest):
    z = sigma * noise(1, 4, 4, 4)
    with torch.no_grad():
        wanted = denoised_by_hand(base, z, sigma, nearest)
        assert torch.allclose(prior_of().denoise(z, sigma), wanted, rtol=1e-6, atol=1e-6 * sigma)


def test_a_level_for_each_sample(base, prior_of, cse):
    """Timesteps and levels between them, with a CSE and without: as for each alone, and equal to the bit where the levels are."""
    sigmas = torch.tensor([float(base.sigmas[300]), float(base.sigmas[700]), 3.21])
    z = sigmas.view(-1, 1, 1, 1) * noise(3, 4, 4, 4)
    hint = noise(3, 3, *SIZE)
    for prior, alone in ((prior_of(), lambda i: prior_of()), (prior_of(SIZE, cse, hint), lambda i: prior_of(SIZE, cse, hint[i : i + 1]))):
        with torch.no_grad():
            together = prior.denoise(z, sigmas)
            for i in range(3):
                assert torch.allclose(together[i : i + 1], alone(i).denoise(z[i : i + 1], float(sigmas[i])), rtol=1e-4, atol=1e-4)
            assert torch.equal(prior.denoise(z, sigmas[1].expand(3)), prior.denoise(z, float(sigmas[1])))


def test_samples_do_not_depend_on_each_other(prior_of):
    z = 3 * noise(3, 4, 4, 4)
    with torch.no_grad():
        together = prior_of().denoise(z, 3.0)
        for i in range(3):
            assert torch.allclose(together[i : i + 1], prior_of().denoise(z[i : i + 1], 3.0), atol=1e-4)


def test_gradients_of_denoised_latents(prior_of, cse):
    """Against finite differences in a random direction, also through a CSE."""
    for prior in (prior_of(), prior_of(SIZE, cse, noise(1, 3, *SIZE))):
        z, direction, weights = 2 * noise(1, 4, 4, 4), noise(1, 4, 4, 4, seed=1), noise(1, 4, 4, 4, seed=3)
        (grad,) = torch.autograd.grad((weights * prior.denoise(z.requires_grad_(), 2.0)).sum(), z)
        with torch.no_grad():
            ahead, behind = (prior.denoise(z + step * direction, 2.0) for step in (1e-2, -1e-2))
        slope = float((weights * (ahead - behind)).sum()) / 2e-2
        assert abs(slope) > 0.1 and float((grad * direction).sum()) == pytest.approx(slope, rel=0.01)
    assert not any(p.requires_grad or p.grad is not None for p in cse.parameters())


def test_gradients_flow_through_both_networks(base, prior_of):
    prior, z = prior_of(), (2 * noise(1, 4, 4, 4)).requires_grad_()
    denoised = prior.denoise(z, 2.0)
    z0 = denoised.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(base.vae.decode(z0).sample.square().sum(), z0)
    (wanted,) = torch.autograd.grad((denoised * cotangent).sum(), z, retain_graph=True)
    (grad,) = torch.autograd.grad(prior.decode(denoised).square().sum(), z)
    assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-5) and float(grad.abs().max()) > 1e-3


def test_latent_and_picture_shapes(prior_of):
    prior = prior_of((32, 48))
    assert prior.latent_shape() == (4, 4, 6)
    with torch.no_grad():
        assert prior.decode(noise(2, 4, 4, 6)).shape == (2, 3, 32, 48)
        assert prior.encode(noise(2, 3, 32, 48)).shape == (2, 4, 4, 6)


def test_encode_and_decode_are_the_bases(base, prior_of):
    image, z0 = noise(1, 3, *SIZE).clamp(-1, 1), noise(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(prior_of().encode(image), base.encode(image))
        assert torch.equal(prior_of().decode(z0), base.decode(z0))


def test_pictures_that_latents_do_not_fill(base, prior_of):
    """A picture of 30x21 pixels is that of the latents' 32x24, cropped; encoded, its edges are repeated."""
    prior = prior_of((30, 21))
    assert prior.latent_shape() == (4, 4, 3)
    z0, image = noise(1, 4, 4, 3), noise(1, 3, 30, 21)
    edges = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 2), (0, 3)), mode="edge"))
    with torch.no_grad():
        assert torch.equal(prior.decode(z0), base.decode(z0)[:, :, :30, :21])
        assert torch.equal(prior.encode(image), base.encode(edges))


def test_a_cse_for_pictures_that_latents_do_not_fill(prior_of, cse):
    hint, z = noise(1, 3, 30, 21), noise(1, 4, 4, 3)
    edges = torch.from_numpy(np.pad(hint.numpy(), ((0, 0), (0, 0), (0, 2), (0, 3)), mode="edge"))
    with torch.no_grad():
        assert torch.equal(prior_of((30, 21), cse, hint).denoise(z, 2.0), prior_of((32, 24), cse, edges).denoise(z, 2.0))


def test_a_cse_changes_what_is_denoised(prior_of, cse):
    z, hints = 2 * noise(2, 4, 4, 4), noise(2, 3, *SIZE)
    with torch.no_grad():
        without = prior_of().denoise(z, 2.0)
        one = prior_of(SIZE, cse, hints[:1]).denoise(z, 2.0)
        other = prior_of(SIZE, cse, hints[1:]).denoise(z, 2.0)
        each = prior_of(SIZE, cse, hints).denoise(z, 2.0)
    assert float((one - without).abs().max()) > 0.01 and float((one - other).abs().max()) > 1e-3
    assert torch.allclose(each, torch.stack([one[0], other[1]]), atol=1e-4)


def test_networks_and_memory(base, prior_of, cse):
    from dmap_core.backends.autoencoded import BLOCKS

    assert prior_of().networks() == [base.unet, base.vae]
    assert prior_of(SIZE, cse, noise(1, 3, *SIZE)).networks() == [base.unet, base.vae, cse]
    assert prior_of().blocks() == [m for m in base.unet.modules() if type(m).__name__ in BLOCKS] != []
    assert len(prior_of(SIZE, cse, noise(1, 3, *SIZE)).blocks()) > len(prior_of().blocks())
    assert 1e6 < prior_of().free_memory() < 1e15


def test_cses_for_another_base(base, checkpoint, tmp_path):
    from dmap_core.cse.use import open_cse

    wide = tiny_checkpoint(tmp_path / "wide.safetensors", width=128)
    with pytest.raises(ValueError, match=r"wide-cse.safetensors was made for another base model than base.safetensors: "):
        open_cse(tiny_cse(tmp_path / "wide-cse.safetensors", wide), base)
    with pytest.raises(
        ValueError, match=r"v.safetensors was trained for v-prediction, and base.safetensors makes eps-predictions; .* v-base"
    ):
        open_cse(tiny_cse(tmp_path / "v.safetensors", checkpoint, prediction="v", base="v-base.ckpt"), base)
    with pytest.raises(ValueError, match="base.safetensors is no ControlNet"):
        open_cse(checkpoint, base)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is no ControlNet"):
        open_cse(tmp_path / "other.safetensors", base)


def test_a_cse_of_the_base(base, checkpoint, tmp_path):
    from dmap_core.cse.use import open_cse

    path = tiny_cse(tmp_path / "cse.safetensors", checkpoint, hint_range="-1..1", steps=5)
    controlnet, metadata = open_cse(path, base)
    assert (metadata.hint_range, metadata.steps) == ("-1..1", 5) and not controlnet.training
    assert {p.dtype for p in controlnet.parameters()} == {torch.float32}


def test_half_precision(checkpoint, tmp_path):
    from dmap_core.backends.diffusers_files import open_base
    from dmap_core.cse.use import open_cse

    half, full = open_base(checkpoint).to(torch.device("cpu"), torch.bfloat16), open_base(checkpoint)
    path = tiny_cse(tmp_path / "cse.safetensors", checkpoint)
    z, hint, found = 2 * noise(1, 4, 4, 4), noise(1, 3, *SIZE), {}
    for base in (half, full):
        controlnet = open_cse(path, base)[0]
        assert {p.dtype for p in controlnet.parameters()} == {base.context.dtype}
        prior = base.sized(SIZE).controlled(controlnet, hint)
        with torch.no_grad():
            found[base.context.dtype] = prior.denoise(z, 2.0)
            assert prior.decode(z).dtype == torch.float32
    low, exact = found[torch.bfloat16], found[torch.float32]
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    assert float((low - exact).norm() / exact.norm()) < 0.05


def test_hints_have_the_range_that_the_file_asks_for():
    from dmap_core.cse.use import hint_for

    hint = torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2)
    assert set(HINT_RANGES) == {"0..1", "-1..1"}
    assert torch.equal(hint_for(hint, CSEMetadata(hint_range="-1..1")), hint)
    for metadata in (CSEMetadata(hint_range="0..1"), None):
        assert torch.equal(hint_for(hint, metadata), torch.tensor([0.0, 0.5, 0.75, 1.0]).view(1, 1, 2, 2))
