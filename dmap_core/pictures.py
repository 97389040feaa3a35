"""Pictures: files and what is wrong with them, tensors in [-1, 1], and sheets of several. Needs Pillow.

A sheet is painted in one place, here: what a node, a training, a table and the demo show side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
GREY_DEPTHS = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes of more than 8 bits
ORIENTATION = 0x0112  # the EXIF tag of how the camera was held
NAMED = 5  # files named in a message


class PictureError(ValueError):
    """Pictures that cannot be trained with."""


def shown(file: Path) -> str:
    """The name of a file for a message, whatever bytes it is made of."""
    return file.name.encode("utf-8", "backslashreplace").decode("utf-8")


def named(files: Sequence[Path]) -> str:
    more = len(files) - NAMED
    return ", ".join(map(shown, files[:NAMED])) + (f" and {more} more" if more > 0 else "")


def picture_files(folder: Path) -> list[Path]:
    """What in a folder has the ending of a picture, in the order of the names. Nothing is opened."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def ignored_files(folder: Path) -> str:
    """A sentence about the files of a folder that are not looked at because of their endings; empty if there are none. Hidden files are not counted."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() not in SUFFIXES and not f.name.startswith(".") and f.is_file())
    if not files:
        return ""
    return f"{len(files)} {'files' if len(files) > 1 else 'file'} of {folder} ignored, not ending in {', '.join(SUFFIXES)}: {named(files)}"


def check_pictures(
    files: Iterable[Path], count: int | None = None, longest: int | None = None
) -> tuple[dict[Path, tuple[int, int]], dict[Path, str]]:
    """((width, height) of those that can be read, what is wrong with the others). Every file is opened whole, up to `count` good ones.

    longest: bytes that a name without its ending may have, where other files will be called after it. This takes as long as reading all of them once, and saves a run of hours from ending at a damaged one.
    """
    good, bad = {}, {}
    for file in files:
        if len(good) == count:
            break
        try:
            _check_name(file, longest)
            good[file] = open_rgb(file).size
        except PictureError as error:
            bad[file] = str(error)
    return good, bad


def refusal(bad: Mapping[Path, str], n: int, folder: Path) -> str:
    """What to say where `check_pictures` found unreadable files among n."""
    return (
        f"pictures: {len(bad)} of {n} files in {folder} cannot be read: {named(list(bad))}. "
        f"The first: {next(iter(bad.values()))}. Mend or remove them, or choose to skip them"
    )


def folder_files(folder: Path, unreadable: str = "refuse") -> tuple[list[Path], list[Path]]:
    """(picture files, unreadable ones) of a folder, in the order of their names; every file is opened whole once.

    unreadable: "refuse" raises PictureError that names them, "skip" leaves them out. Raises PictureError for a folder without pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PictureError(f"pictures: there is no folder {folder}")
    files = picture_files(folder)
    if not files:
        raise PictureError(f"pictures: the folder {folder} holds no pictures ({', '.join(SUFFIXES)}). {ignored_files(folder)}".rstrip(". "))
    good, bad = check_pictures(files)
    if bad and unreadable == "refuse":
        raise PictureError(refusal(bad, len(files), folder))
    if not good:
        raise PictureError(f"pictures: none of the {len(files)} files in {folder} can be read: {named(list(bad))}")
    return list(good), list(bad)


