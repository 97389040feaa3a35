"""The mean of a figure over pictures, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .backbones import needed


@dataclass(frozen=True)
class Interval:
    """The mean of n values, its confidence limits `low` and `high`, and its standard error. What is unknown is NaN."""

    mean: float
    low: float
    high: float
    error: float
    n: int

    def text(self, digits: int = 2) -> str:
        """Such as "24.50 +- 0.31 (n 32)": the mean and its standard error, which is left out where it is unknown."""
        error = "" if math.isnan(self.error) else f" +- {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error} (n {self.n})"

    def __str__(self) -> str:
        return self.text()


def mean_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """The mean of independent, nearly normal values, and the limits that hold the true mean with probability `level` (Student's t).

    One value has NaN for limits and standard error. So have values of which some are infinite (the PSNR of equal pictures); their mean
    is infinite. Raises ValueError for no values, NaN among them, or a level outside (0, 1), and MissingPackage.
    """
    values = [float(value) for value in values]
    n, nan = len(values), math.nan
    if not n:
        raise ValueError("there are no values to take the mean of")
    if any(math.isnan(value) for value in values):
        raise ValueError(f"{sum(map(math.isnan, values))} of {n} values are NaN; leave those pictures out, and say so")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1, such as 0.95")
    if any(math.isinf(value) for value in values):
        return Interval(sum(values), nan, nan, nan, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, nan, nan, nan, n)
    with needed("a confidence interval", "scipy"):
        from scipy import stats
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half, error, n)
