"""Noise levels, in variance-exploding (VE) units, and the steps between them.

A VE latent is z = z0 + sigma * eps. With abar the cumulative alpha of a variance-preserving (VP) model, sigma = sqrt((1 - abar) / abar)
and z = z_vp / sqrt(abar): the convention of k-diffusion and ComfyUI, in which the paper's step sizes zeta are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def ancestral_step(z: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[Tensor, float]:
    """Mean and standard deviation (mu, sigma_up) of p(z_next | z), the reverse kernel of Eq. 2.

    z, denoised: (B, ...), noise level sigma -> sigma_next < sigma. eta = 1 is DDPM's posterior ("fixed small" variance), eta = 0 the
    deterministic PF-ODE (DDIM) step with sigma_up = 0; sigma_up = 0 at sigma_next = 0 too.
    """
    sigma_up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
    return denoised + (sigma_down / sigma) * (z - denoised), sigma_up


def renoised(z0: Tensor, offset: Tensor, sigma: float, sigma_next: float, fresh: float, generator) -> Tensor:
    """z0 (B, ...) with noise of level sigma_next: a share `fresh` of its deviation drawn, the rest the old noise; offset: what is that, at level sigma.

    fresh = 1 keeps nothing of it, as a consistency model's step; fresh = 0 draws nothing (DDIM).
    """
    z0 = z0 + sigma_next * math.sqrt(1 - fresh**2) / sigma * offset
    return z0 + sigma_next * fresh * randn_like(z0, generator) if sigma_next * fresh > 0 else z0


def double_on_cpu(values: Tensor | Sequence[float]) -> Tensor:
    """A tensor or numbers as float64 on the CPU. Moved first: there are devices without float64."""
    return values.detach().cpu().double() if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)


def _sigma_at(model_sigmas: Tensor, timesteps: Tensor) -> Tensor:
    table = double_on_cpu(model_sigmas)
    below = timesteps.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], timesteps - below)


def _check_range(steps: int, start: float, end: float) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if not 0 <= end < start <= 1:
        raise ValueError(f"start is {start} and end {end}; they must satisfy 0 <= end < start <= 1")


def _to_zero(sigmas: Tensor, start: float, end: float) -> Tensor:
    """The levels in float32, with 0 behind them. Raises ValueError where two of them are the same number, as no solver takes them."""
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
    if not (levels[1:] < levels[:-1]).all():
        raise ValueError(
            f"start is {start:g} and end {end:g}, which are too close for {len(sigmas)} steps: noise levels would be equal. Raise start, or lower steps"
        )
    return levels


def paper_sigmas(model_sigmas: Tensor, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """The paper's spacing: timesteps linspace(999, 0, steps), sigmas interpolated between the model's, then 0. (steps + 1,) float32.

    model_sigmas: (N,) rising VE sigmas of the training timesteps. `start` and `end` in [0, 1] are the first and the last timestep as
    fractions of N - 1: start = 0.6 begins from a latent with the noise of timestep 599 (partial denoising), end = 0.1 jumps from there to 0.
    """
    _check_range(steps, start, end)
    last = len(model_sigmas) - 1
    sigmas = _sigma_at(model_sigmas, torch.linspace(start * last, end * last, steps, dtype=torch.float64))
    return _to_zero(sigmas, start, end)


def exponential_sigmas(model_sigmas: Tensor, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Noise levels that fall by the same factor at every step, between the same ends as `paper_sigmas`, then 0.

    Not the paper's: with some dozens of steps instead of hundreds it leaves more of them for the low noise levels, where detail is decided.
    """
    _check_range(steps, start, end)
    last = len(model_sigmas) - 1
    first, final = _sigma_at(model_sigmas, torch.tensor([start * last, end * last], dtype=torch.float64)).log()
    sigmas = torch.linspace(float(first), float(final), steps, dtype=torch.float64).exp()
    return _to_zero(sigmas, start, end)


