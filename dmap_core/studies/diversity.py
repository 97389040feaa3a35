"""How different the restorations of one measurement are (Observation III, Sec. 3.4: Fig. 3 and Table 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class Diversity:
    """The spread of k restorations of one measurement, in units of [0, 1] pictures.

    mean: (3, H, W); std: (H, W), the standard deviation over the samples, unbiased (k - 1), of every channel, then the mean over channels;
    mean_std: its mean over the pixels; error: the jackknife standard error of mean_std over the samples, NaN for k = 2, where no deviation
    is left when one sample is taken away.
    """

    mean: Tensor
    std: Tensor
    mean_std: float
    error: float
    k: int


def diversity(images: Tensor) -> Diversity:
    """The spread of images (k, 3, H, W) in [0, 1], k >= 2; the paper's k is 50. Raises ValueError for anything else."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images is of shape {tuple(images.shape)}; it must be (k, 3, H, W)")
    k = len(images)
    if k < 2:
        raise ValueError(f"images holds {k} picture(s); a spread needs at least 2 restorations of the same measurement")
    images = images.detach().cpu()  # not every device has float64
    if not all(bool(((image >= 0) & (image <= 1)).all()) for image in images):
        raise ValueError("images has values outside [0, 1] or NaN; map the decoder's [-1, 1] to [0, 1] and clamp")
    # one picture at a time in float64: 50 pictures of 512 x 512 need no second copy
    mean = reduce(torch.add, (image.double() for image in images)) / k
    squares = reduce(torch.add, ((image.double() - mean).square() for image in images))
    std = (squares / (k - 1)).sqrt().mean(0)
    return Diversity(mean.float(), std.float(), float(std.mean()), _jackknife(images, mean, squares), k)


def _jackknife(images: Tensor, mean: Tensor, squares: Tensor) -> float:
    """Standard error of the mean deviation, from what it is without each of the samples (Efron and Stein 1981)."""
    k = len(images)
    if k == 2:
        return math.nan
    without = []
    for image in images:
        left = squares - k / (k - 1) * (image.double() - mean).square()  # of the deviations from the mean of the others
        without.append((left.clamp(min=0) / (k - 2)).sqrt().mean())
    return math.sqrt((k - 1) ** 2 / k * float(torch.stack(without).var()))


def diversity_rows(entries: Sequence[tuple[str, Diversity]]) -> list[dict[str, float | str]]:
    """A dict for every name and its spread, for a CSV file."""
    return [{"name": name, "k": d.k, "mean standard deviation": d.mean_std, "standard error": d.error} for name, d in entries]


def deviation_maps(found: Sequence[Diversity]) -> Tensor:
    """(n, H, W) in [0, 1]: their standard deviations on one scale, on which the largest is 1."""
    top = max(float(d.std.max()) for d in found) or 1.0
    return torch.stack([d.std / top for d in found])
