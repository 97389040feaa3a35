"""Gradients in half precision against those in float32, of the same weights (rounded to fp16 once, as most files are)."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dmap_core import gradient
from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.prior import DTYPES

from . import shapes

SIGMAS = (0.1, 1.0, 5.0, 14.0)
SEED = 0
aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default, aten.bmm.default}


class MatrixUnits(TorchDispatchMode):
    """On a CPU: products of half-precision tensors are summed in float32 and rounded once, as a GPU's matrix units do.

    A CPU without such units has the same results up to the order of sums, and takes some fifty times as long for them.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        halves = {a.dtype for a in args if isinstance(a, Tensor)} & {torch.float16, torch.bfloat16}
        if func not in PRODUCTS or not halves:
            return func(*args, **(kwargs or {}))
        (dtype,) = halves
        return tree_map_only(Tensor, lambda t: t.to(dtype), func(*tree_map_only(Tensor, Tensor.float, args), **(kwargs or {})))


@dataclass(frozen=True)
class Fainter(SuperResolution):
    """Its residual is `factor` times as large, as are the cotangents: those of a picture with 1 / factor^2 times as many values."""

    factor: float = 1.0

    def distance(self, image: Tensor, y: Tensor) -> Tensor:
        return self.factor * super().distance(image, y)


@contextmanager
def unscaled():
    """Cotangents go back as they are, without their powers of two."""
    before = gradient.vjp, gradient.LOSS_SCALE
    gradient.vjp = lambda output, x, cotangent: torch.autograd.grad(output, x, cotangent)[0]
    gradient.LOSS_SCALE = 1.0
    try:
        yield
    finally:
        gradient.vjp, gradient.LOSS_SCALE = before


class Networks:
    """A family's UNet, its ControlNet and the KL decoder, stored in fp16 or bf16 and computing in any precision; one copy at a time.

    compute="fp32" casts the stored fp16 weights call by call, so that float32 takes no more memory than half precision.
    """

    def __init__(self, family: str = "SD 2.0", decoder: str = "KL", size: int = 64, device="cpu"):
        self.family, self.decoder, self.size, self.device = family, decoder, size, device
        self.unet = shapes.unet_of(family, device, torch.float16, cast=True)
        self.controlnet = shapes.controlnet_of(family, device, torch.float16, cast=True)
        self.autoencoder = shapes.autoencoder_of(decoder, device, torch.float32).half().float()
        picture = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(SEED))
        self.hint = picture.to(device)

    def to(self, dtype: str, vae_dtype: str) -> Networks:
        """Where fp32 is meant, UNet and ControlNet stay in fp16 and are cast."""
        stored = torch.bfloat16 if dtype == "bf16" else torch.float16
        for network in (self.unet, self.controlnet):
            network.to(stored)
        self.autoencoder.to(DTYPES[vae_dtype])
        self.compute = DTYPES[dtype]
        return self

    def prior(self, sigma: float, cse: bool) -> shapes.ShapePrior:
        prior = shapes.ShapePrior(self.unet, self.autoencoder, controlnet=self.controlnet if cse else None, hint=self.hint)
        prior.dtype = self.compute
        prior.context = prior.context.to(self.compute)
        prior.pooled = None if prior.pooled is None else prior.pooled.to(self.compute)
        return prior.at(sigma)

    def gradient(self, sigma: float, cse: bool = False, factor: float = 1.0) -> Tensor:
        """Of the residual at a noisy latent of a random picture."""
        draw = torch.Generator().manual_seed(SEED + 1)
        z0, noise = (torch.randn(1, 4, self.size // 8, self.size // 8, generator=draw).to(self.device) for _ in range(2))
        operator = Fainter(8, factor=factor)
        y = torch.randn(1, 3, self.size // 8, self.size // 8, generator=draw).to(self.device) / 2
        plan = "checkpoint" if self.compute == torch.float32 else "fast"  # cast weights would be kept as well
        with MatrixUnits() if self.hint.device.type == "cpu" else nullcontext():
            posterior = Posterior(self.prior(sigma, cse), operator, y, plan)
            return posterior.gradient(z0 + sigma * noise, sigma)[0] / factor


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
