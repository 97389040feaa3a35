"""Jpeg against the encoder and decoder behind Pillow (libjpeg-turbo), and its two kinds of gradient."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.autograd import gradcheck

from dmap_core.operators import Compose, Grayscale, Jpeg, from_spec, jpeg_of_file
from dmap_core.operators.jpeg import quantisation_tables

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
SIZES = [(37, 53), (48, 64), (40, 6)]
# A coefficient that falls on the other side of the middle between two steps costs one step, and a picture holds thousands of them.
# quality: largest and mean difference, in levels of 8 bits
TOLERANCE = {10: (3, 0.03), 30: (14, 0.2), 75: (40, 0.25), 95: (10, 0.3)}


def smooth(height, width):
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    return np.stack([0.5 + 0.4 * np.sin(5 * x + 3 * y), 0.5 + 0.4 * np.cos(4 * y - 2 * x), 0.2 + 0.6 * x * y], axis=-1)


def textured(height, width):
    return 0.6 * np.random.default_rng(0).random((height, width, 3)) + 0.4 * smooth(height, width)


def levels(picture):
    return np.rint(255 * picture).astype(np.uint8)


def through_pillow(picture, **settings):
    """uint8 (H, W, 3) or (H, W), saved and opened again."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", **settings)
    return np.asarray(Image.open(file))


def through_jpeg(picture, f, dtype=torch.float64):
    """The same with the operator; float levels."""
    x = torch.from_numpy(np.atleast_3d(picture)).movedim(-1, 0)[None].to(dtype) / 127.5 - 1
    return ((f(x)[0].movedim(0, -1) + 1) * 127.5).numpy().reshape(picture.shape)


def picture(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).sub(1).to(dtype)


@pytest.mark.parametrize("quality", TOLERANCE)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("make", [smooth, textured])
def test_pillow_shows_the_same(make, subsampling, quality):
    largest, mean = TOLERANCE[quality]
    differences = []
    for size in SIZES:
        source = levels(make(*size))
        shown = through_pillow(source, quality=quality, subsampling=subsampling)
        difference = np.abs(through_jpeg(source, Jpeg(quality, subsampling)) - shown)
        assert np.abs(shown.astype(int) - source).mean() > 2 * difference.mean(), size
        assert difference.max() <= largest, size
        differences.append(difference.ravel())
    assert np.concatenate(differences).mean() <= mean


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 1), (5, 4), (8, 3), (1, 30), (16, 16)])
def test_pillow_shows_the_same_of_small_pictures(size, subsampling):
    source = levels(smooth(*size))
    difference = np.abs(through_jpeg(source, Jpeg(75, subsampling)) - through_pillow(source, quality=75, subsampling=subsampling))
    assert difference.max() <= 6  # one coefficient of 5x4 pixels; narrow pictures enlarged the wrong way are off by 20 and more


@pytest.mark.parametrize("quality", TOLERANCE)
@pytest.mark.parametrize("make", [smooth, textured])
def test_pillow_shows_the_same_of_one_channel(make, quality):
    largest, mean = TOLERANCE[quality]
    source = levels(make(37, 53))[..., 0].copy()
    difference = np.abs(through_jpeg(source, Jpeg(quality)) - through_pillow(source, quality=quality))
    assert difference.max() <= largest
    assert difference.mean() <= mean


def test_pillow_shows_the_same_of_saturated_colours():
    source = np.zeros((24, 24, 3), np.uint8)
    source[:, 5:14, 0], source[7:, 14:, 1], source[:9, :, 2] = 255, 255, 255
    for subsampling in SUBSAMPLINGS:
        shown = through_pillow(source, quality=30, subsampling=subsampling)
        difference = np.abs(through_jpeg(source, Jpeg(30, subsampling)) - shown)
        assert difference.max() <= 3 and difference.mean() <= 0.02, subsampling


