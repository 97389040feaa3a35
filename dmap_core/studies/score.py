"""Is DPS's conditional score a conditional score? Its error (Observation I, Sec. 3.2) and its mean (Observation II, Sec. 3.3).

Scores are the paper's: of the VP latent x = z / sqrt(1 + sigma^2), where z is the VE latent that everything else here works on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import check_sigmas, double_on_cpu, generators, randn_like
from ..solvers.dps import guided_denoised

UNCONDITIONAL = "unconditional"
PAPER_ZETAS = (0.05, 0.3, 1.0, 4.8)  # of DPS, in Fig. 1 and Table 2


def vp_score(z: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """grad_x log p(x) at x = z / sqrt(1 + sigma^2), (B, C, h, w), from the denoised latent: Tweedie's formula (Eq. 4) solved for it."""
    return (math.sqrt(1 + sigma**2) / sigma**2) * (denoised - z)


def dps_score(z: Tensor, denoised: Tensor, grad: Tensor, zeta: float, sigma: float, sigma_next: float) -> Tensor:
    """DPS's estimate of the conditional score (Prop. 1, Eq. 9).

    grad: of the residual with respect to z. zeta: in VE units; 0 is no guidance.
    """
    return vp_score(z, guided_denoised(denoised, grad, zeta, sigma, sigma_next), sigma)


@dataclass(frozen=True)
class ScorePoint:
    """What the scores at one noise level are made of: z, denoised and grad (B, C, h, w), residual (B,)."""

    sigma: float
    sigma_next: float
    z: Tensor
    denoised: Tensor
    grad: Tensor
    residual: Tensor


def score_points(
    posterior: Posterior,
    z0: Tensor,
    sigmas,
    generator,
    callback: Callable[[int, ScorePoint], None] | None = None,
) -> list[ScorePoint]:
    """z = z0 + sigma eps at every level of a schedule that falls to 0 (all but the 0), fresh noise at each, and the gradient there.

    z0: (B, C, h, w), clean latents; for Fig. 1 one picture B times, which the noise makes different. generator: one, or one per sample.
    callback(step, point) after every level. One gradient per level serves all zetas, since DPS's score is linear in zeta.
    """
    points = []
    for i, (sigma, sigma_next) in enumerate(pairwise(check_sigmas(sigmas))):
        z = z0 + sigma * randn_like(z0, generator)
        grad, denoised, residual = posterior.gradient(z, sigma)
        points.append(ScorePoint(sigma, sigma_next, z, denoised, grad, residual))
        if callback:
            callback(i, points[-1])
    return points


