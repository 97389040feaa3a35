"""Several runs from the same noise side by side (Tables 5 and 9): the rows of a CSV file, and the series of a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.interval import mean_interval


@dataclass(frozen=True)
class Outcome:
    """What a run made of its measurements.

    about: what the rows say of it; values: of every picture, by the name of the metric, the same names for all runs; seconds and
    denoiser_calls: of the whole batch.
    """

    label: str
    about: Mapping[str, Any]
    values: Mapping[str, Sequence[float]]
    seconds: float
    denoiser_calls: int


def comparison_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A dict for every picture of every run."""
    return [
        {
            **outcome.about,
            "picture": i + 1,
            **dict(zip(outcome.values, figures, strict=True)),
            "seconds of the batch": outcome.seconds,
            "denoiser calls": outcome.denoiser_calls,
        }
        for outcome in outcomes
        for i, figures in enumerate(zip(*outcome.values.values(), strict=True))
    ]


def comparison_series(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[str, float, float, float]]]:
    """(label, mean, low, high) of every run by the name of the metric, and its seconds, which have no interval: for `plots.steps_plot`."""
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for outcome in outcomes:
        for name, values in outcome.values.items():
            i = mean_interval(values)
            found.setdefault(name, []).append((outcome.label, i.mean, i.low, i.high))
        found.setdefault("seconds", []).append((outcome.label, outcome.seconds, math.nan, math.nan))
    return found
