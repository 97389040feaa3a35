"""Training pictures made by the base model itself ("self-generated", Table 6), for those who have none.

    dmap generate-cse --checkpoint 512-base-ema.safetensors --out generated/ --count 100

Picture i has the seed SEED + i and the name 00000i.png: the same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import MOST, PREDICTION_OPTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from ..prior import NetworkPrior

log = logging.getLogger("dmap.cse")
STEPS = 50  # of the paper's authors


def generate(prior: NetworkPrior, shape: tuple[int, int, int], seed: int, steps: int = STEPS) -> Tensor:
    """One image (1, 3, H, W) from latents of `shape` (C, h, w): Euler-ancestral steps (eta 1) over evenly spaced timesteps."""
    import torch

    from ..schedule import generators, randn_like
    from ..solvers.unguided import unguided_steps
    from .validation import levels

    sigmas, noise = levels(prior, steps), generators(seed, 1)
    z = sigmas[0] * randn_like(torch.zeros(1, *shape, device=prior.sigmas.device), noise)
    with torch.no_grad():
        *_, (_, z) = unguided_steps(prior.denoise, z, sigmas, eta=1.0, generator=noise)
        return prior.decode(z)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the base model: a .safetensors or .ckpt file, or a diffusers folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--count", type=int, default=100, help="pictures (default: 100)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"Euler-ancestral steps (default: {STEPS}, the paper's)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--prompt", default="", help="default: empty, the paper's")
    parser.add_argument("--prediction", choices=PREDICTION_OPTIONS, default="auto", help="what the base model predicts (default: auto)")
    parser.add_argument("--distilled-guidance", type=float, help="of models that read one, such as Flux.1 dev (default: 3.5)")


def generate_cse(
    *,
    checkpoint: Path,
    out: Path,
    count: int = 100,
    steps: int = STEPS,
    size: int = 512,
    seed: int = 0,
    prompt: str = "",
    prediction: str = "auto",
    distilled_guidance: float | None = None,
) -> None:
    """`count` pictures into the folder `out`; those that are there already are kept. Raises ValueError for what makes no sense."""
    if count < 1 or not 2 <= steps <= MOST["steps"] or not 8 <= size <= MOST["size"] or size % 8:
        raise ValueError(f"--count must be at least 1, --steps 2 to {MOST['steps']}, and --size a multiple of 8 up to {MOST['size']}")
    import torch
    from tqdm.auto import tqdm

    from ..backends.diffusers_files import open_base
    from ..files import write_whole
    from ..pictures import to_picture

    prior = open_base(checkpoint, prompt, prediction, distilled_guidance).sized((size, size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    shape = prior.latent_shape()
    for i in tqdm(range(count), desc="generating"):
        file = out / f"{i:06d}.png"
        if not file.exists():
            picture = to_picture(generate(prior, shape, seed + i, steps)[0])
            write_whole(file, lambda part, picture=picture: picture.save(part, format="PNG"))
    log.info("%d pictures in %s", count, out)
