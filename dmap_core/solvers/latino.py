"""LATINO, the latent consistency inverse solver: Spagnoletti et al. 2025 (ICCV), and the authors' code (LATINO-PRO/LATINO-PRO, `noise_schemes.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..consistency import ROUNDING, matchable, proximal
from ..operators import Operator
from ..operators.noisy import parts
from ..posterior import Posterior
from ..schedule import renoised
from .base import Cost, Solver, check_eta, eta_setting, setting
from .checks import check_finite, check_problem


@dataclass(frozen=True, kw_only=True)
class LATINO(Solver):
    """x = D(z0(z)); u = argmin_u gamma / 2 ||f(u) - y||^2 + ||u - x||^2 / 2; z+ = E(u); z_next = z+ + sigma_next eps

    No gradient: the denoiser, the decoder and the encoder are called once a step, and u is `consistency.proximal`, x + f^T (f f^T + 1 / gamma)^-1 (y - f(x)),
    between two clamps to [-1, 1]. delta: published, gamma = delta (1 - abar) / sigma_y^2 with 1 - abar = sigma^2 / (1 + sigma^2) and a delta above 0
    that was tuned by hand per operator, half of the schedule and noise; sigma_y is the noise's deviation in units of [-1, 1], at least that of rounding to 8 bits. 0, the
    default, is ours: gamma as the discrepancy principle has it, so that f(u) - y is what the noise explains. Published in VP coordinates,
    z_vp = z / sqrt(1 + sigma^2), where the last line is the step of a consistency model (LCM), whose boundary scalings are 1 and 0 to 2e-7 for t >= 124.
    eta: the share of that noise which is fresh, z+ + sigma_next (sqrt(1 - eta^2) (z - z+) / sigma + eta eps). 1, published, is LCM's; the eps that
    belongs to z+ is computed there too, but only to hand z+ to the scheduler. 0 is DDIM's step with it.
    Published with 8 steps from t = 999 to 124, 125 apart, from the noised E(f^T(y)); here the caller's z, which may be that (`restore.warm_latent`, `start`).
    Linear operators, and with delta 0 all that `consistency.matchable` knows.
    """

    delta: float = setting(
        "How much a step trusts the measurement. 0: as much as its noise allows, which nobody has to tune. Above 0 the authors' rule: gamma = delta (1 - abar) / "
        "noise^2; linear damage only.",
        default=0.0,
        least=0.0,
        most=1000.0,
        step=0.01,
        digits=0.0001,
        optional=True,
    )
    eta: float = eta_setting(
        help="How much of the noise of every step is fresh: 1 is a consistency model's step (published), 0 keeps the noise that there is (DDIM)."
    )

    def __post_init__(self):
        check_eta(self.eta)
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta is {self.delta}; it must be a number of at least 0, where 0 follows the noise of the measurement")

    def check(self, operator: Operator, steps: int) -> None:
        refused = matchable(operator)
        if refused:
            raise ValueError(f"operator: {refused}, which LATINO needs at every step; use DMAP, DPS, DSG or FreeDoM instead")
        if self.delta > 0 and not all(f.linear for f in parts(operator)):
            raise ValueError(
                f"delta is {self.delta:g}, but {operator.describe()} is not linear, where only the discrepancy rule is known; set it to 0"
            )

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            denoised = posterior.denoise(z, sigma)
            image = posterior.decoded(denoised)
            residual = posterior.distance(image)
            check_finite(i, len(levels) - 1, None, image, residual, guided=False)
            consistent = proximal(posterior.operator, image, posterior.y, self.lam(posterior.operator, sigma))
            z0 = posterior.encoded(consistent).to(z)
            z = renoised(z0, z - z0, sigma, sigma_next, self.eta, generator)
            check_finite(i, len(levels) - 1, None, z, residual, guided=False)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def describe(self) -> str:
        trust = f"delta {self.delta:g}" if self.delta > 0 else "as close as the noise allows"
        return f"LATINO ({trust}{f', eta {self.eta:g}' if self.eta < 1 else ''})"

    def lam(self, operator: Operator, sigma: float) -> float | None:
        """1 / gamma at a noise level; None where the discrepancy principle finds it."""
        if self.delta == 0:
            return None
        return max(operator.noise, ROUNDING) ** 2 / (self.delta * sigma**2 / (1 + sigma**2))

    def cost(self, steps: int) -> Cost:
        return Cost(denoiser=steps, denoiser_gradients=0, decoder=steps, decoder_gradients=0, encoder=steps)
