"""Settings that are known to work, per operator and model, and where each number comes from.

Paper and authors: the paper's text and Table 8 as read in the authors' public development code (512x512, 500 steps, Stable Diffusion 2.0
base). Searched: `demo/compare.py --search` on the demo prior. Carried over: the paper's value for super-resolution x8, times the ratio that
the search found between the two operators on the demo prior; nobody has checked those on Stable Diffusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .operators import Operator, SuperResolution
from .operators.base import whole
from .operators.noisy import parts
from .schedule import SPACINGS
from .solvers import DAPS, DMAP, DPS, DSG, LATINO, PSLD, SOLVERS, FlowDPS, FreeDoM, ReSample, Solver

MODELS = ("Stable Diffusion, 512 pixels", "demo prior, 128 pixels")

PAPER_ZETA = {"Super-Resolution x8": 4.8, "Gaussian Blur": 0.6}

# Found on the demo prior: zeta of DPS at 20 steps, of DMAP at 10 steps with K 2, the mix rate of DSG at 20 steps, and gamma / zeta of PSLD.
DEMO = {
    "Super-Resolution x8": (15.0, 38.0, 0.45, 0.02),
    "Super-Resolution x4": (7.5, 20.0, 0.6, 0.02),
    "Gaussian Blur": (2.0, 5.4, 0.5, 0.2),
    "Motion Blur": (2.0, 6.0, 0.5, 0.2),
    "Inpainting": (2.1, 10.0, 0.5, 0.02),
    "JPEG": (1.75, 5.5, 0.5, 0.2),  # mix rate: that of Gaussian blur
    "Nonlinear Blur": (2.1, 5.4, 0.5, 0.2),  # of DPS; the others are those of Gaussian blur
}
# What was searched: the rest follows the paper's rules (same zeta as DPS) or a choice that fits the few steps.
SEARCHED = {
    "DPS": "zeta searched",
    "PSLD": "zeta that was searched for DPS, and gamma searched,",
    "FreeDoM": "zeta that was searched for DPS, and a window in the paper's place of the schedule,",
    "ReSample": "zeta that was searched for DPS, and fewer iterations than the paper's,",
    "DSG": "mix rate searched",
    "DMAP": "zeta searched",
    "DMAP full": "zeta that was searched for DPS, as in the paper,",
}
# How long people want to wait: the steps of DPS, and what that is times the steps and windows of the others. Automatic steps need no other setting.
QUALITIES = {"look": 1, "good": 2, "best": 5}
AUTO = "auto"  # in the place of a solver: the one that was best for its cost (docs/performance.md)
# Of it, where the decoder's gradient is enough: steps of DPS, and gradient steps per call of the denoiser. Guidance begins after three tenths, which lost nothing.
CHEAP = {"look": (10, 2), "good": (10, 4), "best": (20, 4)}
CHEAP_START = 0.3
BY_DMAP = ("Inpainting", "JPEG")  # what it gives to DMAP
# Of it for JPEGs, levels of DMAP: of as many operations DPS was worse there, and more than 20 levels no better.
JPEG_STEPS = {"look": 10, "good": 20, "best": 20}
PAPER = "paper"  # the fourth choice: searched or published zetas, as the tables have them
NAMES = tuple(SEARCHED)  # of presets: the solvers', and of DMAP both that the paper has
# Solvers that are not the paper's, with their noise levels at "look". What they leave to be set was chosen on the demo prior's search pictures (docs/solvers.md).
OTHERS: dict[str, tuple[Solver, int, str]] = {
    "LATINO": (LATINO(), 8, "exponential"),
    "FlowDPS": (FlowDPS(), 10, "exponential"),
    "DAPS": (DAPS(move="gradient", iterations=2), 15, "exponential"),
}
# Operators that nobody searched for, and what they are treated as.
LIKE = {"Kernel Blur": "Motion Blur", "Grayscale": "Inpainting", "Segmentation": "Inpainting"}


@dataclass(frozen=True)
class Preset:
    """A solver with its settings, and the noise levels it goes with; spacing is a key of `schedule.SPACINGS`.

    start: below 1 a run begins with the measurement's own picture, noised to that fraction of the timesteps, and not with pure noise.
    """

    solver: Solver
    steps: int
    spacing: str
    source: str
    start: float = 1.0

    def sigmas(self, model_sigmas: Tensor) -> Tensor:
        """(steps + 1,) noise levels, falling to 0. model_sigmas: (N,) rising VE sigmas of the model's timesteps. Raises ValueError for a start out of (0, 1]."""
        return SPACINGS[self.spacing](model_sigmas, self.steps, self.start)

    def with_steps(self, steps: int) -> Preset:
        """The same with another number of steps."""
        steps = whole("steps", steps, 1)
        if steps == self.steps:
            return self
        solver = self.solver.rescaled(steps / self.steps, steps)
        spacing = self.spacing if steps > 100 else "exponential"
        return replace(
            self, solver=solver, steps=steps, spacing=spacing, source=f"{self.source}; scaled from {self.steps} to {steps} steps"
        )

    def with_settings(self, **settings: Any) -> Preset:
        """The same with other settings of the solver. Raises ValueError for those that it does not have."""
        if "strength" in settings and "zeta" not in settings:  # which counts only where there is no zeta
            settings["zeta"] = None
        known = self.solver.described()
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"{self.solver.name()} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return replace(self, solver=replace(self.solver, **settings))

    def text(self) -> str:
        """One line for people: solver, settings and where they come from."""
        return f"{self.solver.name()}: {self.solver.told()}, {self.steps} steps, {self.spacing} spacing{f', start {self.start:g}' if self.start < 1 else ''} ({self.source})"


