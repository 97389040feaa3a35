"""Operators, from their nodes to what they measure."""

import pytest
import torch

pytestmark = pytest.mark.hosts("one")

KERNEL = torch.tensor([[0.0, 0.2, 0.0], [0.1, 1.0, 0.3], [0.0, 0.0, 0.5], [0.0, 0.1, 0.0], [0.2, 0.0, 0.0]])


def mask(lab):
    mask = torch.zeros(1, lab.SIZE, lab.SIZE)
    mask[:, 8:20, 4:28] = 1
    return mask


def operators(lab):
    """By name: (the node's operator, the operator as dmap_core makes it)."""
    o = lab.core.operators
    kernel = KERNEL[None, :, :, None].expand(-1, -1, -1, 3)
    made = {
        "super-resolution": ("SuperResolution", {"scale": 4}, o.SuperResolution(4)),
        "gaussian blur": ("GaussianBlur", {"sigma": 1.5, "kernel_size": 9}, o.GaussianBlur(kernel_size=9, sigma=1.5)),
        "motion blur": ("MotionBlur", {"length": 5.0, "angle": 30.0}, o.MotionBlur(length=5.0, angle=30.0)),
        "kernel blur": ("KernelBlur", {"kernel": kernel}, o.KernelBlur(tuple(map(tuple, KERNEL.tolist())))),
        "inpainting": ("Inpainting", {"mask": mask(lab)}, o.Inpainting(mask(lab)[0])),
        "grayscale": ("Grayscale", {}, o.Grayscale()),
    }
    pairs = {name: (lab.call(f"DMAP_Operator{node}", **inputs), core) for name, (node, inputs, core) in made.items()}
    parts = [pairs[name] for name in ("grayscale", "gaussian blur", "motion blur", "super-resolution")]
    slots = dict(zip(("first", "second", "third", "fourth"), (node for node, _ in parts), strict=True))
    pairs["compose"] = (lab.call("DMAP_OperatorCompose", **slots), o.Compose(tuple(core for _, core in parts)))
    return pairs


OPERATORS = ["super-resolution", "gaussian blur", "motion blur", "kernel blur", "inpainting", "grayscale", "compose"]


def degrade(lab, image, operator, noise_sigma=0.0, seed=0):
    return lab.call("DMAP_Degrade", image=image, operator=operator, noise_sigma=noise_sigma, seed=seed)


