"""Solvers: ways to walk a posterior down the noise levels, one file each."""

from __future__ import annotations

from typing import Any

from ..costs import Cost
from ..operators.base import shown
from .base import Solver
from .checks import check_finite
from .daps import DAPS
from .dmap import DMAP
from .dps import DPS, guided_denoised
from .dsg import DSG
from .flowdps import FlowDPS
from .freedom import FreeDoM
from .latino import LATINO
from .psld import PSLD
from .resample import ReSample
from .unguided import Unguided

SOLVERS: dict[str, type[Solver]] = {cls.name(): cls for cls in (DPS, PSLD, FreeDoM, ReSample, DSG, DMAP, LATINO, FlowDPS, DAPS)}

__all__ = ["SOLVERS", "Cost", "Solver", "Unguided", "check_finite", "from_spec", "guided_denoised", *SOLVERS]


def from_spec(spec: dict[str, Any]) -> Solver:
    """The solver that `spec()` described; what a spec leaves out is at its default. Raises ValueError for anything that is no spec."""
    if not isinstance(spec, dict):
        raise ValueError(f"a solver is {shown(spec)}; it must map names to settings, such as {{solver: DMAP, zeta: 9.6}}")
    settings = dict(spec)
    name = settings.pop("solver", None)
    known = {**SOLVERS, Unguided.name(): Unguided}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"solver is {shown(name)}; it must be one of {', '.join(SOLVERS)}")
    try:
        return known[name](**settings)
    except TypeError as error:  # a setting that there is not, one that is missing, or of another kind
        raise ValueError(f"{name}: the settings {shown(', '.join(sorted(map(str, settings))))} do not describe one: {error}") from error