def kind(operator: Operator) -> str:
    """The key of the tables above that stands for an operator: for a Compose the part that loses most, for a scale the nearest one."""
    return max((_kind(f) for f in parts(operator)), key=lambda key: DEMO[key][0])


def _kind(operator: Operator) -> str:
    if isinstance(operator, SuperResolution):
        return "Super-Resolution x4" if math.log2(operator.scale) < 2.5 else "Super-Resolution x8"
    return LIKE.get(operator.title, operator.title)


def automatic(operator: Operator, solver: str, quality: str) -> Preset:
    """`solver` with the step that sets itself, for any operator and model. quality: a key of QUALITIES.

    The gradient goes through the decoder alone, which costs half and was as good or better for every operator but one: a hole is filled by what the
    denoiser knows of its surroundings, which is in its Jacobian (docs/solvers.md). Solver AUTO is DMAP for holes and JPEGs, and DPS with inner steps for all else.
    Raises ValueError for unknown names, for PSLD, and for what a solver of OTHERS cannot do.
    """
    if solver not in (*NAMES, AUTO, *OTHERS):
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join([*NAMES, AUTO, *OTHERS])}")
    if quality not in QUALITIES:
        raise ValueError(f"quality is {quality!r}; it must be one of {', '.join([*QUALITIES, PAPER])}")
    if solver == "PSLD":
        raise ValueError("solver: PSLD has two terms, and no automatic step of both is known; take the quality 'paper', or another solver")
    if solver in OTHERS:
        found, steps, spacing = OTHERS[solver]
        found.check(operator, steps)
        told = "step sets itself" if "strength" in found.described() else "nothing to be set"
        return Preset(found, steps * QUALITIES[quality], spacing, f"{quality}: {told}")
    key = kind(operator)
    if solver == AUTO:
        if key not in BY_DMAP:
            steps, inner = CHEAP[quality]
            dps = DPS(jacobian="none", inner=inner, guide_start=CHEAP_START)
            return Preset(dps, steps, "exponential", f"{quality}: step sets itself")
        found = automatic(operator, "DMAP", quality)
        if key != "JPEG" or found.steps == JPEG_STEPS[quality]:
            return found
        return replace(found, steps=JPEG_STEPS[quality], source=f"{found.source}, more levels were no better for JPEGs")
    found = _demo(key, solver)
    if solver != "DSG":
        jacobian = "exact" if key == "Inpainting" else "none"
        found = replace(found, solver=replace(found.solver, zeta=None, jacobian=jacobian))
    source = "mix rate searched on the demo prior" if solver == "DSG" else "step sets itself"
    found = replace(found, source=f"{quality}: {source}")
    return replace(found.with_steps(found.steps * QUALITIES[quality]), spacing="exponential", source=found.source)


