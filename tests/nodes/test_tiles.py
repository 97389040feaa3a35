"""Tiles in ComfyUI: networks see no more than a tile, the picture is one, and what cannot be cut is refused by name."""

import pytest
import torch
from variants import some_at_once

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

TILE = 128
HEIGHT, WIDTH = 136, 180  # of a picture; 17x23 latents


@pytest.fixture(scope="module")
def large(lab):
    """A measurement of a picture that has two tiles across and one more row than a tile, of no whole latents."""
    operator = lab.call("DMAP_OperatorSuperResolution", scale=4)
    picture = lab.picture(1, HEIGHT, WIDTH)
    return {"operator": operator, "measurement": lab.call("DMAP_Degrade", image=picture, operator=operator, noise_sigma=0.0, seed=0)}


def latent(lab, large):
    made, _, _ = lab.call("DMAP_EmptyMeasurementLatent", vae=lab.shared()[1], batch_size=1, **large)
    assert made["samples"].shape[-2:] == (17, 23)
    return made


def run(lab, large, sampler=None, **changes):
    guider = lab.guider(**large, **changes)
    sampler = lab.call("DMAP_DMAPSampler", K=1, step="auto", strength=0.7, jacobian="none", zeta=1.0) if sampler is None else sampler
    return lab.sample(guider, sampler, latent=latent(lab, large), schedule=lab.sigmas(4, spacing="exponential")), guider.report


def test_a_tile_that_holds_all_changes_no_bit(lab, large):
    whole, report = run(lab, large)
    tiled, told = run(lab, large, tile=256)
    assert torch.equal(whole, tiled) and "tiles" not in report.memory and told.memory.endswith("tiles of 256 pixels")


@pytest.mark.parametrize("jacobian", some_at_once(["none", "exact"], ["none"]))
def test_networks_see_a_tile_and_the_picture_is_as_good(lab, large, jacobian):
    sampler = lab.call("DMAP_DMAPSampler", K=1, step="auto", strength=0.7, jacobian=jacobian, zeta=1.0)
    model, vae = lab.shared()
    seen = {"unet": set(), "decoder": set()}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].add(tuple(inputs[0].shape[-2:])))
        for name, module in (("unet", model.model.diffusion_model), ("decoder", vae.first_stage_model.taesd_decoder))
    ]
    try:
        tiled, report = run(lab, large, sampler, tile=TILE)
        assert seen == {"unet": {(16, 16)}, "decoder": {(16, 16)}}
        whole, plain = run(lab, large, sampler)
        assert seen["unet"] == {(16, 16), (17, 23)}
    finally:
        for hook in hooks:
            hook.remove()
    # the demo prior's attention sees less of the picture, so the two are no equals; the measurement is explained as well
    assert plain.residuals[-1][0] < 0.6 * plain.residuals[0][0] and report.residuals[-1][0] < 1.5 * plain.residuals[-1][0]
    assert report.denoiser_calls == plain.denoiser_calls and report.memory.endswith("tiles of 128 pixels")
    images = [lab.call("DMAP_Decode", latent={"samples": z}, vae=vae, keep_given=True, **large) for z in (tiled, whole)]
    assert images[0].shape == (1, HEIGHT, WIDTH, 3) and float((images[0] - images[1]).abs().mean()) < 0.1


@pytest.mark.thorough
def test_a_stock_sampler(lab, large):
    found, report = run(lab, large, lab.stock("ddpm"), tile=TILE, step="auto", strength=0.5)
    assert torch.isfinite(found).all() and report.residuals[-1][0] < 0.7 * report.residuals[0][0]


@pytest.mark.thorough
def test_a_latent_with_a_mask_keeps_the_rest(lab, large):
    given = latent(lab, large)
    given = {"samples": torch.randn(given["samples"].shape, generator=torch.Generator().manual_seed(3))}
    mask = torch.zeros(1, 17, 23)
    mask[..., :8] = 1
    guider = lab.guider(**large, tile=TILE)
    found = lab.sample(guider, lab.dmap(), latent=given | {"noise_mask": mask}, schedule=lab.sigmas(2, spacing="exponential"))
    torch.testing.assert_close(found[..., 8:], given["samples"][..., 8:])
    assert not torch.allclose(found[..., :8], given["samples"][..., :8], atol=0.1)


@pytest.mark.parametrize("tile", [64, 100, 129, 192 + 8])
def test_sizes_that_networks_cannot_halve(lab, large, tile):
    with pytest.raises(ValueError, match=f"DPSGuider: tile is {tile}; it must be 0, or a multiple of 64 pixels of at least 128"):
        lab.guider(**large, tile=tile)


def test_conditioning_that_cannot_be_cut(lab, large):
    positive = lab.problem(**large)["positive"]
    area = lab.call("ConditioningSetArea", conditioning=positive, width=64, height=64, x=0, y=0, strength=1.0)
    with pytest.raises(ValueError, match="DPSGuider: tile: the conditioning has areas, made for the whole picture"):
        run(lab, large, positive=area, tile=TILE)
    run_mask = lab.call("ConditioningSetMask", conditioning=positive, mask=torch.ones(1, 8, 8), set_cond_area="default", strength=1.0)
    with pytest.raises(ValueError, match="DPSGuider: tile: the conditioning has a mask"):
        run(lab, large, positive=run_mask, tile=TILE)
