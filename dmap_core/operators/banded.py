"""Products with matrices that are zero but near a diagonal: of every picture's column with the few pixels that a measured one is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a picture that a block advances by, at least: products of smaller blocks are no faster (128 to 4096 pixels, one core, forward and backward),
# and up to this length a matrix is one block, whose product gives the bits of the whole matrix's.
STEP = 128


class Band(NamedTuple):
    """A (measured, length) matrix as blocks along its diagonal, each `rows` long, whose columns overlap.

    blocks: (n, rows, columns); together they have up to n - 1 rows of zeros too many. index: (n columns,) the picture's row of every block's column.
    """

    blocks: Tensor
    index: Tensor
    measured: int
    length: int

    def times(self, x: Tensor) -> Tensor:
        """(..., length, w) -> (..., measured, w)"""
        if len(self.blocks) == 1:
            return self.blocks[0] @ x
        parts = x.index_select(-2, self.index).unflatten(-2, (len(self.blocks), -1))
        return (self.blocks @ parts).flatten(-3, -2)[..., : self.measured, :]

    def transposed_times(self, y: Tensor) -> Tensor:
        """(..., measured, w) -> (..., length, w)"""
        if len(self.blocks) == 1:
            return self.blocks[0].mT @ y
        n, rows, _ = self.blocks.shape
        parts = torch.nn.functional.pad(y, (0, 0, 0, n * rows - self.measured)).unflatten(-2, (n, rows))
        parts = (self.blocks.mT @ parts).flatten(-3, -2)
        return parts.new_zeros(*parts.shape[:-2], self.length, parts.shape[-1]).index_add(-2, self.index, parts)

    def to(self, like: Tensor) -> Band:
        """In the dtype and on the device of `like`."""
        return self._replace(blocks=self.blocks.to(like), index=self.index.to(like.device))


def band(index: Tensor, weights: Tensor, length: int) -> Band:
    """The matrix that takes `weights` (measured, k) of the rows `index` (measured, k) of a picture of `length`; weights of one row are added."""
    measured, k = index.shape
    n = -(-measured // max(1, max(STEP, k) * measured // length))
    rows = -(-measured // n)
    first, last = (torch.stack(ends) for ends in zip(*(part.aminmax() for part in index.split(rows)), strict=True))
    n, columns = len(first), int((last - first).max()) + 1
    first = first.clamp(max=length - columns)
    blocks = weights.new_zeros(n * rows, columns)
    blocks[:measured].scatter_add_(1, index - first.repeat_interleave(rows)[:measured, None], weights)
    return Band(blocks.view(n, rows, columns), (first[:, None] + torch.arange(columns)).flatten(), measured, length)