@dataclass(frozen=True)
class ScoreErrors:
    """||s - s_conditional|| at T noise levels of B samples (Eq. 10, Fig. 1): l2 norms over a whole latent, float64.

    unconditional: (T, B); dps: (Z, T, B) for the Z zetas; conditional_norm: (T, B), ||s_conditional|| to compare with.
    """

    sigmas: Tensor
    zetas: tuple[float, ...]
    unconditional: Tensor
    dps: Tensor
    conditional_norm: Tensor

    def methods(self) -> list[tuple[str, float | None, Tensor]]:
        """(method, zeta, errors (T, B)): the unconditional score, which has no zeta, then DPS for each."""
        return [(UNCONDITIONAL, None, self.unconditional), *(("DPS", zeta, e) for zeta, e in zip(self.zetas, self.dps, strict=True))]

    def rows(self, timesteps: Sequence[float] | Tensor | None = None) -> list[dict[str, float | str | None]]:
        """A dict for every method and noise level, for a CSV file. timesteps: (T,), from `timesteps`, adds the column t.

        mean and standard_error are over the n samples; with a single one the standard error is NaN.
        """
        times = None if timesteps is None else [float(t) for t in timesteps]
        if times is not None and len(times) != len(self.sigmas):
            raise ValueError(
                f"{len(times)} timesteps were given for {len(self.sigmas)} noise levels; give one per level, without the final 0"
            )
        rows = []
        for method, zeta, errors in self.methods():
            means, deviations = mean_and_error(errors)
            for i, sigma in enumerate(self.sigmas):
                rows.append(
                    {
                        "sigma": float(sigma),
                        **({} if times is None else {"t": times[i]}),
                        "method": method,
                        "zeta": zeta,
                        "mean": float(means[i]),
                        "standard_error": float(deviations[i]),
                        "n": errors.shape[1],
                        "conditional_norm": float(self.conditional_norm[i].mean()),
                    }
                )
        return rows


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last axis and its standard error, (...); NaN for the error of a single value."""
    n = values.shape[-1]
    error = values.std(-1) / math.sqrt(n) if n > 1 else torch.full_like(values[..., 0], math.nan)
    return values.mean(-1), error


def score_errors(points: Sequence[ScorePoint], conditional_denoised: Sequence[Tensor], zetas: Sequence[float]) -> ScoreErrors:
    """How far the unconditional score and DPS's for every zeta are from a conditional model's.

    conditional_denoised: its denoised latent at every point's z, (B, C, h, w) each, as StableSR or a ControlNet gives it.
    """
    if not points:
        raise ValueError("points is empty; give at least one, from score_points")
    if len(points) != len(conditional_denoised):
        raise ValueError(
            f"{len(points)} points but {len(conditional_denoised)} conditional_denoised; give the conditional model's at every point"
        )
    unconditional, dps, norms = [], [], []
    for point, denoised in zip(points, conditional_denoised, strict=True):
        if denoised.shape != point.z.shape:
            raise ValueError(f"conditional_denoised is of shape {tuple(denoised.shape)} where the latent is {tuple(point.z.shape)}")
        reference = vp_score(point.z, denoised, point.sigma)
        unconditional.append(_norms(vp_score(point.z, point.denoised, point.sigma) - reference))
        dps.append([_norms(_dps_score_of(point, zeta) - reference) for zeta in zetas])
        norms.append(_norms(reference))
    per_level = [torch.stack(errors) if errors else torch.empty(0, len(norms[0]), dtype=torch.float64) for errors in dps]
    return ScoreErrors(
        torch.tensor([point.sigma for point in points], dtype=torch.float64),
        tuple(float(zeta) for zeta in zetas),
        torch.stack(unconditional),
        torch.stack(per_level, dim=1),
        torch.stack(norms),
    )


def _dps_score_of(point: ScorePoint, zeta: float) -> Tensor:
    return dps_score(point.z, point.denoised, point.grad, zeta, point.sigma, point.sigma_next)


def _norms(score: Tensor) -> Tensor:
    """(B,) float64 on the CPU."""
    return torch.linalg.vector_norm(score.cpu().double().flatten(1), dim=1)  # on the CPU first: not every device has float64


def timesteps(sigmas: Sequence[float] | Tensor, model_sigmas: Sequence[float] | Tensor) -> Tensor:
    """The training timesteps t of noise levels, (T,) float64, interpolated in log sigma; the nearest end for levels outside the model's.

    model_sigmas: (N,) rising VE sigmas of the timesteps 0 to N - 1.
    """
    levels, model = double_on_cpu(sigmas), double_on_cpu(model_sigmas)
    if len(model) < 2 or not (model[0] > 0 and (model.diff() > 0).all()):
        raise ValueError("model_sigmas must hold at least two noise levels, rising and above 0")
    if not (levels > 0).all():
        raise ValueError("sigmas must be above 0 to have a timestep; leave the final 0 of a schedule out")
    log, table = levels.log(), model.log()
    above = torch.searchsorted(table, log).clamp(1, len(table) - 1)
    fraction = (log - table[above - 1]) / (table[above] - table[above - 1])
    return above - 1 + fraction.clamp(0, 1)


class ScoreMean:
    """The mean of a score over samples, which is 0 for a score of the samples' own density (Eq. 12), and what Table 2 gives for it.

    Samples are added one after the other in float64 (Welford 1962) and not kept, so that results do not depend on how they come in batches.
    """

    def __init__(self) -> None:
        self.k = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)  # the mean, and the sum of squared deviations from it
        self._published = 0.0

    def update(self, score: Tensor) -> None:
        """Adds the scores (B, C, h, w) of B samples."""
        for sample in score.detach().cpu().double():
            self.k += 1
            deviation = sample - self._mean
            self._mean = self._mean + deviation / self.k
            self._squares = self._squares + deviation * (sample - self._mean)
            self._published += float(sample.mean(0).abs().mean())

    def _needs(self, least: int) -> None:
        if self.k < least:
            raise ValueError(f"the score's mean has seen {self.k} sample(s), but needs at least {least}")

    @property
    def mean(self) -> Tensor:
        """(C, h, w) float64: the mean over the samples."""
        self._needs(1)
        return self._mean

    @property
    def std(self) -> Tensor:
        """(C, h, w) float64: the standard deviation over the samples of every element, unbiased (k - 1)."""
        self._needs(2)
        return (self._squares / (self.k - 1)).sqrt()

    @property
    def true_mean(self) -> float:
        """|E[s]|: the mean over the elements of |mean over the samples|, to be compared with `floor`."""
        return float(self.mean.abs().mean())

    @property
    def floor(self) -> float:
        """What `true_mean` is for a score of mean 0, only because k is finite: sqrt(2 / (pi k)) std, the mean over the elements."""
        return math.sqrt(2 / (math.pi * self.k)) * float(self.std.mean())

    @property
    def norm_of_mean(self) -> float:
        """The l2 norm of the mean over the samples."""
        return float(torch.linalg.vector_norm(self.mean))

    @property
    def published(self) -> float:
        """The statistic of Table 2: the mean over samples and pixels of |mean over the latent channels|.

        Unlike `true_mean` it does not fall as k grows: it is 0.399 for a unit Gaussian with 4 channels, the table's 0.4 of a good score.
        """
        self._needs(1)
        return self._published / self.k


def score_means(
    posterior: Posterior,
    shape: Sequence[int],
    sigma: float,
    sigma_next: float,
    zetas: Sequence[float],
    k: int = 1000,
    batch: int = 1,
    seed: int = 0,
    callback: Callable[[int, int], None] | None = None,
) -> dict[str | float, ScoreMean]:
    """Means over k samples x_T ~ N(0, I) of the unconditional score, under UNCONDITIONAL, and of DPS's, under every zeta (Table 2).

    posterior: of one picture; its y may be repeated for a batch. shape: (C, h, w) of a latent. sigma: the first level of the schedule and
    sigma_next its second. batch: samples at a time, which changes speed and memory, and results by rounding. callback(done, k) after every batch.
    Sample i is the noise of `schedule.generators(seed, k)[i]`, the same as in `plain_score_mean`. k gradients in all.
    """
    check_sigmas([sigma, sigma_next], to_zero=False)
    means: dict[str | float, ScoreMean] = {UNCONDITIONAL: ScoreMean(), **{float(zeta): ScoreMean() for zeta in zetas}}
    with _one_measurement(posterior):
        for z in _first_latents(shape, sigma, k, batch, seed, posterior.y.device):
            grad, denoised, _ = posterior.gradient(z, sigma)
            for key, mean in means.items():
                mean.update(dps_score(z, denoised, grad, 0.0 if isinstance(key, str) else key, sigma, sigma_next))
            if callback:
                callback(means[UNCONDITIONAL].k, k)
    return means


@torch.no_grad()
def plain_score_mean(
    denoise: Callable[[Tensor, float], Tensor],
    shape: Sequence[int],
    sigma: float,
    k: int = 1000,
    batch: int = 1,
    seed: int = 0,
    callback: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> ScoreMean:
    """The same for a conditional model, at the very samples of `score_means`.

    denoise(z, sigma): its denoised latent. device: where it wants z.
    """
    mean = ScoreMean()
    for z in _first_latents(shape, sigma, k, batch, seed, device):
        mean.update(vp_score(z, denoise(z, sigma), sigma))
        if callback:
            callback(mean.k, k)
    return mean


def _first_latents(shape: Sequence[int], sigma: float, k: int, batch: int, seed: int, device: torch.device | str) -> Iterator[Tensor]:
    """VE latents z = sqrt(1 + sigma^2) x_T of k samples x_T ~ N(0, I), at most `batch` at a time, float32."""
    noise = generators(seed, whole("k", k, 1))
    for first in range(0, len(noise), whole("batch", batch, 1)):
        part = noise[first : first + batch]
        yield math.sqrt(1 + sigma**2) * randn_like(torch.empty(len(part), *shape, device=device), part)


@contextmanager
def _one_measurement(posterior: Posterior):
    """The posterior with a y of batch 1, which goes with any number of samples; its own is put back at the end."""
    y = posterior.y
    if not torch.equal(y, y[:1].expand_as(y)):
        raise ValueError(
            f"the posterior has {len(y)} different measurements; a score's mean is one picture's, so give the measurement of one"
        )
    posterior.y = y[:1]
    try:
        yield
    finally:
        posterior.y = y


def score_mean_rows(means: Mapping[str | float, ScoreMean]) -> list[dict[str, float | str]]:
    """A dict for every score, each statistic under a name that says what it is."""
    return [
        {
            "score": name if isinstance(name, str) else f"DPS, zeta {name:g}",
            "samples": mean.k,
            "mean over samples (mean of absolute values)": mean.true_mean,
            "the same of a score without mean, from this few samples": mean.floor,
            "norm of the mean over samples": mean.norm_of_mean,
            "Table 2's: mean of |mean over latent channels|": mean.published,
        }
        for name, mean in means.items()
    ]
