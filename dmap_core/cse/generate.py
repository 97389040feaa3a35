"""Training pictures made by the base model itself ("self-generated", Table 6), for those who have none.

    python -m dmap_core.cse.generate --checkpoint 512-base-ema.safetensors --out generated/ --count 100

Picture i has the seed SEED + i and the name 00000i.png: the same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import MOST

if TYPE_CHECKING:
    from torch import Tensor

    from .loss import Base

log = logging.getLogger("dmap.cse")
STEPS = 50  # of the paper's authors


def generate(base: Base, shape: tuple[int, int, int], seed: int, steps: int = STEPS) -> Tensor:
    """One image (1, 3, H, W) from latents of `shape` (C, h, w): Euler-ancestral steps (eta 1) over evenly spaced timesteps."""
    import torch

    with torch.no_grad():
        return _generate(base, shape, seed, steps)


def _generate(base: Base, shape: tuple[int, int, int], seed: int, steps: int) -> Tensor:
    import torch

    from ..schedule import ancestral_step, generators, randn_like
    from .validation import levels

    timesteps, sigmas = levels(base, steps)
    noise = generators(seed, 1)
    device = base.sigmas.device
    z = sigmas[0] * randn_like(torch.zeros(1, *shape, device=device), noise)
    for i, t in enumerate(timesteps):
        denoised = base.denoise(None, z, t.expand(1).to(device), None)
        z, sigma_up = ancestral_step(z, denoised, sigmas[i], sigmas[i + 1])
        if sigma_up:
            z = z + sigma_up * randn_like(z, noise)
    return base.decode(z)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        _main(argv)
    except KeyboardInterrupt:  # during the imports, too, which take seconds; whole pictures are kept
        sys.exit(128 + signal.SIGINT)


def _main(argv: Sequence[str] | None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m dmap_core.cse.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--checkpoint", type=Path, required=True, help="the base model: a .safetensors or .ckpt file, or a diffusers folder")
    p.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    p.add_argument("--count", type=int, default=100, help="pictures (default: 100)")
    p.add_argument("--steps", type=int, default=STEPS, help=f"Euler-ancestral steps (default: {STEPS}, the paper's)")
    p.add_argument("--size", type=int, default=512, help="height and width in pixels (default: 512)")
    p.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    p.add_argument("--prompt", default="", help="default: empty, the paper's")
    p.add_argument("--prediction", choices=("auto", "eps", "v"), default="auto", help="what the base model predicts (default: auto)")
    args = p.parse_args(argv)
    if args.count < 1 or not 2 <= args.steps <= MOST["steps"] or not 8 <= args.size <= MOST["size"] or args.size % 8:
        p.error(f"--count must be at least 1, --steps 2 to {MOST['steps']}, and --size a multiple of 8 up to {MOST['size']}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        import torch
        from tqdm.auto import tqdm

        from ..backends.diffusers_files import open_base
        from ..files import write_whole
        from ..pictures import to_picture
    except ModuleNotFoundError as error:
        from .options import MISSING

        sys.exit(MISSING.format(error.name))
    try:
        base = open_base(args.checkpoint, args.prompt, args.prediction)
    except ValueError as error:
        sys.exit(f"error: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    args.out.mkdir(parents=True, exist_ok=True)
    shape = (base.unet.config.in_channels, args.size // 8, args.size // 8)
    for i in tqdm(range(args.count), desc="generating"):
        file = args.out / f"{i:06d}.png"
        if not file.exists():
            picture = to_picture(generate(base, shape, args.seed + i, args.steps)[0])
            write_whole(file, lambda part, picture=picture: picture.save(part, format="PNG"))
    log.info("%d pictures in %s", args.count, args.out)


if __name__ == "__main__":
    main()
