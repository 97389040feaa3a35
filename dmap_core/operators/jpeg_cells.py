"""Which pictures compress to a given JPEG file: those whose DCT coefficients lie in the cells that the file's were rounded from.

Pictures are R, G, B in 0 .. 255 or luma alone; a file's planes are [Y] or [Y, (Cb, Cr)], the colours around 0 and at their resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .jpeg import SUBSAMPLINGS, Jpeg, edge, enlarged, in_blocks, of_blocks, triangle

MARGIN = 1.5  # grey levels: four standard deviations of what two roundings to 8 bits (R, G, B; Y, Cb, Cr) do to a coefficient
ROUNDS = 8  # of guesses of what was clipped; after four hardly anything moves (measured, qualities 10 and 75)


def read_file(f: Jpeg, y: Tensor) -> list[Tensor]:
    """The coefficients (B, c, h, w, 8, 8) of every plane of the file whose picture is y (B, 3 or 1, H, W) in [-1, 1].

    Where y is clipped at black or white, and in blocks that it shows a part of, they are guessed until they explain what is seen, and a few are wrong
    (of the 24,000 of a 128x128 picture on white at quality 10: 14).
    """
    (height, width), y = y.shape[-2:], edge((y.clamp(-1, 1) + 1) * 127.5, *_sides(f, y))
    beyond = torch.ones_like(y[:1, :1])
    beyond[..., :height, :width] = 0
    kept, seen = [], y
    for _ in range(ROUNDS):
        kept = [(_dct(f, plane) / table).round() * table for plane, table in zip(unsmoothed(f, seen), f.constants(y).tables, strict=False)]
        found = _decoded(f, [_pixels(f, c) for c in kept])
        seen = torch.where(y >= 255, found.clamp(min=255), torch.where(y <= 0, found.clamp(max=0), y))
        seen = torch.where(beyond > 0, found, seen)
    return kept


def nearest_picture(f: Jpeg, image: Tensor, kept: list[Tensor], margin: float = MARGIN) -> Tensor:
    """The picture nearest to `image` (B, 3 or 1, H, W) in [-1, 1], in Y, Cb and Cr, that compresses to the file with these coefficients.

    margin: how far inside of its cell a coefficient is put, in grey levels, so that rounding the picture to 8 bits takes none out again. With margin 0
    no picture of that file is farther from the result than from `image`, in Y, Cb and Cr.
    """
    height, width = image.shape[-2:]
    x = edge((image + 1) * 127.5, *_sides(f, image))
    changes = []
    for plane, centre, table in zip(_planes(f, x), kept, f.constants(x).tables, strict=False):
        half = (table / 2 - margin).clamp(min=0)
        changes.append(_pixels(f, torch.minimum(torch.maximum(_dct(f, plane), centre - half), centre + half)) - plane)
    down, across = SUBSAMPLINGS[f.subsampling]
    for i in range(1, len(changes)):  # of an average: the same to all that were averaged
        changes[i] = changes[i].repeat_interleave(down, -2).repeat_interleave(across, -1)
    return image + _without_edge(_rgb(f, torch.cat(changes, 1)), height, width) / 127.5


def _sides(f: Jpeg, x: Tensor) -> tuple[int, int]:
    """Height and width of the part of a picture that no other shares a block with."""
    down, across = SUBSAMPLINGS[f.subsampling] if x.shape[1] == 3 else (1, 1)
    return 8 * down, 8 * across


def _without_edge(x: Tensor, height: int, width: int) -> Tensor:
    """The least-squares inverse of `edge`: the mean of all that were one row or column."""
    x = torch.cat([x[..., : height - 1, :], x[..., height - 1 :, :].mean(-2, keepdim=True)], -2)
    return torch.cat([x[..., : width - 1], x[..., width - 1 :].mean(-1, keepdim=True)], -1)


def _dct(f: Jpeg, plane: Tensor) -> Tensor:
    dct = f.constants(plane).dct
    return dct @ in_blocks(plane) @ dct.mT


def _pixels(f: Jpeg, coefficients: Tensor) -> Tensor:
    dct = f.constants(coefficients).dct
    return of_blocks(dct.mT @ coefficients @ dct)


def _ycbcr(f: Jpeg, x: Tensor) -> Tensor:
    """Y, Cb and Cr, all around 0; 128 grey is 0 in each."""
    return x - 128 if x.shape[1] == 1 else torch.einsum("oc,bchw->bohw", f.constants(x).ycbcr, x - 128)


def _rgb(f: Jpeg, x: Tensor) -> Tensor:
    """The inverse, but for the 128."""
    return x if x.shape[1] == 1 else torch.einsum("oc,bchw->bohw", f.constants(x).rgb, x)


def _planes(f: Jpeg, x: Tensor) -> list[Tensor]:
    """Of a picture that is to be compressed."""
    x = _ycbcr(f, x)
    return [x[:, :1], F.avg_pool2d(x[:, 1:], SUBSAMPLINGS[f.subsampling])] if x.shape[1] == 3 else [x]


def _decoded(f: Jpeg, planes: list[Tensor]) -> Tensor:
    """The picture of a file's planes, before it is clipped."""
    full = [*planes[:1], *(enlarged(colour, *SUBSAMPLINGS[f.subsampling]) for colour in planes[1:])]
    return _rgb(f, torch.cat(full, 1)) + 128


def unsmoothed(f: Jpeg, x: Tensor) -> list[Tensor]:
    """The planes of a picture that `_decoded` has made: averages of the colours, and from those what the triangles had mixed."""
    planes = _planes(f, x)
    for colour in planes[1:]:
        smooth = colour.shape[-1] > 2
        for dim, times in zip((-2, -1), SUBSAMPLINGS[f.subsampling], strict=True):
            if times == 2 and smooth:
                mixed = triangle(torch.eye(colour.shape[dim], dtype=torch.float64), 0).unflatten(0, (-1, 2)).mean(1)
                # on the CPU: not every device has float64
                colour = torch.linalg.solve(mixed, colour.cpu().double().movedim(dim, -2)).to(x).movedim(-2, dim)
        planes[1] = colour
    return planes
