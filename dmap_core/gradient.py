"""How the residual's gradient is taken: z --denoise--> z0 --decode--> x --objective--> r, each stage a vector-Jacobian product.

The stages run forwards, then a cotangent walks back: of the picture, of the clean latent, of the latent. Each is a tensor in its own right.
What is kept in memory on the way is a strategy's choice; all of them give the same gradient, each slower and leaner than the one before it:

Keep       ("fast")        the denoiser's activations wait while the decoder's gradient is taken
Rerun      ("lean")        the denoiser runs twice, once without a graph, so that its activations and the decoder's are never alive together
Recompute  ("checkpoint")  both networks keep only the inputs of their blocks and recompute the rest block by block

`decoder_gradient` is another gradient: it stops at the clean latent, as if the denoiser's Jacobian were the identity, and costs half.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .memory import checkpointed
from .prior import Prior

Network = Callable[[Tensor], Tensor]
Pull = Callable[[Tensor], Tensor]  # a cotangent of a stage's output -> one of its input
Counted = Callable[[], AbstractContextManager]  # a context in which what autograd saves is counted
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (z0, x) -> (residual, loss), (B,) each

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


def linearise(f: Network, x: Tensor, counted: Counted = nullcontext) -> tuple[Tensor, Pull]:
    """(f(x) without a graph, what takes a cotangent of f(x) to one of x). The pull can be called once: it frees what f saved."""
    x = x.detach().requires_grad_()
    with counted():
        output = f(x)
    return output.detach(), lambda cotangent: vjp(output, x, cotangent)


def picture_gradient(objective: Objective, z0: Tensor, x: Tensor, counted: Counted = nullcontext) -> tuple[Tensor, Tensor | None, Tensor]:
    """The last stage: (residual (B,), the loss's cotangent of z0, None where the loss does not see it, and that of the picture x).

    Cotangents are LOSS_SCALE times the derivative, which the caller takes back at the end.
    """
    z0, x = z0.detach().requires_grad_(), x.detach().requires_grad_()
    with counted():
        residual, loss = objective(z0, x)
    direct, cotangent = torch.autograd.grad(loss, [z0, x], torch.full_like(loss, LOSS_SCALE), allow_unused=True)
    return residual.detach(), direct, cotangent


def latent_gradient(decode: Network, objective: Objective, z0: Tensor, counted: Counted = nullcontext) -> tuple[Tensor, Tensor]:
    """The last two stages: (residual (B,), LOSS_SCALE times the loss's gradient with respect to the clean latent z0)."""
    x, pull = linearise(decode, z0, counted)
    residual, direct, cotangent = picture_gradient(objective, z0, x, counted)
    cotangent = pull(cotangent)
    return residual, cotangent if direct is None else cotangent + direct


def decoder_gradient(
    denoise: Network, decode: Network, objective: Objective, z: Tensor, counted: Counted = nullcontext
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient at z0, denoised z0, residual (B,)): the denoiser's Jacobian is taken for the identity, and only the decoder has a graph."""
    with torch.no_grad():
        z0 = denoise(z)
    residual, cotangent = latent_gradient(decode, objective, z0, counted)
    return cotangent / LOSS_SCALE, z0, residual


class Keep:
    """Every network runs once, and the denoiser's activations wait while the decoder's gradient is taken."""

    name = "fast"

    def economy(self, prior: Prior) -> AbstractContextManager:
        """A context for gradients through the prior's networks."""
        return nullcontext()

    def gradient(
        self, denoise: Network, decode: Network, objective: Objective, z: Tensor, budget: Callable[[], Counted]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient at z, denoised, residual (B,)) of the whole chain. budget() begins a new count of saved activations."""
        counted = budget()
        z0, pull = linearise(denoise, z, counted)
        residual, cotangent = latent_gradient(decode, objective, z0, counted)
        return pull(cotangent) / LOSS_SCALE, z0, residual


class Rerun(Keep):
    """The denoiser runs twice, once without a graph: its activations and the decoder's are never alive together."""

    name = "lean"

    def gradient(self, denoise, decode, objective, z, budget):
        with torch.no_grad():
            z0 = denoise(z)
        residual, cotangent = latent_gradient(decode, objective, z0, budget())
        _, pull = linearise(denoise, z, budget())  # from zero: the decoder's activations are gone
        return pull(cotangent) / LOSS_SCALE, z0, residual


class Recompute(Keep):
    """Blocks of the networks keep their inputs only, and run again on the way back."""

    name = "checkpoint"

    def economy(self, prior: Prior) -> AbstractContextManager:
        return checkpointed(prior.blocks())


AUTO = (Keep(), Rerun(), Recompute())  # in the order in which they are tried
STRATEGIES = {strategy.name: strategy for strategy in AUTO}
