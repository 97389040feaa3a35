"""What a run takes, before it begins: operations and memory, of the networks that `dmap_core.costs` knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ...dmap_core import costs
from ...dmap_core.gradient import STRATEGIES
from ...dmap_core.prior import DTYPES
from ...dmap_core.solvers import Cost
from .prior import SDXL_WIDTH, is_demo_prior

WIDTHS = {768: "SD 1.5", 1024: "SD 2.0", SDXL_WIDTH: "SDXL"}  # of the context
CLOSE = 0.05  # of the parameters that a family has, by which a network of it may differ
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """family, decoder, guidance: of costs' tables; guidance is the decoder of gradients. size: (H, W). tile: in latents, None for the whole picture.

    dtype, vae_dtype: of prior.DTYPES. cost: of the run; spared: of the same with jacobian none, None where that is no choice.
    """

    family: str
    decoder: str
    guidance: str
    size: tuple[int, int]
    batch: int
    tile: int | None
    dtype: str
    vae_dtype: str
    cost: Cost
    spared: Cost | None = None

    def flop(self, strategy: str = "fast") -> float:
        """Floating-point operations of the run. Gradients count as they do under that strategy."""
        return costs.run_flop(self.family, self.decoder, self.size, self.cost, strategy, self.tile, self.batch, self.guidance)

    def peak(self, strategy: str) -> float:
        """Bytes at most, weights included."""
        told = (self.dtype, strategy, self.tile, self.batch, self.vae_dtype, self.guidance)
        return costs.run_peak(self.family, self.decoder, self.size, self.cost, *told)

    def fitting(self, memory: str, room: float) -> str | None:
        """The first strategy that fits into `room` bytes, of those that `memory` allows; None if none does."""
        names = STRATEGIES if memory == "auto" else (memory,)
        return next((name for name in names if self.peak(name) <= room), None)

    def remedies(self, room: float) -> list[str]:
        """What to change so that it fits, for people."""
        tried = {
            "a small decoder as guidance_vae": replace(self, guidance="TAESD"),
            "one picture at a time": replace(self, batch=1),
            "the model in fp16 or bf16": replace(self, dtype="fp16"),
        }
        if self.spared:
            none = replace(self, cost=self.spared)
            tried = {"jacobian none": none, "jacobian none and a small decoder as guidance_vae": replace(none, guidance="TAESD")} | tried
        tried |= {f"tile {8 * n}": replace(self, tile=n) for n in (128, 64, 32) if n < max(self.size) // 8 and n < (self.tile or 10**9)}
        return [words for words, job in tried.items() if job != self and job.fitting("auto", room)]


def family_of(model: Any) -> str | None:
    """One of costs.FAMILIES, by the shape of a MODEL's network; None for others."""
    family = "demo prior" if is_demo_prior(model) else WIDTHS.get(model.model.model_config.unet_config.get("context_dim"))
    return family if family and _about(model.model.diffusion_model, family) else None


def decoder_of(vae: Any) -> str | None:
    """One of costs.DECODERS; None for others."""
    return next((name for name in costs.DECODERS if _about(vae.first_stage_model, name)), None)


def _about(network: torch.nn.Module, name: str) -> bool:
    count = sum(p.numel() for p in network.parameters())
    return abs(count / costs.PARAMETERS[name] - 1) < CLOSE


def dtype_name(dtype: torch.dtype) -> str:
    """Of prior.DTYPES; formats of 8 bits compute in 16."""
    return next((name for name, known in DTYPES.items() if known == dtype), "bf16")


def job_of(
    model: Any, vae: Any, guidance_vae: Any, size: tuple[int, int], batch: int, tile: int | None, cost: Cost, spared: Cost | None
) -> Job | None:
    """None where a network is not one that was counted."""
    family, decoder = family_of(model), decoder_of(vae)
    guidance = decoder_of(guidance_vae) if guidance_vae else decoder
    if family is None or decoder is None or guidance is None:
        return None
    dtypes = dtype_name(model.model_dtype()), dtype_name(vae.vae_dtype)
    return Job(family, decoder, guidance, size, batch, tile, *dtypes, cost, spared)


def room() -> float:
    """Bytes of the device that ComfyUI computes on, all of them: it unloads other models where it has to."""
    return float(comfy.model_management.get_total_memory(comfy.model_management.get_torch_device()))
