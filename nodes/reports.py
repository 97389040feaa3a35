"""What the json output of DMAP Sampling Report says, for the nodes that show it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_cost(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_residuals(value: Any) -> bool:
    """A list for every step, of a number for every sample."""
    return isinstance(value, list) and all(isinstance(step, list) and step and all(map(_is_number, step)) for step in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


FIELDS = {
    "solver": _is_text,
    "operator": _is_text,
    "memory": _is_text,
    "seconds": _is_cost,
    "denoiser_calls": _is_cost,
    "residuals": _is_residuals,
}


def read_report(text: str, fields: Sequence[str], name: str) -> dict[str, Any]:
    """These fields of a report, and its peak_memory in bytes where it has one. Raises ValueError, naming the input, for any other text."""
    try:
        told = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not all(FIELDS[field](told.get(field)) for field in fields):
        raise ValueError(f"{name} is no report; connect the json output of DMAP Sampling Report")
    peak = told.get("peak_memory")
    return {field: told[field] for field in fields} | ({"peak_memory": peak} if _is_cost(peak) and peak else {})
