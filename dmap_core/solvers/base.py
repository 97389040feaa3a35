"""What a solver declares once: its settings, what it refuses, what it costs, and how it is written down."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from ..costs import Cost
from ..operators import Operator
from ..posterior import Posterior

STEP, WINDOW = "step", "window"  # how a setting goes with the number of steps: as a step size, or as a place in the schedule


@dataclass(frozen=True)
class Setting:
    """What people are told about a setting, and between which values an interface lets them choose.

    usual: to begin with, where the setting has no default. choices: of a text. step, digits: of an interface's arrows and rounding. scales: STEP or
    WINDOW. optional: rarely changed, and not worth mentioning at its default.
    """

    help: str
    usual: Any = None
    least: float | None = None
    most: float | None = None
    step: float | None = None
    digits: float | None = None
    choices: Sequence[str] = ()
    scales: str | None = None
    optional: bool = False


def setting(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a solver. Without a default it has to be given. more: see Setting."""
    return field(default=default, metadata={"setting": Setting(help, **more)})


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A way down the noise levels. Subclasses are frozen dataclasses whose fields are made by `setting`; wrong ones are a ValueError.

    Its name is the class's. Everything that is said about a solver elsewhere (specs, presets, nodes, reports, costs) comes from here.
    """

    @abstractmethod
    def __call__(
        self,
        posterior: Posterior,
        z: Tensor,
        sigmas: Tensor | Sequence[float],
        generator=None,
        callback: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """z0 (B, C, h, w), from a VE latent z at noise level sigmas[0]; sigmas: falling to 0.

        generator: one torch.Generator, or one per sample. callback(step, denoised, z, residual) after every step. Raises ValueError, before
        any network is called, for a problem or a schedule without meaning, and errors.Diverged for NaN.
        """

    @abstractmethod
    def cost(self, steps: int) -> Cost:
        """What a run of that many steps takes."""

    def check(self, operator: Operator, steps: int) -> None:  # noqa: B027 (most can do everything)
        """Raises ValueError for an operator or a number of steps that it cannot do, before anything is loaded."""

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @classmethod
    def described(cls) -> dict[str, tuple[Field, Setting]]:
        """Its settings by name: the field, and what people are told about it."""
        return {f.name: (f, f.metadata["setting"]) for f in fields(cls)}

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def notable(self) -> dict[str, Any]:
        """Its settings without the optional ones that are at their default, and the one of zeta and strength that counts; this one comes first."""
        told = {
            name: getattr(self, name)
            for name, (f, s) in self.described().items()
            if not s.optional or getattr(self, name) != f.default or name == "strength"
        }
        told.pop("zeta" if told.get("zeta", 0) is None else "strength", None)
        return dict(sorted(told.items(), key=lambda item: item[0] not in ("zeta", "strength")))

    def told(self) -> str:
        """Its notable settings in one line, such as "zeta 9.6, K 2"."""
        return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.notable().items())

    def describe(self) -> str:
        """Its name and what matters most about it, for people: what a report says."""
        told = self.told()
        return f"{self.name()} ({told})" if told else self.name()

    def spec(self) -> dict[str, Any]:
        """A dict for JSON, of which `solvers.from_spec` makes the solver again."""
        return {"solver": self.name(), **self.settings()}

    def rescaled(self, ratio: float, steps: int) -> Solver:
        """The same for `ratio` times as many steps, which are then `steps`.

        Step sizes grow as steps get fewer (B.3: "double zeta to compensate"), windows move along. What has no unit stays.
        """
        changed = {}
        for name, (_, about) in self.described().items():
            value = getattr(self, name)
            if value is None:  # a step that sets itself
                continue
            if about.scales == STEP:
                changed[name] = float(f"{value / ratio:.4g}")
            elif about.scales == WINDOW:
                changed[name] = max(1, round(value * ratio))
        changed |= {name: min(value, steps - 1) for name, value in changed.items() if name in ("first", "last")}
        return replace(self, **changed)


# Settings that several have.


def zeta_setting(usual: float, default: Any = None) -> Any:
    """default: None, where the step sets itself; MISSING, where zeta has to be given."""
    return setting(
        "Step size of the guidance, in latent units per unit of gradient. Paper, 512x512 at 500 steps: 4.8 for super-resolution x8, 0.6 for Gaussian blur; "
        "twice that at 250 steps. Raise it if the result does not match the measurement, lower it if it is noisy or the run diverges.",
        default=default,
        usual=usual,
        least=0.001,
        most=1000.0,
        step=0.1,
        digits=0.001,
        scales=STEP,
    )


def eta_setting(least: float = 0.0, help: str | None = None) -> Any:
    """help: of solvers whose noise is not that of ancestral sampling."""
    end = "0 deterministic (DDIM)." if least == 0 else "less keeps closer to the deterministic path."
    return setting(
        help or f"How much fresh noise every step adds: 1 is ancestral sampling (paper), {end}",
        default=1.0,
        least=least,
        most=1.0,
        step=0.05,
        optional=True,
    )


def window_setting(end: str, default: int, what: str) -> Any:
    """first or last, the steps of a window."""
    told = {
        "first": f"First step that {what}, counted from 0 at the start, where the noise is strongest.",
        "last": f"Last step that {what}. Must lie within the schedule: below its number of steps.",
    }
    return setting(told[end], default=default, least=0, most=9999, scales=WINDOW)


def choice_setting(choices: Sequence[str], help: str) -> Any:
    """One of several words, the first of them unless said otherwise."""
    return setting(help, default=choices[0], choices=choices, optional=True)


# What they check.


def check_zeta(zeta: float) -> None:
    """Raises ValueError for a step size without meaning."""
    if not (math.isfinite(zeta) and zeta > 0):
        raise ValueError(f"zeta is {zeta}; the step size must be above 0")


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (ancestral)")


def check_sphere(solver: str, eta: float) -> None:
    """Raises ValueError for an eta at which a solver that moves on spheres has none."""
    check_eta(eta)
    if eta == 0:
        raise ValueError(f"eta is 0, where {solver}'s sphere shrinks to a point and nothing is guided; use a value above 0, or DPS")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
