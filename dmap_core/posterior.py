"""A measurement and a prior make a posterior: the residual of a latent and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from .memory import PLANS, SHARE, Budget, ShortOfMemory, checkpointed
from .operators import Operator
from .prior import Prior

Extra = Callable[[Tensor, Tensor], Tensor]
LOSS_SCALE = 2.0**10  # a power of two, which changes no digit: entries of a norm's gradient are small where pictures are large

# How a number's exponent stands in its bits: (integers of the same width, the mask of its exponent).
EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def vjp(output: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    """The vector-Jacobian product cotangent^T d output / d x of every sample.

    Entries of a cotangent are about 1e-3 at 512x512, and a network in half precision would round the smaller ones to zero on the way back. So
    it is given a cotangent whose largest entry lies in [0.5, 1). Powers of two are exact: in float32 the result is the same to the last bit.
    """
    largest = cotangent.detach().abs().flatten(1).amax(dim=1)
    bits, exponent = EXPONENT[largest.dtype]
    scale = 2 * (largest.view(bits) & exponent).view(largest.dtype)  # the power of two above it; not every device has frexp
    scale = torch.where(scale > 0, scale, 1.0).view(-1, *[1] * (cotangent.ndim - 1))
    (product,) = torch.autograd.grad(output, x, cotangent / scale)
    return product * scale


class Posterior:
    """p(z | y) up to what DPS-like solvers need: r(z) = ||f(D(z0(z))) - y|| and its gradient (Eq. 19).

    y: (B, c, h, w), the measurement of every sample. memory: one of `memory.PLANS`, or "auto": the first plan whose activations fit
    into `prior.free_memory()`, found out at the first gradient. `denoiser_calls` and `decoder_calls` count evaluations.
    """

    def __init__(self, prior: Prior, operator: Operator, y: Tensor, memory: str = "auto"):
        if memory not in ("auto", *PLANS):
            raise ValueError(f"memory is {memory!r}; it must be one of auto, {', '.join(PLANS)}")
        self.prior, self.operator, self.y = prior, operator, y
        self.plan = PLANS[0] if memory == "auto" else memory
        self._auto = self._undecided = memory == "auto"
        self.denoiser_calls = 0
        self.decoder_calls = 0

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        """E[z0 | z], (B, C, h, w), without a graph."""
        with torch.no_grad():
            return self._denoise(z, sigma)

    def residual(self, z: Tensor, sigma: float) -> Tensor:
        """||f(D(z0(z))) - y|| of every sample, (B,); sigma = 0 takes z itself for z0."""
        with torch.no_grad():
            return self.distance(self.decode(self._denoise(z, sigma) if sigma > 0 else z))

    def decode(self, z0: Tensor) -> Tensor:
        """D(z0), an image (B, 3, H, W), with the caller's graph."""
        self.decoder_calls += 1
        return self.prior.decode(z0)

    def economy(self):
        """A context for gradients through the networks, under which they recompute their activations if the memory plan says so."""
        return checkpointed(self.prior.networks()) if self.plan == "checkpoint" else nullcontext()

    def distance(self, image: Tensor) -> Tensor:
        """||f(image) - y|| of every sample, (B,)."""
        return self.operator.distance(self.operator(image), self.y)

    def gradient(self, z: Tensor, sigma: float, extra: Extra | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(grad, denoised, residual) at z (B, C, h, w): d r / d z per sample, z0(z), and r (B,).

        extra(z0, D(z0)) -> (B,) is added to r before the derivative is taken, but not to the residual that is returned.
        The residual of one sample does not depend on another's latent, so the gradient of their sum is every sample's own.
        Raises ValueError for an operator through which no gradient flows.
        """
        while True:
            try:
                result = self._gradient(z, sigma, extra)
            except (ShortOfMemory, torch.OutOfMemoryError):
                if not self._auto or self.plan == PLANS[-1]:
                    raise
            else:
                self._undecided = False
                return result
            self.plan = PLANS[PLANS.index(self.plan) + 1]  # outside the handler, whose traceback keeps the activations alive

    def _gradient(self, z: Tensor, sigma: float, extra: Extra | None) -> tuple[Tensor, Tensor, Tensor]:
        lean = self.plan == "lean"
        counted = self._counted()
        with torch.enable_grad(), self.economy():
            z = z.detach().requires_grad_()
            with torch.no_grad() if lean else counted():
                z0 = self._denoise(z, sigma)
            # stage one: the decoder alone. Its activations are gone before the denoiser's backward pass starts.
            leaf = z0.detach().requires_grad_()
            with counted():
                image = self.decode(leaf)
                seen = image.detach().requires_grad_()
                residual = self.distance(seen)
                loss = residual if extra is None else residual + extra(leaf, seen)
            if not residual.requires_grad:
                raise ValueError(f"operator: {self.operator.describe()} is not differentiable, and no solver can do without its gradient")
            direct, cotangent = torch.autograd.grad(loss, [leaf, seen], torch.full_like(loss, LOSS_SCALE), allow_unused=True)
            cotangent = vjp(image, leaf, cotangent)
            cotangent = cotangent if direct is None else cotangent + direct
            del image, seen, loss
            # stage two: the denoiser's vector-Jacobian product
            if lean:
                counted = self._counted()  # from zero: the decoder's activations are gone
                with counted():
                    z0 = self.prior.denoise(z, sigma)
            grad = vjp(z0, z, cotangent) / LOSS_SCALE
        return grad, z0.detach(), residual.detach()

    def _counted(self):
        """A context in which saved activations count against the free memory, as long as "auto" has not found its plan."""
        if not self._undecided or self.plan == PLANS[-1]:  # the last plan has nothing to fall back to
            return nullcontext
        return Budget(SHARE * self.prior.free_memory(), self.prior.networks()).counted

    def _denoise(self, z: Tensor, sigma: float) -> Tensor:
        self.denoiser_calls += 1
        return self.prior.denoise(z, sigma)
