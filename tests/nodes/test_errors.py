"""What cannot work is refused before the model runs, with the name of the input and a way out."""

import contextlib
import copy

import pytest
import torch


@pytest.fixture
def refused(lab):
    """A context in which a ValueError must be raised that holds all of the words. It gives a model which must not be called."""
    model, calls = lab.counting(lab.shared()[0])

    @contextlib.contextmanager
    def check(*words):
        with pytest.raises(ValueError) as error:
            yield model
        assert [word for word in words if word not in str(error.value)] == [], str(error.value)
        assert calls == [], f"refused only after the model had been called: {error.value}"

    return check


def superres(lab, scale):
    return lab.call("DMAP_OperatorSuperResolution", scale=scale)


def blur(lab):
    return lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=9)


def mask(lab, height=None, width=None, value=0.0):
    mask = torch.full((1, height or lab.SIZE, width or lab.SIZE), value)
    mask[:, 4:8, 4:8] = 1
    return mask


# sizes


@pytest.mark.parametrize("sampler", ["dps", "dmap", "euler"])
def test_a_latent_of_another_size(lab, refused, sampler):
    sampler = {"dps": lab.dps, "dmap": lab.dmap, "euler": lambda: lab.stock("euler")}[sampler]()
    with refused("latent_image", "64x64 latents", "100x100", "800x800", "Empty Measurement Latent") as model:
        guider = lab.guider(model=model, measurement=lab.picture(height=100, width=100))
        lab.sample(guider, sampler, latent=lab.empty(height=64, width=64))


def test_a_latent_with_other_channels(lab, refused):
    with refused("latent_image", "16", "channels") as model:
        lab.sample(lab.guider(model=model), lab.dps(), latent={"samples": torch.ones(1, 16, 4, 4)})


def test_a_scale_that_does_not_divide(lab, refused):
    with refused("36x20", "crop it to 32x16", "another scale"):
        lab.call("DMAP_Degrade", image=lab.picture(height=20, width=36), operator=superres(lab, 8), noise_sigma=0.0, seed=0)


def test_a_kernel_larger_than_the_picture(lab, refused):
    with refused("12x12", "too small", "12 pixels") as model:
        operator = lab.call("DMAP_OperatorGaussianBlur", sigma=3.0, kernel_size=61)
        lab.guider(model=model, operator=operator, measurement=lab.picture(height=12, width=12))


# masks


@pytest.mark.parametrize(("value", "words"), [(0.0, ("empty", "invert")), (1.0, ("full", "invert"))])
def test_a_mask_without_hole_or_without_rest(lab, refused, value, words):
    with refused("mask", *words):
        lab.call("DMAP_OperatorInpainting", mask=torch.full((1, 32, 32), value))


def test_a_mask_of_another_size(lab, refused):
    operator = lab.call("DMAP_OperatorInpainting", mask=mask(lab, 16, 24))
    with refused("mask", "24x16", "32x32", "same size") as model:
        lab.guider(model=model, operator=operator, measurement=lab.picture())
    with refused("mask", "24x16", "32x32", "same size"):
        lab.call("DMAP_Degrade", image=lab.picture(), operator=operator, noise_sigma=0.0, seed=0)
    with refused("mask", "24x16", "32x32", "same size"):
        lab.call("DMAP_EmptyMeasurementLatent", measurement=lab.picture(), operator=operator, vae=lab.shared()[1], batch_size=1)


def test_more_masks_than_pictures(lab, refused):
    operator = lab.call("DMAP_OperatorInpainting", mask=torch.cat([mask(lab), mask(lab)]))
    with refused("mask", "one per picture") as model:
        lab.sample(lab.guider(model=model, operator=operator, measurement=lab.picture()), lab.dps())


# pictures


def picture_with(lab, **values):
    image = lab.picture()
    if "alpha" in values:
        image = torch.cat([image, torch.ones_like(image[..., :1])], dim=-1)
    if "value" in values:
        image[0, 3, 5, 1] = values["value"]
    return image * values.get("factor", 1)


