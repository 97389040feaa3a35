"""Computations of nodes where ComfyUI computes: operators and metrics, outside of sampling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...dmap_core.operators import Operator

NETWORK_MEMORY = 2**30  # bytes that a metric's network and its activations need at most, roughly


class Bar:
    """ComfyUI's progress bar. A move is also where Cancel takes effect."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)

    def move(self, steps: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update(steps)


@contextmanager
def measuring():
    """Where networks of metrics are made and used, and the toy's gradients taken: outside the executor's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def place(network: Any) -> None:
    """Moves a metric's network to where ComfyUI computes."""
    comfy.model_management.free_memory(NETWORK_MEMORY, device())
    network.to(device())


def with_operator(operator: Operator, image: Tensor, function: Callable[[Operator, Tensor], Tensor]) -> Tensor:
    """function(operator, image (B, 3, H, W)) with both where ComfyUI computes; the result comes back to where the image was."""
    try:
        return function(operator.to(device()), image.to(device())).to(image.device)
    finally:
        operator.to("cpu")


def residuals(operator: Operator, image: Tensor, y: Tensor) -> Tensor:
    """||f(x) - y|| of pictures (B, 3, H, W) in [0, 1], (B,). y: of the batch, or one for all of it."""
    return with_operator(operator, image, lambda f, x: f.distance(f(2 * x - 1), y.to(x.device).expand(len(x), -1, -1, -1)))
