"""Which way a gradient step goes: along the gradient, or along Adam's scaling of it (C.1 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import choice_setting

OPTIMIZERS = ("gradient", "adam")


class Adam:
    """Adam's direction (Kingma & Ba 2014) of a sequence of gradients, bias-corrected: about +-1 per element, whatever the gradient's scale.

    The moments live as long as the run, across noise levels, as in the works that C.1 explains. Elementwise, so every sample has its own.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def __call__(self, grad: Tensor) -> Tensor:
        (b1, b2), grad = self.betas, grad.float() if grad.dtype.itemsize < 4 else grad
        self.count += 1
        self.first = b1 * self.first + (1 - b1) * grad
        self.second = b2 * self.second + (1 - b2) * grad.square()
        return (self.first / (1 - b1**self.count)) / (torch.sqrt(self.second / (1 - b2**self.count)) + self.eps)


def optimizer_setting() -> Any:
    return choice_setting(
        OPTIMIZERS,
        "gradient: the paper's. adam: steps scaled by Adam (C.1 of the paper); zeta is then the size of a step in every latent value: start at 0.05.",
    )


def direction(optimizer: str):
    """grad -> direction of one run's steps."""
    return Adam() if optimizer == "adam" else lambda grad: grad
