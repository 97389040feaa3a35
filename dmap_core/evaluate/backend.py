"""Who restores the pictures of a table: a protocol, and diffusers, which does unless another is given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..operators import Operator
from ..presets import Preset
from ..prior import DTYPES
from ..restore import restore, warm_latent
from .config import Config, Row


class Backend(Protocol):
    """Restores measurements with a row's model.

    device: where measurements are made and given; identity: what decides its results besides the config, empty for the default.
    """

    device: torch.device
    identity: dict[str, Any]

    def restore(self, row: Row, plan: Preset, operator: Operator, y: Tensor, seeds: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        """(pictures (B, 3, H, W) in [-1, 1], what each cost) of measurements y (B, c, h, w); seeds: of x_T of each, the next one is the steps'.

        A cost has `seconds` of one picture and `denoiser_calls`, and may have `decoder_calls`, `memory`, `peak_memory` in bytes, and a `residual`
        where the pictures are not those that the solver saw. Raises errors.Diverged for NaN.
        """
        ...


class Diffusers:
    """Base models and CSEs of a run, opened when they are needed; the last ones are kept."""

    identity: dict[str, Any] = {}

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.base = lru_cache(maxsize=1)(self._base)
        self.cse = lru_cache(maxsize=4)(self._cse)
        self.guidance = lru_cache(maxsize=1)(self._guidance)

    def _base(self, path: Path, prediction: str):
        from ..backends.diffusers_files import open_base

        base = open_base(path, self.config.prompt, prediction, self.config.distilled_guidance)
        base.to(self.device, DTYPES[self.config.precision])
        if self.device.type == "cpu":  # a sixth faster there
            networks: list[Any] = base.networks()
            for network in networks:
                network.to(memory_format=torch.channels_last)
        return base

    def _cse(self, path: Path, base_path: Path, prediction: str):
        from ..cse.use import open_cse

        return open_cse(path, self.base(base_path, prediction))

    def _guidance(self, path: Path):
        from ..backends.diffusers_files import open_decoder

        return open_decoder(path).to(self.device)

    def of(self, row: Row) -> tuple[Any, ...]:
        """(base model, ControlNet or None, its metadata) of a row."""
        base_path, prediction = self.config.checkpoint_of(row), row.prediction or self.config.prediction
        base = self.base(base_path, prediction)
        return (base, *(self.cse(row.cse, base_path, prediction) if row.cse else (None, None)))

    def restore(self, row: Row, plan: Preset, operator: Operator, y: Tensor, seeds: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        """All at once: their seconds are shared out evenly."""
        from ..backends.autoencoded import FACTOR
        from ..cse.use import hint_for

        base, controlnet, metadata = self.of(row)
        prior = base.sized(operator.image_size(y)).tiled(self.config.tile and self.config.tile // FACTOR)
        if controlnet:
            prior = prior.controlled(controlnet, hint_for(operator.hint(y), metadata))
        latent = warm_latent(prior, operator, y) if plan.start < 1 else None
        guidance = prior.decoded_by(self.guidance(row.guidance)) if row.guidance else None
        sigmas = plan.sigmas(prior.sigmas.cpu())
        done = restore(
            prior, operator, y, prior.latent_shape(), sigmas, plan.solver, seeds, self.config.memory, latent=latent, guidance=guidance
        )
        cost = {"seconds": done.seconds / len(seeds), "memory": done.memory, "peak_memory": done.peak_memory}
        cost |= {"denoiser_calls": done.denoiser_calls, "decoder_calls": done.decoder_calls, "batch": len(seeds)}
        cost |= {"guidance_calls": done.guidance_calls} if row.guidance else {}
        return done.image, [cost] * len(seeds)
