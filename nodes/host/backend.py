"""Tables (`dmap_core.evaluate`) with ComfyUI in place of diffusers: every picture is the one that a graph of the pack's nodes makes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...dmap_core.evaluate.config import ALONE, Config, Row
from ...dmap_core.operators import Operator
from ...dmap_core.presets import Preset
from ..pictures import from_core, measurement_to_core
from .compute import device
from .controlnet import attach, load_cse
from .flow import host_sigmas
from .prior import latent_size, load_vae, model_sigmas, warm_latent
from .run import Problem, restore

STOCK = "euler_ancestral"  # the sampler of a CSE alone


class ComfyUI:
    """A `Backend` of evaluate with ComfyUI's loaded objects. A row's CSE is applied as ApplyCSE does; its checkpoint is this model, whatever it says."""

    identity = {"backend": "ComfyUI"}

    def __init__(self, config: Config, model: Any, conditioning: list, vae: Any):
        self.config, self.model, self.conditioning, self.vae = config, model, conditioning, vae
        self.device = device()
        self._cse = lru_cache(maxsize=4)(lambda path: load_cse(path)[0])
        self._guidance = lru_cache(maxsize=1)(load_vae)

    def restore(self, row: Row, plan: Preset, operator: Operator, y: Tensor, seeds: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        """One after the other, for a seed in ComfyUI is one of a whole batch."""
        with torch.inference_mode():  # as in a graph
            found = [self._one(row, plan, operator, one, seed) for one, seed in zip(y.split(1), seeds, strict=True)]
        images = torch.cat([image for image, _ in found]).clone()
        return images.movedim(-1, 1).float().to(self.device) * 2 - 1, [cost for _, cost in found]

    def _one(self, row: Row, plan: Preset, operator: Operator, y: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """(picture (1, H, W, 3) in [0, 1], cost). The measurement goes through a picture, as between nodes."""
        y = measurement_to_core(from_core(operator.picture(y)), operator, "measurement")
        conditioning = self.conditioning
        if row.cse:
            conditioning = attach(conditioning, self._cse(row.cse), (operator.hint(y) + 1) / 2, 1.0, 0.0, 1.0)
        sigmas = plan.sigmas(model_sigmas(self.model))
        if row.solver == ALONE:
            return self._alone(conditioning, operator.image_size(y), sigmas, seed)
        tile = self.config.tile and self.config.tile // self.vae.downscale_ratio
        guidance = row.guidance and self._guidance(row.guidance)
        problem = Problem.of(self.model, conditioning, self.vae, operator, y.cpu(), self.config.memory, tile=tile, guidance_vae=guidance)
        latent = warm_latent(self.vae, operator, y) if plan.start < 1 else None
        done = restore(problem, plan.solver, sigmas, seed, latent=latent)
        report = done.report
        cost = {"seconds": report.seconds, "denoiser_calls": report.denoiser_calls, "decoder_calls": report.decoder_calls}
        cost |= {"guidance_calls": report.guidance_calls} if row.guidance else {}
        # of what the solver saw: ComfyUI's decoders clamp the picture
        cost |= {"memory": report.memory, "peak_memory": report.peak_memory, "residual": report.residuals[-1][0]}
        return done.images, cost

    def _alone(self, conditioning: list, size: tuple[int, int], sigmas: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """By a stock sampler, as a graph would have it."""
        started = time.perf_counter()
        latent = torch.zeros(1, self.vae.latent_channels, *latent_size(self.vae, size))
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(conditioning, conditioning)
        noise = comfy.sample.prepare_noise(latent, seed)
        samples = guider.sample(noise, latent, comfy.samplers.sampler_object(STOCK), host_sigmas(self.model, sigmas), seed=seed)
        image = self.vae.decode(samples)[:, : size[0], : size[1]]
        return image, {"seconds": time.perf_counter() - started, "denoiser_calls": len(sigmas) - 1, "decoder_calls": 1}
