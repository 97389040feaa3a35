"""DAPS in latent space: Zhang et al. 2025 (CVPR), Alg. 1, and the authors' code (zhangbingliang2019/DAPS: `sampler.py`, `cores/mcmc.py`, `configs/`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import randn_like, renoised
from .base import Cost, Solver, check_choice, check_eta, choice_setting, eta_setting, setting
from .checks import check_finite, check_problem
from .resample import SPACES
from .step import check_step, norm, per_sample, strength_setting, told
from .unguided import unguided_steps

MOVES = ("langevin", "gradient")
TAU = 0.01  # published, where the measurement's noise is not known; 1.3 grey levels
RHO = 7.0  # of the levels between sigma and 0 at which z0 is estimated
PIXELS = 0.9  # of the steps, "both" works on the picture
FIRST_PROBES, PROBE = 4, 0.01  # of the curvature in the first step, and how far from z0, in each of its elements
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DAPS(Solver):
    """z0_hat: the PF-ODE from z at sigma to 0, in `ode` Euler steps;
    z0: from z0_hat, `iterations` times z0 <- z0 - l grad U(z0) + sqrt(2 l) eps, with U = ||z0 - z0_hat||^2 / (2 sigma^2) + ||f(D(z0)) - y||^2 / (2 tau^2);
    z_next = z0 + sigma_next eps   (Alg. 1)

    Published in VE space, as here. Consecutive noise levels are decoupled: nothing of z but z0_hat reaches the next one. The chain draws from p(z0 | z, y), in which
    p(z0 | z) is taken for N(z0_hat, r^2 I) with r = sigma, as published.
    ode >= 1: Euler steps, at levels evenly spaced in sigma^(1/7) from sigma to the schedule's last one above 0 (published: 2 for Stable Diffusion, to 0.001); at that last level
    one is enough. move: "langevin", or "gradient", the same without noise: it goes to the maximum. momentum in [0, 1): of the damped Hamiltonian dynamics that the authors'
    settings for Stable Diffusion have, v <- momentum v - sqrt(l) grad U + sqrt(2 (1 - momentum)) eps, z0 <- z0 + sqrt(l) v; at 0 that is the line above.
    space: of the chain. "latent" (the published code since 2025); "pixel": of the picture from D(z0_hat), which is then encoded, without a network in it; "both": pixels for nine tenths of the steps,
    the latent after that (the paper's first version, and its configs).
    The likelihood is of y itself: the distance of an operator with known noise, which that noise is taken from, is not used here.
    tau > 0: standard deviation of the measurement's noise in units of [-1, 1]; 0: that of the operator, or 0.01 where it has none. The published code has 0.01, without the 1/2 before the
    square, which is tau = 0.0071 here.
    zeta > 0: l, in squared latent units; in step i of T zeta (1 + (decay - 1) i / T). Published for Stable Diffusion at 768 pixels with 50 steps from sigma 10 to 0.1 (Karras): super-resolution x4
    1e-4, 30 iterations, momentum 0.45; Gaussian blur 1e-5, 40, 0.9; a hole 1.1e-6, 58, 0.92, decay 0.43.
    zeta None: the step sets itself, l = strength / (1 / r^2 + c / tau^2) with c the curvature of ||f(D(z0)) - y||^2 / 2, so that 1 / l is U's: Langevin steps are stable below 2 and biased in proportion to strength.
    For Langevin c is the largest eigenvalue of its Hessian, by power iteration on differences of gradients, one more gradient in a step (4 in the first). Without noise c is ||grad||^2 / ||f(D(z0)) - y||^2, never more than
    the largest eigenvalue of J^T J: Polyak's step, as in DPS. This is not the paper's.
    eta: 1 as published; below it, sqrt(1 - eta^2) of the noise that z had is kept (0: DDIM).
    """

    zeta: float | None = setting(
        "Step size of the chain, in squared latent units. Published, Stable Diffusion, 50 steps from sigma 10: 0.0001 for super-resolution, 0.00001 for blur, "
        "0.000001 for holes.",
        default=None,
        usual=1e-4,
        least=1e-7,
        most=10.0,
        step=1e-5,
        digits=1e-7,
    )
    iterations: int = setting(
        "Steps of the chain at every noise level, each a gradient through the VAE (published: 30 to 60).", default=4, least=1, most=1000
    )
    ode: int = setting(
        "Calls of the denoiser at every noise level: Euler steps from it to the clean latent (published: 2).", default=1, least=1, most=100
    )
    move: str = choice_setting(
        MOVES,
        "langevin: the chain draws a sample, as published. gradient: the same without noise, which goes to the likeliest latent and keeps less grain.",
    )
    momentum: float = setting(
        "Of the chain: 0 is Langevin dynamics, 0.45 to 0.95 the damped Hamiltonian dynamics of the authors' settings. With few iterations leave it at 0.",
        default=0.0,
        least=0.0,
        most=0.99,
        step=0.05,
        digits=0.001,
        optional=True,
    )
    tau: float = setting(
        "Standard deviation of the measurement's noise, in units of [-1, 1]. 0 takes the operator's, or the published 0.01 where it has none.",
        default=0.0,
        least=0.0,
        most=1.0,
        step=0.01,
        digits=0.0001,
        optional=True,
    )
    decay: float = setting(
        "Of zeta: what is left of it at the end, as it falls evenly over the steps.",
        default=1.0,
        least=0.001,
        most=1.0,
        step=0.05,
        digits=0.001,
        optional=True,
    )
    space: str = setting(
        "Where the chain is. latent: every iteration calls the VAE. pixel: it moves the decoded picture, which is then encoded; quick, and not for VAEs that lose much. "
        "both: pixels for nine tenths of the steps, then the latent.",
        default="latent",
        choices=SPACES,
        optional=True,
    )
    eta: float = eta_setting(help="Fresh noise of every step: 1 as published, all of it; 0 keeps the noise that there was.")
    strength: float = strength_setting()

    def __post_init__(self):
        check_step(self.zeta, self.strength, "none")
        whole("iterations", self.iterations, 1)
        whole("ode", self.ode, 1)
        check_choice("move", self.move, MOVES)
        check_choice("space", self.space, SPACES)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"tau is {self.tau}; it must be above 0, or 0 for the operator's own noise")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be above 0 and at most 1")
        check_eta(self.eta)

    def space_of(self, step: int, steps: int) -> str:
        """Where the chain of a step is, "pixel" or "latent"."""
        return self.space if self.space != "both" else "pixel" if step < math.floor(PIXELS * steps) else "latent"

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        steps = len(levels) - 1
        tau = self.tau or posterior.operator.noise or TAU
        directions: dict[str, Tensor] = {}  # of the greatest curvature, per space
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            denoised = probability_flow(posterior.denoise, z, sigma, levels[-2], int(self.ode))
            space = self.space_of(i, steps)
            gradient = partial(posterior.gradient_z0 if space == "latent" else posterior.gradient_x, squared=True, bare=True)
            start = denoised if space == "latent" else posterior.decoded(denoised)
            z0, residuals = start, []
            for z0, residual in self._chain(gradient, start, sigma, tau, i / steps, directions, space, generator):  # noqa: B020 (the last one)
                check_finite(i, steps, self.zeta, z0, residual)
                residuals.append(residual)
            z0 = z0 if space == "latent" else posterior.encoded(z0)
            z = renoised(z0, z - denoised, sigma, sigma_next, self.eta, generator)
            check_finite(i, steps, self.zeta, z, residuals[0])
            if callback:
                callback(i, denoised, z, posterior.operator.excess(residuals[0], posterior.y))
        return z

    def _chain(
        self, gradient: Gradient, start: Tensor, r: float, tau: float, gone: float, directions: dict[str, Tensor], space: str, generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(z0, the residual before it) of every iteration. gone: of the steps, in [0, 1); directions: of earlier steps, and of this one."""
        noisy = self.move == "langevin"
        z0, curvature = start, None
        velocity = randn_like(start, generator) if noisy and self.momentum > 0 else torch.zeros_like(start)
        for _ in range(int(self.iterations)):
            grad, residual = gradient(z0)
            if self.zeta is not None:
                size: float | Tensor = self.zeta * (1 + (self.decay - 1) * gone)
            else:
                if not noisy:
                    curvature = quotient(grad, residual)
                elif curvature is None:
                    curvature, directions[space] = largest(gradient, z0, grad, directions.get(space))
                size = (self.strength / (1 / r**2 + curvature / tau**2)).to(z0)
            slope = (z0 - start) / r**2 + grad / tau**2
            noise = math.sqrt(2 * (1 - self.momentum)) * randn_like(z0, generator) if noisy else 0.0
            velocity = self.momentum * velocity - size**0.5 * slope + noise
            z0 = z0 + size**0.5 * velocity
            yield z0, residual

    def cost(self, steps: int) -> Cost:
        spaces = [self.space_of(i, steps) for i in range(steps)]
        latents, pictures = spaces.count("latent"), spaces.count("pixel")
        probes = latents + FIRST_PROBES - 1 if latents and self.zeta is None and self.move == "langevin" else 0
        gradients = latents * int(self.iterations) + probes
        return Cost(
            denoiser=(steps - 1) * int(self.ode) + 1,
            denoiser_gradients=0,
            decoder=gradients + pictures,
            decoder_gradients=gradients,
            encoder=pictures,
        )

    def describe(self) -> str:
        shown = ("zeta", "strength", "iterations", "move", "ode")
        rest = [f"{name} {value}" for name, value in self.notable().items() if name not in shown]
        return f"DAPS ({', '.join([told(self), f'{self.iterations} {self.move} steps', f'ode {self.ode}', *rest])})"


def probability_flow(denoise: Callable[[Tensor, float], Tensor], z: Tensor, sigma: float, least: float, steps: int) -> Tensor:
    """The clean latent at the end of the PF-ODE from z at sigma, in Euler steps at levels from sigma towards `least`, then 0; one where sigma is `least`."""
    ends = sigma ** (1 / RHO), least ** (1 / RHO)
    levels = [(ends[0] + i / steps * (ends[1] - ends[0])) ** RHO for i in range(1, steps)] if least < sigma else []
    *_, (_, z0) = unguided_steps(denoise, z, [sigma, *levels, 0.0], eta=0.0)
    return z0


def quotient(grad: Tensor, residual: Tensor) -> Tensor:
    """||J^T r||^2 / ||r||^2 (B, 1, ...) of a gradient of ||r||^2 / 2: at most the largest eigenvalue of J^T J, and 0 where r is."""
    length = norm(grad)
    return per_sample(torch.where(residual > 0, (length / residual.to(length)) ** 2, 0.0), grad)


def largest(gradient: Gradient, z0: Tensor, grad: Tensor, direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the size of the largest eigenvalue (B, 1, ...) of the Hessian, its direction) at z0, by power iteration from a direction, or from the gradient there."""
    probes, direction = (FIRST_PROBES, grad) if direction is None else (1, direction)
    curvature = grad.new_zeros(len(grad), *[1] * (grad.ndim - 1))
    for _ in range(probes):
        length = per_sample(norm(direction), grad).to(grad)
        unit = torch.where(length == 0, 0.0, direction / length)  # NaN stays
        far = PROBE * math.sqrt(grad[0].numel())
        direction = (gradient(z0 + far * unit)[0] - grad) / far
        curvature = per_sample(norm(direction), grad)
    return curvature, direction
