"""One restoration from beginning to end: noise from a seed, a solver, the picture and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import Diverged
from .operators import Operator
from .operators.base import check_batch
from .posterior import Posterior
from .prior import Prior
from .schedule import generators, randn_like
from .solvers import Solver


@dataclass
class Restoration:
    """image: (B, 3, H, W) in [-1, 1], not clamped. peak_memory: bytes on the GPU, None on the CPU."""

    image: Tensor
    seconds: float
    denoiser_calls: int
    decoder_calls: int
    guidance_calls: int
    memory: str
    peak_memory: int | None


def initial_latent(shape: tuple[int, int, int], sigma: float, seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """x_T (B, C, h, w) in VE space for B seeds: sqrt(1 + sigma^2) eps, as the last step of a VP model is not quite pure noise."""
    noise = torch.empty((len(seeds), *shape), device=device)
    return (1 + sigma**2) ** 0.5 * randn_like(noise, [g for seed in seeds for g in generators(seed, 1)])


def noised(latent: Tensor, sigma: float, seeds: Sequence[int]) -> Tensor:
    """A latent z0 (B, C, h, w) with the noise of a level, of the same seeds as `initial_latent`'s: where a run with `start` below 1 begins."""
    return latent + sigma * randn_like(latent, [g for seed in seeds for g in generators(seed, 1)])


def warm_latent(prior: Prior, operator: Operator, y: Tensor) -> Tensor:
    """z0 of the measurement's own picture, enlarged where it is smaller."""
    with torch.no_grad():
        return prior.encode(operator.hint(y).clamp(-1, 1)).to(y.device, torch.float32)


def _check_latent(size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless some factor makes a latent (C, h, w) of a picture of `size` (H, W), rounded up."""
    factor = max(-(-n // m) for n, m in zip(size, shape[1:], strict=True))
    if tuple(-(-n // factor) for n in size) != tuple(shape[1:]):
        raise ValueError(
            f"measurement: it is that of a picture of {size[1]}x{size[0]}, of which no autoencoder makes a latent of {shape[2]}x{shape[1]}"
        )


def restore(
    prior: Prior,
    operator: Operator,
    y: Tensor,
    shape: tuple[int, int, int],
    sigmas: Tensor,
    solver: Solver,
    seeds: Sequence[int],
    memory: str = "auto",
    callback: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    latent: Tensor | None = None,
    guidance: Callable[[Tensor], Tensor] | None = None,
) -> Restoration:
    """A restoration for every seed, of one measurement y (1, c, h, w) or of one each (B, c, h, w). shape: (C, h, w) of a latent.

    sigmas: (T + 1,) falling to 0. The noise of x_T comes from a sample's seed, that of
    the steps from the seed after it, as in ComfyUI: it is the picture that a graph with that seed makes. No sample depends on the others,
    but for rounding, which a guided run amplifies (docs/solvers.md). latent: (B, C, h, w) z0 to begin from, noised to the first level, in the place of pure noise.
    guidance: see Posterior.
    Raises ValueError, before anything is computed, for a y that the operator does not make; errors.Diverged for NaN, and what the solver raises.
    """
    operator.check_measurement(y)
    check_batch(y, len(seeds))
    _check_latent(operator.image_size(y), shape)
    device = y.device
    posterior = Posterior(prior, operator, y.expand(len(seeds), -1, -1, -1), memory, guidance)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    z = initial_latent(shape, float(sigmas[0]), seeds, device) if latent is None else noised(latent, float(sigmas[0]), seeds)
    noise = [g for seed in seeds for g in generators(seed + 1, 1)]
    z0 = solver(posterior, z, sigmas, generator=noise, callback=callback)
    with torch.no_grad():
        image = prior.decode(z0)
    if not torch.isfinite(image).all():
        raise Diverged("the decoded picture holds NaN or infinity; lower zeta, or run the model and the VAE in fp32")
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    calls = posterior.denoiser_calls, posterior.decoder_calls, posterior.guidance_calls
    return Restoration(image, seconds, *calls, posterior.plan, peak)
