"""What is done with a GUIDER besides sampling in a graph: studies look at its posterior, comparisons restore pictures.

A study runs as a PosteriorSampler, or as the function of a stock sampler: `guider.sample` then readies models, gradients and
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

from ...dmap_core.operators import Operator
from ...dmap_core.posterior import Posterior
from ...dmap_core.solvers import DPS, Solver
from ..messages import node_of
from .controlnet import check_controls
from .flow import host_sigmas, to_host, ve_sigmas
from .guider import PosteriorGuider, PosteriorSampler, SolverSampler
from .prior import check_conditioning, check_model, latent_size, model_sigmas
from .report import Report

Denoise = Callable[[Tensor, float], Tensor]
Result = TypeVar("Result")


def check_guider(guider: Any, name: str, one: bool = False) -> None:
    """Raises ValueError for a guider without measurement, and with `one` for several measurements."""
    if not isinstance(guider, PosteriorGuider):
        raise ValueError(f"{name}: it is a {node_of(guider)}, which knows neither measurement nor operator; connect DPSGuider")
    if one and len(guider.y) != 1:
        raise ValueError(
            f"{name}: it has {len(guider.y)} measurements, and this study is about one picture; give DPSGuider one measurement"
        )


def check_conditional(conditional: Any, guider: PosteriorGuider, name: str) -> None:
    """Raises ValueError for a guider whose model does not denoise the same latents as the other one's."""
    if not isinstance(conditional, comfy.samplers.CFGGuider):
        raise ValueError(f"{name}: it is a {node_of(conditional)}; connect DPSGuider, CFGGuider or BasicGuider")
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


def known_sigmas(guider: PosteriorGuider, sigmas: Tensor) -> Tensor:
    """VE noise levels of SIGMAS as a graph has them."""
    return ve_sigmas(guider.model_patcher, sigmas)


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


class _Look(PosteriorSampler):
    """Calls function(posterior) and keeps what it returns; the latent stays as it is."""

    def __init__(self, name: str, function: Callable[[Posterior], Any]):
        self.name, self._function, self.found = name, function, None

    def run(self, posterior, z, sigmas, generator, callback) -> Tensor:
        self.found = self._function(posterior)
        return z


def with_posterior(guider: PosteriorGuider, name: str, sigmas: Tensor, batch: int, function: Callable[[Posterior], Result]) -> Result:
    """What function(posterior) returns, called where a solver would be: models loaded, gradients possible. batch: of its largest call."""
    look = _Look(name, function)
    latent = torch.zeros(batch, *latent_shape(guider))
    with _own_report(guider):
        guider.sample(torch.zeros_like(latent), latent, look, host_sigmas(guider.model_patcher, sigmas), seed=0)
    return look.found


def with_denoiser(
    conditional: Any, name: str, sigmas: Tensor, shape: Sequence[int], function: Callable[[Denoise, torch.device], Result]
) -> Result:
    """The same for any guider: function(denoise, device), denoise(z, sigma) its denoised latent. shape: (B, C, h, w) of the largest call.

    A PosteriorGuider would answer a stock sampler with DPS's guided estimate; its model's own is asked for.
    """
    if isinstance(conditional, PosteriorGuider):
        return with_posterior(conditional, name, sigmas, shape[0], lambda posterior: function(posterior.denoise, posterior.y.device))
    found, patcher = [], conditional.model_patcher

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def denoise(z: Tensor, sigma: float) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return model(*to_host(patcher, z.to(x), x.new_full((len(z),), sigma)), **extra_args).float().to(z.device)

        found.append(function(denoise, x.device))
        return x

    zeros = torch.zeros(*shape)
    conditional.sample(zeros, zeros.clone(), comfy.samplers.KSAMPLER(sampler), host_sigmas(patcher, sigmas), disable_pbar=True, seed=0)
    return found[0]


