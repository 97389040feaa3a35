"""Degradations y = f(x). Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Find, Operator, Separable, in_words, shown
from .blur import GaussianBlur, KernelBlur, MotionBlur
from .compose import DEEPEST, MOST, Compose
from .grayscale import Grayscale
from .inpainting import PIXELS, Inpainting, centred_box
from .jpeg import Jpeg, jpeg_of_file
from .noisy import Noisy
from .nonlinear_blur import NonlinearBlur
from .segmentation import Segmentation
from .super_resolution import SuperResolution

LONGEST_SETTING = 80  # characters of a setting that `spec_in_words` shows

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

__all__ = ["OPERATORS", "Find", "Operator", "Separable", "centred_box", "spec_in_words", "from_spec", "jpeg_of_file", *OPERATORS]


def from_spec(spec: dict[str, Any], find: Find | None = None) -> Operator:
    """The operator that `spec()` described. `find(name)` is the path of a learned operator's weights file.

    A spec may come from anybody: it is checked before anything is allocated, and nothing that it may ask for is without bounds.
    Raises ValueError for anything that is no spec: an unknown operator, settings that do not fit, more parts or pixels than there may be.
    """
    _check_extent(spec)
    return _from_spec(spec, find)


def spec_in_words(spec: Mapping[str, Any]) -> str:
    """An operator's spec for people, as `Operator.describe` says it; long settings (a mask) are left out. It need not be that of an operator."""
    name = str(spec.get("operator", "an unknown operator"))
    settings = {k: v for k, v in spec.items() if k != "operator" and len(str(v)) <= LONGEST_SETTING}
    parts = spec.get("operators", [spec.get("of")])
    if isinstance(parts, list) and parts and all(isinstance(part, Mapping) for part in parts):
        settings = {"of": ", ".join(map(spec_in_words, parts)), **{k: v for k, v in settings.items() if k not in ("of", "operators")}}
    return in_words(OPERATORS[name].title if name in OPERATORS else name[:LONGEST_SETTING], settings)


def _check_extent(spec: Any) -> None:
    """Raises ValueError for a spec that is no mapping, or made of too many, without making any of its operators."""
    level, count, depth, pixels = [spec], 0, 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MOST + 1 or depth > DEEPEST + 1:
            raise ValueError(f"the spec is made of too many operators; {MOST} are the most, and {DEEPEST} inside each other")
        below = []
        for part in level:
            name, settings = _split(part)
            if name == "Inpainting":
                pixels += Inpainting.pixels(settings)
            inner = settings.get("operators", []) if name == "Compose" else [settings["of"]] if name == "Noisy" and "of" in settings else []
            below += inner[: MOST + 1] if isinstance(inner, (list, tuple)) else []
        if pixels > PIXELS:
            raise ValueError(f"the spec asks for masks of {pixels} pixels together; {PIXELS} are the most")
        level = below


def _split(spec: Any) -> tuple[str, dict[str, Any]]:
    """(the operator's name, its settings)."""
    if not isinstance(spec, dict):
        raise ValueError(f"an operator is {shown(spec)}; it must map names to settings, such as {{operator: SuperResolution, scale: 8}}")
    settings = dict(spec)
    name = settings.pop("operator", None)
    if not isinstance(name, str) or name not in OPERATORS:
        raise ValueError(f"unknown operator {shown(name)}; known are {', '.join(OPERATORS)}")
    odd = [key for key in settings if not isinstance(key, str)]
    if odd:
        raise ValueError(f"{name}: it has a setting called {shown(odd[0])}; names of settings are text")
    return name, settings


def _from_spec(spec: Any, find: Find | None) -> Operator:
    name, settings = _split(spec)
    try:
        return OPERATORS[name].from_settings(settings, find)
    except (TypeError, KeyError, OverflowError) as error:
        known = shown(", ".join(sorted(settings)))
        raise ValueError(f"{name}: the settings {known} do not describe one: {error}") from error
