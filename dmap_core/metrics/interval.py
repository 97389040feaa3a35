"""The mean of a figure over pictures, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .backbones import needed

# Tables are read by comparing rows by eye, and for that a standard error looks surer than the few pictures of a run are.
PLUS_MINUS = "half the width of the 95 % confidence interval of the mean (Student's t over pictures)"


@dataclass(frozen=True)
class Interval:
    """The mean of n values, its confidence limits `low` and `high`, and its standard error. What is unknown is NaN."""

    mean: float
    low: float
    high: float
    error: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the confidence interval."""
        return (self.high - self.low) / 2

    def text(self, digits: int = 2, sign: str = "") -> str:
        """Such as "24.50 +- 0.64", the only way that this package prints `+-` (`PLUS_MINUS`); what is unknown is left out. sign: "+" for differences."""
        return f"{self.mean:{sign}.{digits}f}" + ("" if math.isnan(self.half) else f" +- {self.half:.{digits}f}")

    def __str__(self) -> str:
        return f"{self.text()} (n {self.n})"


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
