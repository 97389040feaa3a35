"""How long a gradient step is: the paper's zeta times the gradient, or as long as Polyak's rule makes it, for which nobody has to search."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..posterior import JACOBIANS
from .base import check_choice, check_zeta, choice_setting, setting

STRENGTH = 0.7
STRONGEST = 2.0  # twice Polyak's step, where a linear residual comes back to where it was


def strength_setting() -> Any:
    return setting(
        "Of the automatic step: the part of the residual that a step would take away if it fell as it begins to. "
        "The default serves all operators, sizes, models and numbers of steps.",
        default=STRENGTH,
        least=0.01,
        most=STRONGEST,
        step=0.05,
        digits=0.01,
        optional=True,
    )


def jacobian_setting() -> Any:
    return choice_setting(
        JACOBIANS,
        "exact: the gradient goes through the denoiser, as in the paper. none: through the VAE alone, which costs half, and runs wherever plain "
        "sampling runs.",
    )


def check_step(zeta: float | None, strength: float, jacobian: str, optimizer: str = "gradient") -> None:
    """Raises ValueError for step sizes without meaning. zeta: None for the automatic step."""
    if zeta is not None:
        check_zeta(zeta)
    elif optimizer != "gradient":
        raise ValueError(
            f"optimizer is {optimizer!r}, which has no gradient that the automatic step could measure; give it a zeta, such as 0.05"
        )
    if not (math.isfinite(strength) and 0 < strength <= STRONGEST):
        raise ValueError(f"strength is {strength}; it must be above 0 and at most {STRONGEST:g}")
    check_choice("jacobian", jacobian, JACOBIANS)


def step_size(zeta: float | None, strength: float, grad: Tensor, residual: Tensor, radius: float) -> float | Tensor:
    """t of the step z - t grad: zeta, or where that is None strength r / ||grad||^2 of every sample, (B, 1, 1, 1) (Polyak 1969).

    grad: (B, C, h, w) of the residual r (B,), whose least value is 0. A convex residual's Polyak step never overshoots at strength 1; it has no unit, so
    it fits any operator, size and number of steps. At most `radius` long: where the gradient fades the rule would leave the noise level.
    0 where r or the gradient is 0.
    """
    if zeta is not None:
        return zeta
    slope = norm(grad)
    length = (strength * residual.to(slope) / slope).clamp(max=radius)
    return per_sample(torch.where(slope > 0, length / slope, 0.0).to(grad), grad)


def norm(x: Tensor) -> Tensor:
    """That of every sample of x (B, ...), (B,), at least in float32."""
    return torch.linalg.vector_norm(x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) as (B, 1, ...), to go with `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def step_of(solver: Any, grad: Tensor, residual: Tensor, sigma: float) -> float | Tensor:
    """`step_size` of a solver with the fields above; a step is no longer than noise of that level, sqrt(d) sigma (DMAP: its sphere's radius)."""
    return step_size(solver.zeta, solver.strength, grad, residual, math.sqrt(grad[0].numel()) * sigma)


def told(solver: Any) -> str:
    """The step of a solver with fields as above, as far as it has them, for people: "zeta 4.8" or "automatic step 0.5"."""
    found = [f"automatic step {solver.strength:g}" if solver.zeta is None else f"zeta {solver.zeta:g}"]
    found += ["no Jacobian"] if getattr(solver, "jacobian", "") == "none" else []
    return ", ".join(found + (["Adam"] if getattr(solver, "optimizer", "") == "adam" else []))
