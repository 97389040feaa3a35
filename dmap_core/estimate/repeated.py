"""Enlarging by repeating pixels."""

from __future__ import annotations

from torch import Tensor

MOST = 16  # times
INSIDE = 0.2  # of the difference between neighbours at the edges of repeated pixels, which those inside may have at most
BUSY = 0.5  # grey levels: less difference between neighbours is none


def factor(luma: Tensor) -> int:
    """How many times the pixels of (n, h, w) in 0 .. 255 are repeated, down and across, beginning at the first; 1 if they are not."""
    found = [_along(plane) for plane in (luma, luma.mT)]
    return found[0] if found[0] == found[1] else 1


def _along(plane: Tensor) -> int:
    """Along the last dimension."""
    steps = plane.diff(dim=-1).abs().mean((0, 1))
    best = 1
    for times in range(2, MOST + 1):
        count = len(steps) // times
        if count < 4:
            break
        *inside, edge = steps[: count * times].view(count, times).mean(0).tolist()
        if edge > BUSY and max(inside) < INSIDE * edge:
            best = times
    return best