@pytest.mark.parametrize("quality", [1, 10, 24, 49, 50, 51, 75, 95, 100])
def test_quantisation_tables_are_those_pillow_writes(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    written = Image.open(file).quantization
    assert quantisation_tables(quality).flatten(1).tolist() == [list(written[0]), list(written[1])]


def test_what_comes_out_are_levels_of_8_bits_in_range():
    y = Jpeg(20)(3 * picture(2, 3, 20, 20))
    shown = (y + 1) * 127.5
    torch.testing.assert_close(shown, shown.round(), rtol=0, atol=1e-10)
    assert y.min() >= -1 and y.max() <= 1


def test_the_best_quality_without_subsampling_hardly_changes_anything():
    source = levels(textured(37, 53))
    difference = np.abs(through_jpeg(source, Jpeg(100, "4:4:4")) - source)
    assert difference.max() <= 4 and difference.mean() <= 1


def test_worse_quality_changes_more():
    x = torch.from_numpy(smooth(40, 48) + textured(40, 48)).movedim(-1, 0)[None] - 1
    losses = [float((Jpeg(quality)(x) - x).norm()) for quality in (5, 20, 50, 80, 95)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("quality", [20, 75])
def test_compressing_again_changes_little(quality):
    f = Jpeg(quality, "4:4:4")
    x = torch.from_numpy(levels(smooth(40, 48))).movedim(-1, 0)[None].double() / 127.5 - 1
    once = f(x)
    assert (f(once) - once).norm() < 0.3 * (once - x).norm()


@pytest.mark.parametrize("rounding, expected", [("straight-through", 130.0), ("cubic", 129.984)])
def test_a_constant_is_rounded_to_steps_of_its_mean(rounding, expected):
    """At quality 50 a step of the mean coefficient is 16 / 8 = 2 levels: 129.6 is 0.8 steps above 128, and 1 - 0.2^3 is 0.992."""
    y = Jpeg(50, rounding=rounding)(torch.full((1, 1, 8, 8), 129.6 / 127.5 - 1, dtype=torch.float64))
    torch.testing.assert_close((y + 1) * 127.5, torch.full_like(y, expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("quality", [30, 90])
def test_cubic_resembles_jpeg(quality):
    x = torch.from_numpy(smooth(40, 48)).movedim(-1, 0)[None] * 2 - 1
    exact, cubic = Jpeg(quality)(x), Jpeg(quality, rounding="cubic")(x)
    assert 0 < (cubic - exact).norm() < 0.6 * (exact - x).norm()


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradcheck_of_cubic(subsampling, channels):
    x = picture(1, channels, 5, 7).requires_grad_()
    assert gradcheck(Jpeg(60, subsampling, "cubic"), (x,), fast_mode=False)


def halved(n):
    """(ceil(n / 2), n) averages of two."""
    matrix = np.zeros((-(-n // 2), n))
    for i in range(len(matrix)):
        for j in (2 * i, min(2 * i + 1, n - 1)):
            matrix[i, j] += 0.5
    return matrix


def doubled(n):
    """(n, ceil(n / 2)) weights 3/4 and 1/4 of the two samples nearest to an output's centre."""
    half = -(-n // 2)
    matrix = np.zeros((n, half))
    for j in range(n):
        other = j // 2 - 1 if j % 2 == 0 else j // 2 + 1
        matrix[j, j // 2] += 0.75
        matrix[j, min(max(other, 0), half - 1)] += 0.25
    return matrix


def without_rounding(x, subsampling):
    """The linear part of encoder and decoder with nothing rounded: the DCT and its inverse leave nothing but the colour's resolution."""
    colour = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    height, width = x.shape[-2:]
    rows = doubled(height) @ halved(height) if subsampling == "4:2:0" else np.eye(height)
    columns = doubled(width) @ halved(width) if subsampling != "4:4:4" else np.eye(width)
    ycc = np.einsum("oc,bchw->bohw", colour, x)
    ycc[:, 1:] = rows @ ycc[:, 1:] @ columns.T
    return np.einsum("oc,bchw->bohw", np.linalg.inv(colour), ycc)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(16, 16), (13, 19), (7, 6)])
def test_the_straight_through_gradient_is_that_of_the_steps_without_rounding(size, subsampling):
    shape = (2, 3, *size)
    direction, cotangent = picture(*shape, seed=1), picture(*shape, seed=2)
    expected = without_rounding(direction.numpy(), subsampling)
    for quality, scale in ((10, 1.0), (90, 3.0)):  # three times a picture is clamped nearly everywhere
        f, x = Jpeg(quality, subsampling), scale * picture(*shape)
        _, along = torch.autograd.functional.jvp(f, x, direction)
        np.testing.assert_allclose(along.numpy(), expected, rtol=0, atol=1e-5)  # the weights above have six digits
        x.requires_grad_()
        (vjp,) = torch.autograd.grad(f(x), x, cotangent)
        torch.testing.assert_close((vjp * direction).sum(), (along * cotangent).sum(), rtol=1e-10, atol=1e-10)


def test_the_straight_through_gradient_of_one_channel_is_the_identity():
    x, cotangent = picture(2, 1, 11, 9).requires_grad_(), picture(2, 1, 11, 9, seed=1)
    (vjp,) = torch.autograd.grad(Jpeg(10)(x), x, cotangent)
    torch.testing.assert_close(vjp, cotangent, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounding", ["straight-through", "cubic"])
def test_every_sample_is_treated_alone(rounding):
    x = picture(3, 3, 18, 21)
    f = Jpeg(40, rounding=rounding)
    for i in range(3):
        torch.testing.assert_close(f(x[i : i + 1]), f(x)[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    x = picture(1, 3, 21, 30, dtype=dtype)
    y = Jpeg(75)(x)
    assert y.dtype == dtype
    # the same picture in double, but for coefficients that float32 rounds to the other step
    assert (y.double() - Jpeg(75)(x.double())).abs().mean() < {torch.float16: 3e-4, torch.bfloat16: 2e-3, torch.float32: 1e-4}[dtype]


def test_input_is_left_alone_and_gradients_work_after_inference_mode():
    with torch.inference_mode():
        f = Jpeg(30)
        y = f(picture(1, 3, 12, 10))
    x = picture(1, 3, 12, 10, seed=1)
    before = x.clone()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(f.distance(f(x), y).sum(), x)
    assert torch.equal(x, before)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


def test_sizes_and_channels_are_kept():
    f = Jpeg(50)
    y = f(picture(2, 3, 11, 14))
    assert y.shape == (2, f.channels(3), *f.measurement_size((11, 14))) == (2, 3, 11, 14)
    assert f.image_size(y) == (11, 14)
    assert not f.linear
    with pytest.raises(NotImplementedError, match="Jpeg has no adjoint"):
        f.adjoint(y, (11, 14))


def test_after_grayscale_only_luma_is_compressed():
    x = picture(1, 3, 20, 18)
    f = Compose([Grayscale(), Jpeg(25)])
    assert f(x).shape == (1, 1, 20, 18) and f.channels() == 1 and not f.linear
    assert torch.equal(f(x), Jpeg(25)(Grayscale()(x)))


@pytest.mark.parametrize("f", [Jpeg(30), Jpeg(75, "4:2:2", "cubic"), Jpeg(quality=95, subsampling="4:4:4")], ids=lambda f: f.describe())
def test_spec_survives_json(f):
    again = from_spec(json.loads(json.dumps(f.spec())))
    x = picture(1, 3, 9, 10)
    assert again == f and torch.equal(again(x), f(x))


def test_describe():
    assert Jpeg(30).describe() == "JPEG (quality 30, subsampling 4:2:0, rounding straight-through)"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quality": 0}, r"Jpeg: quality is 0;.*at least 1"),
        ({"quality": 101}, r"Jpeg: quality is 101;.*at most 100"),
        ({"quality": 7.5}, r"Jpeg: quality is 7\.5;.*whole number"),
        ({"quality": float("nan")}, r"Jpeg: quality is nan"),
        ({"quality": "high"}, r"Jpeg: quality is 'high'"),
        ({"quality": 50, "subsampling": "4:1:1"}, r"Jpeg: subsampling is '4:1:1'; it must be one of 4:4:4, 4:2:2, 4:2:0"),
        ({"quality": 50, "subsampling": ["4:2:0"]}, r"Jpeg: subsampling is \['4:2:0'\]"),
        ({"quality": 50, "rounding": "soft"}, r"Jpeg: rounding is 'soft'; it must be one of straight-through, cubic"),
        ({}, r"Jpeg.*quality"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        from_spec({"operator": "Jpeg", **settings})


def test_pictures_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="Jpeg: the picture has 4 channels; it must have 1 or 3"):
        Jpeg(50)(torch.zeros(1, 4, 8, 8))


CHROMA = tuple(20 + i // 3 for i in range(64))
LUMA = tuple(12 + i % 8 + i // 8 * 9 for i in range(64))  # no quality has these, and they are not symmetric
OWN = {"qtables": [LUMA, CHROMA]}


def saved(picture, **settings):
    file = io.BytesIO()
    picture = Image.fromarray(picture)
    exif = picture.getexif()
    exif[0x0112] = settings.pop("orientation", 1)
    picture.save(file, "JPEG", exif=exif, **settings)
    return file


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_file_with_tables_of_its_own(subsampling, tmp_path):
    source = levels(textured(37, 53))
    file = tmp_path / "own.jpg"
    file.write_bytes(saved(source, subsampling=subsampling, **OWN).getvalue())
    f = jpeg_of_file(file)
    assert f.tables == (LUMA, CHROMA) and f.subsampling == subsampling and f == jpeg_of_file(str(file)) == jpeg_of_file(Image.open(file))
    shown = np.asarray(Image.open(file))
    difference = np.abs(through_jpeg(source, f) - shown)
    assert difference.max() <= 14 and difference.mean() <= 0.3  # measured: 13 and 0.26
    assert np.abs(through_jpeg(source, Jpeg(f.quality, subsampling)) - shown).mean() > 4 * difference.mean()


@pytest.mark.parametrize("quality", [1, 30, 75, 92, 100])
def test_a_file_of_libjpegs_scale_is_told_by_its_quality(quality):
    source = levels(smooth(40, 48))
    assert jpeg_of_file(Image.open(saved(source, quality=quality, subsampling="4:2:2"))) == Jpeg(quality, "4:2:2")
    assert jpeg_of_file(Image.open(saved(source[..., 0].copy(), quality=quality))) == Jpeg(quality, "4:4:4")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_file(orientation):
    """The operator is that of the upright picture: compressing the upright original gives what the upright file shows."""
    source = levels(textured(48, 80))
    opened = Image.open(saved(source, subsampling="4:2:0", orientation=orientation, **OWN))
    f = jpeg_of_file(opened)
    shown = ImageOps.exif_transpose(opened)
    turned = Image.fromarray(source)
    turned.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(turned))
    difference = np.abs(through_jpeg(upright, f) - np.asarray(shown)).mean()
    wrong = Jpeg(f.quality, tables=tuple(tuple(torch.tensor(t).view(8, 8).T.flatten().tolist()) for t in f.tables))
    assert 5 * difference < np.abs(through_jpeg(upright, wrong) - np.asarray(shown)).mean()


def test_a_turned_file_whose_blocks_begin_elsewhere_is_not_described():
    rows, columns = levels(smooth(48, 53)), levels(smooth(37, 64))
    found = {
        (name, orientation): jpeg_of_file(Image.open(saved(source, quality=50, orientation=orientation))) is not None
        for name, source in (("columns cut", rows), ("rows cut", columns))
        for orientation in range(1, 9)
    }
    assert [orientation for orientation in range(1, 9) if found["columns cut", orientation]] == [1, 4, 5, 6]
    assert [orientation for orientation in range(1, 9) if found["rows cut", orientation]] == [1, 2, 5, 8]
    assert jpeg_of_file(Image.open(saved(levels(smooth(48, 64)), subsampling="4:2:2", orientation=6))) is None


def test_files_that_no_operator_describes(tmp_path):
    source = Image.fromarray(levels(smooth(40, 48)))
    made = {"png": {"format": "PNG"}, "rgb": {"format": "JPEG", "keep_rgb": True}}
    for name, settings in made.items():
        source.save(tmp_path / name, **settings)
        assert jpeg_of_file(tmp_path / name) is None
    source.convert("CMYK").save(tmp_path / "cmyk", "JPEG")
    assert jpeg_of_file(tmp_path / "cmyk") is None
    assert jpeg_of_file(source) is None  # it comes from no file


def test_tables_survive_json_and_old_specs_stay_as_they_were():
    f = Jpeg(60, "4:2:2", tables=(LUMA, CHROMA))
    again = from_spec(json.loads(json.dumps(f.spec())))
    x = picture(1, 3, 9, 10)
    assert again == f and hash(again) == hash(f) and torch.equal(again(x), f(x))
    assert Jpeg(60).spec() == {"operator": "Jpeg", "quality": 60, "subsampling": "4:2:0", "rounding": "straight-through"}
    assert f.describe() == "JPEG (tables of the file, about quality 60, subsampling 4:2:2, rounding straight-through)"
    standard = tuple(map(tuple, quantisation_tables(60).long().flatten(1).tolist()))
    assert torch.equal(Jpeg(1, "4:2:2", tables=standard)(x), Jpeg(60, "4:2:2")(x))


@pytest.mark.parametrize(
    "tables", [[LUMA], [LUMA, LUMA[1:]], "tables", 7, [LUMA, (0, *LUMA[1:])], [LUMA, (1.5, *LUMA[1:])], [LUMA, (65536, *LUMA[1:])]]
)
def test_bad_tables_are_named(tables):
    with pytest.raises(ValueError, match=r"^Jpeg: tables"):
        from_spec({"operator": "Jpeg", "quality": 50, "tables": tables})


def test_a_gradient_through_tables():
    x = (picture(1, 3, 16, 16) * 0.3).requires_grad_()
    assert gradcheck(Jpeg(60, "4:2:0", "cubic", (LUMA, CHROMA)), (x,), fast_mode=True)
