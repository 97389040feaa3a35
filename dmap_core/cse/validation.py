"""How good a CSE is during its training: the loss with fixed noise, and pictures that it restores alone."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn

from ..operators import Operator
from ..pictures import Layout, Tile, to_picture
from ..pictures import sheet as painted
from ..prior import NetworkPrior
from ..solvers.unguided import unguided_steps
from .loss import denoising_loss, make_hint, noised
from .settings import TrainingSettings

LEVELS = 8  # timesteps at which the loss is taken
STEPS = 20  # of the restoration
GAP = 4  # pixels between the pictures of a sheet


@torch.no_grad()
def validation_loss(
    prior: NetworkPrior, controlnet: nn.Module | None, operator: Operator, image: Tensor, settings: TrainingSettings
) -> float:
    """Mean training loss over images (B, 3, S, S) and evenly spaced timesteps, always with the same noise: comparable between steps and trainings."""
    seeds = list(range(len(image)))
    hint = make_hint(operator, image, seeds, settings.hint_range)
    z0, seeing = prior.encode(image), prior.controlled(controlnet, hint)
    losses = []
    for t in torch.linspace(0, len(prior.sigmas) - 1, LEVELS + 2)[1:-1].round().long():
        sigma = prior.sigmas[t.expand(len(image)).to(z0.device)]
        z = noised(z0, sigma, seeds)
        denoised = seeing.denoise(z, sigma)
        losses.append(denoising_loss(denoised, z0, sigma, prior.prediction, settings.snr_gamma).mean())
    return float(torch.stack(losses).mean())


def levels(prior: NetworkPrior, steps: int) -> list[float]:
    """Noise levels of evenly spaced timesteps from the last to the first, with 0 behind them."""
    timesteps = torch.linspace(len(prior.sigmas) - 1, 0, steps).round().long()
    return [float(prior.sigmas[t]) for t in timesteps] + [0.0]


@torch.no_grad()
def restore(prior: NetworkPrior, controlnet: nn.Module | None, hint: Tensor, steps: int = STEPS) -> Tensor:
    """Images (B, 3, S, S) restored by the CSE alone: deterministic steps (eta 0) over evenly spaced timesteps, noise from seeds 0, 1, ..."""
    sigmas = levels(prior, steps)
    like = prior.encode(torch.zeros_like(hint))
    z = noised(torch.zeros_like(like), like.new_full((len(like),), sigmas[0]), range(len(like)))
    *_, (_, z) = unguided_steps(prior.controlled(controlnet, hint).denoise, z, sigmas, eta=0.0)
    return prior.decode(z)


@torch.no_grad()
def sheet(prior: NetworkPrior, controlnet: nn.Module | None, operator: Operator, image: Tensor, hint_range: str) -> Image.Image:
    """A picture with a row for every image: what the CSE sees, what it makes of it alone, and the original."""
    hint = make_hint(operator, image, range(len(image)), hint_range)
    shown = hint if hint_range == "-1..1" else hint * 2 - 1
    restored = restore(prior, controlnet, hint)
    size = image.shape[-1]
    rows = [[Tile(to_picture(picture)) for picture in pictures] for pictures in zip(shown, restored, image, strict=True)]
    return painted(rows, Layout((size, size), (GAP, GAP)))
