"""How good a CSE is during its training: the loss with fixed noise, and pictures that it restores alone."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..operators import Operator
from ..pictures import Layout, Tile, to_picture
from ..pictures import sheet as painted
from ..schedule import ancestral_step
from .loss import Base, denoising_loss, make_hint, noised
from .settings import TrainingSettings

LEVELS = 8  # timesteps at which the loss is taken
STEPS = 20  # of the restoration
GAP = 4  # pixels between the pictures of a sheet


@torch.no_grad()
def validation_loss(base: Base, controlnet: Any, operator: Operator, image: Tensor, settings: TrainingSettings) -> float:
    """Mean training loss over images (B, 3, S, S) and evenly spaced timesteps, always with the same noise: comparable between steps and trainings."""
    seeds = list(range(len(image)))
    hint = make_hint(operator, image, seeds, settings.hint_range)
    z0 = base.encode(image)
    losses = []
    for t in torch.linspace(0, len(base.sigmas) - 1, LEVELS + 2)[1:-1].round().long():
        timestep = t.expand(len(image)).to(z0.device)
        sigma = base.sigmas[timestep]
        z = noised(z0, sigma, seeds)
        denoised = base.denoise(controlnet, z, timestep, hint)
        losses.append(denoising_loss(denoised, z0, sigma, base.prediction, settings.snr_gamma).mean())
    return float(torch.stack(losses).mean())


def levels(base: Base, steps: int) -> tuple[Tensor, list[float]]:
    """(steps,) evenly spaced timesteps from the last to the first, and their noise levels with 0 behind them."""
    timesteps = torch.linspace(len(base.sigmas) - 1, 0, steps).round().long()
    return timesteps, [float(base.sigmas[t]) for t in timesteps] + [0.0]


@torch.no_grad()
def restore(base: Base, controlnet: Any, hint: Tensor, steps: int = STEPS) -> Tensor:
    """Images (B, 3, S, S) restored by the CSE alone: deterministic steps (eta 0) over evenly spaced timesteps, noise from seeds 0, 1, ..."""
    timesteps, sigmas = levels(base, steps)
    like = base.encode(torch.zeros_like(hint))
    z = noised(torch.zeros_like(like), like.new_full((len(like),), sigmas[0]), range(len(like)))
    for i, t in enumerate(timesteps):
        denoised = base.denoise(controlnet, z, t.expand(len(z)).to(z.device), hint)
        z, _ = ancestral_step(z, denoised, sigmas[i], sigmas[i + 1], eta=0.0)
    return base.decode(z)


@torch.no_grad()
def sheet(base: Base, controlnet: Any, operator: Operator, image: Tensor, hint_range: str) -> Image.Image:
    """A picture with a row for every image: what the CSE sees, what it makes of it alone, and the original."""
    hint = make_hint(operator, image, range(len(image)), hint_range)
    shown = hint if hint_range == "-1..1" else hint * 2 - 1
    restored = restore(base, controlnet, hint)
    size = image.shape[-1]
    rows = [[Tile(to_picture(picture)) for picture in pictures] for pictures in zip(shown, restored, image, strict=True)]
    return painted(rows, Layout((size, size), (GAP, GAP)))
