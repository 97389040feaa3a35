"""What cheaper guidance leaves out: noise levels, and calls of the denoiser between gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..operators.base import whole
from ..posterior import Posterior
from .base import setting
from .step import step_of


def every_setting() -> Any:
    return setting(
        "Guide at every n-th noise level only, counted back from the last guided one. 1 guides at all of them, as the paper does.",
        default=1,
        least=1,
        most=1000,
        optional=True,
    )


def guide_setting(end: str) -> Any:
    """guide_start or guide_end, fractions of the steps."""
    told = {
        "guide_start": "Fraction of the steps that pass before guidance begins. 0: it begins with the first one.",
        "guide_end": "Fraction of the steps after which guidance ends. 1: it goes on to the last one.",
    }
    return setting(
        told[end],
        default=float(end == "guide_end"),
        least=0.0,
        most=1.0,
        step=0.05,
        digits=0.001,
        optional=True,
    )


def inner_setting() -> Any:
    return setting(
        "Gradient steps per call of the denoiser, on the clean latent it gave. More than 1 needs jacobian none. Only the VAE runs for those after the first.",
        default=1,
        least=1,
        most=100,
        optional=True,
    )


def check_guidance(solver: Any) -> None:
    """Raises ValueError for fields of those settings without meaning, or without anything to guide."""
    whole("every", solver.every, 1)
    if whole("inner", solver.inner, 1) > 1 and solver.jacobian != "none":
        raise ValueError(
            f"inner is {solver.inner}, whose steps after the first know no denoiser; it needs jacobian 'none' (now {solver.jacobian!r})"
        )
    start, end = solver.guide_start, solver.guide_end
    if not 0 <= start < end <= 1:
        raise ValueError(f"guide_start is {start} and guide_end {end}; they must lie between 0 and 1, the first below the second")


def guided_levels(solver: Any, count: int) -> list[bool]:
    """Which of `count` noise levels are guided: every n-th between guide_start and guide_end, the last of them in any case."""
    first, last = math.floor(solver.guide_start * count), math.ceil(solver.guide_end * count) - 1
    return [first <= i <= last and (last - i) % int(solver.every) == 0 for i in range(count)]


def shift_of(
    solver: Any, posterior: Posterior, z: Tensor, sigma: float, longest: float, direction: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(what is taken from z (B, C, h, w), denoised, residual (B,)): `inner` gradient steps, the first at z, the others at the clean latent.

    They move the clean latent and z alike, as if the denoiser's Jacobian were the identity. longest: the noise level whose noise no step exceeds.
    """
    grad, denoised, residual = posterior.gradient(z, sigma, jacobian=solver.jacobian)
    shift = step_of(solver, grad, residual, longest) * direction(grad)
    for _ in range(int(solver.inner) - 1):
        grad, r = posterior.gradient_z0(denoised - shift)
        shift = shift + step_of(solver, grad, r, longest) * direction(grad)
    return shift, denoised, residual


def told_guidance(solver: Any) -> list[str]:
    """Those settings for people, as far as they are not at their defaults."""
    found = [f"{solver.inner} inner steps"] if solver.inner > 1 else []
    found += [f"every {solver.every} levels"] if solver.every > 1 else []
    if (solver.guide_start, solver.guide_end) != (0, 1):
        found.append(f"guided from {solver.guide_start:g} to {solver.guide_end:g}")
    return found
