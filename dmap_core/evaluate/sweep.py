"""A sweep: a setting of the rows' solvers times several factors, and where the best factor lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import AS_GIVEN, Config, ConfigError, Row
from .tables import Line


@dataclass(frozen=True)
class Sweep:
    """A setting and its factors; as text zeta=0.5,1,2."""

    setting: str
    factors: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Raises ConfigError."""
        setting, _, factors = text.partition("=")
        try:
            found = tuple(float(factor) for factor in factors.split(","))
        except ValueError as error:
            raise ConfigError(f"sweep: {text!r} is no setting with factors, such as zeta=0.5,1,2") from error
        if not setting or not all(0 < factor < math.inf for factor in found) or len(set(found)) != len(found):
            raise ConfigError(f"sweep: {text!r} is no setting with different factors above 0, such as zeta=0.5,1,2")
        return cls(setting, found)

    def name(self, row: Row, factor: float) -> str:
        return f"{row.name}, {self.setting} x {factor:g}"

    def rows(self, config: Config, row: Row) -> list[Row]:
        """A row for every factor; the row itself if it has nothing to set. Raises ConfigError for a solver that has no such setting."""
        plan = config.plan(row)
        if plan is None:
            return [row]
        settings = plan.solver.settings()
        if not isinstance(settings.get(self.setting), (int, float)):
            raise ConfigError(f"sweep: {row.solver} has no setting {self.setting!r} that is a number; it has {', '.join(settings)}")
        return [
            replace(row, name=self.name(row, factor), settings=row.settings | {self.setting: settings[self.setting] * factor})
            for factor in self.factors
        ]

    def config(self, config: Config) -> Config:
        """The config with a row for every factor in place of each of its rows."""
        return replace(config, rows=tuple(new for row in config.rows for new in self.rows(config, row)))

    def told(self, config: Config, lines: Sequence[Line], metric: str = "psnr") -> list[str]:
        """A sentence for every row of the unswept config: which factor is best by a metric of which more is better."""
        found = []
        for row in config.rows:
            if row.solver == AS_GIVEN:
                continue
            means = {line.row.name: line.interval(metric).mean for line in lines if line.row.operator == row.operator and line.n}
            known = [(factor, means[name]) for factor in self.factors if (name := self.name(row, factor)) in means]
            found.append(f"{row.operator}, {row.name}: {best_factor(*zip(*known, strict=True)) if known else 'nothing is finished'}")
        return found


def best_factor(factors: Sequence[float], values: Sequence[float]) -> str:
    """Where a parabola through the values has its top, the factors taken by their logarithm."""
    import numpy as np

    if len(factors) < 3:
        return "three factors or more are needed to see where the best lies"
    curve, slope, _ = np.polyfit(np.log(factors), values, 2)
    top = float(np.exp(-slope / (2 * curve))) if curve < 0 else None
    if top is None or not min(factors) <= top <= max(factors):
        return f"the best lies outside of the factors {min(factors):g} to {max(factors):g}: sweep further"
    return f"the best factor is about {top:.2f}"