@pytest.mark.parametrize("name", OPERATORS)
def test_degrade_is_the_operator(lab, name):
    operator, core = operators(lab)[name]
    image = torch.cat([lab.picture(0), lab.picture(1)])
    measurement = degrade(lab, image, operator)
    expected = (core(lab.as_core(image)) + 1) / 2
    size = core.measurement_size((lab.SIZE, lab.SIZE))
    assert tuple(measurement.shape) == (2, *size, 3)
    torch.testing.assert_close(measurement, expected.expand(-1, 3, -1, -1).movedim(1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_measurement_leads_back_to_the_size_of_its_picture(lab, name):
    operator, _ = operators(lab)[name]
    measurement = degrade(lab, lab.picture(), operator)
    latent, width, height = lab.call(
        "DMAP_EmptyMeasurementLatent", measurement=measurement, operator=operator, vae=lab.shared()[1], batch_size=1
    )
    assert (width, height) == (lab.SIZE, lab.SIZE)
    assert latent["samples"].shape == lab.empty()["samples"].shape


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_guides(lab, name):
    """Its own picture has a residual of almost nothing, and a run steps towards the measurement."""
    operator, core = operators(lab)[name]
    inputs = {"operator": operator, "measurement": degrade(lab, lab.picture(), operator)}
    y = lab.as_core(inputs["measurement"])[:, : core.channels()]
    assert float(core.distance(core(lab.as_core(lab.picture())), y)) < 1e-4
    schedule = torch.tensor([2.0, 1.9, 0.0])
    residuals = []
    for zeta in (0.3, 0.001):
        guider = lab.guider(**inputs)
        lab.sample(guider, lab.dmap(zeta=zeta, K=3), schedule=schedule)
        residuals.append(guider.report.residuals[0][0])
    assert residuals[0] < residuals[1]


@pytest.mark.parametrize("noise_sigma", [0.02, 0.2])
def test_noise_has_the_deviation_that_was_asked_for(lab, noise_sigma):
    operator = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=9)
    image = lab.picture(height=64, width=64)
    clean = degrade(lab, image, operator)
    noise = degrade(lab, image, operator, noise_sigma) - clean
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 * noise_sigma / n**0.5
    assert float(noise.std()) == pytest.approx(noise_sigma, rel=5 / (2 * n) ** 0.5)


def test_noise_follows_its_seed(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=4)
    image = torch.cat([lab.picture(0), lab.picture(0)])
    first, again, other = (degrade(lab, image, operator, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.01)
    assert not torch.allclose(first[0], first[1], atol=0.01), "both pictures of a batch got the same noise"
    assert torch.equal(first[:1], degrade(lab, image[:1], operator, 0.1, 1))


def test_the_picture_is_not_written_to(lab):
    image = lab.picture()
    before = image.clone()
    for operator, _ in operators(lab).values():
        degrade(lab, image, operator, 0.1)
    assert torch.equal(image, before)


def test_compose_is_one_after_the_other(lab):
    pairs = operators(lab)
    first, second = pairs["inpainting"][0], pairs["super-resolution"][0]
    both = lab.call("DMAP_OperatorCompose", first=first, second=second)
    nested = lab.call("DMAP_OperatorCompose", first=both, second=pairs["kernel blur"][0])
    image = lab.picture()
    expected = degrade(lab, degrade(lab, image, first), second)
    torch.testing.assert_close(degrade(lab, image, both), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(degrade(lab, image, nested), degrade(lab, expected, pairs["kernel blur"][0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["dps", "dmap", "ddpm"])
def test_inpainting_ignores_what_the_hole_shows(lab, sampler):
    sampler = {"dps": lab.dps, "dmap": lab.dmap, "ddpm": lambda: lab.stock("ddpm")}[sampler]()
    operator, hole = operators(lab)["inpainting"][0], mask(lab)[..., None]
    grey, red = lab.picture(), lab.picture()
    grey, red = grey * (1 - hole) + 0.5 * hole, red * (1 - hole) + torch.tensor([1.0, 0.0, 0.0]) * hole
    results = [lab.sample(lab.guider(operator=operator, measurement=y), sampler, steps=2) for y in (grey, red)]
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", ["single", "batch"])
def test_masks_as_nodes_give_them(lab, shape):
    """LoadImageMask gives a batch of one, some nodes a bare (H, W)."""
    image = lab.picture()
    given = mask(lab)[0] if shape == "single" else mask(lab)
    measurement = degrade(lab, image, lab.call("DMAP_OperatorInpainting", mask=given))
    known = mask(lab)[0] < 0.5
    torch.testing.assert_close(measurement[0][known], image[0][known], rtol=0, atol=1e-6)
    torch.testing.assert_close(measurement[0][~known], torch.full_like(image[0][~known], 0.5), rtol=0, atol=1e-6)


def test_a_mask_for_each_picture(lab):
    masks = torch.cat([mask(lab), mask(lab).flip(1)])
    operator = lab.call("DMAP_OperatorInpainting", mask=masks)
    images = torch.cat([lab.picture(0), lab.picture(1)])
    both = lab.sample(lab.guider(operator=operator, measurement=images), lab.dps(), steps=2, latent=lab.empty(batch=2))
    alone = lab.guider(operator=lab.call("DMAP_OperatorInpainting", mask=masks[:1]), measurement=images[:1])
    torch.testing.assert_close(both[:1], lab.sample(alone, lab.dps(), steps=2), rtol=0, atol=1e-3 * float(both.std()))


def test_a_colour_picture_serves_as_a_grey_measurement(lab):
    grey = lab.call("DMAP_OperatorGrayscale")
    image = lab.picture()
    luma = degrade(lab, image, grey)
    results = [lab.sample(lab.guider(operator=grey, measurement=y), lab.dps(), steps=2) for y in (image, luma, luma[..., :1])]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4 * float(results[0].std()))
