"""FlowDPS: Kim et al. 2025 (ICCV), and the authors' code (FlowDPS-Inverse/FlowDPS, `sd3_sampler.py`); weights of TriPS, Bang et al. 2026 (ICML)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import flow_time, renoised
from .base import Cost, Solver, check_choice, check_eta, choice_setting, eta_setting, setting, zeta_setting
from .checks import check_finite, check_problem
from .step import check_step, step_of, strength_setting, told

WEIGHTS = ("constant", "published", "falling", "rising")
NOISES = ("published", "falling")
LAST = 0.2  # of the first step is the last one of TriPS' ramp, 250 to 50 for super-resolution
LATE = 15.0  # how late TriPS' noise falls


@dataclass(frozen=True, kw_only=True)
class FlowDPS(Solver):
    """z_y: from z0(z), `inner` times z_y <- z_y - zeta w grad ||f(D(z_y)) - y||; z~ = (1 - m) z0 + m z_y; z_next = z~ + sigma_next (sqrt(1 - a^2) e + a eps)

    Published for flows, x_t = (1 - t) z0 + t e with velocity v. In VE space, where z = x_t / (1 - t) and sigma = t / (1 - t), that is t = sigma / (1 + sigma),
    z0 = x_t - t v, e = x_t + (1 - t) v = (z - z0) / sigma, and x_next = (1 - t_next) z~ + t_next (...) becomes the line above, exactly. So it needs no
    flow: a model trained with another noise gives z0(z) at the same sigma. e is that of z0, not of z~.
    weight: "constant", the default, which was best on the demo prior: w = m = 1. "published", FlowDPS': w = 1, m = t. "falling", TriPS' data consistency: m = 1, w = (1 - 0.8 u) (1 + 3 t^2) / 4 with u from 0 at the
    first step to 1 at the last (its ramp from 250 to 50; other tasks have ratios from 1/5 to 2/3). "rising": the ramp turned round, m = 1, w = 0.2 + 0.8 u, for comparison.
    noise: a of "published" is eta sqrt(1 - t_next), so that with eta 1 a^2 + t_next = 1; of "falling", TriPS', eta (1 - (e^15u - 1) / (e^15 - 1)). eta 0 is
    deterministic. TriPS' third schedule, cfg rising from 1 to 6, belongs to the model, not to the solver.
    zeta > 0 as in DPS (published: 15 to 30 on SD 3, for another norm); None: the automatic step, w strength of Polyak's. The residual is ours:
    FlowDPS takes ||f^+ (y - f(D))|| for super-resolution and ||f^T (y - f(D))|| elsewhere, TriPS a mix of that and ours; f^+ of block means is ours but for a factor.
    T steps cost T denoiser calls without gradient, and `inner` T decoder calls with it.
    """

    zeta: float | None = zeta_setting(4.8)
    inner: int = setting(
        "Gradient steps through the decoder per call of the denoiser (published: 3; TriPS: 6).", default=3, least=1, most=100
    )
    weight: str = choice_setting(
        WEIGHTS,
        "How much the guided latent counts. constant: all of it, always. published: as much as there is noise, so that the last steps are the model's. falling: all of it, with steps that get "
        "shorter (TriPS). rising: with steps that get longer.",
    )
    noise: str = choice_setting(
        NOISES, "The fresh noise of a step. published: little at first, more and more. falling: all of it until the last steps (TriPS)."
    )
    eta: float = eta_setting(help="Scales the fresh noise of every step: 1 as published, 0 deterministic.")
    strength: float = strength_setting()

    def __post_init__(self):
        check_step(self.zeta, self.strength, "none")
        whole("inner", self.inner, 1)
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("noise", self.noise, NOISES)
        check_eta(self.eta)

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        steps = len(levels) - 1
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            u = i / max(steps - 1, 1)
            t, t_next = flow_time(sigma), flow_time(sigma_next)
            w, m = weights_of(self.weight, u, t)
            denoised = posterior.denoise(z, sigma)
            guided, residuals = denoised, []
            for _ in range(int(self.inner)):
                grad, residual = posterior.gradient_z0(guided)
                guided = guided - w * step_of(self, grad, residual, sigma) * grad
                check_finite(i, steps, self.zeta, guided, residual)
                residuals.append(residual)
            z0 = (1 - m) * denoised + m * guided
            a = self.eta * (math.sqrt(1 - t_next) if self.noise == "published" else late(u))
            z = renoised(z0, z - denoised, sigma, sigma_next, a, generator)
            check_finite(i, steps, self.zeta, z, residuals[0])
            if callback:
                callback(i, denoised, z, residuals[0])
        return z

    def describe(self) -> str:
        noise = "" if self.noise == "published" else f", {self.noise} noise"
        return (
            f"FlowDPS ({told(self)}, {self.inner} inner steps, {self.weight} weight{noise}{f', eta {self.eta:g}' if self.eta < 1 else ''})"
        )

    def cost(self, steps: int) -> Cost:
        gradients = steps * int(self.inner)
        return Cost(denoiser=steps, denoiser_gradients=0, decoder=gradients, decoder_gradients=gradients)


def weights_of(weights: str, u: float, t: float) -> tuple[float, float]:
    """(w, m) of a step: how long it is, and how much the guided latent counts. u: of the way gone; t: flow time."""
    if weights == "published":
        return 1.0, t
    ramp = LAST + (1 - LAST) * (u if weights == "rising" else 1 - u)
    return {"constant": 1.0, "rising": ramp, "falling": ramp * (1 + 3 * t**2) / 4}[weights], 1.0


def late(u: float) -> float:
    """1 at u = 0, 0 at 1, and above a half for u up to 0.95."""
    return 1 - math.expm1(LATE * u) / math.expm1(LATE)
