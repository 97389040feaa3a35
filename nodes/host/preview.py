"""What is seen of a run before it is over: a preview in its own colours, and the last picture of one that was cancelled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.taesd.taesd import TAESD
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...dmap_core.files import write_whole
from ...dmap_core.pictures import to_picture

log = logging.getLogger(__name__)
CANCELLED = "dmap-cancelled"  # what files of cancelled runs are called

Event = tuple[int, Tensor, Tensor, int]  # step, denoised latent, noisy latent, steps
Callback = Callable[[int, Tensor, Tensor, int], Any]


def is_small(vae: Any) -> bool:
    """Whether decoding with a VAE costs next to nothing beside a step. None is no VAE."""
    return vae is not None and isinstance(vae.first_stage_model, TAESD)


class Watch:
    """A sampler's callback that keeps the last denoised latent, and passes on to that of the node that runs the sampler.

    `show(z0 (1, C, h, w))`, where it is set, makes the preview: (1, 3, H, W) in [-1, 1]. ComfyUI's own takes latents for those of Stable Diffusion, so
    its callback waits for the end, where it keeps the last latent for the node's second output; the bar that it moves is moved here.
    """

    def __init__(self, callback: Callback, steps: int):
        self.show: Callable[[Tensor], Tensor] | None = None
        self.last: Tensor | None = None
        self.done = 0
        self._callback, self._bar = callback, comfy.utils.ProgressBar(steps)
        self._hosts = getattr(callback, "__module__", None) == latent_preview.__name__
        self._waiting: tuple[Event, Image.Image] | None = None

    def __call__(self, step: int, denoised: Tensor, z: Tensor, steps: int) -> None:
        event = step, denoised, z, steps
        self.last, self.done = denoised, step + 1
        picture = self._preview(denoised)
        self._waiting = (event, picture) if picture and self._hosts else None
        if self._waiting is None:
            self._callback(*event)
        if picture:
            self._send(step, steps, picture)

    def finish(self) -> None:
        """The run is over: what waited for that."""
        if self._waiting:
            event, picture = self._waiting
            self._callback(*event)
            self._send(event[0], event[3], picture)

    def _send(self, step: int, steps: int, picture: Image.Image) -> None:
        self._bar.update_absolute(step + 1, steps, ("JPEG", picture, args.preview_size))

    def _preview(self, denoised: Tensor) -> Image.Image | None:
        if self.show is None or args.preview_method == LatentPreviewMethod.NoPreviews:
            return None
        try:
            with torch.no_grad():
                return to_picture(self.show(denoised[:1])[0])
        except torch.OutOfMemoryError:  # a run that fits is not ended by what is only looked at
            log.warning("DPSGuider: no more previews: the memory does not suffice for them")
            self.show = None
            return None


def show(picture: Image.Image) -> None:
    """Shows a picture on the node that is running, in the place of a run's preview, which would stay; without a server nowhere."""
    if get_executing_context() is not None:
        comfy.utils.ProgressBar(1).update_absolute(1, 1, ("JPEG", picture, None))


def save_cancelled(images: Tensor) -> list[Path]:
    """Writes pictures (B, 3, H, W) in [-1, 1] as PNG files into ComfyUI's output folder, whole or not at all. Raises OSError where that is not possible."""
    height, width = images.shape[-2:]
    found = []
    for image in images:
        folder, name, counter, *_ = folder_paths.get_save_image_path(CANCELLED, folder_paths.get_output_directory(), width, height)
        path, picture = Path(folder) / f"{name}_{counter:05}_.png", to_picture(image)
        write_whole(path, lambda part, picture=picture: picture.save(part, format="PNG"))
        found.append(path)
    return found


def told(paths: Sequence[Path], done: int, steps: int) -> str:
    """Where the pictures of a cancelled run are."""
    files = ", ".join(f"output/{path.name}" for path in paths)
    return f"cancelled at step {done} of {steps}; the last picture is in {files}"