def preset(operator: Operator, solver: str, model: str) -> Preset:
    """The settings of `solver` for an operator on a model, as the paper or a search found them. Raises ValueError for unknown names, and where no settings are known."""
    if solver in OTHERS:
        raise ValueError(
            f"solver: no settings of {solver} are the paper's; take the quality look, good or best (in a table, give steps and spacing)"
        )
    if solver in SOLVERS and solver not in NAMES:
        raise ValueError(f"solver: no settings of {solver} are known for {model}; give its zeta, steps and spacing")
    if solver not in NAMES:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(NAMES)}")
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
    if any(f.name == "Segmentation" for f in parts(operator)) and solver != "DSG":
        raise ValueError(
            f"solver: no zeta of {solver} is known for {operator.describe()}, whose distance is a cross-entropy with other units; "
            f"take an automatic step (quality {', '.join(QUALITIES)}; strength in a config), or DSG, whose mix rate has no units"
        )
    return (_paper if model == MODELS[0] else _demo)(kind(operator), solver)


def _paper(key: str, solver: str) -> Preset:
    known = key in PAPER_ZETA
    zeta = PAPER_ZETA[key] if known else round(PAPER_ZETA["Super-Resolution x8"] * DEMO[key][0] / DEMO["Super-Resolution x8"][0], 2)
    source = "paper and authors" if known else f"carried over from the demo prior (treated as {key})"
    found, steps = {
        "DPS": (DPS(zeta=zeta), 500),
        "PSLD": (PSLD(zeta=zeta, gamma=round(0.002 * zeta, 6)), 500),
        "FreeDoM": (FreeDoM(zeta=zeta, K=2, first=25, last=50), 500),
        "ReSample": (ReSample(zeta=zeta, first=50, last=100, every=50, iterations=200, learning_rate=5e-3, factor=40.0), 500),
        "DSG": (DSG(zeta=0.08), 500),
        "DMAP": (DMAP(zeta=2 * zeta, K=2), 250),
        "DMAP full": (DMAP(zeta=zeta, K=3), 500),
    }[solver]
    if solver == "DSG" and not known:
        source = "paper's mix rate for super-resolution and Gaussian blur"
    if solver in ("PSLD", "FreeDoM", "ReSample") and key == "Gaussian Blur":
        source = "paper and authors for zeta; the rest is theirs for super-resolution x8"
    return Preset(found, steps, "paper", source)


def _demo(key: str, solver: str) -> Preset:
    zeta, dmap_zeta, mix, glue = DEMO[key]
    found, steps = {
        "DPS": (DPS(zeta=zeta), 20),
        "PSLD": (PSLD(zeta=zeta, gamma=round(glue * zeta, 4)), 20),
        "FreeDoM": (FreeDoM(zeta=zeta, K=2, first=4, last=7), 16),
        "ReSample": (ReSample(zeta=zeta, first=8, last=16, every=8, iterations=20, learning_rate=0.02, factor=40.0), 20),
        "DSG": (DSG(zeta=mix), 20),
        "DMAP": (DMAP(zeta=dmap_zeta, K=2), 10),
        "DMAP full": (DMAP(zeta=zeta, K=3), 20),
    }[solver]
    source = f"{SEARCHED[solver]} on the demo prior for {key}"
    return Preset(found, steps, "exponential", source)
