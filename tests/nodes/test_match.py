"""Match Measurement: known pixels, noise, what it says, and what it refuses."""

import pytest
import torch

pytestmark = pytest.mark.hosts("one")


def smooth(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).movedim(-1, 1)
    return (torch.nn.functional.avg_pool2d(x, 5, 1, 2) * 0.6 + 0.5).clamp(0.05, 0.95).movedim(1, -1)


def eight_bits(x):
    return (x * 255).round() / 255


def degraded(lab, image, operator):
    return eight_bits(lab.call("DMAP_Degrade", image=image, operator=operator, noise_sigma=0.0, seed=0))


def test_the_result_explains_the_measurement(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=4)
    original, restored = smooth(1, 32, 48, 3, seed=1), smooth(1, 32, 48, 3, seed=2)
    y = degraded(lab, original, operator)
    matched, text = lab.call("DMAP_MatchMeasurement", image=restored, measurement=y, operator=operator)
    again = lab.call("DMAP_Degrade", image=matched, operator=operator, noise_sigma=0.0, seed=0)
    assert float((again - y).square().mean().sqrt()) <= 0.5 / 255
    assert (matched - original).norm() < (restored - original).norm()
    assert "explains your picture to within 1 level" in text and "rounding to 8 bits (0.29 levels)." in text
    assert matched.shape == restored.shape and matched.min() >= 0 and matched.max() <= 1


def test_known_pixels_come_back_to_the_bit(lab):
    mask = torch.zeros(1, 32, 48)
    mask[:, 8:20, 10:30] = 1
    operator = lab.call("DMAP_OperatorInpainting", mask=mask)
    given, restored = torch.rand(2, 32, 48, 3), smooth(2, 32, 48, 3)
    for feather in (0.0, 4.0):
        matched, text = lab.call("DMAP_MatchMeasurement", image=restored, measurement=given, operator=operator, feather=feather)
        hole = (mask > 0.5).unsqueeze(-1).expand_as(given)
        assert torch.equal(matched[~hole], given[~hole])
        assert torch.equal(matched[hole], restored[hole]) is (feather == 0)
        assert "-> 0.0 of 255" in text


def test_noise_is_not_put_back(lab):
    operator = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=7)
    y = degraded(lab, smooth(1, 32, 48, 3, seed=1), operator) + 5 / 255 * torch.randn(1, 32, 48, 3)
    call = {"image": smooth(1, 32, 48, 3, seed=2), "measurement": y}
    _, text = lab.call("DMAP_MatchMeasurement", operator=operator, noise=5.0, **call)
    assert "Noise: 5.0 levels" in text and "which its noise of 5.0 covers" in text
    known = lab.call("DMAP_OperatorNoise", operator=operator, sigma=5 / 255)
    assert lab.call("DMAP_MatchMeasurement", operator=known, **call)[1] == text
    _, text = lab.call("DMAP_MatchMeasurement", operator=operator, noise=0.1, **call)
    assert "rounding to 8 bits (0.29 levels), as 0.1 is below it" in text and "could not be reached" in text


def test_a_blur_that_is_a_little_off_spoils_no_picture(lab):
    """Two pictures, of which one has the blur that is said: matched it shows the truth. The other is left alone when careful, and it is said in any case."""
    true, said = (lab.call("DMAP_OperatorMotionBlur", length=length, angle=30.0) for length in (9.0, 13.0))
    original = smooth(2, 48, 64, 3, seed=1)
    y = torch.cat([degraded(lab, original[:1], said), degraded(lab, original[1:], true)])
    restored = (original + 0.01 * smooth(2, 48, 64, 3, seed=2)).clamp(0, 1)
    call = {"image": restored, "measurement": y, "operator": said}
    matched, text = lab.call("DMAP_MatchMeasurement", **call)
    apart = [float((matched[i] - original[i]).square().mean().sqrt()) * 255 for i in (0, 1)]
    assert apart[0] < 3 and apart[1] > 12 and "matching moves it by" in text and "left as they were" not in text
    kept, told = lab.call("DMAP_MatchMeasurement", careful=True, **call)
    assert torch.equal(kept[0], matched[0]) and torch.allclose(kept[1], restored[1], atol=1e-6)
    assert "1 of 2 pictures were left as they were: the picture misses the measurement by" in told
    one = {"image": restored[1:], "measurement": y[1:], "operator": said}
    kept, told = lab.call("DMAP_MatchMeasurement", careful=True, **one)
    assert torch.allclose(kept, restored[1:], atol=1e-6) and told.startswith("Not matched: the picture misses")
    noisy = degraded(lab, original, said) + 5 / 255 * torch.randn(2, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    kept, told = lab.call("DMAP_MatchMeasurement", careful=True, image=restored, measurement=noisy, operator=said)
    assert torch.allclose(kept, restored, atol=1e-6) and "grain that was not said" in told
    _, told = lab.call("DMAP_MatchMeasurement", careful=True, image=restored, measurement=noisy, operator=said, noise=5.0)
    assert not told.startswith("Not")


def test_a_jpeg(lab):
    """The picture compresses to the given one."""
    jpeg = lab.call("DMAP_OperatorJpeg", quality=30, subsampling="4:2:0", rounding="straight-through")
    good = torch.rand(1, 8, 8, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    y = lab.call("DMAP_Degrade", image=good, operator=jpeg, noise_sigma=0.0, seed=0)
    matched, text = lab.call("DMAP_MatchMeasurement", image=torch.full_like(good, 0.5), measurement=y, operator=jpeg)
    again = lab.call("DMAP_Degrade", image=matched, operator=jpeg, noise_sigma=0.0, seed=0)
    assert "explains your picture" in text and (again - y).square().mean().sqrt() < 4 / 255 < (0.5 - y).square().mean().sqrt()


def test_what_is_refused(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=4)
    call = {"image": torch.rand(1, 32, 32, 3), "measurement": torch.rand(1, 8, 8, 3), "operator": operator}
    jpeg = lab.call("DMAP_OperatorJpeg", quality=30, subsampling="4:2:0", rounding="straight-through")
    noisy = lab.call("DMAP_OperatorNoise", operator=jpeg, sigma=5 / 255)
    for change, words in (
        ({"image": torch.rand(1, 16, 32, 3)}, "Match Measurement: image: it is 32x16, and the measurement is that of a picture of 32x32"),
        ({"measurement": torch.rand(2, 8, 8, 3)}, "Match Measurement: measurement: 2 measurements for a batch of 1"),
        ({"image": torch.rand(1, 32, 32, 4)}, "Match Measurement: image: the picture has an alpha channel"),
        (
            {"operator": noisy, "measurement": torch.rand(1, 32, 32, 3)},
            "Match Measurement: operator: Known Noise .* noise on top of a JPEG",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            lab.call("DMAP_MatchMeasurement", **call | change)
