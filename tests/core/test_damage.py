"""What people say of a photo becomes an operator and a measurement; what they do not say is measured, or assumed and told."""

import math

import pytest
import torch

from dmap_core import damage
from dmap_core.damage import AUTO, LOOKS_FOR, Said, case_of
from dmap_core.estimate import Estimate
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, Jpeg, MotionBlur, Noisy, SuperResolution
from dmap_core.operators.noisy import parts

PHOTO = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
MASK = torch.zeros(64, 96)
MASK[10:20, 30:60] = 1


@pytest.fixture
def seen(monkeypatch):
    """Decides what the estimate finds."""

    def see(**found):
        values = {"grey": False, "enlarged": 1.0, "blur": 0.0, "grain": 0.0, "jpeg": None, "notes": ()} | found
        monkeypatch.setattr(damage, "estimate", lambda photo, jpeg=None: Estimate(size=tuple(photo.shape[-2:]), **values))
        monkeypatch.setattr(damage, "is_grey", lambda photo: values["grey"])

    see()
    return see


def names(operator) -> list[str]:
    return [f.name for f in parts(operator)]


@pytest.mark.parametrize("kind", [kind for kind in LOOKS_FOR if kind not in (AUTO, "custom", "scratched", "too small")])
def test_where_nothing_is_found_the_usual_is_assumed_and_said(seen, kind):
    seen(blur=None, grain=None)
    case = case_of(PHOTO, Said(kind), native=64)
    assert case.operator.image_size(case.measurement) == case.size == (64, 96)
    assert kind == "old photo" or any("assumed" in note for note in case.notes)


def test_what_is_said_counts_and_not_what_is_measured(seen):
    seen(blur=9.0, grain=0.5, jpeg=Jpeg(5))
    case = case_of(PHOTO, Said("soft", softness=1.5, grain=6, jpeg_quality=40))
    assert isinstance(case.operator, Noisy) and case.operator.sigma == pytest.approx(6 / 255)
    blur, jpeg = parts(case.operator)
    assert blur.sigma == 1.5 and jpeg == Jpeg(40)
    assert case.notes == ()


def test_nothing_is_measured_where_nothing_of_it_would_be_used(monkeypatch):
    asked = []
    monkeypatch.setattr(damage, "estimate", lambda photo, jpeg=None: asked.append(photo) or Estimate(size=tuple(photo.shape[-2:])))
    grey = PHOTO[:, :1].expand(-1, 3, -1, -1)
    for said in (
        Said("shaken"),
        Said("too small"),
        Said("soft", softness=2.0),
        Said("grainy", grain=8.0),
        Said("old photo", softness=2.0, grain=8.0),
    ):
        assert case_of(grey, said).grey and not case_of(PHOTO, said).grey
    assert case_of(grey, Said("scratched"), MASK).grey and case_of(grey, Said("custom"), given=GaussianBlur()).grey
    assert asked == []
    case_of(PHOTO, Said("old photo", softness=2.0))
    assert len(asked) == 1


def test_the_colours_of_a_grey_photos_grain_are_left_out(seen):
    """What is measured in a grey photo is luma's grain, and that is what the measurement then has."""
    noise = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    photo = (PHOTO[:, :1] * 0.5 + 0.1 * noise).clamp(-1, 1)
    seen(grey=True, grain=0.03)
    case = case_of(photo, Said("grainy"))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close(case.measurement, (photo * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1), rtol=0, atol=1e-6)
    assert any("its grain has colours" in note for note in case.notes)
    grey = photo[:, :1].expand(-1, 3, -1, -1)
    assert case_of(grey, Said("grainy")).measurement is grey
    assert case_of(photo, Said("grainy", grain=8.0)).measurement is photo


def test_an_old_photos_grain_that_cannot_be_told_is_said_to_be_none(seen):
    seen(blur=1.0, grain=None)
    case = case_of(PHOTO, Said("old photo", enlarge="1"))
    assert names(case.operator) == ["GaussianBlur"] and any("grain cannot be measured" in note for note in case.notes)


def test_what_is_measured_counts_where_damage_looks_for_it(seen):
    seen(blur=1.25, grain=0.02, jpeg=Jpeg(33), spent=0.01)
    assert parts(case_of(PHOTO, Said("soft")).operator)[0].sigma == 1.25
    assert names(case_of(PHOTO, Said("soft")).operator) == ["GaussianBlur"]
    assert case_of(PHOTO, Said("grainy")).operator.sigma == 0.02
    assert case_of(PHOTO, Said("JPEG")).operator == Jpeg(33)
    every = case_of(PHOTO, Said(AUTO), native=64).operator
    assert isinstance(every, Noisy) and names(every) == ["GaussianBlur"], "a JPEG whose loss the grain hides is part of it"
    assert every.sigma == pytest.approx(math.hypot(0.02, 0.01))
    seen(blur=1.25, grain=0.0, jpeg=Jpeg(33), spent=0.01)
    assert names(case_of(PHOTO, Said(AUTO), native=64).operator) == ["GaussianBlur", "Jpeg"]