@dataclass(frozen=True)
class Problem:
    """What is to be restored: all that a guider holds, and how often.

    batch: the number of restorations; None is one of every measurement. More than that are different ones of one measurement.
    """

    guider: PosteriorGuider
    batch: int | None = None

    @classmethod
    def of(
        cls,
        model,
        conditioning: list,
        vae,
        operator: Operator,
        y: Tensor,
        memory: str = "auto",
        batch: int | None = None,
        tile: int | None = None,
        guidance_vae=None,
    ) -> Problem:
        """Of ComfyUI's objects, as loaders and ApplyCSE make them. y: (B, c, h, w) in [-1, 1], as `pictures.measurement_to_core` makes it of a picture.

        Raises ValueError for a model, a VAE or a conditioning that cannot be used, and for a y that the operator does not make.
        """
        operator.check_measurement(y)
        check_conditioning(conditioning, model, "conditioning")
        guider = PosteriorGuider(model, vae, operator, y, DPS(), memory, tile, guidance_vae)  # the step is of stock samplers only
        guider.set_conds(conditioning, conditioning)
        guider.set_cfg(1.0)
        guider.warnings += check_controls(conditioning, model, operator, "conditioning")
        return cls(guider, batch)

    def latent(self) -> Tensor:
        """The empty latent that a run starts from, (B, C, h, w)."""
        return torch.zeros(len(self.guider.y) if self.batch is None else self.batch, *latent_shape(self.guider))


@dataclass(frozen=True)
class Restored:
    """images: (B, H, W, 3) in [0, 1], as VAEDecode makes them. seconds: of the solver alone, for the whole batch; report: of the whole run."""

    images: Tensor
    seconds: float
    report: Report


class _Timed(PosteriorSampler):
    """Another sampler, and what it takes. With warm_up a gradient, or a residual where it takes none, comes first; its time and calls are not counted."""

    def __init__(self, sampler: PosteriorSampler, warm_up: bool, on_step: Callable[[], None] | None):
        self.name, self.check, self._run, self._warm_up, self._on_step = sampler.name, sampler.check, sampler.run, warm_up, on_step
        self.through_denoiser, self.cost = sampler.through_denoiser, sampler.cost
        self.seconds = 0.0

    def run(self, posterior, z, sigmas, generator, callback) -> Tensor:
        if self._warm_up:
            cost = self.cost(len(sigmas) - 1)
            if cost is None or cost.decoder_gradients:
                posterior.gradient(z, float(sigmas[0]), jacobian="exact" if self.through_denoiser else "none")
            else:
                posterior.residual(z, float(sigmas[0]))
            posterior.denoiser_calls = posterior.decoder_calls = posterior.guidance_calls = 0
        started = time.perf_counter()
        z = self._run(posterior, z, sigmas, generator, self._stepping(callback))
        float(z.sum())  # waits for the GPU
        self.seconds = time.perf_counter() - started
        return z

    def _stepping(self, callback: Callable[..., None]) -> Callable[..., None]:
        """The guider has no callback of its own here: a study's runs show no previews, and leave no picture when they are cancelled."""

        def stepped(*event: Any) -> None:
            callback(*event)
            if self._on_step:
                self._on_step()

        return stepped


def restore(
    problem: Problem,
    solver: Solver,
    sigmas: Tensor,
    seed: int,
    on_step: Callable[[], None] | None = None,
    warm_up: bool = False,
    latent: Tensor | None = None,
) -> Restored:
    """The pictures that a graph of the same model and measurement makes with RandomNoise of that seed, SamplerCustomAdvanced and VAE Decode, bit by bit.

    Where the picture's size is no multiple of the VAE's factor, they are cut to it, as DMAP Decode does.

    sigmas: (T + 1,) falling to 0, of the model (`prior.model_sigmas` and `schedule.SPACINGS`). on_step is called after every step.
    latent: what is noised to the first level, in the place of an empty one. warm_up: compute a gradient (a residual, if it takes none) before the clock starts, so that `seconds` do not hold what the first use of loaded models takes.
    The guider's own report stays that of its last run in a graph.
    Raises what the solver raises, before models are loaded where that can be known; errors.Diverged for NaN.
    """
    guider, latent = problem.guider, problem.latent() if latent is None else latent
    sampler = _Timed(SolverSampler(solver), warm_up, on_step)
    noise = comfy.sample.prepare_noise(latent, seed)
    with _own_report(guider):
        latents = guider.sample(noise, latent, sampler, host_sigmas(guider.model_patcher, sigmas), seed=seed)
        report = guider.report
    with torch.no_grad():
        images = guider.vae.decode(latents)
    height, width = guider.size
    return Restored(images[:, :height, :width], sampler.seconds, report)
