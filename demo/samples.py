"""Make demo/samples/: damaged pictures for the workflows, of a good one of 512x512 for Stable Diffusion, and of a held-out one for the demo prior.

    python demo/samples.py    # fetches the demo data first

The node "DMAP Sample Picture" lists them after the pictures of demo/held-out/, "Load Photo" as dmap/*. Each damaged one is an operator on a good one.
"""

from pathlib import Path

import numpy as np
import torch
from data import fetch, load
from PIL import Image, ImageDraw

from dmap_core.operators import Compose, GaussianBlur, Grayscale, Operator, SuperResolution

HERE = Path(__file__).resolve().parent

NAME = "1f413"  # the rooster, of a held-out concept
SIDE = 512
DAMAGE = {
    "rooster-small-64": SuperResolution(8),
    "rooster-blurred-512": GaussianBlur(kernel_size=61, sigma=3.0),
    "rooster-256": SuperResolution(2),
    "rooster-old-photo-128": Compose((Grayscale(), GaussianBlur(kernel_size=61, sigma=1.5), SuperResolution(4))),
}

DEMO_NAME = "dmap-demo-18"
DEMO_DAMAGE = {
    "emoji-small-32": SuperResolution(4),
    "emoji-blurred-128": GaussianBlur(kernel_size=61, sigma=2.0),
    "emoji-old-photo-64": Compose((Grayscale(), GaussianBlur(kernel_size=61, sigma=1.0), SuperResolution(2))),
}


def damaged(good: Image.Image, operator: Operator) -> Image.Image:
    """What the operator makes of an RGB picture, rounded to 8 bits."""
    x = torch.from_numpy(np.asarray(good, np.float32) / 127.5 - 1).movedim(-1, 0).unsqueeze(0)
    y = operator.picture(operator(x)).squeeze(0).movedim(0, -1)
    return Image.fromarray(((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())


def with_holes(good: Image.Image) -> Image.Image:
    """A torn-out piece and two scratches, grey and transparent, as the mask editor leaves them."""
    alpha = Image.new("L", good.size, 255)
    draw = ImageDraw.Draw(alpha)
    scale = good.width / SIDE
    for box, width in (((40, 90, 470, 200), 7), ((150, 20, 120, 500), 5)):
        draw.line([scale * n for n in box], fill=0, width=max(2, round(scale * width)))
    draw.rectangle([round(scale * n) for n in (250, 190, 349, 289)], fill=0)
    picture = Image.composite(good, Image.new("RGB", good.size, (128, 128, 128)), alpha)
    picture.putalpha(alpha)
    return picture


def main() -> None:
    out = HERE / "samples"
    out.mkdir(exist_ok=True)
    good = Image.fromarray(load(fetch(HERE / "cache") / f"{NAME}.webp", 256)).resize((SIDE, SIDE), Image.LANCZOS)
    pictures = {"rooster-512": good, **{name: damaged(good, operator) for name, operator in DAMAGE.items()}}
    pictures["rooster-holes-512"] = with_holes(good)
    known = Image.open(HERE / "held-out" / f"{DEMO_NAME}.png").convert("RGB")
    pictures |= {name: damaged(known, operator) for name, operator in DEMO_DAMAGE.items()}
    pictures["emoji-scratched-128"] = with_holes(known)
    for name, picture in pictures.items():
        path = out / f"{name}.png"
        picture.save(path, optimize=True)
        print(f"{path}  {picture.width}x{picture.height}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
