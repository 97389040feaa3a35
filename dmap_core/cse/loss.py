"""What training minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..operators import Operator
from ..prior import NetworkPrior
from .settings import TrainingSettings


def noised(z0: Tensor, sigma: Tensor, seeds: Sequence[int]) -> Tensor:
    """z = z0 + sigma eps; the noise of every sample from a seed of its own, drawn on the CPU, so that it depends on nothing else."""
    eps = torch.stack([torch.randn(z0.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return z0 + sigma.view(-1, 1, 1, 1) * eps.to(z0)


@torch.no_grad()
def make_hint(operator: Operator, image: Tensor, seeds: Sequence[int], hint_range: str) -> Tensor:
    """The hint (B, 3, H, W) of clean images: degraded after their augmentation, with the measurement's noise if the operator has any."""
    y = operator.measure(image)
    if operator.noise:
        y = noised(y, y.new_full((len(y),), operator.noise), seeds)
    return in_range(operator.hint(y), hint_range)


def in_range(hint: Tensor, hint_range: str) -> Tensor:
    """A hint in [-1, 1] as a ControlNet of that range wants it. Not clamped: bicubic enlargement overshoots a little."""
    return (hint + 1) / 2 if hint_range == "0..1" else hint


def denoising_loss(denoised: Tensor, z0: Tensor, sigma: Tensor, prediction: str, snr_gamma: float | None = None) -> Tensor:
    """Squared error of the network's own target, mean over a latent: (B,) float32 (B.2: eps-prediction).

    denoised, z0: (B, C, h, w) VE latents; sigma: (B,). With z = z0 + sigma eps, eps_hat - eps = (z0 - denoised) / sigma; for v-prediction
    v_hat - v = (z0 - denoised) sqrt(1 + 1 / sigma^2), and for a flow's velocity (z0 - denoised) (1 + 1 / sigma). snr_gamma: min-SNR weights (Hang et al. 2023), which are min(1 / sigma^2, gamma) on
    the error of z0 for both: low noise levels, where a hint is worth little, count less.
    """
    snr = sigma.float() ** -2
    own = {"eps": snr, "v": snr + 1, "flow": (1 + snr.sqrt()) ** 2}
    weight = snr.clamp(max=snr_gamma) if snr_gamma else own[prediction]
    return weight * (denoised - z0).float().square().flatten(1).mean(1)


def batch_loss(prior: NetworkPrior, controlnet: nn.Module | None, operator: Operator, batch: dict, settings: TrainingSettings) -> Tensor:
    """Mean loss of a batch (see data.collate), with a graph to the ControlNet's weights."""
    hint = make_hint(operator, batch["image"], batch["measurement_seeds"], settings.hint_range)
    with torch.no_grad():
        z0 = prior.encode(batch["image"])
    sigma = prior.sigmas[batch["timestep"]]
    z = noised(z0, sigma, batch["noise_seeds"])
    denoised = prior.controlled(controlnet, hint).denoise(z, sigma)
    return denoising_loss(denoised, z0, sigma, prior.prediction, settings.snr_gamma).mean()
