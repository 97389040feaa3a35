"""The pictures of a table run: found, counted and measured before a run starts."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..files import NAME_BYTES
from ..pictures import SUFFIXES, centred, check_pictures, ignored_files, named, open_rgb, picture_files, to_tensor
from .config import ConfigError

log = logging.getLogger("dmap.evaluate")
SHOWN = 4
TAKEN = "row"  # row.json is beside the pictures' figures


@dataclass(frozen=True)
class Picture:
    """A file to be restored, and its place in the run, which decides its seed. repeat: which of several restorations of it, or None."""

    file: Path
    index: int
    repeat: int | None = None

    @property
    def name(self) -> str:
        return self.file.stem if self.repeat is None else f"{self.file.stem}-{self.repeat:04d}"

    @cached_property
    def identity(self) -> dict[str, str | int]:
        return {"file": self.file.name, "sha256": hashlib.sha256(self.file.read_bytes()).hexdigest(), "index": self.index}

    def open(self, size: int | None) -> Tensor:
        """(1, 3, H, W) in [-1, 1]: upright, RGB; with a size, its shorter side resized to it (Lanczos) and the middle taken."""
        picture = open_rgb(self.file)
        return to_tensor(centred(picture, size) if size else picture).unsqueeze(0)


def find_pictures(
    folder: Path,
    count: int | None,
    size: int | None,
    expected: str = "",
    repeats: int = 1,
    unreadable: str = "refuse",
    last: bool = False,
) -> list[Picture]:
    """The first `count` pictures of a folder by name, or the last ones, each `repeats` times. Raises ConfigError that says what is wrong with the folder or the files.

    Every one of them is opened whole. unreadable: "refuse", or "skip" to leave out those that cannot be read; their names, and those of files
    that do not end like pictures, are logged. expected: a hint about which data set the folder should hold, for the message.
    """
    folder = Path(folder)
    hint = f" This table expects {expected}." if expected else ""
    if not folder.is_dir():
        raise ConfigError(f"images: there is no folder {folder}.{hint}")
    files, ignored = picture_files(folder), ignored_files(folder)
    if not files:
        raise ConfigError(f"images: the folder {folder} holds no pictures ({', '.join(SUFFIXES)}).{hint}")
    if ignored:
        log.info("%s", ignored)
    if count is not None and len(files) < count:
        raise ConfigError(f"images: {count} pictures are wanted and {folder} holds {len(files)}; lower --count or add pictures.{hint}")
    if last and count is not None:
        files = files[-count:]
    sizes, bad = check_pictures(files if unreadable == "skip" else files[:count], count, NAME_BYTES)
    if bad and unreadable == "refuse":
        reason = next(iter(bad.values())).removeprefix("pictures: ")
        others = f" The same holds for {named(list(bad)[1:])}." if len(bad) > 1 else ""
        raise ConfigError(f"images: {reason}; mend or remove it, or leave such files out (--unreadable skip).{others}")
    if bad:
        log.warning("%d files of %s cannot be read and are left out: %s", len(bad), folder, named(list(bad)))
    files = list(sizes)
    if not files or count is not None and len(files) < count:
        raise ConfigError(f"images: {count or 'some'} pictures are wanted and {len(files)} of those in {folder} can be read.{hint}")
    twice = [stem for stem, n in Counter(file.stem for file in files).items() if n > 1]
    if repeats == 1 and any(file.stem.casefold() == TAKEN for file in files):
        raise ConfigError(
            f"images: a file in {folder} is called {TAKEN}, which is what the settings beside the results are called; rename it"
        )
    if twice:
        raise ConfigError(f"images: several files in {folder} are called {twice[0]}; results are named after the files, so rename them")
    if size is None and len(set(sizes.values())) > 1:
        common, _ = Counter(sizes.values()).most_common(1)[0]
        odd = [file for file in files if sizes[file] != common]
        raise ConfigError(
            f"images: most pictures in {folder} are {common[0]}x{common[1]}, but {len(odd)} are not "
            f"({', '.join(f'{file.name} {sizes[file][0]}x{sizes[file][1]}' for file in odd[:SHOWN])}). "
            f"Give --size N to resize and centre-crop all of them to NxN"
        )
    small = [file for file in files if size is not None and min(sizes[file]) < size]
    if small:  # as the paper does with most of ImageNet; a folder of thumbnails by mistake should be noticed, though
        log.warning(
            "%d of %d pictures are smaller than %d pixels and are enlarged (%s): what was restored of them cannot be sharper than they are",
            len(small),
            len(files),
            size,
            ", ".join(f"{file.name} {sizes[file][0]}x{sizes[file][1]}" for file in small[:SHOWN]),
        )
    if repeats == 1:
        return [Picture(file, i) for i, file in enumerate(files)]
    return [Picture(file, i * repeats + k, k) for i, file in enumerate(files) for k in range(repeats)]
