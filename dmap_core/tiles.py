"""Networks on overlapping tiles of what is too large for them, their results blended into one; the gradient too, tile by tile.

A model has a native size: beyond it denoisers repeat objects, and memory grows with the picture. So a network runs on tiles of that size, and windows that
sum to one blend what it says. There is no measurement of a tile: f sees the blended whole, and its cotangent is cut into the tiles' again.
Memory is that of one tile and the picture, as every tile runs again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .gradient import vjp
from .operators.base import whole

Part = tuple[slice, slice]  # rows and columns
Network = Callable[[Tensor, Part], Tensor]  # (a tile, where it lies) -> its result


@dataclass(frozen=True)
class Tiles:
    """size: of a square tile, overlap: of neighbours, at least, and margin: of a tile that is computed and not used where another goes on. In latents.

    Raises ValueError for an overlap of more than half a tile, and for a margin that leaves nothing to blend.
    """

    size: int
    overlap: int
    margin: int = 0

    def __post_init__(self):
        whole("Tiles: size", self.size, 2)
        whole("Tiles: overlap", self.overlap, 1, self.size // 2)
        whole("Tiles: margin", self.margin, 0, (self.overlap - 1) // 2)

    def spans(self, n: int) -> list[slice]:
        """The tiles along an axis of n latents, evenly spread; one if it is no longer than a tile."""
        if n <= self.size:
            return [slice(0, n)]
        count = -(-(n - self.overlap) // (self.size - self.overlap))
        return [slice(start, start + self.size) for start in (round(i * (n - self.size) / (count - 1)) for i in range(count))]

    def windows(self, n: int, factor: int = 1) -> list[Tensor]:
        """The weights of every span, (length factor,) float64; at every place they sum to one."""
        spans, total = self.spans(n), torch.zeros(n * factor, dtype=torch.float64)
        found = [self._ramps(span, n, factor) for span in spans]
        for span, window in zip(spans, found, strict=True):
            total[_scaled(span, factor)] += window
        return [window / total[_scaled(span, factor)] for span, window in zip(spans, found, strict=True)]

    def _ramps(self, span: slice, n: int, factor: int) -> Tensor:
        """Rising from the margin to the end of the overlap and falling again, half a cosine; 1 to the picture's own edges."""
        x = (torch.arange((span.stop - span.start) * factor, dtype=torch.float64) + 0.5) / factor
        width = self.overlap - 2 * self.margin
        rise, fall = ((d - self.margin) / width for d in (x, span.stop - span.start - x))
        one = torch.ones_like(x)
        ramps = one if span.start == 0 else rise.clamp(0, 1), one if span.stop == n else fall.clamp(0, 1)
        return torch.stack([(1 - (torch.pi * ramp).cos()) / 2 for ramp in ramps]).prod(0)

    def parts(self, size: tuple[int, int], factor: int = 1, of: int = 1) -> Iterator[tuple[Part, Part, Tensor]]:
        """(where a tile lies in what is cut, where in the result, its weights there) of every tile of (h, w) latents. factor, of: as of `tiled`."""
        (h, w) = size
        for rows, down in zip(self.spans(h), self.windows(h, factor), strict=True):
            for columns, across in zip(self.spans(w), self.windows(w, factor), strict=True):
                part, to = ((_scaled(rows, n), _scaled(columns, n)) for n in (of, factor))
                yield part, to, down[:, None] * across


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def denoising(size: int) -> Tiles:
    """Tiles of a denoiser: a quarter is shared, and blended over all of it."""
    return Tiles(size, size // 4)


def decoding(size: int) -> Tiles:
    """Tiles of a decoder, which sees a few latents around: TAESD's differ from the whole by 0.0004 of 255 levels (RMS) with a margin of 6, by 0.07 with 3."""
    overlap = max(size // 4, min(16, size // 2))
    return Tiles(size, overlap, min(6, (overlap - 2) // 2))


def encoding(size: int) -> Tiles:
    """Tiles of an encoder, which sees less: TAESD's latents are the whole's with a margin of 6, and off by 0.00002 of their deviation with 3."""
    return decoding(size)


def wanted(size: tuple[int, int], native: int) -> bool:
    """Whether a latent of `size` (h, w) is larger than a model's native side by more than a quarter, as the root of its area."""
    return size[0] * size[1] > (1.25 * native) ** 2


def tiled(network: Network, x: Tensor, tiles: Tiles, factor: int = 1, of: int = 1) -> Tensor:
    """What `network` says of x (B, C, of h, of w), tile by tile, blended: (B, c, factor h, factor w), differentiable with respect to x.

    A side of h or w latents is `of` times as long in x, and `factor` times in the result: a decoder has 1 and 8, an encoder 8 and 1. A picture of one tile
    is given to the network whole.
    """
    if all(n <= of * tiles.size for n in x.shape[-2:]):
        return network(x, (slice(0, x.shape[-2]), slice(0, x.shape[-1])))
    return _Tiled.apply(x, network, tiles, factor, of)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, network, tiles, factor, of):
        ctx.save_for_backward(x)
        h, w = (n // of for n in x.shape[-2:])
        ctx.network, ctx.parts = network, lambda: tiles.parts((h, w), factor, of)
        found = None
        for part, to, weight in ctx.parts():
            result = network(x[..., part[0], part[1]], part)
            if found is None:
                found = result.new_zeros(*result.shape[:-2], factor * h, factor * w)
            found[..., to[0], to[1]] += weight.to(result) * result
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        found = torch.zeros_like(x)
        for part, to, weight in ctx.parts():
            tile = x[..., part[0], part[1]].detach().requires_grad_()
            with torch.enable_grad():
                result = ctx.network(tile, part)
            found[..., part[0], part[1]] += vjp(result, tile, weight.to(cotangent) * cotangent[..., to[0], to[1]])
        return found, None, None, None, None
