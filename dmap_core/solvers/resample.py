"""ReSample: hard data consistency and stochastic resampling, Song et al. 2023, Eq. 37 to 39 of the paper (operands of 39 put right)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..operators import Operator
from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import randn_like
from .base import (
    WINDOW,
    Cost,
    Solver,
    check_choice,
    check_eta,
    choice_setting,
    eta_setting,
    setting,
    window_setting,
    zeta_setting,
)
from .checks import check_finite, check_problem, check_window
from .dps import guided_step
from .step import check_step, jacobian_setting, step_of, strength_setting, told

SPACES = ("both", "latent", "pixel")
TWEEDIES = ("correct", "published")


@dataclass(frozen=True, kw_only=True)
class ReSample(Solver):
    """DPS; after the steps first, first + every, ... up to last, z0 is optimised until f(D(z0)) is y, and noised again around the latent.

    zeta, strength and jacobian as in DPS. first <= last: numbers of steps counted from 0 at the noisiest. space: what AdamW optimises, the "latent" z0 or the "pixel"
    picture D(z0), which is then encoded; "both": the picture in the first two thirds of the schedule, the latent in the last (the original's
    stages). iterations and learning_rate are AdamW's. factor: how far the resampled latent leaves the current one, 40 in the original. tweedie:
    "published" takes its starting point as the original's code does, with (1 - abar) eps for sqrt(1 - abar) eps. eta: 1 ancestral, 0 PF-ODE (the
    original's). T steps cost T denoiser calls, each with gradient; a consistency step in latent space adds `iterations` decoder calls.
    """

    zeta: float | None = zeta_setting(4.8)
    first: int = window_setting("first", 50, "may be followed by a consistency step")
    last: int = window_setting("last", 100, "may be followed by a consistency step")
    every: int = setting(
        "A consistency step after first, first + every, first + 2 every and so on, up to last.",
        default=50,
        least=1,
        most=9999,
        scales=WINDOW,
    )
    iterations: int = setting("Optimisation steps of a consistency step (AdamW).", default=200, least=1, most=10000)
    learning_rate: float = setting(
        "Step size of that optimisation. With fewer iterations raise it.",
        default=0.005,
        least=0.00001,
        most=1.0,
        step=0.001,
        digits=0.00001,
    )
    factor: float = setting(
        "How far a consistency step moves the latent (original: 40): large values trust the optimised picture, small ones the current latent.",
        default=40.0,
        least=0.01,
        most=100000.0,
        step=1.0,
        digits=0.01,
    )
    space: str = choice_setting(
        SPACES,
        "What is optimised: the latent (slower: a decoder call per iteration), the picture in pixels, or pixels for the first two thirds of the steps "
        "and then the latent.",
    )
    tweedie: str = choice_setting(
        TWEEDIES, "Where the optimisation starts: the denoised latent, or what the published code computes in its place."
    )
    eta: float = eta_setting()
    strength: float = strength_setting()
    jacobian: str = jacobian_setting()

    def __post_init__(self):
        check_step(self.zeta, self.strength, self.jacobian)
        check_eta(self.eta)
        check_choice("space", self.space, SPACES)
        check_choice("tweedie", self.tweedie, TWEEDIES)
        if not (0 < self.learning_rate < math.inf and 0 < self.factor < math.inf):
            raise ValueError(f"learning_rate is {self.learning_rate} and factor {self.factor}; both must be numbers above 0")
        whole("every", self.every, 1)
        whole("iterations", self.iterations, 1)
        check_window(self.first, self.last)

    def check(self, operator: Operator, steps: int) -> None:
        check_window(self.first, self.last, steps)

    def space_after(self, step: int, steps: int) -> str | None:
        """What is optimised after a step, "pixel" or "latent"; None if nothing is."""
        if not (self.first <= step <= self.last and (step - self.first) % int(self.every) == 0):
            return None
        return self.space if self.space != "both" else "pixel" if step < 2 * steps / 3 else "latent"

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        steps = len(levels) - 1
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            grad, denoised, residual = posterior.gradient(z, sigma, jacobian=self.jacobian)
            z0 = denoised if self.tweedie == "correct" else z - sigma / math.sqrt(1 + sigma**2) * (z - denoised)
            size = step_of(self, grad, residual, sigma)
            z = guided_step(z, denoised, size * grad, sigma, sigma_next, self.eta, generator)
            check_finite(i, steps, self.zeta, z, residual)
            space = self.space_after(i, steps)
            if space:
                consistent = consistent_picture if space == "pixel" else consistent_latent
                z0 = consistent(posterior, z0, int(self.iterations), self.learning_rate)
                mean, std = resampling(z0, z, sigma, sigma_next, self.factor)
                z = mean + std * randn_like(z, generator) if std > 0 else mean
                check_finite(i, steps, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        spaces = [self.space_after(i, steps) for i in range(steps)]
        pictures, gradients = spaces.count("pixel"), steps + spaces.count("latent") * int(self.iterations)
        through = steps if self.jacobian == "exact" else 0
        return Cost(denoiser=steps, denoiser_gradients=through, decoder=gradients + pictures, decoder_gradients=gradients, encoder=pictures)

    def describe(self) -> str:
        return f"ReSample ({told(self)}, steps {self.first} to {self.last} every {self.every})"


def consistent_latent(posterior: Posterior, z0: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """argmin_Z ||y - f(D(Z))||^2 / 2 from z0 (Eq. 37, below)."""
    return _minimise(lambda z0: posterior.gradient_z0(z0, squared=True)[0], z0, iterations, learning_rate)


def consistent_picture(posterior: Posterior, z0: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """E(argmin_X ||y - f(X)||^2 / 2) from X = D(z0) (Eq. 37, above)."""
    image = posterior.decoded(z0)
    return posterior.encoded(_minimise(lambda x: posterior.gradient_x(x, squared=True)[0], image, iterations, learning_rate))


def _minimise(gradient: Callable[[Tensor], Tensor], x: Tensor, iterations: int, learning_rate: float) -> Tensor:
    x = x.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=learning_rate)
    for _ in range(iterations):
        x.grad = gradient(x)
        optimizer.step()
    return x.detach()


def resampling(z0: Tensor, z: Tensor, sigma: float, sigma_next: float, factor: float) -> tuple[Tensor, float]:
    """Mean and standard deviation, in VE space, of the noisy latent at sigma_next given the consistent z0 and the current latent z (Eq. 39).

    The product of N(z0, sigma_next^2 I), what z0's noisy latent would be, with a Gaussian of VP variance s around z, which has
    s = factor (1 - abar_next) / (1 - abar) (1 - abar / abar_next).
    """
    abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    noise = 1 - abar_next
    if noise == 0:
        return z0, 0.0
    s = factor * noise / (1 - abar) * (1 - abar / abar_next)
    return (s * z0 + noise * z) / (s + noise), math.sqrt(s * noise / (s + noise) / abar_next)
