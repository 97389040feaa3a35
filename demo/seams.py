"""Tiles against the whole: a collage of held-out pictures, restored both ways. Is there a seam, and what does it cost?

    python demo/seams.py --size 512x512
    python demo/seams.py --size 768x512 --no-whole

The seam: how much neighbouring pixels differ across a tile's edge, divided by how much they do one pixel beside it. A decoder makes its pixels in blocks
of eight, so the same ratio at blocks' edges where no tile ends is printed as well. The collage's own edges are between pixels of one block, where no tile ends.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from run import HERE, PRIOR_FILE

TILE = 128
FACTOR = 8
OFFSET = 36  # pixels that are cut off the first row and column of pictures


def collage(width: int, height: int) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1] of the last held-out pictures."""
    from dmap_core.pictures import open_rgb, to_tensor

    columns, rows = (-(-(n + OFFSET) // TILE) for n in (width, height))
    files = sorted((HERE / "held-out").glob("*.png"))[-columns * rows :]
    pictures = [to_tensor(open_rgb(file)) for file in files]
    lines = [torch.cat(pictures[i * columns : (i + 1) * columns], dim=-1) for i in range(rows)]
    return torch.cat(lines, dim=-2)[None, :, OFFSET : OFFSET + height, OFFSET : OFFSET + width]


def edges(n: int) -> tuple[list[int], list[int]]:
    """(pixels where a tile begins or ends along n latents, other pixels where a latent does)."""
    from dmap_core.tiles import decoding, denoising

    spans = [span for tiles in (denoising(TILE // FACTOR), decoding(TILE // FACTOR)) for span in tiles.spans(n)]
    found = {FACTOR * k for span in spans for k in (span.start, span.stop) if 0 < k < n}
    near = {k + d for k in found for d in (-FACTOR, 0, FACTOR)}
    return sorted(found), [FACTOR * k for k in range(1, n) if FACTOR * k not in near]


def seam(image: torch.Tensor) -> tuple[float, float]:
    """(the ratio at tiles' edges, that at other edges of latents) of a picture (1, 3, H, W); 1 is no seam."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for dim in (-1, -2):
        difference = image.double().diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1)  # [k - 1] is between pixels k - 1 and k
        for which, places in enumerate(edges(image.shape[dim] // FACTOR)):
            for k in places:
                sums[which] += torch.stack([difference[k - 1], (difference[k - 2] + difference[k]) / 2])
    (ours, other) = sums[:, 0] / sums[:, 1]
    return float(ours), float(other)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of pictures (1, 3, H, W) in [-1, 1], the first clamped to it."""
    from dmap_core import metrics

    return float(metrics.psnr((a.clamp(-1, 1) + 1) / 2, (b + 1) / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512x512", help="width x height of the collage, multiples of 32")
    parser.add_argument("--no-whole", dest="whole", action="store_false", help="do not restore it as a whole")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    options = parser.parse_args()

    from host import import_torchvision

    import_torchvision()
    from dmap_core.backends.diffusers_files import open_base
    from dmap_core.consistency import match
    from dmap_core.operators import SuperResolution
    from dmap_core.pictures import to_picture
    from dmap_core.presets import automatic
    from dmap_core.restore import restore

    width, height = (int(n) for n in options.size.split("x"))
    x, operator = collage(width, height), SuperResolution(4)
    y = operator(x)
    preset = automatic(operator, "DMAP", "look").with_steps(options.steps)
    base = open_base(PRIOR_FILE).to(torch.device("cpu"), torch.float32).sized((height, width))
    found = {"size": options.size, "solver": preset.text(), "seed": options.seed, "given": psnr(operator.hint(y), x)}
    found["given matched"] = psnr(match(operator, operator.hint(y), y).image, x)
    pictures = {"measurement": operator.hint(y), "original": x}
    for name, tile in (("tiles", TILE // FACTOR), ("whole", None))[: 1 + options.whole]:
        prior, started = base.tiled(tile), time.process_time()
        done = restore(prior, operator, y, prior.latent_shape(), preset.sigmas(base.sigmas), preset.solver, [options.seed])
        matched = match(operator, done.image, y).image
        found[name] = {"psnr": psnr(done.image, x), "psnr matched": psnr(matched, x), "cpu seconds": time.process_time() - started}
        found[name] |= dict(zip(("seam", "elsewhere"), seam(done.image), strict=True))
        found[name] |= dict(zip(("seam matched", "elsewhere matched"), seam(matched), strict=True))
        pictures |= {name: done.image, f"{name}-matched": matched}
    found["original"] = dict(zip(("seam", "elsewhere"), seam(x), strict=True))
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, image in pictures.items():
            to_picture(image[0]).save(options.out / f"{options.size}-{name}.png")


if __name__ == "__main__":
    main()
