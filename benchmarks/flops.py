"""Floating-point operations of networks, counted under fake tensors by torch's counter (a product and its sum are two operations)."""

from __future__ import annotations

import torch

from dmap_core.gradient import linearise

from .live import fake, flop_counter
from .memory import SIGMA, empty
from .shapes import CHANNELS, FACTOR, build

SIZES = (512, 768, 1024, 2048)
TERA = 1e12


def forward_and_vjp(f, x) -> tuple[int, int]:
    """Operations of (f(x), the vector-Jacobian product behind it)."""
    with torch.enable_grad():
        with flop_counter() as forward:
            y, pull = linearise(f, x)
        with flop_counter() as back:
            pull(torch.empty_like(y))
    return forward.get_total_flops(), back.get_total_flops()


def denoiser_flop(family: str, size: int) -> tuple[int, int]:
    with fake():
        prior = build(family, "TAESD", weights=False)
        return forward_and_vjp(lambda z: prior.denoise(z, SIGMA), empty(size, CHANNELS, FACTOR))


def decoder_flop(decoder: str, size: int) -> tuple[int, int]:
    with fake():
        prior = build("demo prior", decoder, weights=False)
        return forward_and_vjp(prior.decode, empty(size, CHANNELS, FACTOR))


def encoder_flop(decoder: str, size: int) -> tuple[int, int]:
    """Of the encoder that belongs to a decoder."""
    with fake():
        prior = build("demo prior", decoder, weights=False)
        return forward_and_vjp(prior.encode, empty(size, 3, 1))


def fitted(sizes, values) -> tuple[float, float, float]:
    """(lin, quad) of lin a + quad a^2 for values at squares of these sizes, a in units of 512x512, and the worst relative error.

    Weighted, so that small sizes count as much as large ones.
    """
    a = torch.tensor([(size / 512) ** 2 for size in sizes], dtype=torch.float64)
    v = torch.tensor(values, dtype=torch.float64)
    columns = torch.stack([a / v, a**2 / v], dim=1)
    lin, quad = torch.linalg.lstsq(columns, torch.ones(len(sizes), 1, dtype=torch.float64)).solution[:, 0].tolist()
    return lin, quad, float(((lin * a + quad * a**2) / v - 1).abs().max())
