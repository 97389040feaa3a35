"""Writes workflows/<name>.jpg, what ComfyUI's list of templates shows of a workflow: damaged on the left, restored on the right.

    python demo/run.py --n 1 --solvers DMAP --operators super-resolution-x8,super-resolution-x4,gaussian-deblur,inpainting,old-photo
    python tools/thumbnails.py

The pictures are those that demo/run.py restored with DMAP; workflows that compare solvers show docs/all-solvers.png, which
demo-all-solvers.json makes, and so on: see SHEETS. Stable Diffusion 2.0 has not run for them: the
thumbnails of sd2-*.json show the demo prior on the same kind of damage, and say so.
"""

import argparse
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SHEETS = {  # by how a workflow's name ends
    "-all-solvers": DOCS / "all-solvers.png",
    "-cse": DOCS / "cse.png",
    "-metrics": DOCS / "metrics.png",
    "-observations": DOCS / "observations.png",
    "-steps-and-solvers": DOCS / "steps.png",
    "-toy": DOCS / "toy.png",
}
SIDE = 384  # three times the demo's 128 pixels, and a multiple of every degraded size: nearest neighbours stay even squares
KINDS = {  # of the numbered workflows: the results that show the same damage
    "1": "old-photo",
    "2": "inpainting",
    "3": "super-resolution-x8",
    "4": "gaussian-deblur",
    "5": "super-resolution-x4",
    "6": "super-resolution-x8",
}
QUALITY = 85
MAX_BYTES = 40_000


def find_pair(folder: Path, picture: str | None) -> tuple[Path, Path]:
    """Degraded and restored file of a picture, by default of the first one that has both."""
    for restored in sorted(folder.glob(f"{picture or '*'}-DMAP.png")):
        degraded = restored.with_name(restored.name.removesuffix("-DMAP.png") + "-degraded.png")
        if degraded.exists():
            return degraded, restored
    raise SystemExit(
        f"{folder} holds no {picture or '*'}-DMAP.png with a {picture or '*'}-degraded.png beside it; "
        f"make them with: python demo/run.py --operators {folder.name} --out {folder.parent}"
    )


def kind(name: str) -> str:
    """The damage that a workflow of that name is about, as demo/run.py calls it."""
    return KINDS.get(name[0]) or name.partition("-")[2]


def label(page: Image.Image, caption: str) -> None:
    """Write into the lower right corner."""
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    width = draw.textlength(caption, font=font)
    draw.rectangle((SIDE - width - 16, SIDE - 30, SIDE, SIDE), fill=(40, 40, 40))
    draw.text((SIDE - 8, SIDE - 15), caption, fill="white", font=font, anchor="rm")


def thumbnail(degraded: Image.Image, restored: Image.Image) -> Image.Image:
    """Left half of the one and right half of the other. Both are enlarged without smoothing, so that neither looks better than it is."""
    page, right = (picture.convert("RGB").resize((SIDE, SIDE), Image.NEAREST) for picture in (degraded, restored))
    middle = SIDE // 2
    page.paste(right.crop((middle, 0, SIDE, SIDE)), (middle, 0))
    draw = ImageDraw.Draw(page)
    draw.rectangle((middle - 3, 0, middle + 2, SIDE), fill=(150, 150, 150))  # the demo pictures are white where this line is
    draw.rectangle((middle - 2, 0, middle + 1, SIDE), fill="white")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "output" / "demo", help="the --out folder of demo/run.py")
    parser.add_argument("--picture", help="name of the held-out picture to show, for example dmap-demo-03 (default: the first)")
    parser.add_argument("--out", type=Path, default=ROOT / "workflows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    everything = sorted((ROOT / "workflows").glob("*.json"))
    sheets = {path: sheet for path in everything for end, sheet in SHEETS.items() if path.stem.endswith(end)}
    workflows = [path for path in everything if path not in sheets]
    # all are found before the first is written: the thumbnails are of one run
    pairs = [find_pair(args.results / kind(path.stem), args.picture) for path in workflows]
    pages = {w: thumbnail(Image.open(degraded), Image.open(restored)) for w, (degraded, restored) in zip(workflows, pairs, strict=True)}
    pages |= {w: ImageOps.pad(Image.open(sheet).convert("RGB"), (SIDE, SIDE), color="white") for w, sheet in sheets.items()}
    for workflow, page in pages.items():
        if workflow.stem.startswith("sd2-") or workflow.stem.endswith("-sd"):
            label(page, "demo prior")
        content = io.BytesIO()
        page.save(content, "JPEG", quality=QUALITY, optimize=True)
        if len(content.getvalue()) > MAX_BYTES:
            raise SystemExit(
                f"{workflow.stem}: the thumbnail takes {len(content.getvalue())} bytes, more than {MAX_BYTES}; choose another --picture"
            )
        path = args.out / f"{workflow.stem}.jpg"
        path.write_bytes(content.getvalue())
        print(f"{path}  {len(content.getvalue())} bytes")


if __name__ == "__main__":
    main()
