"""How far the estimates of `dmap_core.estimate` are off, on natural photographs damaged on purpose: the tables of docs/estimates.md.

    python demo/estimates.py [--photographs table|tuning] [--only WORDS]

The photographs are those of scikit-image, scikit-learn and matplotlib, made smaller (Lanczos), so that no trace of their own files is left, and their corners cut
out. The limits in `dmap_core/estimate` were set on the photographs called tuning; the tables are of the others. Every case has one seed.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dmap_core.estimate import Estimate, estimate  # noqa: E402
from dmap_core.operators import GaussianBlur, Jpeg  # noqa: E402
from dmap_core.operators.colour import luma  # noqa: E402
from dmap_core.pictures import open_rgb, to_picture, to_tensor  # noqa: E402

SIDE = 192  # pixels of a crop
SMALLER = {False: 1.5, True: 3.0}  # times, of photographs up to a thousand pixels wide, and of larger ones
TUNING = {
    "skimage/data": ("chelsea.png", "motorcycle_left.png", "rocket.jpg", "camera.png"),
    "sklearn/datasets/images": ("flower.jpg",),
}
TABLE = {
    "skimage/data": ("astronaut.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg"),
    "sklearn/datasets/images": ("china.jpg",),
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
}
HOW = {
    "linear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "Lanczos": Image.Resampling.LANCZOS,
    "repeated": Image.Resampling.NEAREST,
}


def photographs(group: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """(name, (1, 3, SIDE, SIDE) in [-1, 1]) of the four corners of every photograph."""
    for place, names in group.items():
        package, *inside = place.split("/")
        for name in names:
            with as_file(files(package).joinpath(*inside, name)) as file:
                picture = open_rgb(file)
            times = SMALLER[max(picture.size) > 1000]
            width, height = (int(n / times) for n in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            for left in (0, width - SIDE):
                for top in (0, height - SIDE):
                    yield f"{name} {left},{top}", to_tensor(picture.crop((left, top, left + SIDE, top + SIDE))).unsqueeze(0)


def rounded(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def through(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    return to_tensor(change(to_picture(x[0]))).unsqueeze(0)


def blurred(x: Tensor, sigma: float) -> Tensor:
    return rounded(GaussianBlur(61, sigma)(x))


def grainy(x: Tensor, levels: float, channels: int = 3) -> Tensor:
    noise = torch.randn(1, channels, *x.shape[-2:], generator=torch.Generator().manual_seed(0))
    return rounded(x + 2 * levels / 255 * noise)


def grey(x: Tensor) -> Tensor:
    return rounded(luma(x).expand(-1, 3, -1, -1))


def compressed(x: Tensor, quality: int, subsampling: str = "4:2:0") -> Tensor:
    def save(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=subsampling)
        return Image.open(file).convert("RGB")

    return through(x, save)


def enlarged(x: Tensor, times: float, how: str) -> Tensor:
    return through(x, lambda picture: picture.resize((int(picture.width * times), int(picture.height * times)), HOW[how]))


def cut(x: Tensor, rows: int, columns: int) -> Tensor:
    return x[..., rows:, columns:]


@dataclass(frozen=True)
class Case:
    """A damage, and what should be found. blur: pixels; grain: grey levels, of luma where a compression follows."""

    name: str
    damage: Callable[[Tensor], Tensor]
    blur: float = 0.0
    grain: float = 0.0
    enlarged: float = 1.0
    jpeg: Jpeg | None = None
    grid: tuple[int, int] = (0, 0)
    grey: bool = False


OF_LUMA = (0.299**2 + 0.587**2 + 0.114**2) ** 0.5  # what is left in luma of grain that is different in R, G and B


def cases() -> list[Case]:
    found = [Case("undamaged", lambda x: x), Case("grey", grey, grey=True)]
    found += [Case(f"blur {s}", lambda x, s=s: blurred(x, s), blur=s) for s in (1.0, 1.5, 2.0, 3.0, 5.0)]
    found += [Case(f"grain {n}", lambda x, n=n: grainy(x, n), grain=n) for n in (4, 8, 16)]
    found += [
        Case(f"enlarged {s}, {how}", lambda x, s=s, how=how: enlarged(x, s, how), enlarged=s)
        for how, factors in (("repeated", (2, 3)), ("linear", (2, 3)), ("cubic", (1.5, 2, 4)), ("Lanczos", (2, 3)))
        for s in factors
    ]
    found += [Case(f"JPEG {q}", lambda x, q=q: compressed(x, q), jpeg=Jpeg(q)) for q in (10, 25, 50, 75, 85)]
    found += [
        Case("JPEG 60 4:4:4, cut", lambda x: cut(compressed(x, 60, "4:4:4"), 3, 6), jpeg=Jpeg(60, "4:4:4"), grid=(5, 2)),
        Case("blur 2, grain 8", lambda x: grainy(blurred(x, 2), 8), blur=2, grain=8),
        Case("old photo: grey, blur 2, grain 4", lambda x: grainy(grey(blurred(x, 2)), 4, 1), blur=2, grain=4, grey=True),
        Case("old photo: grey, blur 1.2, grain 8", lambda x: grainy(grey(blurred(x, 1.2)), 8, 1), blur=1.2, grain=8, grey=True),
        Case("blur 1.5, JPEG 75", lambda x: compressed(blurred(x, 1.5), 75), blur=1.5, jpeg=Jpeg(75)),
        Case("blur 3, JPEG 40", lambda x: compressed(blurred(x, 3), 40), blur=3, jpeg=Jpeg(40)),
        Case("grain 8, JPEG 85", lambda x: compressed(grainy(x, 8), 85), grain=8 * OF_LUMA, jpeg=Jpeg(85)),
        Case("grain 8, JPEG 60", lambda x: compressed(grainy(x, 8), 60), grain=8 * OF_LUMA, jpeg=Jpeg(60)),
        Case("JPEG 40, enlarged 3, repeated", lambda x: enlarged(compressed(x, 40), 3, "repeated"), enlarged=3, jpeg=Jpeg(40)),
        Case("JPEG 40, enlarged 2, cubic", lambda x: enlarged(compressed(x, 40), 2, "cubic"), enlarged=2),
        Case("enlarged 2, cubic, JPEG 85", lambda x: compressed(enlarged(x, 2, "cubic"), 85), enlarged=2, jpeg=Jpeg(85)),
        Case("enlarged 2, cubic, grain 4", lambda x: grainy(enlarged(x, 2, "cubic"), 4), enlarged=2),
    ]
    return found


def errors(values: list[float | None], truth: float, unit: float = 1.0) -> str:
    """ "n of N: median [5 %, 95 %]" of those that are not unsure."""
    sure = sorted(v * unit for v in values if v is not None)
    if not sure:
        return f"unsure in all {len(values)}"
    at = [sure[round(share * (len(sure) - 1))] for share in (0.05, 0.95)]
    off = statistics.fmean(abs(v - truth) for v in sure)
    return f"{statistics.median(sure):.2f} [{at[0]:.2f}, {at[1]:.2f}], off by {off:.2f}" + f", unsure {len(values) - len(sure)}" * (
        len(sure) < len(values)
    )


def row(case: Case, found: list[Estimate]) -> str:
    """A line of the table: what was to be found, and what was."""
    n = len(found)
    right = [e for e in found if abs(e.enlarged / case.enlarged - 1) < 0.13]
    columns = [case.name, str(n), f"{len(right)}" + (f" (not at all: {sum(e.enlarged == 1 for e in found)})" if case.enlarged > 1 else "")]
    columns.append(errors([e.blur for e in found], case.blur))
    columns.append(errors([e.grain for e in found], case.grain, 255))
    wanted = case.jpeg
    if wanted is None:
        columns.append(f"none: {sum(e.jpeg is None for e in found)}")
    else:
        known = [e for e in found if e.jpeg is not None]
        exact = sum(e.jpeg.quality == wanted.quality and e.grid == case.grid for e in known)
        chroma = sum(e.jpeg.subsampling == wanted.subsampling for e in known)
        columns.append(f"found {len(known)}, quality and grid right {exact}, subsampling {chroma}")
    columns += [f"{sum(e.grey == case.grey for e in found)}", f"{sum(e.operator() is not None for e in found)}"]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", choices=("table", "tuning"), default="table")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    arguments = parser.parse_args()
    pictures = [x for _, x in photographs(TABLE if arguments.photographs == "table" else TUNING)]
    sys.stdout.write(
        "| damage | n | factor right | blur, px | grain, levels | JPEG | grey right | to repair |\n|---|---|---|---|---|---|---|---|\n"
    )
    for case in cases():
        if arguments.only in case.name:
            sys.stdout.write(row(case, [estimate(case.damage(x)) for x in pictures]) + "\n")
            sys.stdout.flush()
    began = time.perf_counter()
    large = torch.nn.functional.interpolate(pictures[0], (2048, 2048), mode="bicubic").clamp(-1, 1)
    estimate(large)
    sys.stdout.write(f"\n2048x2048: {time.perf_counter() - began:.1f} s on {torch.get_num_threads()} thread(s)\n")


if __name__ == "__main__":
    main()