def karras_sigmas(model_sigmas: Tensor, steps: int, start: float = 1.0, end: float = 0.0, rho: float = 7.0) -> Tensor:
    """Noise levels evenly spaced in sigma^(1 / rho), between the same ends as `paper_sigmas`, then 0 (Karras et al. 2022, Eq. 5)."""
    _check_range(steps, start, end)
    last = len(model_sigmas) - 1
    first, final = _sigma_at(model_sigmas, torch.tensor([start * last, end * last], dtype=torch.float64)) ** (1 / rho)
    sigmas = torch.linspace(float(first), float(final), steps, dtype=torch.float64) ** rho
    return _to_zero(sigmas, start, end)


SPACINGS = {"paper": paper_sigmas, "exponential": exponential_sigmas, "karras": karras_sigmas}


def check_sigmas(sigmas: Tensor | Sequence[float], to_zero: bool = True) -> list[float]:
    """The schedule as floats. Raises ValueError unless it falls at every step, and ends at 0 if `to_zero`."""
    levels = [float(s) for s in sigmas]
    if len(levels) < 2:
        raise ValueError(f"sigmas holds {len(levels)} noise levels; it must hold at least two")
    if not all(math.isfinite(s) for s in levels):
        raise ValueError("sigmas holds NaN or infinite values")
    rise = next((i for i, (a, b) in enumerate(zip(levels, levels[1:], strict=False)) if b >= a), None)
    if rise is not None:
        raise ValueError(
            f"sigmas must fall at every step, but step {rise} goes from {levels[rise]:.4g} to {levels[rise + 1]:.4g}; do not flip the schedule"
        )
    if to_zero and levels[-1] != 0:
        raise ValueError(f"sigmas must end at 0, but end at {levels[-1]:.4g}; give the whole schedule, not the first half of a split one")
    return levels


# Rectified flows: x_t = (1 - t) z0 + t eps, so that z = x_t / (1 - t) is a VE latent at sigma = t / (1 - t).

FLOW_FIRST = 0.995  # time of the noisiest level, sigma 199: at 1 it would be infinite, and closer to 1 steps would go into pure noise
FLOW_LAST = 0.02  # and of the least noisy one: below it is only rounding to be removed


def flow_time(sigma: Any) -> Any:
    """t of VE noise levels, numbers or a tensor."""
    return sigma / (1 + sigma)


def flow_sigma(t: Any) -> Any:
    """VE noise levels of times t below 1, numbers or a tensor."""
    return t / (1 - t)


def flow_sigmas(times: Tensor) -> Tensor:
    """(N,) rising VE noise levels of a flow's rising training times (as its shift makes them), without those above FLOW_FIRST and below FLOW_LAST."""
    times = double_on_cpu(times)
    rounded = 1e-6  # of times that come in float32, so that the same ones are among them
    return flow_sigma(times[(times > FLOW_LAST - rounded) & (times < FLOW_FIRST + rounded)]).float()


def flow_levels(times: Tensor) -> Tensor:
    """A schedule of falling times (T + 1,) with a first one below 1: FLOW_FIRST, or half of what the next one leaves if that is nearer to 1.

    Nothing is known of the picture at either, so that it does not matter where a run begins.
    """
    if len(times) < 2 or times[0] < 1:
        return times
    return torch.cat([torch.clamp((1 + times[1:2]) / 2, min=FLOW_FIRST), times[1:]])


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator per sample, so that the noise of sample i does not depend on the batch size. Sample 0's is seeded with `seed` itself."""
    return [torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * i) % 2**64) for i in range(n)]


def randn_like(z: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Unit Gaussian noise like z (B, ...), drawn on the CPU; with a sequence of generators, one per sample."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(z.shape, generator=generator).to(z)
    if len(generator) != len(z):
        raise ValueError(f"{len(generator)} generators for a batch of {len(z)}")
    return torch.stack([torch.randn(z.shape[1:], generator=g) for g in generator]).to(z)
