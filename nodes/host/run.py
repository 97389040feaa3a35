"""What is done with a GUIDER besides sampling in a graph: studies look at its posterior, comparisons restore pictures.

A study runs as the solver of a SolverSampler, or as the function of a stock sampler: `guider.sample` then readies models, gradients and
interruptions as for any run, and the study looks at the posterior or at the model instead of going from noise to a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...dmap_core.posterior import Posterior
from .compute import Bar
from .guider import PosteriorGuider, SolverSampler
from .prior import check_model, latent_size, model_sigmas

Denoise = Callable[[Tensor, float], Tensor]
Result = TypeVar("Result")


def check_guider(guider: Any, name: str, one: bool = False) -> None:
    """Raises ValueError for a guider without measurement, and with `one` for several measurements."""
    if not isinstance(guider, PosteriorGuider):
        raise ValueError(f"{name}: it is a {type(guider).__name__}, which knows neither measurement nor operator; connect DPSGuider")
    if one and len(guider.y) != 1:
        raise ValueError(
            f"{name}: it has {len(guider.y)} measurements, and this study is about one picture; give DPSGuider one measurement"
        )


def check_conditional(conditional: Any, guider: PosteriorGuider, name: str) -> None:
    """Raises ValueError for a guider whose model does not denoise the same latents as the other one's."""
    if not isinstance(conditional, comfy.samplers.CFGGuider):
        raise ValueError(f"{name}: it is a {type(conditional).__name__}; connect DPSGuider, CFGGuider or BasicGuider")
    try:
        check_model(conditional.model_patcher)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    ours, theirs = (type(g.model_patcher.get_model_object("latent_format")).__name__ for g in (guider, conditional))
    if ours != theirs:
        raise ValueError(
            f"{name}: its model works on latents of {theirs}, and the guider's on those of {ours}; compare models with one VAE"
        )
    if isinstance(conditional, PosteriorGuider):
        check_guider(conditional, name, one=True)
        if conditional.size != guider.size:
            raise ValueError(f"{name}: it restores {_words(conditional.size)} pictures, and the guider {_words(guider.size)} ones")


def check_size(image: Tensor, guider: PosteriorGuider, name: str) -> None:
    """Raises ValueError for pictures (B, H, W, C) of another size or number than the guider restores."""
    size, count = tuple(image.shape[1:3]), len(guider.y)
    if size != guider.size:
        raise ValueError(f"{name}: it is {_words(size)}, but the guider restores {_words(guider.size)} pictures; crop or resize it")
    if len(image) not in (1, count):
        raise ValueError(f"{name}: {len(image)} pictures for {count} measurement(s) of the guider; give one, or one for each")


def _words(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def noise_levels(guider: PosteriorGuider) -> Tensor:
    """(N,) rising VE sigmas of the training timesteps of the guider's model."""
    return model_sigmas(guider.model_patcher)


def latent_shape(guider: PosteriorGuider) -> tuple[int, int, int]:
    """(C, h, w) of a latent of the guider's picture."""
    return guider.vae.latent_channels, *latent_size(guider.vae, guider.size)


@contextmanager
def _own_report(guider: PosteriorGuider):
    """A study's runs leave no trace in what DMAP Sampling Report says about the guider."""
    report = guider.report
    try:
        yield
    finally:
        guider.report = report


def with_posterior(guider: PosteriorGuider, name: str, sigmas: Tensor, batch: int, function: Callable[[Posterior], Result]) -> Result:
    """What function(posterior) returns, called where a solver would be: models loaded, gradients possible. batch: of its largest call."""
    found = []

    def solver(posterior: Posterior, z: Tensor, sigmas: Tensor, **_) -> Tensor:
        found.append(function(posterior))
        return z

    latent = torch.zeros(batch, *latent_shape(guider))
    with _own_report(guider):
        guider.sample(torch.zeros_like(latent), latent, SolverSampler(name, solver), sigmas, seed=0)
    return found[0]


def with_denoiser(
    conditional: Any, name: str, sigmas: Tensor, shape: Sequence[int], function: Callable[[Denoise, torch.device], Result]
) -> Result:
    """The same for any guider: function(denoise, device), denoise(z, sigma) its denoised latent. shape: (B, C, h, w) of the largest call.

    A PosteriorGuider would answer a stock sampler with DPS's guided estimate; its model's own is asked for.
    """
    if isinstance(conditional, PosteriorGuider):
        return with_posterior(conditional, name, sigmas, shape[0], lambda posterior: function(posterior.denoise, posterior.y.device))
    found = []

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def denoise(z: Tensor, sigma: float) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return model(z.to(x), z.new_full((len(z),), sigma), **extra_args).float().to(z.device)

        found.append(function(denoise, x.device))
        return x

    zeros = torch.zeros(*shape)
    conditional.sample(zeros, zeros.clone(), comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True, seed=0)
    return found[0]


@dataclass(frozen=True)
class Restored:
    """images: (B, H, W, 3) in [0, 1], rounded to 8 bits as if they had been saved; seconds: of the solver alone, for the whole batch."""

    images: Tensor
    seconds: float
    denoiser_calls: int


def restore(
    guider: PosteriorGuider, name: str, solver: Callable[..., Tensor], settings: dict, sigmas: Tensor, seed: int, bar: Bar, warm: bool
) -> Restored:
    """A picture for every measurement of the guider, the same as SamplerCustomAdvanced and VAEDecode make with RandomNoise of that seed.

    warm: an earlier run has loaded the models; otherwise a gradient is computed before the clock starts, so that it does not pay for that.
    """
    costs = []

    def timed(posterior: Posterior, z: Tensor, sigmas: Tensor, **given) -> Tensor:
        if not warm:
            posterior.gradient(z, float(sigmas[0]))
        before, started = posterior.denoiser_calls, time.perf_counter()
        z = solver(posterior, z, sigmas, **given)
        float(z.sum())  # waits for the GPU
        costs.append((time.perf_counter() - started, posterior.denoiser_calls - before))
        return z

    latent = torch.zeros(len(guider.y), *latent_shape(guider))
    noise = comfy.sample.prepare_noise(latent, seed)
    with _own_report(guider):
        sampler = SolverSampler(name, timed, **settings)
        latents = guider.sample(noise, latent, sampler, sigmas, callback=lambda *_: bar.move(), seed=seed)
    height, width = guider.size
    images = guider.vae.decode(latents)[:, :height, :width]
    return Restored((images.cpu().float().clamp(0, 1) * 255).round() / 255, *costs[0])