PICTURES = {
    "alpha": ({"alpha": 1}, ("alpha", "Split Image with Alpha")),
    "nan": ({"value": float("nan")}, ("1 values are NaN", "look at the node")),
    "infinite": ({"value": float("inf")}, ("infinite", "look at the node")),
    "bytes": ({"factor": 255}, ("0..1", "divide by 255")),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_bad_picture(lab, refused, kind):
    changes, words = PICTURES[kind]
    bad, operator = picture_with(lab, **changes), blur(lab)
    with refused("measurement", *words) as model:
        lab.guider(model=model, operator=operator, measurement=bad)
    with refused("measurement", *words):
        lab.call("DMAP_EmptyMeasurementLatent", measurement=bad, operator=operator, vae=lab.shared()[1], batch_size=1)
    with refused("image", *words):
        lab.call("DMAP_Degrade", image=bad, operator=operator, noise_sigma=0.0, seed=0)
    with refused("kernel", *words):
        lab.call("DMAP_OperatorKernelBlur", kernel=bad[:, :5, :7] if kind == "alpha" else bad[:, :7, :9])


def test_a_grey_measurement_of_a_colour_operator(lab, refused):
    with refused("measurement", "1 channel", "Gaussian Blur", "Grayscale") as model:
        lab.guider(model=model, operator=blur(lab), measurement=lab.picture()[..., :1])


def test_degrading_a_grey_picture(lab, refused):
    with refused("image", "1 channel", "RGB"):
        lab.call("DMAP_Degrade", image=lab.picture()[..., :1], operator=blur(lab), noise_sigma=0.0, seed=0)


@pytest.mark.parametrize("sampler", ["dps", "euler"])
def test_a_batch_that_does_not_fit(lab, refused, sampler):
    sampler = lab.dps() if sampler == "dps" else lab.stock("euler")
    pictures = torch.cat([lab.picture(0, 4, 4), lab.picture(1, 4, 4)])
    with refused("latent_image", "3 latents", "2 measurements", "one per latent") as model:
        lab.sample(lab.guider(model=model, measurement=pictures), sampler, latent=lab.empty(batch=3))


def test_a_batch_of_batches(lab, refused):
    pictures = torch.cat([lab.picture(0), lab.picture(1)])
    with refused("batch_size", "2 measurements", "leave it at 1"):
        lab.call("DMAP_EmptyMeasurementLatent", measurement=pictures, operator=blur(lab), vae=lab.shared()[1], batch_size=3)


# operators


@pytest.mark.parametrize(("height", "width"), [(4, 5), (5, 4), (6, 6)])
def test_a_kernel_with_even_sides(lab, refused, height, width):
    with refused("kernel", f"({height}, {width})", "odd sides"):
        lab.call("DMAP_OperatorKernelBlur", kernel=torch.rand(1, height, width, 3))


def test_a_black_kernel_and_two_kernels(lab, refused):
    with refused("kernel", "sum above 0"):
        lab.call("DMAP_OperatorKernelBlur", kernel=torch.zeros(1, 5, 5, 3))
    with refused("kernel", "batch of 2", "give one"):
        lab.call("DMAP_OperatorKernelBlur", kernel=torch.ones(2, 5, 5, 3))


def test_colour_that_is_lost_twice(lab, refused):
    grey = lab.call("DMAP_OperatorGrayscale")
    with refused("Grayscale", "first") as model:
        operator = lab.call("DMAP_OperatorCompose", first=grey, second=grey)
        lab.sample(lab.guider(model=model, operator=operator, measurement=lab.picture()), lab.dps())


# model and VAE


@pytest.mark.parametrize("node", ["guider", "scheduler"])
def test_an_image_to_image_model(lab, refused, node):
    with refused("model", "image-to-image", "Stable Diffusion 1.5, 2.0, 2.1, SDXL or 3.5") as model:
        other = lab.call("ModelSamplingDiscrete", model=model, sampling="img_to_img", zsnr=False)
        if node == "guider":
            lab.guider(model=other)
        else:
            lab.call("DMAP_DMAPScheduler", model=other, steps=3)


def test_a_video_model(lab, refused):
    with refused("model", "video", "Stable Diffusion 1.5, 2.0, 2.1, SDXL or 3.5") as model:
        model.add_object_patch("latent_format", lab.comfy.latent_formats.Wan21())
        lab.guider(model=model)


def test_a_video_model_with_latents_of_pictures(lab, refused, monkeypatch):
    with refused("model", "video", "Stable Diffusion 1.5, 2.0, 2.1, SDXL or 3.5") as model:
        monkeypatch.setitem(model.model.model_config.unet_config, "use_temporal_resblock", True)
        lab.guider(model=model)


def test_a_vae_with_other_channels(lab, refused):
    from comfy.taesd.taesd import TAESD

    vae = lab.comfy.sd.VAE(sd=TAESD(latent_channels=16).state_dict())
    with refused("vae", "16 latent channels", "4", "belongs to the model") as model:
        lab.guider(model=model, vae=vae)


def test_a_vae_that_is_not_one_of_pictures(lab, refused):
    video, other_range = copy.copy(lab.shared()[1]), copy.copy(lab.shared()[1])
    video.downscale_ratio = (lambda frames: frames, 8, 8)
    other_range.process_output = lambda image: image
    for vae in (video, other_range):
        with refused("vae", "still pictures", "belongs to the model") as model:
            lab.guider(model=model, vae=vae)


def test_unconditional_without_a_context(lab, refused, monkeypatch):
    with refused("model", "no cross-attention", "needs no DMAPUnconditional") as model:
        monkeypatch.setitem(model.model.model_config.unet_config, "context_dim", None)
        lab.call("DMAP_DMAPUnconditional", model=model)


# samplers


@pytest.mark.parametrize("guider", ["CFGGuider", "BasicGuider"])
@pytest.mark.parametrize("sampler", ["DPS", "DMAP"])
def test_a_sampler_of_the_pack_with_a_stock_guider(lab, refused, guider, sampler):
    with refused(sampler, "DPSGuider", "guider input") as model:
        if guider == "CFGGuider":
            guider = lab.stock_guider(model=model)
        else:
            guider = lab.call("BasicGuider", model=model, conditioning=lab.problem()["positive"])
        lab.sample(guider, lab.dps() if sampler == "DPS" else lab.dmap())


SCHEDULES = {
    "above zero": ([8.0, 4.0, 1.0], ("sigmas", "end at 0", "whole schedule"), ("dps", "dmap")),
    "rising": ([1.0, 4.0, 0.0], ("sigmas", "fall", "flip"), ("dps", "dmap", "euler")),
    "level": ([4.0, 4.0, 0.0], ("sigmas", "fall"), ("dps", "dmap", "euler")),
    "one level": ([4.0], ("sigmas", "at least two"), ("dps", "dmap", "euler")),
    "nan": ([4.0, float("nan"), 0.0], ("sigmas", "NaN"), ("dps", "dmap", "euler")),
}


@pytest.mark.parametrize("name", ["dps", "dmap", "euler"])
def test_no_level_at_all(lab, name):
    """denoise 0: as with ComfyUI's own guiders the latent comes back as it is, and no model is called."""
    sampler = {"dps": lab.dps, "dmap": lab.dmap, "euler": lambda: lab.stock("euler")}[name]()
    latent = {"samples": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))}
    model, calls = lab.counting(lab.shared()[0])
    samples = lab.sample(lab.guider(model=model), sampler, latent=latent, schedule=torch.tensor([]))
    assert torch.equal(samples, latent["samples"]) and calls == []
    assert torch.equal(samples, lab.sample(lab.stock_guider(model=model), lab.stock("euler"), latent=latent, schedule=torch.tensor([])))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_bad_schedule(lab, refused, kind):
    levels, words, samplers = SCHEDULES[kind]
    for name in samplers:
        sampler = {"dps": lab.dps, "dmap": lab.dmap, "euler": lambda: lab.stock("euler")}[name]()
        with refused(*words) as model:
            lab.sample(lab.guider(model=model), sampler, schedule=torch.tensor(levels))


