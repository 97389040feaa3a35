"""What the latent that goes into the sampler does: partial denoising, noise masks, sizes."""

import pytest
import torch


def encoded(lab, image):
    return lab.call("VAEEncode", pixels=image, vae=lab.shared()[1])


@pytest.fixture(params=["dps", "dmap", "ddpm"])
def sampler(lab, request):
    return {"dps": lab.dps, "dmap": lab.dmap, "ddpm": lambda: lab.stock("ddpm")}[request.param]()


def test_partial_denoising_keeps_what_it_was_given(lab, sampler):
    given = encoded(lab, lab.picture(seed=3))
    guider = lab.guider(zeta=0.1)

    def distance(**settings):
        return float((lab.sample(guider, sampler, latent=given, schedule=lab.sigmas(**settings)) - given["samples"]).norm())

    assert distance(start=0.1) < distance(start=0.4) < 0.8 * distance()


def test_a_noise_mask_keeps_the_rest_of_the_latent(lab, sampler):
    mask = torch.zeros(1, lab.SIZE, lab.SIZE)
    mask[..., : lab.SIZE // 2] = 1
    given = encoded(lab, lab.picture(seed=3))
    inside = lab.shared()[0].model.process_latent_in(given["samples"])
    seen = []
    latents = lab.watch(lab.guider(), sampler, lambda *event: seen.append(event), latent={**given, "noise_mask": mask})
    half = latents.shape[-1] // 2
    torch.testing.assert_close(latents[..., half:], given["samples"][..., half:], rtol=0, atol=1e-4 * float(given["samples"].std()))
    assert float((latents - given["samples"])[..., :half].abs().min()) > 1e-3
    for _, x0, _, _ in seen:  # the rest is known at every step, so that what is restored can join on to it
        torch.testing.assert_close(x0[..., half:], inside[..., half:], rtol=0, atol=1e-4 * float(inside.std()))


@pytest.mark.parametrize(("height", "width", "scale"), [(7, 9, 4), (5, 3, 8), (10, 10, 3)])
def test_sizes(lab, height, width, scale):
    """The latent is rounded up where the VAE's factor does not divide the picture, and what is beyond the picture does not count."""
    operator = lab.call("DMAP_OperatorSuperResolution", scale=scale)
    inputs = {"measurement": lab.picture(height=height, width=width), "operator": operator}
    latent, *size = lab.call("DMAP_EmptyMeasurementLatent", **inputs, vae=lab.shared()[1], batch_size=1)
    assert size == [width * scale, height * scale]
    assert tuple(latent["samples"].shape) == (1, 4, -(-height * scale // 8), -(-width * scale // 8))
    guider = lab.guider(**inputs)
    latents = lab.sample(guider, lab.dmap(), steps=2, latent=latent)
    assert latents.shape == latent["samples"].shape
    (last,) = guider.report.residuals[-1]
    assert lab.residual(latents, **inputs) == pytest.approx(last, rel=1e-4)


def test_a_size_that_the_unet_has_to_halve(lab):
    """3x5 latents: the network halves them, rounded, and has to come back to the same size."""
    latent = lab.empty(height=3, width=5)
    inputs = {"operator": lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=9), "measurement": lab.picture(height=24, width=40)}
    for sampler in (lab.dmap(), lab.stock("euler")):
        assert torch.isfinite(lab.sample(lab.guider(**inputs), sampler, steps=2, latent=latent)).all()


def test_the_latent_is_not_written_to(lab, sampler):
    given = encoded(lab, lab.picture(seed=3))
    before = given["samples"].clone()
    lab.sample(lab.guider(), sampler, steps=2, latent=given)
    assert torch.equal(given["samples"], before)