def file_version(file: Path) -> tuple[int, int]:
    """(time of the last change in ns, bytes) of a file; zeros for one that is not there, such as behind a broken link."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _check_name(file: Path, longest: int | None) -> None:
    """Raises PictureError for a name that no text file could hold, or no file that is called after it."""
    try:
        size = len(file.stem.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise PictureError(f"pictures: the name of {shown(file)} is not UTF-8; rename it") from error
    if longest and size > longest:
        raise PictureError(
            f"pictures: the name {shown(file)} is {size} bytes long, and files called after it may have {longest}; rename it"
        )


def open_rgb(file: Path) -> Image.Image:
    """The picture of a file, whole, upright, 8-bit RGB. Transparent parts become white; 16-bit values are scaled, and so are floats in 0..1.

    Raises PictureError, naming the file, for one that is damaged, no regular file, above Pillow's limit of pixels, or whose values have no
    known white.
    """
    return _read(file, _rgb)


@dataclass(frozen=True)
class Photo:
    """A picture file as `open_photo` reads it. picture: upright, 8-bit RGB. alpha: 8-bit, of its size, None where all is opaque. turned: whether the camera had
    held it otherwise. frames: of an animation, of which this is the first.
    """

    picture: Image.Image
    alpha: Image.Image | None
    turned: bool
    frames: int


def open_photo(file: Path) -> Photo:
    """A picture with its transparency apart. Raises PictureError as `open_rgb` does."""
    return _read(file, _photo)


def _read(file: Path, how: Callable[[Image.Image], Any]) -> Any:
    file = Path(file)
    try:
        if file.exists() and not file.is_file():  # opening a pipe would wait for its other end
            raise PictureError("it is no regular file")
        with Image.open(file) as opened:  # which only warns above the limit
            limit = Image.MAX_IMAGE_PIXELS
            if limit and opened.width * opened.height > limit:
                raise PictureError(f"it has {opened.width}x{opened.height} pixels, and Pillow opens up to {limit}; make it smaller")
            return how(opened)
    except Exception as error:  # a damaged file raises whatever its bytes mean
        reason = str(error) if isinstance(error, PictureError) else f"{type(error).__name__}: {error}"
        raise PictureError(f"pictures: {file.parent / shown(file)} cannot be read ({reason})") from error


def _photo(opened: Image.Image) -> Photo:
    upright = ImageOps.exif_transpose(opened)
    turned = opened.getexif().get(ORIENTATION, 1) != 1
    frames = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1  # of which the second is a camera's thumbnail
    if upright.mode in GREY_DEPTHS or not upright.has_transparency_data:
        return Photo(_rgb(opened), None, turned, frames)
    rgba = upright.convert("RGBA")
    alpha = rgba.getchannel("A")
    opaque = alpha.getextrema()[0] == 255
    return Photo(rgba.convert("RGB"), None if opaque else alpha, turned, frames)


def _rgb(opened: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(opened)
    if picture.mode in GREY_DEPTHS:
        return Image.fromarray(_grey(np.asarray(picture), opened)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _grey(values: np.ndarray, opened: Image.Image) -> np.ndarray:
    """8-bit grey of values with more than 8 bits, which Pillow would clip at 255. A colour that stands for transparent becomes white."""
    if opened.mode.startswith("I;16") or opened.format == "PNG":  # a PNG has no more than 16 bits
        found = (values / 257).round()
    elif opened.mode == "F":
        low, high = (float(f(values)) for f in (np.min, np.max))
        if not 0 <= low <= high <= 1:  # NaN, too
            raise PictureError(f"its values are floats from {low:g} to {high:g}; they must lie in 0..1. Save it with 8 or 16 bits")
        found = (values * 255).round()
    else:
        raise PictureError(
            f"its values are 32-bit whole numbers, up to {values.max()}, of which white is not known. Save it with 8 or 16 bits"
        )
    transparent = opened.info.get("transparency")
    return np.where(values == transparent, 255, found).astype(np.uint8) if transparent is not None else found.astype(np.uint8)


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1] of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """8-bit RGB of an image (3, H, W) in [-1, 1]."""
    return Image.fromarray(((image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def centred(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, its shorter side being `size` pixels: what validation looks at."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def file_identity(file: Path) -> str:
    """Tells a picture file from another of its name: the name and the size in bytes. Contents are not read."""
    return f"{file.name} {file.stat().st_size}"


@dataclass(frozen=True)
class Tile:
    """A picture of a sheet, RGB, and the lines of text below it. It may be smaller than its place, at whose left upper corner it is."""

    picture: Image.Image
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Layout:
    """Where the parts of a sheet are, in pixels.

    cell: (width, height) of a place; gap: (right of it, below it), where captions are; margin: (left, top, right, bottom) of the page.
    text: of heads, labels and captions from the left edge of their pictures, and of captions from their lower edge; line: from one line of a
    caption to the next; head: of heads from the page's top. font: Pillow's own if None.
    """

    cell: tuple[int, int]
    gap: tuple[int, int]
    margin: tuple[int, int, int, int] = (0, 0, 0, 0)
    text: tuple[int, int] = (0, 2)
    line: int = 0
    head: int = 0
    font: Any = field(default=None, compare=False)


def sheet(rows: Sequence[Sequence[Tile]], layout: Layout, heads: Sequence[str] = (), labels: Sequence[str] = ()) -> Image.Image:
    """A white page with pictures in rows. heads: a name above every column; labels: one to the left of every row, half way down."""
    (width, height), (right, below), margin = layout.cell, layout.gap, layout.margin
    columns = max(map(len, rows))
    size = (columns * (width + right) - right, len(rows) * (height + below) - below)
    page = Image.new("RGB", (margin[0] + size[0] + margin[2], margin[1] + size[1] + margin[3]), "white")
    draw = ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        draw.text((margin[0] + column * (width + right) + layout.text[0], layout.head), head, fill="black", font=layout.font)
    for i, tiles in enumerate(rows):
        top = margin[1] + i * (height + below)
        if labels:
            draw.text((layout.text[0], top + height // 2), labels[i], fill="black", font=layout.font)
        for column, tile in enumerate(tiles):
            left = margin[0] + column * (width + right)
            page.paste(tile.picture, (left, top))
            for j, caption in enumerate(tile.captions):
                at = left + layout.text[0], top + tile.picture.height + layout.text[1] + j * layout.line
                draw.text(at, caption, fill="black", font=layout.font)
    return page
