"""Noise of a picture, from what its flattest blocks hold at high frequencies, where a picture has little and white noise as much as anywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators.jpeg import dct_matrix, in_blocks
from .lattice import Lattice

FLAT = 0.1  # share of the blocks, those with least at low frequencies, that is taken for flat
FEWEST = 12  # blocks that an estimate is made of
FAINT = 3.0  # grey levels: less is what most cameras leave, and is called none
FALL = 2.0  # log likelihood that a grain may lose for it to be possible still
LEAST = 6  # coefficients that a compression left, for grain to be seen in them at all


def _order() -> Tensor:
    """(64,): the sum of the two frequencies of every coefficient, 0 .. 14."""
    return (torch.arange(8)[:, None] + torch.arange(8)).flatten()


ORDER = _order()
LOW, HIGH = (ORDER > 0) & (ORDER < 5), ORDER >= 9
KEPT = tuple((least <= ORDER) & (ORDER <= 9) for least in (4, 5, 6))  # of a compression, which hardly leaves higher ones
FLATTER, WIDER = 0.04, 0.15  # shares of the blocks of a compression, of which texture has more in the wider, noise as much
VISIBLE = 4.5  # grey levels of a compression's grain: less is as often texture
EVEN = 1.3  # times: more of it in the wider share is texture


def flattest(coefficients: Tensor, low: Tensor, share: float = FLAT) -> Tensor:
    """Of coefficients (n, 64) the blocks with least of those called low."""
    activity = coefficients[:, low].square().sum(1)
    return coefficients[activity.argsort()[: max(FEWEST, int(share * len(coefficients)))]]


def of_channels(channels: Tensor) -> float | None:
    """Standard deviation in grey levels of white noise in every one of (n, c, h, w), 0 .. 255; None if there is too little to see it in.

    Half of the flattest blocks have less than the median of theirs: flat ones that are not flat do not count.
    """
    visible = ((channels > 0) & (channels < 255)).all(1)
    height, width = (n // 8 * 8 for n in channels.shape[-2:])
    whole = in_blocks(visible[..., :height, :width]).flatten(-2).all(-1).flatten()
    if int(whole.sum()) < FEWEST:
        return None
    dct = dct_matrix().to(channels)
    variances = []
    for channel in channels.unbind(1):
        blocks = in_blocks(channel[..., :height, :width]).flatten(0, 2)[whole]
        flat = flattest((dct @ blocks @ dct.mT).flatten(1), LOW)
        freedom = int(HIGH.sum())
        median = float(flat[:, HIGH].square().mean(1).median()) / (1 - 2 / (9 * freedom)) ** 3  # of chi squared (Wilson and Hilferty 1931)
        variances.append(max(0.0, median - 1 / 12))
    return math.sqrt(sum(variances) / len(variances))


def of_compressed(lattice: Lattice) -> tuple[float | None, float]:
    """(standard deviation in grey levels of luma's noise, what it is below for certain) from coefficients that were rounded; None where they hide it.

    The likeliest sigma, every coefficient being known to lie in its cell alone: a zero says less than half a step, not zero. Taken for numbers they would give a
    fraction of the grain.
    """
    steps = lattice.jpeg.constants(lattice.coefficients).tables[0].flatten()
    flat, wider = (flattest(lattice.coefficients, (ORDER > 0) & (ORDER < 3), share) for share in (FLATTER, WIDER))
    if len(flat) < FEWEST:
        return None, math.inf
    # white noise is in all frequencies alike, texture less in higher ones: the least is nearest to the noise
    found = [_likeliest(flat[:, kept], steps[kept]) for kept in KEPT]
    most = min(upper for _, upper in found)
    seen = [sigma for sigma, _ in found if sigma is not None]
    if not seen or min(seen) > most:
        return None, most
    around = min(sigma for sigma, _ in (_likeliest(wider[:, kept], steps[kept]) for kept in KEPT) if sigma is not None)
    return (min(seen) if around < EVEN * min(seen) else None), most


def _likeliest(flat: Tensor, steps: Tensor) -> tuple[float | None, float]:
    index = (flat / steps).round().abs()
    sigmas = torch.logspace(math.log10(0.25), math.log10(60), 80).to(flat)
    likelihood = []
    for sigma in sigmas:
        upper, lower = ((index + side) * steps / (sigma * math.sqrt(2)) for side in (0.5, -0.5))
        cell = torch.where(index == 0, torch.erf(upper), (torch.erf(upper) - torch.erf(lower)) / 2)
        likelihood.append(cell.clamp(min=1e-4).log().sum())
    curve = torch.stack(likelihood)
    possible = sigmas[curve > curve.max() - FALL]
    if int((index > 0).sum()) < LEAST:
        return None, float(possible.max())
    return float(sigmas[curve.argmax()]), float(possible.max())
