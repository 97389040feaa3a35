"""Tiles in ComfyUI: networks see no more than a tile, the picture is one, and what cannot be cut is refused by name."""

import importlib

import pytest
import torch
from variants import some_at_once

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

TILE = "128"
HEIGHT, WIDTH = 128, 180  # of a picture; 16x23 latents


def measured(lab, height, width):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=4)
    picture = lab.picture(1, height, width)
    return {"operator": operator, "measurement": lab.call("DMAP_Degrade", image=picture, operator=operator, noise_sigma=0.0, seed=0)}


@pytest.fixture(scope="module")
def large(lab):
    """A measurement of a picture that has two tiles across, of no whole latents."""
    return measured(lab, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def larger(lab):
    """Of one that has one more row than a tile, too: 17x23 latents."""
    return measured(lab, 136, WIDTH)


def latent(lab, large):
    made, _, _ = lab.call("DMAP_EmptyMeasurementLatent", vae=lab.shared()[1], batch_size=1, **large)
    return made


def run(lab, large, sampler=None, steps=4, **changes):
    guider = lab.guider(**large, **changes)
    sampler = lab.call("DMAP_DMAPSampler", K=1, step="auto", strength=0.7, jacobian="none", zeta=1.0) if sampler is None else sampler
    return lab.sample(guider, sampler, latent=latent(lab, large), schedule=lab.sigmas(steps, spacing="exponential")), guider.report


def watched(lab, large, **changes):
    """(latents, report, the sizes that each network saw) of a run."""
    model, vae = lab.shared()
    autoencoder, seen = vae.first_stage_model, {"unet": set(), "decoder": set(), "encoder": set()}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].add(tuple(inputs[0].shape[-2:])))
        for name, module in (
            ("unet", model.model.diffusion_model),
            ("decoder", autoencoder.taesd_decoder),
            ("encoder", autoencoder.taesd_encoder),
        )
    ]
    try:
        return *run(lab, large, **changes), seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def plain(lab, larger):
    """A run without tiles."""
    return watched(lab, larger)


@pytest.fixture(scope="module")
def in_tiles(lab, larger):
    """The same in tiles."""
    return watched(lab, larger, tile=TILE)


def test_a_tile_that_holds_all_changes_no_bit(lab, large):
    whole, report = run(lab, large, steps=1)
    tiled, told = run(lab, large, steps=1, tile="256")
    assert torch.equal(whole, tiled) and "tiles" not in report.memory and told.memory.endswith("tiles of 256 pixels")


@pytest.mark.parametrize("jacobian", some_at_once(["none", "exact"], ["none"], nightly=["exact"]))
def test_networks_see_a_tile_and_the_picture_is_as_good(lab, larger, jacobian, request):
    """Without the denoiser's Jacobian the runs are those that other tests take, too."""
    if jacobian == "none":
        runs = request.getfixturevalue("in_tiles"), request.getfixturevalue("plain")
    else:
        sampler = lab.call("DMAP_DMAPSampler", K=1, step="auto", strength=0.7, jacobian=jacobian, zeta=1.0)
        runs = watched(lab, larger, sampler=sampler, tile=TILE), watched(lab, larger, sampler=sampler)
    (tiled, report, seen), (whole, plain, seen_whole) = runs
    assert seen["unet"] == seen["decoder"] == {(16, 16)} and seen_whole["unet"] == {(17, 23)}
    vae = lab.shared()[1]
    # the demo prior's attention sees less of the picture, so the two are no equals; the measurement is explained as well
    assert plain.residuals[-1][0] < 0.6 * plain.residuals[0][0] and report.residuals[-1][0] < 1.5 * plain.residuals[-1][0]
    assert report.denoiser_calls == plain.denoiser_calls and report.memory.endswith("tiles of 128 pixels")
    images = [lab.call("DMAP_Decode", latent={"samples": z}, vae=vae, keep_given=True, **larger) for z in (tiled, whole)]
    assert images[0].shape == (1, 136, WIDTH, 3) and float((images[0] - images[1]).abs().mean()) < 0.1


