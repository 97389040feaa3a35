"""What is estimated of damages that are known: leaves that cover each other, which have edges and flat parts as photographs do, damaged on purpose."""

import io
import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from dmap_core.estimate import IDENTITY, Estimate, estimate, grain, is_grey, lattice, repeated, samples, spectrum
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Jpeg, Noisy, SuperResolution, from_spec
from dmap_core.operators.colour import luma
from dmap_core.pictures import to_picture, to_tensor

SIDE = 192


@lru_cache(maxsize=4)
def leaves(height=SIDE, width=SIDE, seed=0):
    """(1, 3, H, W), 8 bits in [-1, 1]: discs of all sizes, drawn at thrice the size and made smaller."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: 3 * height, : 3 * width]
    page = np.zeros((3 * height, 3 * width, 3))
    for radius in np.minimum(
        3 * 4 / draw.uniform(0.001, 1, height * width // 20) ** 0.5, 3 * 80
    ):  # as often as r^-3: the same at every scale
        top, left = draw.random(2) * page.shape[:2]
        rows, columns = (slice(max(0, int(at - radius)), int(at + radius) + 2) for at in (top, left))
        inside = (y[rows, columns] - top) ** 2 + (x[rows, columns] - left) ** 2 < radius**2
        page[rows, columns][inside] = draw.uniform(20, 235, 3)
    return to_tensor(Image.fromarray(page.astype(np.uint8)).resize((width, height), Image.Resampling.LANCZOS))[None]


def rounded(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def blurred(x, sigma):
    return rounded(GaussianBlur(61, sigma)(x))


def grainy(x, levels, channels=3, seed=0):
    return rounded(x + levels / 127.5 * torch.randn(1, channels, *x.shape[-2:], generator=torch.Generator().manual_seed(seed)))


def grey(x):
    return rounded(luma(x).expand(-1, 3, -1, -1))


def compressed(x, **settings):
    file = io.BytesIO()
    to_picture(x[0]).save(file, "JPEG", **settings)
    return to_tensor(Image.open(file).convert("RGB"))[None]


def enlarged(x, times, how):
    size = tuple(int(n * times) for n in x.shape[:-3:-1])
    return to_tensor(to_picture(x[0]).resize(size, how))[None]


def looks_right(f, found, picture):
    """The operator makes the measurement of pictures as large as this one, or a little larger, and can be saved."""
    y = found.measurement(picture)
    shown = f.read(y)
    f.check_measurement(shown)
    size = f.image_size(shown)
    f.check(size)
    assert all(0 <= made - given < found.scale for made, given in zip(size, picture.shape[-2:], strict=True))
    assert from_spec(json.loads(json.dumps(f.spec()))) == f
    return f


def test_an_undamaged_picture():
    x = leaves()
    found = estimate(x)
    assert found == Estimate(size=(SIDE, SIDE)) and found.operator() is None
    assert torch.equal(found.measurement(x), x)
    assert found.text() == "nothing to repair; here is what I see: 192x192, colour, sharp, no visible grain, no trace of JPEG."


def test_grey_alone_is_no_damage():
    found = estimate(grey(leaves()))
    assert is_grey(grey(leaves())) and not is_grey(leaves())
    assert found.grey and found.operator() is None and found.text().startswith("nothing to repair; here is what I see: 192x192, grey,")
    assert estimate(grainy(grey(leaves()), 6)).grey  # with grain of all colours
    assert estimate(compressed(grey(leaves()), quality=30)).grey


def test_a_toned_print_is_told():
    x = leaves()
    tone = torch.tensor([1.0, 0.85, 0.6]).view(1, 3, 1, 1)
    found = estimate(rounded((grey(x) + 1) * tone - 1))
    assert not found.grey and any("shades of one" in note for note in found.notes)
    assert not any("shades of one" in note for note in estimate(x).notes)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_softness(sigma):
    x = blurred(leaves(), sigma)
    found = estimate(x)
    assert found.blur == pytest.approx(sigma, rel=0.15) and found.enlarged == 1 and found.grain == 0
    assert looks_right(found.operator(), found, x) == GaussianBlur(61, round(found.blur, 2))


@pytest.mark.parametrize("levels", [5, 15])
def test_grain(levels):
    x = grainy(leaves(), levels)
    found = estimate(x)
    assert found.grain * 255 == pytest.approx(levels, rel=0.08)
    f = looks_right(found.operator(), found, x)
    assert isinstance(f, Noisy) and f.operator == IDENTITY and f.sigma == pytest.approx(found.grain, abs=1e-4)
    torch.testing.assert_close(IDENTITY(x), x, rtol=0, atol=1e-6)


def test_grain_of_a_small_picture_may_be_texture():
    x = grainy(leaves(), 8)
    assert estimate(x).notes == ()
    small = estimate(x[..., :64, :64])
    assert small.grain and any("fine texture" in note for note in small.notes)


def test_grain_in_a_jpeg_is_not_taken_for_what_its_rounding_left():
    """Taking the file's values at their face gives a fraction of it."""
    x = compressed(grainy(grey(leaves()), 8, channels=1), quality=70)
    found = estimate(x)
    plain = grain.of_channels((x[:, :1] + 1) * 127.5)
    assert plain < 8 / 3 and found.grain * 255 == pytest.approx(8, rel=0.3)


