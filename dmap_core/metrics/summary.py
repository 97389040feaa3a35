"""What is said of restored pictures: a metric's values, their means, distances between sets; as lines of text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .distribution import frechet, frechet_warning, kernel
from .interval import PLUS_MINUS, mean_interval


@dataclass(frozen=True)
class Column:
    """A metric's value of every picture. digits: behind the point; None: so many that the largest value has four in all."""

    name: str
    label: str
    values: list[float]
    digits: int | None

    def show(self, value: float) -> str:
        return f"{value:.{self._digits()}f}"

    def _digits(self) -> int:
        if self.digits is not None:
            return self.digits
        largest = max(self.values)
        return max(0, 3 - math.floor(math.log10(largest))) if 0 < largest < math.inf else 3

    def mean(self) -> str:
        """The mean and its interval, which a single picture does not have."""
        return mean_interval(self.values).text(self._digits())


@dataclass(frozen=True)
class Summary:
    """Columns and what is said of all pictures together. size: (H, W); sets: (name, label, value, its deviation over subsets or NaN), already in digits; run: the report's, if there is one."""

    size: tuple[int, int]
    columns: list[Column]
    sets: list[tuple[str, str, float, float, int]]
    warnings: list[str]
    run: dict[str, Any] | None

    @property
    def count(self) -> int:
        return len(self.columns[0].values)

    def title(self) -> str:
        return f"{self.count} picture{'s' if self.count > 1 else ''} of {self.size[1]}x{self.size[0]}"

    def footer(self) -> list[str]:
        """What is said of the pictures as a whole."""
        lines = [f"+- is {PLUS_MINUS}"] if self.count > 1 else []
        for _, label, value, deviation, digits in self.sets:
            spread = "" if math.isnan(deviation) else f", standard deviation over subsets {deviation:.{digits}f}"
            lines.append(f"{label}: {value:.{digits}f} (n {self.count}{spread})")
        lines += [f"Warning: {warning}" for warning in self.warnings]
        if self.run:
            r = self.run
            peak = f" with a peak of {r['peak_memory'] / 2**30:.1f} GiB" if "peak_memory" in r else ""
            cost = f"{r['seconds']:.1f} s, {r['denoiser_calls']} denoiser calls, memory plan {r['memory']}{peak}"
            lines.append(f"{r['solver']} on {r['operator']}: {cost}")
        return lines

    def text(self) -> str:
        return "\n".join([self.title(), *(f"{c.label}: {c.mean()} (n {self.count})" for c in self.columns), *self.footer()])

    def json(self) -> str:
        """Limits that one picture does not have are null; the PSNR of equal pictures is the string inf, for JSON knows no such number."""
        means = {}
        for c in self.columns:
            i = mean_interval(c.values)
            means[c.name] = {"label": c.label, "mean": _plain(i.mean), "low": _plain(i.low), "high": _plain(i.high), "n": i.n}
        return json.dumps(
            {
                "pictures": [{c.name: _plain(c.values[i]) for c in self.columns} for i in range(self.count)],
                "means": means,
                "sets": {
                    n: {"label": label, "value": _plain(v), "deviation": _plain(d), "n": self.count} for n, label, v, d, _ in self.sets
                },
                "warnings": self.warnings,
                "run": self.run,
            }
        )


def _plain(value: float) -> float | str | None:
    return None if math.isnan(value) else str(value) if math.isinf(value) else value


def distances(metrics: Sequence[Any], real: Tensor, fake: Tensor) -> tuple[list[tuple[str, str, float, float, int]], list[str]]:
    """((name, label, value, deviation over subsets or NaN, digits) of every metric of sets, warnings) for features (n, D) of both sets."""
    found = []
    for metric in metrics:
        value, deviation = (frechet(real, fake), math.nan) if metric.distance == "frechet" else kernel(real, fake)
        found.append((metric.name, metric.label, value, deviation, metric.digits))
    warning = frechet_warning(len(fake), fake.shape[1])
    return found, [warning] if warning else []