@pytest.mark.parametrize("name", ["LATINO", "PSLD"])
def test_an_encoder_sees_a_tile_too(lab, large, name):
    """In a step of LATINO, and with its gradient in one of PSLD; before them the VAE is tried on the middle of the picture."""
    sampler = lab.call(f"DMAP_{name}Sampler", **({"zeta": 1.0, "gamma": 0.1} if name == "PSLD" else {}))
    found, _, seen = watched(lab, large, sampler=sampler, steps=2, tile=TILE)
    assert seen == {"unet": {(16, 16)}, "decoder": {(16, 16)}, "encoder": {(128, 128)}}
    assert torch.isfinite(found).all()


def test_the_latent_of_a_large_picture(lab, larger):
    """Encoded in tiles, it differs from the whole's by what the margin, of an encoder that is as wide as a tile of 128, leaves."""
    prior = importlib.import_module("dmap_pack.nodes.host.prior")
    model, vae = lab.shared()
    picture = lab.picture(1, 136, WIDTH).movedim(-1, 1) * 2 - 1
    whole, tiled = (
        prior.HostPrior(model.model, vae, [vae.first_stage_model], [], (136, WIDTH), tile).encode(picture).detach() for tile in (None, 16)
    )
    assert whole.shape == tiled.shape == (1, 4, 17, 23)
    assert 0 < float((whole - tiled).square().mean().sqrt()) < 0.005 * float(whole.std())


@pytest.mark.thorough
def test_a_stock_sampler(lab, large):
    found, report = run(lab, large, lab.stock("ddpm"), tile=TILE, step="auto", strength=0.5)
    assert torch.isfinite(found).all() and report.residuals[-1][0] < 0.7 * report.residuals[0][0]


@pytest.mark.thorough
def test_a_latent_with_a_mask_keeps_the_rest(lab, large):
    given = latent(lab, large)
    given = {"samples": torch.randn(given["samples"].shape, generator=torch.Generator().manual_seed(3))}
    mask = torch.zeros(1, 16, 23)
    mask[..., :8] = 1
    guider = lab.guider(**large, tile=TILE)
    found = lab.sample(guider, lab.dmap(), latent=given | {"noise_mask": mask}, schedule=lab.sigmas(2, spacing="exponential"))
    torch.testing.assert_close(found[..., 8:], given["samples"][..., 8:])
    assert not torch.allclose(found[..., :8], given["samples"][..., :8], atol=0.1)


def hints_of(lab, control, make):
    """What `make` returns, and every hint that the control's network was given meanwhile."""
    seen = []
    hook = control.control_model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hint"].clone()), with_kwargs=True)
    try:
        return make(), seen
    finally:
        hook.remove()


