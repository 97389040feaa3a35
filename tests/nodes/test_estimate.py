"""Estimate Degradation: what it gives to DPSGuider, and what it refuses."""

import pytest
import torch


def photo(lab, height=192, width=192, sigma=0.0, grain=0.0):
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)), (height, width), mode="nearest"
    )
    image = image.movedim(1, -1)
    if sigma or grain:
        image = lab.call(
            "DMAP_Degrade",
            image=image,
            operator=lab.call("DMAP_OperatorGaussianBlur", sigma=sigma, kernel_size=61),
            noise_sigma=grain,
            seed=0,
        )
    return (image.clamp(0, 1) * 255).round() / 255


def test_what_it_gives_is_a_problem(lab):
    image = photo(lab, sigma=2.0, grain=0.03)
    operator, measurement, text = lab.call("DMAP_EstimateDegradation", image=image)
    torch.testing.assert_close(measurement, image, rtol=0, atol=1e-6)
    assert operator.name == "Noisy" and operator.sigma == pytest.approx(0.03, rel=0.15)
    assert text.startswith("found: 192x192, colour, soft by ") and "\nrepair: Known Noise (Gaussian Blur (" in text
    assert lab.call("DMAP_EmptyMeasurementLatent", measurement=measurement, operator=operator, vae=lab.shared()[1], batch_size=1)[1:] == (
        192,
        192,
    )


def test_the_measurement_is_smaller_where_the_photo_had_been_enlarged(lab):
    small = torch.rand(1, 40, 50, 3, generator=torch.Generator().manual_seed(0))
    small = (small * 255).round() / 255
    image = small.repeat_interleave(3, 1).repeat_interleave(3, 2)
    operator, measurement, text = lab.call("DMAP_EstimateDegradation", image=image)
    torch.testing.assert_close(measurement, small, rtol=0, atol=1e-5)
    assert "enlarged 3 times by repeating pixels, from about 50x40" in text
    assert "SuperResolution" in str(operator.spec())


def test_nothing_to_repair_leaves_pictures_as_they_are(lab):
    image = torch.full((1, 64, 64, 3), 0.5)
    operator, measurement, text = lab.call("DMAP_EstimateDegradation", image=image)
    assert text.startswith("nothing to repair; here is what I see: 64x64, grey")
    again = lab.call("DMAP_Degrade", image=image, operator=operator, noise_sigma=0.0, seed=0)
    torch.testing.assert_close(again, image, rtol=0, atol=1e-6)
    torch.testing.assert_close(measurement, image, rtol=0, atol=1e-6)


def test_the_files_own_compression_is_taken(lab):
    jpeg = lab.call("DMAP_OperatorJpeg", quality=30, subsampling="4:2:2")
    operator, _, text = lab.call("DMAP_EstimateDegradation", image=photo(lab), jpeg=jpeg)
    assert "JPEG quality 30 4:2:2" in text and operator.spec() == jpeg.spec()
    blur = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=7)
    with pytest.raises(ValueError, match=r"^Estimate Degradation: jpeg is Gaussian Blur .*; give 'Operator: JPEG'"):
        lab.call("DMAP_EstimateDegradation", image=photo(lab), jpeg=blur)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 5, 7, 1), (1, 1, 64, 3), (3, 40, 40, 3)])
def test_small_pictures_grey_ones_and_batches(lab, shape):
    _, measurement, text = lab.call("DMAP_EstimateDegradation", image=torch.rand(shape))
    assert measurement.shape == (*shape[:-1], 3)
    assert ("the first of 3 pictures was looked at" in text) is (shape[0] == 3)
    assert "smaller than" in text


def test_what_is_no_picture_is_refused(lab):
    for image, message in (
        (torch.rand(1, 8, 8, 4), "alpha channel"),
        (torch.rand(1, 8, 8), "batch of pictures"),
        (torch.full((1, 8, 8, 3), float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=rf"^Estimate Degradation: image: .*{message}"):
            lab.call("DMAP_EstimateDegradation", image=image)