def test_grain_that_a_jpeg_may_hide_is_unsure():
    found = estimate(compressed(leaves(), quality=12))
    assert found.grain is None and any("hides grain" in note for note in found.notes) and "grain unknown" in found.text()


@pytest.mark.parametrize(
    "quality, subsampling, cut", [(10, "4:2:0", (0, 0)), (50, "4:4:4", (3, 6)), (85, "4:2:0", (0, 0)), (92, "4:2:2", (8, 1))]
)
def test_a_compression(quality, subsampling, cut):
    x = compressed(leaves(), quality=quality, subsampling=subsampling)[..., cut[0] :, cut[1] :]
    found = estimate(x)
    assert found.jpeg == Jpeg(quality, subsampling) and found.grid == tuple(-n % 8 for n in cut)
    f = found.operator()
    if quality >= 90:
        assert f is None and found.text().startswith("nothing to repair")  # nobody sees it
    elif cut == (0, 0):
        assert looks_right(f, found, x) == found.jpeg
    else:  # the operator's blocks begin at the corner
        assert isinstance(f, Noisy) and any("cut off 5 rows at the top and 2 columns at the left" in note for note in found.notes)
        again = estimate(x[..., 5:, 2:])
        assert again.grid == (0, 0) and again.operator() == found.jpeg


def test_a_file_that_is_known_is_not_guessed():
    own = Jpeg(60, "4:2:2", tables=(tuple(range(10, 74)), tuple(range(20, 84))))
    found = estimate(leaves(), own)
    assert found.jpeg is own and found.grid == (0, 0) and "JPEG with tables of its own, about quality 60 4:2:2" in found.text()


@pytest.mark.parametrize("times", [2, 3, 5])
def test_repeated_pixels(times):
    small = leaves(96, 100, seed=1)
    x = enlarged(small, times, Image.Resampling.NEAREST)
    found = estimate(x)
    assert found.enlarged == times and found.blocky and found.size == (96 * times, 100 * times)
    torch.testing.assert_close(found.measurement(x), small, rtol=0, atol=1e-5)
    assert looks_right(found.operator(), found, x) == SuperResolution(times)


@pytest.mark.parametrize("times, how", [(2, "BILINEAR"), (2, "BICUBIC"), (3, "LANCZOS"), (1.5, "BICUBIC")])
def test_smooth_enlarging(times, how):
    x = enlarged(leaves(), times, Image.Resampling[how])[..., :-1]  # no multiple of anything
    found = estimate(x)
    assert found.enlarged == pytest.approx(times, rel=0.13) and not found.blocky
    f = looks_right(found.operator(), found, x)
    assert f == SuperResolution(found.scale) and any("take the small file itself" in note for note in found.notes)


def test_a_jpeg_under_repeated_pixels_is_undone_with_them():
    x = enlarged(compressed(leaves(), quality=30), 2, Image.Resampling.NEAREST)
    found = estimate(x)
    assert found.jpeg == Jpeg(30) and found.beneath
    assert looks_right(found.operator(), found, x) == Compose((SuperResolution(2), Jpeg(30)))