def test_softness_is_in_pixels_of_the_photo_and_the_blur_in_those_of_the_result(seen):
    case = case_of(PHOTO, Said("too small", enlarge="4", softness=1.5))
    blur, small = parts(case.operator)
    assert (blur.sigma, small.scale, case.size) == (6.0, 4, (256, 384))
    assert blur.kernel_size >= 2 * 4 * 6 + 1, "a kernel that is cut is another blur"


@pytest.mark.parametrize(("native", "scale"), [(512, 4), (1024, 8), (200, 2), (64, 2)])
def test_a_small_photo_is_enlarged_up_to_what_the_model_knows(seen, native, scale):
    assert case_of(PHOTO, Said("too small"), native=native).operator == SuperResolution(scale)


def test_auto_finds_nothing_to_repair(seen):
    case = case_of(PHOTO, Said(), native=96)
    assert case.operator is None and case.size == (64, 96)
    assert torch.equal(case.measurement, PHOTO)


def test_auto_asks_where_it_cannot_tell(seen):
    seen(blur=None)
    case = case_of(PHOTO, Said(), native=96)
    assert case.operator is None and "whether it is soft cannot be told" in case.notes[-1]


def test_auto_enlarges_a_small_photo(seen):
    assert case_of(PHOTO, Said(), native=512).operator == SuperResolution(4)


def test_what_had_been_enlarged_is_shrunk_and_enlarged_by_the_model(seen):
    seen(enlarged=2.0)
    case = case_of(PHOTO, Said(), native=96)
    assert case.operator == SuperResolution(2) and case.measurement.shape[-2:] == (32, 48) and case.size == (64, 96)


@pytest.mark.parametrize("kind", [AUTO, "JPEG"])
def test_a_jpeg_beneath_an_enlargement_is_that_of_the_smaller_picture(seen, kind):
    seen(enlarged=2.0, blocky=True, beneath=True, jpeg=Jpeg(30), spent=0.01)
    case = case_of(PHOTO, Said(kind), native=96)
    assert names(case.operator) == ["SuperResolution", "Jpeg"] and case.measurement.shape[-2:] == (32, 48)
    kept = case_of(
        PHOTO, Said(kind, softness=1.0), MASK, native=96
    ).operator  # a mask keeps the photo's own size, where those blocks are not
    assert names(kept) == ["GaussianBlur", "Inpainting"]


def test_a_good_jpeg_is_left_out_unless_it_is_the_damage(seen):
    seen(jpeg=Jpeg(95), blur=1.0)
    assert names(case_of(PHOTO, Said(), native=64).operator) == ["GaussianBlur"]
    assert case_of(PHOTO, Said("JPEG")).operator == Jpeg(95)


def test_a_mask_is_the_last_of_all_and_of_the_photos_size(seen):
    case = case_of(PHOTO, Said("old photo", enlarge="2", softness=1.0), MASK)
    assert names(case.operator) == ["GaussianBlur", "SuperResolution", "Inpainting"]
    assert torch.equal(parts(case.operator)[-1].mask[0, 0], MASK)
    assert isinstance(case_of(PHOTO, Said("scratched"), MASK).operator, Inpainting)


def test_a_grey_photo_stays_grey_or_is_colourised(seen):
    seen(grey=True)
    assert case_of(PHOTO, Said("soft", softness=2)).grey
    case = case_of(PHOTO, Said("soft", softness=2, colours="colourise"))
    assert not case.grey and isinstance(parts(case.operator)[0], Grayscale)
    seen(grey=False)
    assert any("has colours" in note for note in case_of(PHOTO, Said("soft", softness=2, colours="colourise")).notes)


def test_streaks(seen):
    case = case_of(PHOTO, Said("shaken", softness=9, angle=30, enlarge="2"))
    assert parts(case.operator)[0] == MotionBlur(18, 30)


def test_custom_is_what_is_connected(seen):
    case = case_of(PHOTO, Said("custom"), given=GaussianBlur(sigma=2.5))
    assert case.operator == GaussianBlur(sigma=2.5)
    with_mask = case_of(PHOTO, Said("custom"), MASK, Noisy(Compose((GaussianBlur(), SuperResolution(2))), 0.05)).operator
    assert isinstance(with_mask, Noisy) and names(with_mask) == ["GaussianBlur", "SuperResolution", "Inpainting"]
    with pytest.raises(ValueError, match="operator: damage is custom"):
        case_of(PHOTO, Said("custom"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"damage": "rotten"}, "damage is 'rotten'"),
        ({"enlarge": "3"}, "enlarge is '3'"),
        ({"colours": "no"}, "colours is 'no'"),
        ({"softness": -1.0}, "softness"),
        ({"softness": math.nan}, "softness"),
        ({"grain": 300.0}, "grain"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Said(**wrong)


def test_scratches_need_a_mask_and_a_result_some_pixels(seen):
    with pytest.raises(ValueError, match="nothing is painted"):
        case_of(PHOTO, Said("scratched"))
    with pytest.raises(ValueError, match="would be 4x4"):
        case_of(PHOTO[..., :1, :1], Said("too small", enlarge="4"))
