"""Softness and enlarging, from a picture's spectrum.

A natural picture's power falls as A |f|^-b in the plane of frequencies, b about 2.8. A Gaussian multiplies it with exp(-4 pi^2 sigma^2 f^2). Enlarging s times
stretches it, with images of it above 1 / (2 s), and multiplies it with the interpolation's own response. Noise adds a floor. All such models, summed over one of the
two frequencies, are compared with the spectrum of rows and columns; the cost of a model is the mean square of the logarithms' difference and how unusual its b is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..operators.super_resolution import cubic

LENGTH = 128  # pixels of a row that a spectrum is made of
FIRST = 2  # bin, of LENGTH / 2: below, the window mixes them with the mean
SIGMAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.3, 2.6, 3.0, 3.5, 4.0, 4.6, 5.3, 6.0, 7.0, 8.0)
FACTORS = (1.33, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
POWERS = (2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4)
USUAL, SPREAD = 2.8, 0.3  # of the power
FLOORS = (0.6, 1.0, 1.6)  # times the noise that is expected
SOFTENED = 1.0  # times the noise that is expected, added to both sides: what is below it counts little
START, ROUNDS = 6, 4  # bins that a model's strength is first taken from; corrections of it
NEAR = 0.004  # cost that a model may have more to fit about as well
FAR = 3.0  # of a logarithm, for one of them
MISFIT = 0.3  # of a logarithm: natural spectra are no straighter than this


@dataclass(frozen=True)
class Fit:
    """A model's factor and sigma, in pixels of the picture before it was enlarged, the range of sigmas that fit about as well, and its cost."""

    enlarged: float
    sigma: float
    low: float
    high: float
    cost: float


def power(luma: Tensor) -> Tensor:
    """(LENGTH / 2,): mean power of rows and columns of (n, h, w) at f = 0, 1 / LENGTH, ...; white noise has its variance everywhere.

    Raises ValueError for pictures smaller than LENGTH.
    """
    if min(luma.shape[-2:]) < LENGTH:
        raise ValueError(f"spectrum: {luma.shape[-1]}x{luma.shape[-2]} pixels; {LENGTH} are needed along each side")
    window = torch.hann_window(LENGTH, dtype=luma.dtype, device=luma.device)
    found = []
    for plane in (luma, luma.mT):
        rows = plane[:, ::2].unfold(-1, LENGTH, LENGTH // 2)
        spectrum = torch.fft.rfft((rows - rows.mean(-1, keepdim=True)) * window).abs().square().flatten(0, -2).mean(0)
        found.append(spectrum[: LENGTH // 2] / window.square().sum())
    return torch.stack(found).log().mean(0).exp()


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def models() -> tuple[Tensor, Tensor, Tensor]:
    """(settings (m, 2): enlarged and sigma; shapes (m, p, bins): logarithms of their power but for its strength, one for every power p; the bins' frequencies)."""
    along = torch.arange(FIRST, LENGTH // 2, dtype=torch.float64) / LENGTH
    across = (torch.arange(LENGTH // 2, dtype=torch.float64) + 0.5) / LENGTH
    settings, shapes = [], []
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64)[:, None]
    for factor in (1.0, *FACTORS):
        folded = [(f * factor - (f * factor).round()).abs().clamp(min=0.5 / LENGTH) for f in (along, across)]
        plane = (folded[0][:, None].square() + folded[1].square()).log()
        natural = torch.stack([(plane * (-power / 2)).exp() for power in POWERS])  # (p, along, across)
        soft = [torch.exp(-4 * (math.pi * sigmas * f) ** 2) for f in folded]  # (sigmas, f)
        for here, there in zip(*(responses(f * factor) for f in (along, across)), strict=True) if factor > 1 else [(1.0, 1.0)]:
            settings += [(factor, sigma) for sigma in SIGMAS]
            summed = torch.einsum("pfg,sg->spf", natural, soft[1] * there)
            shapes.append(summed * (soft[0] * here)[:, None])
    return torch.tensor(settings), torch.cat(shapes).clamp(min=1e-30).log().float(), along.float()


def responses(frequency: Tensor) -> list[Tensor]:
    """Of linear, cubic and Lanczos interpolation to a frequency in cycles per pixel of the small picture: of power, 1 at 0."""
    t = torch.arange(-3, 3, 0.01, dtype=torch.float64) + 0.005
    kernels = [(1 - t.abs()).clamp(min=0), cubic(t), torch.sinc(t) * torch.sinc(t / 3)]
    waves = torch.cos(2 * math.pi * frequency[:, None] * t)
    return [((waves @ kernel) / kernel.sum()).square() for kernel in kernels]


def fit(spectrum: Tensor, noise: float, trusted: Tensor | None = None) -> tuple[Fit, Fit]:
    """The likeliest models of `power`'s spectrum, (not enlarged, enlarged).

    noise: variance of what is no picture in it, rounding included. trusted: (bins,) weights of the frequencies from FIRST on; None: all count.
    """
    settings, shapes, _ = (t.to(spectrum) for t in models())
    measured = spectrum[FIRST:].clamp(min=1e-12).log()
    weights = torch.ones_like(measured) if trusted is None else trusted.to(measured)
    weights = weights / weights.sum()
    unusual = ((torch.tensor(POWERS).to(spectrum) - USUAL) / SPREAD).square() * MISFIT**2 / 10
    measured = (measured.exp() + SOFTENED * noise).log()
    best = None
    for floor in FLOORS:
        raised = noise * (floor + SOFTENED)
        strength = (measured - shapes)[..., :START].mean(-1, keepdim=True)
        for _ in range(ROUNDS):  # Gauss-Newton's
            signal = (shapes + strength).exp()
            difference = measured - (signal + raised).log()
            slope = signal / (signal + raised)
            change = (slope * difference * weights).sum(-1, keepdim=True) / (slope.square() * weights).sum(-1, keepdim=True).clamp(
                min=1e-12
            )
            strength = strength + change.clamp(-FAR, FAR)
        difference = measured - ((shapes + strength).exp() + raised).log()
        cost = ((difference.square() * weights).sum(-1) + unusual).amin(-1)
        best = cost if best is None else torch.minimum(best, cost)
    assert best is not None
    factors, sigmas = settings.T
    return _best(factors, sigmas, best, factors == 1), _best(factors, sigmas, best, factors > 1)


def _best(factors: Tensor, sigmas: Tensor, costs: Tensor, allowed: Tensor) -> Fit:
    winner = int(torch.where(allowed, costs, torch.inf).argmin())
    factor, cost = float(factors[winner]), float(costs[winner])
    curve = torch.stack([costs[(factors == factors[winner]) & (sigmas == sigma)].min() for sigma in sigmas.unique()])
    near = sigmas.unique()[curve < cost + NEAR]
    return Fit(factor, _between(sigmas.unique(), curve), float(near.min()), float(near.max()), cost)


def _between(sigmas: Tensor, curve: Tensor) -> float:
    """Where the parabola through the least and its neighbours is least."""
    i = int(curve.argmin())
    if i in (0, len(curve) - 1):
        return float(sigmas[i])
    x, y = sigmas[i - 1 : i + 2].double(), curve[i - 1 : i + 2].double()
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    at = (x[0] + x[1]) / 2 - left / (2 * bend)
    return float(at.clamp(x[0], x[2]))