def test_an_old_photo():
    x = grainy(grey(blurred(leaves(), 2.0)), 5, channels=1)
    found = estimate(x)
    assert found.grey and found.blur == pytest.approx(2, rel=0.2) and found.grain * 255 == pytest.approx(5, rel=0.1) and found.jpeg is None
    f = looks_right(found.operator(), found, x)
    assert isinstance(f, Noisy) and [type(g) for g in f.operator.operators] == [Grayscale, GaussianBlur]


def test_a_soft_photo_saved_as_a_jpeg():
    x = compressed(blurred(leaves(), 2.0), quality=75)
    found = estimate(x)
    assert found.blur == pytest.approx(2, rel=0.2) and found.jpeg == Jpeg(75) and found.enlarged == 1
    assert [type(g) for g in looks_right(found.operator(), found, x).operators] == [GaussianBlur, Jpeg]


def test_the_same_picture_has_the_same_estimate_in_inference_mode_and_half_precision():
    x = grainy(blurred(leaves(), 1.5), 4)
    state = torch.get_rng_state()
    once = estimate(x)
    with torch.inference_mode():
        assert estimate(x) == once
    assert torch.equal(torch.get_rng_state(), state)
    assert estimate(x.double()) == once


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5, 7), (31, 64), (32, 32), (64, 100), (127, 400), (40, 30000)])
def test_any_size(size):
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = estimate(x)
    assert found.size == size
    if min(size) < 128:
        assert found.blur is None and any("smaller than" in note for note in found.notes)
    if found.operator() is not None:
        looks_right(found.operator(), found, x)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_flat_picture(value):
    found = estimate(torch.full((1, 3, 160, 160), value))
    assert is_grey(grey(leaves())) and not is_grey(leaves())
    assert found.grey and found.operator() is None and found.jpeg is None and not found.blur and not found.grain


@pytest.mark.parametrize(
    "picture, message",
    [
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\); it must be \(1, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
    ],
    ids=["batch", "one channel", "empty", "NaN"],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=f"^estimate: .*{message}"):
        estimate(picture)


def test_white_noise_has_its_variance_in_every_bin():
    noise = 7 * torch.randn(1, 512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert spectrum.power(noise)[2:].log().mean().exp() == pytest.approx(49, rel=0.02)


def test_interpolations_responses_are_those_of_their_definitions():
    """Of linear interpolation sinc^4; of all: 1 at 0, and 0 where the small picture's pixels repeat."""
    f = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    linear, cubic, lanczos = spectrum.responses(f)
    torch.testing.assert_close(linear, torch.sinc(f) ** 4, rtol=1e-3, atol=1e-6)
    for response in (cubic, lanczos):
        assert response[0] == pytest.approx(1) and response[3] < 1e-3 and response[1] > 0.9


def test_the_score_of_a_step_is_best_for_the_step_itself():
    draw = torch.Generator().manual_seed(0)
    wide = 40 * torch.randn(500, 64, generator=draw)
    for step in (3, 8, 21):
        found = (wide / step).round() * step + 0.35 * torch.randn(wide.shape, generator=draw)
        best = lattice.scores(*lattice._large(found)).sum(0).argmax() + 1
        assert int(best) == step
    assert float(lattice.scores(*lattice._large(wide)).sum(0).max()) < 0  # on no lattice


def test_large_pictures_are_looked_at_in_places():
    x = torch.arange(2000.0)[:, None] * 3000 + torch.arange(3000.0)
    tiles = samples.tiles_of(x[None].double())
    assert len(tiles) <= samples.MOST and tiles.shape[1:] == (1, samples.TILE, samples.TILE)
    assert (tiles[:, 0, 0, 0] % 3000 % 16 == 0).all() and (tiles[:, 0, 0, 0] // 3000 % 16 == 0).all()
    assert tiles.min() == 0 and len(tiles[:, 0, 0, 0].unique()) == len(tiles)


def test_pixels_are_repeated_only_where_they_begin_at_the_corner():
    x = torch.rand(1, 30, 40, generator=torch.Generator().manual_seed(0)) * 255
    big = x.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert repeated.factor(big) == 4 and repeated.factor(big[:, 1:]) == 1 and repeated.factor(x) == 1
    assert repeated.factor(big.repeat_interleave(2, 1)) == 1  # in one direction more than in the other
