"""The demo data: 3,391 emoji pictures of the npm package @lobehub/fluent-emoji-3d (MIT), on white, split by concept.

`pictures(cache, size)` gives uint8 RGB arrays (N, size, size, 3) with their names; `held_out(names)` says which of them no model may see.
A concept is the first code point of a name (both of a flag's pair), so that skin-tone and gender variants never straddle the split.
"""

import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dmap_core.files import write_whole

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
COUNT = 3391
HELD_OUT_CONCEPTS = 100


def concept(name: str) -> str:
    """First code point of an emoji name such as `1f44d-1f3fc`; flags are named by a pair of regional indicators."""
    first, *rest = name.split("-")
    is_flag = 0x1F1E6 <= int(first, 16) <= 0x1F1FF
    return "-".join([first, rest[0]]) if is_flag and rest else first


def split(names: list[str]) -> tuple[list[str], list[str]]:
    """(held-out, training) concepts, a fixed shuffle of the sorted concepts."""
    concepts = sorted({concept(name) for name in names})
    random.Random(0).shuffle(concepts)
    return concepts[:HELD_OUT_CONCEPTS], concepts[HELD_OUT_CONCEPTS:]


def held_out_names(names: list[str]) -> list[str]:
    """One name per held-out concept (its first in sorted order), in the order of the shuffle."""
    first = {}
    for name in sorted(names):
        first.setdefault(concept(name), name)
    return [first[c] for c in split(names)[0]]


def fetch(cache: Path) -> Path:
    """Download and unpack the package with `npm pack`; returns the folder of webp files."""
    assets = cache / "package" / "assets"
    if not assets.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True)
        with tarfile.open(next(cache.glob("lobehub-fluent-emoji-3d-*.tgz"))) as tar:
            tar.extractall(cache, filter="data")
    found = len(list(assets.glob("*.webp")))
    if found != COUNT:
        raise RuntimeError(f"{assets} holds {found} pictures, expected {COUNT}; remove {cache} and try again")
    return assets


def load(path: Path, size: int) -> np.ndarray:
    """One picture on white, (size, size, 3) uint8. Four pictures are 256x264 and lose their margins."""
    picture = Image.open(path).convert("RGBA")
    left, top = (picture.width - 256) // 2, (picture.height - 256) // 2
    picture = picture.crop((left, top, left + 256, top + 256))
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    rgb = white.convert("RGB")
    return np.asarray(rgb if size == 256 else rgb.resize((size, size), Image.BOX))


def pictures(cache: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """All pictures (N, size, size, 3) uint8 in sorted order, memory-mapped, and their names."""
    files = sorted(fetch(cache).glob("*.webp"))
    names = [file.stem for file in files]
    array = cache / f"pictures-{size}.npy"
    if not array.exists():
        stacked = np.stack([load(file, size) for file in files])

        def write(part: Path) -> None:
            with open(part, "wb") as file:  # to a name, numpy would add an ending
                np.save(file, stacked)

        write_whole(array, write)
    return np.load(array, mmap_mode="r"), names
