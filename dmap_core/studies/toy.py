"""The toy example (A.4, Fig. 8): two Gaussians in the plane, of which a measurement shows the first coordinate.

With the published numbers, sigma_0 = 0.3 and y = (0.5, 0), the true posterior is not the two-modal one that Fig. 8 shows: the lower mode is
5 sigma_0 from y and the upper one 1.67, so that its weight is exp(-1.5^2 / 0.18) / exp(-0.5^2 / 0.18) = 1.5e-5. Nor do DPS's samples
concentrate in one mode: 64 % are in the upper and 36 % in the lower one, which the measurement all but rules out. At y = (0, 0),
BIMODAL_Y, the posterior has two equal modes, and DPS and DMAP have half of their samples in each.

DSG and DMAP put their samples on a sphere because a Gaussian in many dimensions has its mass there. In the plane it is a circle, near
which a Gaussian has no particular mass, so that the two are out of their element. Measured with the defaults at y = (0.5, 0): DSG at the
published mix rate of 0.08 is hardly guided (mean residual 0.63, of unguided samples 1.0); DMAP fits better than DPS (0.012 to 0.027) and
has 78 % of its samples in the upper mode, but its modes are some 10 % too narrow.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.mixture import GaussianMixture
from ..operators import Operator
from ..operators.base import whole
from ..posterior import Posterior
from ..solvers import DMAP, DPS, DSG, Solver

CENTRES = ((-1.0, -1.0), (1.0, 1.0))
PUBLISHED_Y = (0.5, 0.0)
BIMODAL_Y = (0.0, 0.0)
TRUE = "true posterior"


@dataclass(frozen=True)
class FirstCoordinate(Operator):
    """The inpainting of A.4: points (B, 2) lose their second coordinate."""

    def __call__(self, image: Tensor) -> Tensor:
        return image * image.new_tensor([1.0, 0.0])


@dataclass(frozen=True)
class Summary:
    """upper: the part of the points in the upper mode, those with a second coordinate above 0, half-way between the centres;
    mean, std: of the second coordinate; residual: the mean of ||f(x) - y||."""

    upper: float
    mean: float
    std: float
    residual: float


@dataclass(frozen=True)
class Toy:
    """samples: (n, 2) points of every method, TRUE among them; summaries: their figures; true: those of the closed form.

    weights (2,) and means (2, 2): of the true posterior's modes, lower first. settings: what `toy_example` was called with.
    """

    samples: dict[str, Tensor]
    summaries: dict[str, Summary]
    true: Summary
    weights: Tensor
    means: Tensor
    settings: dict[str, Any]

    @property
    def y(self) -> tuple[float, float]:
        return self.settings["y"]

    def rows(self) -> list[dict[str, float | str]]:
        """A dict for the closed form and for every method's samples, for a CSV file."""
        found = [("true posterior, closed form", self.true, math.inf), *((m, s, len(self.samples[m])) for m, s in self.summaries.items())]
        return [{"method": method, "y": self.y[0], "n": n, **asdict(summary)} for method, summary, n in found]

    def text(self) -> str:
        """A line for each of them."""
        return "\n".join(
            f"{row['method']}: {100 * row['upper']:.1f} % in the upper mode, unseen coordinate {row['mean']:.3f} "
            f"(standard deviation {row['std']:.3f}), mean residual {row['residual']:.4f}"
            for row in self.rows()
        )


