"""A measurement and a prior make a posterior: the residual of a latent and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from .gradient import AUTO, LOSS_SCALE, STRATEGIES, Counted, Keep, Network, decoder_gradient, latent_gradient, picture_gradient
from .memory import SHARE, Budget, ShortOfMemory
from .operators import Operator
from .prior import Prior

JACOBIANS = ("exact", "none")  # of the denoiser, in the residual's gradient
Extra = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


class Posterior:
    """p(z | y) up to what DPS-like solvers need: r(z) = ||f(D(z0(z))) - y|| and its gradient (Eq. 19).

    y: (B, c, h, w), the measurement of every sample. memory: one of `gradient.STRATEGIES`, or "auto": the first of them whose activations fit
    into `prior.free_memory()`, found out at the first gradient. `denoiser_calls`, `decoder_calls` and `guidance_calls` count evaluations.
    guidance: z0 -> picture, a decoder in the place of the prior's for gradients, cheaper and nearly the same; None: the prior's own.
    into_tiles: called when nothing else fits: makes the prior's networks run on tiles, and says whether it could. None: nothing can be done.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        y: Tensor,
        memory: str = "auto",
        guidance: Network | None = None,
        into_tiles: Callable[[], bool] | None = None,
    ):
        if memory not in ("auto", *STRATEGIES):
            raise ValueError(f"memory is {memory!r}; it must be one of auto, {', '.join(STRATEGIES)}")
        self.prior, self.operator, self.y = prior, operator, y
        self._strategies: tuple[Keep, ...] = AUTO if memory == "auto" else (STRATEGIES[memory],)
        self._left = self._strategies  # the first is used, the others wait until it does not fit
        self._undecided = True
        self._guidance, self._into_tiles = guidance, into_tiles
        self.denoiser_calls = 0
        self.decoder_calls = 0
        self.guidance_calls = 0

    @property
    def plan(self) -> str:
        """The name of the memory strategy in use."""
        return self._left[0].name

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        """E[z0 | z], (B, C, h, w), without a graph."""
        self.denoiser_calls += 1
        return self._plain(lambda: self.prior.denoise(z, sigma))

    def decode(self, z0: Tensor) -> Tensor:
        """D(z0), an image (B, 3, H, W), with the caller's graph."""
        self.decoder_calls += 1
        return self.prior.decode(z0)

    def decoded(self, z0: Tensor) -> Tensor:
        """D(z0), an image (B, 3, H, W), without a graph."""
        self.decoder_calls += 1
        return self._plain(lambda: self.prior.decode(z0))

    def encoded(self, image: Tensor) -> Tensor:
        """E(image), a latent (B, C, h, w), without a graph."""
        return self._plain(lambda: self.prior.encode(image))

    def _guide(self, z0: Tensor) -> Tensor:
        """The picture whose residual is differentiated."""
        if self._guidance is None:
            return self.decode(z0)
        self.guidance_calls += 1
        return self._guidance(z0)

    def distance(self, image: Tensor, bare: bool = False) -> Tensor:
        """||f(image) - y|| of every sample, (B,). bare: see `gradient_z0`."""
        f = self.operator.bare if bare else self.operator
        return f.distance(f(image), self.y)

    def residual(self, z: Tensor, sigma: float) -> Tensor:
        """||f(D(z0(z))) - y|| of every sample, (B,); sigma = 0 takes z itself for z0."""
        return self.distance(self.decoded(self.denoise(z, sigma) if sigma > 0 else z))

    def gradient(self, z: Tensor, sigma: float, extra: Extra | None = None, jacobian: str = JACOBIANS[0]) -> tuple[Tensor, Tensor, Tensor]:
        """(grad, denoised, residual) at z (B, C, h, w): d r / d z per sample, z0(z), and r (B,).

        jacobian: "exact" takes the derivative through the denoiser, as the paper does; "none" stops at z0, d r / d z0, and costs about half.
        With a guidance decoder D is that one. extra(z0, D(z0)) -> (B,) is added to r before the derivative is taken, but not to the residual that is returned.
        The residual of one sample does not depend on another's latent, so the gradient of their sum is every sample's own.
        Raises ValueError for an operator through which no gradient flows.
        """

        def attempt() -> tuple[Tensor, Tensor, Tensor]:
            self.denoiser_calls += 1
            denoise, objective = (lambda z: self.prior.denoise(z, sigma)), self._objective(extra=extra)
            if jacobian == "none":
                return decoder_gradient(denoise, self._guide, objective, z, self._counted())
            return self._left[0].gradient(denoise, self._guide, objective, z, self._counted)

        found = self._fitting(attempt)
        self._undecided = False
        return found

    def gradient_z0(self, z0: Tensor, squared: bool = False, bare: bool = False) -> tuple[Tensor, Tensor]:
        """(grad, residual) at a clean latent z0 (B, C, h, w): d r / d z0 per sample, no denoiser in it, and r (B,).

        squared: the gradient of r^2 / 2 instead. bare: r is the distance to y itself, not what of it exceeds its known noise: a likelihood's, in which
        that noise counts already. Raises ValueError as `gradient` does.
        """

        def attempt() -> tuple[Tensor, Tensor]:
            residual, cotangent = latent_gradient(self._guide, self._objective(squared, bare=bare), z0, self._counted())
            return cotangent / LOSS_SCALE, residual

        return self._fitting(attempt)

    def gradient_x(self, x: Tensor, squared: bool = False, bare: bool = False) -> tuple[Tensor, Tensor]:
        """(grad, residual) at a picture x (B, 3, H, W): d ||f(x) - y|| / d x per sample, no network in it. Otherwise as `gradient_z0`."""
        with torch.enable_grad():
            residual, _, cotangent = picture_gradient(self._objective(squared, bare=bare), x, x)
        return cotangent / LOSS_SCALE, residual

    def _objective(self, squared: bool = False, extra: Extra | None = None, bare: bool = False):
        """(z0, x) -> (residual, loss) of every sample."""

        def objective(z0: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            residual = self.distance(x, bare)
            if not residual.requires_grad:
                raise ValueError(f"operator: {self.operator.describe()} is not differentiable, and no solver can do without its gradient")
            loss = residual.square() / 2 if squared else residual
            return residual, loss if extra is None else loss + extra(z0, x)

        return objective

    def _fitting(self, attempt: Callable[[], Result]) -> Result:
        """What `attempt` returns under the strategy in use, or under the next ones where the memory does not suffice; the last are tiles."""
        while True:
            try:
                with torch.enable_grad(), self._left[0].economy(self.prior):
                    return attempt()
            except (ShortOfMemory, torch.OutOfMemoryError):
                if len(self._left) == 1 and not self._smaller():
                    raise
            self._left = self._left[1:] or self._strategies  # outside the handler, whose traceback keeps the activations alive

    def _plain(self, call: Callable[[], Tensor]) -> Tensor:
        """What a network makes without a graph, of tiles where the memory does not suffice."""
        while True:
            try:
                with torch.no_grad():
                    return call()
            except torch.OutOfMemoryError:
                if not self._smaller():
                    raise

    def _smaller(self) -> bool:
        """Whether networks run on tiles from here on, which they did not before."""
        into_tiles, self._into_tiles = self._into_tiles, None
        self._undecided = True
        return into_tiles is not None and into_tiles()

    def _counted(self) -> Counted:
        """A new count of saved activations against the free memory, as long as "auto" has not found its strategy."""
        if not self._undecided or (len(self._left) == 1 and self._into_tiles is None):  # which has nothing to fall back to
            return nullcontext
        return Budget(SHARE * self.prior.free_memory(), self.prior.networks()).counted
