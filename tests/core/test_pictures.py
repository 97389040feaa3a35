"""Pictures: which files of a folder are taken, how they are read, tensors, and sheets."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dmap_core import pictures
from dmap_core.pictures import (
    Layout,
    PictureError,
    Tile,
    centred,
    folder_files,
    ignored_files,
    named,
    open_rgb,
    sheet,
    to_picture,
    to_tensor,
)


def random_picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- files


def truncated(path, suffix):
    file = path / f"whole.{suffix}"
    random_picture().save(file)
    content = file.read_bytes()
    file.unlink()
    return content[: len(content) * 2 // 3]


def test_the_pictures_of_a_folder_by_name(tmp_path):
    picture = random_picture()
    names = ("c.png", "A.JPG", "b.jpeg", "d.webp", "e.bmp", "f.tif", "G.TIFF")
    for name in names:
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "inside").mkdir()
    good, bad = folder_files(tmp_path)
    assert good == [tmp_path / name for name in sorted(names)] and bad == []
    assert folder_files(str(tmp_path), "skip") == (good, [])


BROKEN = {
    "truncated png": (".png", lambda path: truncated(path, "png")),
    "truncated jpeg": (".jpg", lambda path: truncated(path, "jpg")),
    "truncated webp": (".webp", lambda path: truncated(path, "webp")),
    "truncated bmp": (".bmp", lambda path: truncated(path, "bmp")),
    "truncated tiff": (".tif", lambda path: truncated(path, "tif")),
    "text": (".png", lambda path: b"This is a web page that was saved under the picture's name"),
    "empty": (".jpg", lambda path: b""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_file_is_named_or_left_out(tmp_path, kind):
    suffix, content = BROKEN[kind]
    content = content(tmp_path)
    random_picture().save(tmp_path / "good.png")
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(content)
    with pytest.raises(PictureError, match=rf"pictures: 1 of 2 files in .* cannot be read: {bad.name}\. .*skip"):
        folder_files(tmp_path)
    assert folder_files(tmp_path, "skip") == ([tmp_path / "good.png"], [bad])


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, MemoryError, SyntaxError, OSError])
def test_whatever_a_damaged_file_raises(tmp_path, monkeypatch, error):
    random_picture().save(tmp_path / "a.png")
    random_picture().save(tmp_path / "b.png")

    def transposed(picture):
        if Path(picture.filename).name == "b.png":
            raise error("damaged")
        return picture

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", transposed)
    assert folder_files(tmp_path, "skip") == ([tmp_path / "a.png"], [tmp_path / "b.png"])


@pytest.mark.parametrize("size", [(15, 10), (40, 30)], ids=["where Pillow warns", "where Pillow refuses"])
@pytest.mark.filterwarnings("ignore")  # the caller's filters do not decide
def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch, size):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    random_picture(9, 9).save(tmp_path / "good.png")
    random_picture(*size).save(tmp_path / "bomb.png")
    with pytest.raises(PictureError, match="1 of 2 .*bomb.png"):
        folder_files(tmp_path)
    assert folder_files(tmp_path, "skip") == ([tmp_path / "good.png"], [tmp_path / "bomb.png"])


def test_a_folder_called_like_a_picture_is_unreadable(tmp_path):
    random_picture().save(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    assert folder_files(tmp_path, "skip") == ([tmp_path / "good.png"], [tmp_path / "folder.png"])


def test_a_pipe_is_unreadable_and_not_waited_for(tmp_path):
    random_picture().save(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert folder_files(tmp_path, "skip") == ([tmp_path / "good.png"], [tmp_path / "broken.png", tmp_path / "pipe.png"])
    with pytest.raises(PictureError, match=r"pipe\.png cannot be read \(it is no regular file\)"):
        open_rgb(tmp_path / "pipe.png")


def test_a_name_that_is_not_utf_8(tmp_path):
    random_picture().save(tmp_path / "good.png")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.png"))
    shutil.copy(tmp_path / "good.png", odd)
    with pytest.raises(PictureError, match=r"cannot be read: a\\udcff\.png\. The first: .*is not UTF-8; rename it") as caught:
        folder_files(tmp_path)
    str(caught.value).encode("utf-8")
    assert folder_files(tmp_path, "skip") == ([tmp_path / "good.png"], [odd])


def test_files_that_are_not_looked_at_are_named(tmp_path):
    random_picture().save(tmp_path / "good.png")
    assert ignored_files(tmp_path) == ""
    (tmp_path / "deeper").mkdir()
    for name in ("b.gif", "a.avif", "c.jfif", ".hidden"):
        (tmp_path / name).touch()
    found = ignored_files(tmp_path)
    assert found.startswith(f"3 files of {tmp_path} ignored, not ending in .png, ") and found.endswith(": a.avif, b.gif, c.jfif")
    (tmp_path / "good.png").unlink()
    with pytest.raises(PictureError, match=r"holds no pictures .*3 files of .* ignored.*: a\.avif, b\.gif, c\.jfif"):
        folder_files(tmp_path)


def test_no_pictures(tmp_path):
    with pytest.raises(PictureError, match=rf"there is no folder {re.escape(str(tmp_path / 'missing'))}"):
        folder_files(tmp_path / "missing")
    random_picture().save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="there is no folder .*a.png"):
        folder_files(tmp_path / "a.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    with pytest.raises(PictureError, match=r"holds no pictures \(\.png, "):
        folder_files(empty)
    for i in range(7):
        (empty / f"{i}.png").write_bytes(b"")
    with pytest.raises(PictureError, match=r"none of the 7 files .*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 2 more"):
        folder_files(empty, "skip")
    with pytest.raises(PictureError, match="7 of 7 files .* and 2 more"):
        folder_files(empty)
    assert issubclass(PictureError, ValueError)


def test_names_in_a_message():
    files = [Path(f"/x/{i}.png") for i in range(6)]
    assert named(files[:5]) == "0.png, 1.png, 2.png, 3.png, 4.png"
    assert named(files) == "0.png, 1.png, 2.png, 3.png, 4.png and 1 more"


# ---- reading


def test_transparent_parts_become_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[...] = (200, 0, 100, 255)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 51  # a fifth
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    found = np.array(open_rgb(tmp_path / "rgba.png")).astype(int)
    assert found.shape == (2, 3, 3)
    assert (found[0, 0] == 255).all()
    assert np.abs(found[0, 1] - (244, 204, 224)).max() <= 1
    assert (found[1] == (200, 0, 100)).all()

    Image.merge("LA", [Image.new("L", (4, 4), 50), Image.new("L", (4, 4), 0)]).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 30, 40])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "rgb.png", transparency=(9, 8, 7))
    for name in ("la.png", "p.png", "rgb.png"):
        assert (np.array(open_rgb(tmp_path / name)) == 255).all(), name


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_pictures_are_turned_upright(tmp_path, orientation, turn):
    picture = random_picture(7, 4)
    exif = Image.Exif()
    exif[0x112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.array(open_rgb(tmp_path / "a.png")), turn(np.array(picture)))


def test_other_kinds_of_pictures(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    grey = np.repeat(ramp[..., None], 3, 2)
    Image.fromarray(ramp).save(tmp_path / "l.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "p.png")
    for name in ("l.png", "p.png"):
        assert np.array_equal(np.array(open_rgb(tmp_path / name)), grey), name
    for name in ("16.png", "16.tif"):
        Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / name)
        assert np.array_equal(np.array(open_rgb(tmp_path / name)), grey), name
    Image.fromarray(ramp > 127).save(tmp_path / "1.png")
    assert np.array_equal(np.array(open_rgb(tmp_path / "1.png")), np.where(grey > 127, 255, 0))
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    colour = np.array(open_rgb(tmp_path / "cmyk.jpg")).astype(int)
    assert colour.shape == (8, 8, 3) and np.abs(colour - (0, 255, 255)).max() <= 3


def test_values_that_a_picture_file_can_have(tmp_path):
    """Scaled where white is known, and named where it is not: never clipped to something else."""
    ramp = np.tile(np.arange(256), (4, 1))
    grey = np.repeat(ramp[..., None], 3, 2)
    Image.fromarray((ramp / 255).astype(np.float32)).save(tmp_path / "float.tif")
    assert np.array_equal(np.array(open_rgb(tmp_path / "float.tif")), grey)
    refused = {
        "int.tif": (
            (ramp * 257 * 65537).clip(max=2**31 - 1).astype(np.int32),
            "32-bit whole numbers, up to 2147483647, of which white is not known",
        ),
        "small-int.tif": (ramp.astype(np.int32), "32-bit whole numbers, up to 255"),
        "levels.tif": (ramp.astype(np.float32), "floats from 0 to 255; they must lie in 0..1"),
        "signed.tif": ((ramp / 128 - 1).astype(np.float32), "floats from -1 to 0.992188"),
        "nan.tif": (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
    }
    for name, (values, message) in refused.items():
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(PictureError, match=rf"pictures: .*{name} cannot be read \(its values are {re.escape(message)}"):
            open_rgb(tmp_path / name)


def test_palettes_and_inks(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 0, 100, 9, 9, 9])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "p.png", transparency=bytes([255, 51, 0]))  # opaque, a fifth, nothing
    found = np.array(open_rgb(tmp_path / "p.png")).astype(int)
    assert np.abs(found[0] - [(10, 20, 30), (244, 204, 224), (255, 255, 255)]).max() <= 1
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert (np.array(open_rgb(tmp_path / "cmyk.tif")) == (255, 0, 0)).all()
    deep = Image.fromarray(np.array([[0, 257 * 7, 65535]], np.uint16))
    deep.save(tmp_path / "deep.png", transparency=257 * 7)
    assert np.array(open_rgb(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 255, 255]


def test_tensors_and_pictures():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pixels[0, 1] = (255, 128, 0)
    image = to_tensor(Image.fromarray(pixels))
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    torch.testing.assert_close(image[:, 0, 1], torch.tensor([1.0, 128 / 127.5 - 1, -1.0]))
    assert np.array_equal(np.array(to_picture(image)), pixels)
    assert to_picture(torch.full((3, 2, 2), 1.7)).getpixel((0, 0)) == (255, 255, 255)
    assert to_picture(torch.full((3, 2, 2), -1.7).double().requires_grad_()).getpixel((0, 0)) == (0, 0, 0)


def test_what_validation_looks_at():
    assert centred(random_picture(50, 31), 16).size == (16, 16)
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    assert (np.array(centred(Image.fromarray(pixels), 16)) == 255).all()


# ---- sheets


def test_a_sheet_has_its_parts_where_the_layout_says():
    red, blue = Image.new("RGB", (10, 8), "red"), Image.new("RGB", (6, 5), "blue")
    plain = sheet([[Tile(red), Tile(blue)], [Tile(blue)]], Layout((10, 8), (3, 4), (1, 2, 5, 6)))
    assert plain.size == (1 + 10 + 3 + 10 + 5, 2 + 8 + 4 + 8 + 6)
    pixels = np.full((plain.height, plain.width, 3), 255, np.uint8)
    pixels[2:10, 1:11] = (255, 0, 0)
    pixels[2:7, 14:20] = pixels[14:19, 1:7] = (0, 0, 255)
    assert np.array_equal(np.array(plain), pixels)


def test_text_of_a_sheet_is_beside_its_pictures():
    picture = Image.new("RGB", (40, 20), "red")
    layout = Layout((40, 20), (5, 30), (60, 20, 0, 30), text=(2, 3), line=12, head=4, font=ImageFont.load_default(size=10))
    bare = np.array(sheet([[Tile(picture)] * 2] * 2, layout))
    both = np.array(sheet([[Tile(picture, ["a", "b"])] * 2] * 2, layout, heads=["c", "d"], labels=["e", "f"]))
    rows, columns = np.nonzero((bare != both).any(axis=2))
    assert (bare != both).any() and not ((both != bare).any(axis=2) & (bare == (255, 0, 0)).all(axis=2)).any()  # no letter is on a picture
    for place in (
        (slice(4, 18), slice(62, 72)),
        (slice(43, 53), slice(62, 72)),
        (slice(55, 67), slice(62, 72)),
        (slice(30, 46), slice(2, 12)),
    ):
        assert (bare[place] != both[place]).any()
    assert rows.min() >= 4 and columns.min() >= 2