@pytest.mark.parametrize("zeta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_zeta_without_meaning(lab, refused, zeta):
    for make in (lab.guider, lab.dps, lab.dmap):
        with refused("zeta", "above 0"):
            make(zeta=zeta)


def test_settings_without_meaning(lab, refused):
    for eta in (-0.1, 1.1, float("nan")):
        for make in (lab.dps, lab.dmap):
            with refused("eta", "between 0"):
                make(eta=eta)
    with refused("K", "at least 1"):
        lab.dmap(K=0)
    with refused("cfg", "negative", "set cfg to 1") as model:
        lab.guider(model=model, cfg=2.0)
    with refused("memory", "auto, fast, lean, checkpoint") as model:
        lab.sample(lab.guider(model=model, memory="small"), lab.dps())


def test_dmap_without_noise(lab, refused):
    with refused("eta", "above 0") as model:
        lab.sample(lab.guider(model=model), lab.dmap(eta=0.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, ("steps", "at least 1")),
        ({"steps": 3, "start": 0.2, "end": 0.5}, ("start", "end", "0 <= end < start <= 1")),
        ({"steps": 3, "start": 0.0}, ("start", "0 <= end < start <= 1")),
    ],
)
def test_a_scheduler_without_a_schedule(lab, refused, settings, words):
    with refused(*words) as model:
        lab.call("DMAP_DMAPScheduler", model=model, **settings)


def test_a_report_without_a_run(lab, refused):
    with refused("guider", "no finished run", "DPSGuider"):
        lab.call("DMAP_SamplingReport", guider=lab.guider(), latent=lab.empty())
    with refused("guider", "no finished run", "DPSGuider"):
        lab.call("DMAP_SamplingReport", guider=lab.stock_guider(), latent=lab.empty())
