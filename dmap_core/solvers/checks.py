"""What every solver checks: the problem before the first step, its latents after each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import Diverged
from ..operators.base import check_batch, whole
from ..posterior import Posterior
from ..schedule import check_sigmas
from .base import Solver


def check_problem(solver: Solver, posterior: Posterior, z: Tensor, sigmas: Tensor | Sequence[float]) -> list[float]:
    """The schedule as floats. Raises ValueError for one without meaning, unless there is one measurement, or one for every latent z, and for a
    problem that the solver cannot do."""
    check_batch(posterior.y, len(z))
    levels = check_sigmas(sigmas)
    solver.check(posterior.operator, len(levels) - 1)
    return levels


def check_finite(step: int, steps: int, zeta: float | None, z: Tensor, residual: Tensor, guided: bool = True) -> None:
    """Raises Diverged if a latent or a residual is NaN or infinite. guided: whether there is a step that could be made smaller."""
    bad = ~(torch.isfinite(z).flatten(1).all(1) & torch.isfinite(residual))
    if bad.any():
        i = int(bad.nonzero()[0])
        lower = ("lower strength, or " if zeta is None else f"lower zeta (now {zeta:g}), or ") if guided else ""
        raise Diverged(
            f"step {step + 1} of {steps}: NaN or infinity in sample {i} of the batch, residual {float(residual[i]):.4g}; "
            f"{lower}run the model and the VAE in fp32 if the very first steps fail"
        )


def check_window(first: int, last: int, steps: int | None = None) -> None:
    """Raises ValueError unless the steps first..last, counted from 0, lie within a schedule of `steps`, if that is known."""
    if whole("first", first, 0) > whole("last", last, 0):
        raise ValueError(f"first is {first} and last {last}; the window of steps must not end before it begins")
    if steps is not None and last >= steps:
        raise ValueError(f"last is {last}, but the schedule has the steps 0 to {steps - 1}; move the window there, or take more steps")