def applied_cse(lab, large):
    control, _, _ = lab.call("DMAP_CSEControlNetLoader", cse="dmap-demo-cse-sr4.safetensors")
    positive = lab.call(
        "DMAP_ApplyCSE",
        conditioning=lab.problem(**large)["positive"],
        cse=control,
        **large,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    return control, positive


@pytest.fixture(scope="module")
def with_cse(lab, large):
    return applied_cse(lab, large)


def test_a_cse_sees_its_tile_of_the_hint(lab, larger):
    control, positive = applied_cse(lab, larger)
    _, whole = hints_of(lab, control, lambda: run(lab, larger, steps=1, positive=positive))
    (found, report), tiles = hints_of(lab, control, lambda: run(lab, larger, steps=1, positive=positive, tile=TILE))
    assert {tuple(h.shape) for h in whole} == {(1, 3, 136, 184)} and {tuple(h.shape) for h in tiles} == {(1, 3, 128, 128)}
    picture = whole[0]
    places = [(top, left) for top in (0, 8) for left in (0, 56)]
    for hint, (top, left) in zip(tiles[: len(places)], places, strict=True):
        assert torch.equal(hint, picture[..., top : top + 128, left : left + 128])
    assert torch.isfinite(found).all() and report.memory.endswith("tiles of 128 pixels")
    again, _ = run(lab, larger, steps=1, positive=positive)  # the conditioning itself is whole again
    plain, _ = run(lab, larger, steps=1)
    assert not torch.equal(again, plain)


@pytest.mark.thorough
def test_a_batch_is_as_many_single_pictures(lab, large):
    operator = large["operator"]
    # 16 x 23 x 4 latents: where they are no multiple of 16, torch draws the last of a longer batch differently
    picture = lab.picture(1, HEIGHT, WIDTH)
    measurement = lab.call("DMAP_Degrade", image=picture, operator=operator, noise_sigma=0.0, seed=0)
    dps, found = lab.call("DMAP_DPSSampler", step="auto", strength=0.7, jacobian="none", zeta=1.0), []
    for pictures in (torch.cat([measurement, measurement.flip(2)]), measurement):
        given = {"operator": operator, "measurement": pictures}
        made, _, _ = lab.call("DMAP_EmptyMeasurementLatent", vae=lab.shared()[1], batch_size=1, **given)
        found.append(lab.sample(lab.guider(**given, tile=TILE), dps, latent=made, schedule=lab.sigmas(2, spacing="exponential")))
    assert len(found[0]) == 2 and not torch.allclose(found[0][0], found[0][1], atol=0.1)
    # rounding, amplified: by CPU and number of threads 0.00005 to 0.0008 of the deviation, with single latents up to 0.07 apart; the other picture is as far as any
    apart = [float((z - found[1]).square().mean().sqrt() / found[1].std()) for z in (found[0][:1], found[0][1:])]
    assert apart[0] < 0.02 and apart[1] > 0.3


def test_auto_takes_tiles_where_the_picture_is_much_larger(lab, large):
    _, report = run(lab, large, steps=1, tile="auto")  # 16 x 23 latents are less than a quarter more than 16 x 16
    assert "tiles" not in report.memory
    wider = measured(lab, HEIGHT, 208)
    made, _, _ = lab.call("DMAP_EmptyMeasurementLatent", vae=lab.shared()[1], batch_size=1, **wider)
    dps = lab.call("DMAP_DPSSampler", step="auto", strength=0.7, jacobian="none", zeta=1.0)
    auto, number = (lab.guider(**wider, tile=tile) for tile in ("auto", TILE))
    found, expected = (lab.sample(guider, dps, latent=made, schedule=lab.sigmas(2, spacing="exponential")) for guider in (auto, number))
    assert torch.equal(found, expected) and auto.report.memory.endswith("tiles of 128 pixels")


def out_of_memory(lab, large, after, **changes):
    """A run in whose `after`-th call of the whole picture's decoder the memory is at its end; (latents, report)."""
    decoder, calls = lab.shared()[1].first_stage_model.taesd_decoder, []

    def full(_, inputs):
        if inputs[0].shape[-2:] != (16, 16):
            calls.append(torch.is_grad_enabled())
            if len(calls) > after:
                raise torch.OutOfMemoryError("CUDA out of memory")

    hook = decoder.register_forward_pre_hook(full)
    try:
        return run(lab, large, **changes)
    finally:
        hook.remove()


def test_where_it_does_not_fit_it_goes_on_in_tiles(lab, larger, plain, in_tiles):
    """From the very step that failed, with the noise and the levels that were next."""
    expected = in_tiles[0]
    found, report = out_of_memory(lab, larger, after=0, tile="auto")
    whole = plain[0]
    assert report.memory == "fast, tiles of 128 pixels" and len(report.residuals) == 4
    assert not torch.equal(found, whole)
    # before it failed, the denoiser's first call saw the whole picture
    assert float((found - expected).square().mean()) < float((whole - expected).square().mean())
    later, report = out_of_memory(lab, larger, after=2, tile="auto")
    assert len(report.residuals) == 4 and report.memory == "fast, tiles of 128 pixels"
    residuals = plain[1].residuals
    assert report.residuals[:2] == residuals[:2] and report.residuals[2:] != residuals[2:]


def test_what_does_not_fit_either_way_says_what_would(lab, large):
    decoder = lab.shared()[1].first_stage_model.taesd_decoder

    def full(_, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = decoder.register_forward_pre_hook(full)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="DPSGuider: the memory does not suffice for a gradient of tiles of 128 pixels"):
            run(lab, large, tile="auto")
        with pytest.raises(torch.OutOfMemoryError, match="of the whole picture of 180x128.*tile auto"):
            run(lab, large, tile="whole")
    finally:
        hook.remove()


@pytest.mark.thorough
def test_a_picture_of_no_whole_latents_comes_back_in_its_own_size(lab):
    """211 x 140: what the latents have too much is cropped."""
    operator = lab.call("DMAP_OperatorGaussianBlur", sigma=2.0, kernel_size=61)
    given = {"operator": operator}
    given["measurement"] = lab.call("DMAP_Degrade", image=lab.picture(2, 140, 211), operator=operator, noise_sigma=0.0, seed=0)
    made, width, height = lab.call("DMAP_EmptyMeasurementLatent", vae=lab.shared()[1], batch_size=1, **given)
    guider = lab.guider(**given, tile="auto")
    dps = lab.call("DMAP_DPSSampler", step="auto", strength=0.7, jacobian="none", zeta=1.0)
    latents = lab.sample(guider, dps, latent=made, schedule=lab.sigmas(2, spacing="exponential"))
    image = lab.call("DMAP_Decode", latent={"samples": latents}, vae=lab.shared()[1], keep_given=True, **given)
    assert (width, height) == (211, 140) and image.shape == (1, 140, 211, 3) and guider.report.memory.endswith("tiles of 128 pixels")
    assert guider.report.mismatch and not any("size" in warning for warning in guider.report.warnings)


@pytest.mark.parametrize("tile", ["64", "100", "129", "200"])
def test_sizes_that_networks_cannot_halve(lab, large, tile):
    with pytest.raises(ValueError, match=f"DPSGuider: tile is {tile}; it must be auto, whole, or a multiple of 64 pixels of at least 128"):
        lab.guider(**large, tile=tile)


def test_conditioning_that_cannot_be_cut(lab, large, with_cse):
    positive = lab.problem(**large)["positive"]
    area = lab.call("ConditioningSetArea", conditioning=positive, width=64, height=64, x=0, y=0, strength=1.0)
    mask = lab.call("ConditioningSetMask", conditioning=positive, mask=torch.ones(1, 8, 8), set_cond_area="default", strength=1.0)
    pooling = with_cse[0].copy()
    pooling.global_average_pooling = True
    pooled = [[tokens, {**values, "control": pooling.set_cond_hint(torch.zeros(1, 3, 8, 8))}] for tokens, values in positive]
    for conditioning, words in ((area, "areas"), (mask, "a mask"), (pooled, "ControlNet dmap-demo-cse-sr4.safetensors")):
        with pytest.raises(ValueError, match=f"DPSGuider: tile: the conditioning has {words}, made for the whole picture"):
            run(lab, large, positive=conditioning, tile=TILE)


@pytest.mark.thorough
def test_auto_leaves_such_conditioning_whole_and_says_so(lab, large):
    wider = measured(lab, HEIGHT, 208)
    made, _, _ = lab.call("DMAP_EmptyMeasurementLatent", vae=lab.shared()[1], batch_size=1, **wider)
    positive = lab.problem(**wider)["positive"]
    area = lab.call("ConditioningSetArea", conditioning=positive, width=64, height=64, x=0, y=0, strength=1.0)
    guider = lab.guider(**wider, tile="auto", positive=area)
    lab.sample(guider, lab.dps(), latent=made, schedule=lab.sigmas(1, spacing="exponential"))
    assert "tiles" not in guider.report.memory and any("the conditioning has areas" in warning for warning in guider.report.warnings)
