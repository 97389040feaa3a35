"""Degradations y = f(x). Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from typing import Any

from .base import Find, Operator, Separable
from .blur import GaussianBlur, KernelBlur, MotionBlur
from .compose import Compose
from .grayscale import Grayscale
from .inpainting import Inpainting, centred_box
from .jpeg import Jpeg
from .noisy import Noisy
from .nonlinear_blur import NonlinearBlur
from .segmentation import Segmentation
from .super_resolution import SuperResolution

OPERATORS: dict[str, type[Operator]] = {
    cls.__name__: cls
    for cls in (
        SuperResolution,
        GaussianBlur,
        KernelBlur,
        MotionBlur,
        NonlinearBlur,
        Inpainting,
        Grayscale,
        Jpeg,
        Segmentation,
        Compose,
        Noisy,
    )
}

__all__ = ["OPERATORS", "Find", "Operator", "Separable", "centred_box", "from_spec", *OPERATORS]


def from_spec(spec: dict[str, Any], find: Find | None = None) -> Operator:
    """The operator that `spec()` described. `find(name)` is the path of a learned operator's weights file.

    Raises ValueError for an unknown operator or settings that do not fit.
    """
    settings = dict(spec)
    name = settings.pop("operator", None)
    if name not in OPERATORS:
        raise ValueError(f"unknown operator {name!r}; known are {', '.join(OPERATORS)}")
    try:
        return OPERATORS[name].from_settings(settings, find)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{name}: the settings {sorted(settings)} do not describe one: {error}") from error