def karras_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """(steps + 1,) float64 noise levels evenly spaced in sigma^(1 / rho) from sigma_max to sigma_min, then 0 (Karras et al. 2022)."""
    whole("steps", steps, 2)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; they must satisfy 0 < sigma_min < sigma_max")
    if rho <= 0:
        raise ValueError(f"rho is {rho}; it must be above 0")
    levels = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def toy_example(
    samples: int = 1000,
    steps: int = 100,
    zeta: float = 0.05,
    dsg_zeta: float = 0.08,
    dmap_zeta: float = 0.1,
    K: int = 2,
    sigma_0: float = 0.3,
    sigma_max: float = 4.0,
    rho: float = 7.0,
    sigma_min: float = 0.01,
    y: tuple[float, float] = PUBLISHED_Y,
    seed: int = 0,
    sigma_y: float = 0.01,
) -> Toy:
    """DPS, DSG and DMAP on the toy example, and exact samples of its true posterior.

    steps: Karras levels from sigma_max to sigma_min, then 0. zeta: DPS's, published. dsg_zeta: a mix rate, the paper's for pictures.
    dmap_zeta: twice DPS's, as for pictures; K: its gradient steps. sigma_0: of both Gaussians. y: the measurement, whose second coordinate
    is 0. sigma_y: its noise in the closed form, as good as none. sigma_min, dsg_zeta, dmap_zeta and K are not published. The solvers start
    from the same latents. Takes about a second.
    """
    whole("samples", samples, 2)
    if len(y) != 2 or y[1] != 0 or not math.isfinite(y[0]):
        raise ValueError(f"y is {tuple(y)}; it must be two numbers, the second of them 0, because the operator sets it to 0")
    if not (sigma_0 > 0 and sigma_y > 0):
        raise ValueError(f"sigma_0 is {sigma_0} and sigma_y {sigma_y}; both must be above 0")
    y = (float(y[0]), 0.0)
    settings = {"samples": samples, "steps": steps, "zeta": zeta, "dsg_zeta": dsg_zeta, "dmap_zeta": dmap_zeta, "K": K, "sigma_0": sigma_0}
    settings |= {"sigma_max": sigma_max, "rho": rho, "sigma_min": sigma_min, "y": y, "seed": seed, "sigma_y": sigma_y}

    prior = GaussianMixture(torch.tensor(CENTRES, dtype=torch.float64), sigma_0)
    measurement = torch.tensor([y], dtype=torch.float64)
    levels = karras_levels(steps, sigma_min, sigma_max, rho)

    def run(solver: Solver) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = sigma_max * torch.randn(samples, 2, generator=generator, dtype=torch.float64)
        return solver(Posterior(prior, FirstCoordinate(), measurement), z, levels, generator=generator)

    weights, means, covariance = prior.posterior(torch.tensor([[1.0, 0.0]], dtype=torch.float64), measurement[0, :1], sigma_y)
    points = {
        TRUE: _draw(weights, means, covariance, samples, seed),
        "DPS": run(DPS(zeta=zeta)),
        "DSG": run(DSG(zeta=dsg_zeta)),
        "DMAP": run(DMAP(zeta=dmap_zeta, K=K)),
    }
    summaries = {name: _summary(x, y[0]) for name, x in points.items()}
    return Toy(points, summaries, _true_summary(weights, means, covariance, y[0]), weights, means, settings)


def _draw(weights: Tensor, means: Tensor, covariance: Tensor, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mode = torch.multinomial(weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, 2, generator=generator, dtype=means.dtype)
    return means[mode] + noise @ torch.linalg.cholesky(covariance).mT


def _summary(x: Tensor, y: float) -> Summary:
    unseen = x[:, 1]
    return Summary(float((unseen > 0).double().mean()), float(unseen.mean()), float(unseen.std()), float((x[:, 0] - y).abs().mean()))


def _true_summary(weights: Tensor, means: Tensor, covariance: Tensor, y: float) -> Summary:
    """The same in closed form, of a mixture of Gaussians with a diagonal covariance."""
    seen, unseen = covariance.diagonal().sqrt()
    upper = weights @ _below(means[:, 1] / unseen)
    mean = weights @ means[:, 1]
    variance = unseen**2 + weights @ (means[:, 1] - mean).square()
    offset = (means[:, 0] - y) / seen
    # E|N(m, s^2)|, the mean of a folded normal distribution
    residual = weights @ (seen * (math.sqrt(2 / math.pi) * torch.exp(-offset.square() / 2) + offset * (2 * _below(offset) - 1)))
    return Summary(float(upper), float(mean), float(variance.sqrt()), float(residual))


def _below(x: Tensor) -> Tensor:
    """The standard normal distribution function."""
    return (1 + torch.erf(x / math.sqrt(2))) / 2
