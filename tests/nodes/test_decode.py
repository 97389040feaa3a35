"""DMAP Decode: the picture of the right size, and the pixels that were given."""

import pytest

# Not run here, only collected: torch and the pack are imported where ComfyUI is.


def given(lab, height, width, batch=1, hole=8):
    """(measurement, operator) of an inpainting with a hole in the upper left corner."""
    import torch

    measurement = torch.cat([lab.picture(seed, height, width) for seed in range(batch)])
    mask = torch.zeros(1, height, width)
    mask[:, :hole, :hole] = 1
    return measurement, lab.call("DMAP_OperatorInpainting", mask=mask)


def latent(lab, measurement, operator, batch=1):
    import torch

    vae = lab.shared()[1]
    empty, width, height = lab.call("DMAP_EmptyMeasurementLatent", measurement=measurement, operator=operator, vae=vae, batch_size=batch)
    noise = torch.randn(empty["samples"].shape, generator=torch.Generator().manual_seed(1))
    return {"samples": noise}, (height, width)


def decode(lab, latent, measurement, operator, keep_given=True):
    return lab.call("DMAP_Decode", latent=latent, vae=lab.shared()[1], measurement=measurement, operator=operator, keep_given=keep_given)


def test_a_latent_of_the_measurement(lab):
    """What VAE Encode makes of the enlarged picture, in the size of an empty one, once for every restoration."""
    import torch

    operator = lab.call("DMAP_OperatorSuperResolution", scale=2)
    measurement, vae = lab.picture(1, 15, 18), lab.shared()[1]  # of a picture of 36x30
    call = {"measurement": measurement, "operator": operator, "vae": vae}
    warm, width, height = lab.call("DMAP_EmptyMeasurementLatent", **call, batch_size=2, content="measurement")
    empty, *size = lab.call("DMAP_EmptyMeasurementLatent", **call, batch_size=2)
    assert warm["samples"].shape == empty["samples"].shape and [width, height] == size == [36, 30]
    assert torch.equal(warm["samples"][0], warm["samples"][1]) and not empty["samples"].any()
    decoded = vae.decode(warm["samples"])[:, :30, :36]
    enlarged = ((operator.hint(measurement.movedim(-1, 1) * 2 - 1) + 1) / 2).movedim(1, -1).clamp(0, 1)
    assert (decoded - enlarged).abs().mean() < 0.1 < (0.5 - enlarged).abs().mean()


def test_pixels_outside_the_mask_are_the_given_ones_to_the_bit(lab):
    measurement, operator = given(lab, 29, 37)
    z, _ = latent(lab, measurement, operator)
    restored = decode(lab, z, measurement, operator)
    plain = decode(lab, z, measurement, operator, keep_given=False)
    assert restored.shape == plain.shape == measurement.shape
    hole = operator.mask[0, 0] > 0
    assert (restored[:, ~hole] == measurement[:, ~hole]).all()
    assert (restored[:, hole] == plain[:, hole]).all()
    assert (plain[:, ~hole] != measurement[:, ~hole]).any()


@pytest.mark.parametrize("measurements, batch", [(1, 3), (3, 1)])
def test_a_batch(lab, measurements, batch):
    measurement, operator = given(lab, 24, 24, measurements)
    z, _ = latent(lab, measurement, operator, batch)
    restored = decode(lab, z, measurement, operator)
    hole = operator.mask[0, 0] > 0
    assert len(restored) == 3
    assert (restored[:, ~hole] == measurement.expand(3, -1, -1, -1)[:, ~hole]).all()


def test_an_odd_size_is_cut_to_the_operators(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=2)
    measurement = lab.picture(0, 15, 22)
    z, size = latent(lab, measurement, operator)
    restored = decode(lab, z, measurement, operator)
    assert size == tuple(restored.shape[1:3]) == (30, 44)
    whole = lab.call("VAEDecode", samples=z, vae=lab.shared()[1])
    assert tuple(whole.shape[1:3]) == (32, 48)
    assert (restored == whole[:, :30, :44]).all()


def test_where_nothing_is_to_cut_or_to_put_back_it_is_vae_decode(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    measurement = lab.picture(0, 4, 4)
    z, _ = latent(lab, measurement, operator)
    assert (decode(lab, z, measurement, operator) == lab.call("VAEDecode", samples=z, vae=lab.shared()[1])).all()


def test_a_latent_of_another_run_is_refused(lab):
    measurement, operator = given(lab, 24, 24)
    with pytest.raises(ValueError, match=r"DMAP Decode: latent.*3x3"):
        decode(lab, lab.empty(), measurement, operator)
    z, _ = latent(lab, measurement, operator, 2)
    with pytest.raises(ValueError, match=r"DMAP Decode: 2 pictures for 3 measurements"):
        decode(lab, z, measurement.expand(3, -1, -1, -1), operator)
