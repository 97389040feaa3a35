"""Training-free energy-guided conditional diffusion: Yu et al. 2023, Eq. 36 of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..operators import Operator
from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import randn_like
from .base import Cost, Solver, check_choice, check_eta, choice_setting, eta_setting, setting, window_setting, zeta_setting
from .checks import check_finite, check_problem, check_window
from .dps import guided_step
from .step import check_step, jacobian_setting, step_of, strength_setting, told

TRAVELS = ("forward", "published")


@dataclass(frozen=True, kw_only=True)
class FreeDoM(Solver):
    """DPS that walks every step from `first` to `last` K times, going back in time between: z_t = z_{t-1} + N(0, sigma_t^2 - sigma_{t-1}^2).

    zeta, strength and jacobian as in DPS. K >= 1, the passes over a step of the window; 1 is DPS. first <= last: the window [c1, c2], numbers of steps counted from 0
    at the noisiest. travel: "forward" adds the noise that the step took away; "published" adds what the authors' latent code does, the VP beta of
    the wrong end of the schedule, which is almost none. eta: 1 ancestral, 0 PF-ODE. T + (K - 1) (last - first + 1) denoiser calls, each with
    gradient.
    """

    zeta: float | None = zeta_setting(4.8)
    K: int = setting("How many times a step of the window is walked. 1 is DPS.", default=2, least=1, most=100)
    first: int = window_setting("first", 25, "is walked K times")
    last: int = window_setting("last", 50, "is walked K times")
    travel: str = choice_setting(
        TRAVELS,
        "The noise of the way back. forward: as much as the step took away. published: what the authors' latent code adds, a thousandth of it.",
    )
    eta: float = eta_setting()
    strength: float = strength_setting()
    jacobian: str = jacobian_setting()

    def __post_init__(self):
        check_step(self.zeta, self.strength, self.jacobian)
        check_eta(self.eta)
        whole("K", self.K, 1)
        check_choice("travel", self.travel, TRAVELS)
        check_window(self.first, self.last)

    def check(self, operator: Operator, steps: int) -> None:
        check_window(self.first, self.last, steps)

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            passes = int(self.K) if self.first <= i <= self.last else 1
            for k in range(passes):
                grad, denoised, residual = posterior.gradient(z, sigma, jacobian=self.jacobian)
                size = step_of(self, grad, residual, sigma)
                z = guided_step(z, denoised, size * grad, sigma, sigma_next, self.eta, generator)
                if k + 1 < passes:
                    shrink, noise = (1.0, math.sqrt(sigma**2 - sigma_next**2)) if self.travel == "forward" else published_travel(i)
                    z = shrink * z + noise * randn_like(z, generator)
                check_finite(i, len(levels) - 1, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        calls = steps + (int(self.K) - 1) * (int(self.last) - int(self.first) + 1)
        through = calls if self.jacobian == "exact" else 0
        return Cost(denoiser=calls, denoiser_gradients=through, decoder=calls, decoder_gradients=calls)

    def describe(self) -> str:
        return f"FreeDoM ({told(self)}, K {self.K} in steps {self.first} to {self.last})"


def published_travel(step: int) -> tuple[float, float]:
    """sqrt(1 - beta) and sqrt(beta) of Stable Diffusion's training schedule at timestep `step`, where the step's own is 999 - step or so."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    beta = (low + min(step, 999) / 999 * (high - low)) ** 2
    return math.sqrt(1 - beta), math.sqrt(beta)
