"""Whether a picture has colour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..operators.jpeg import ycbcr_matrix

BLOCK = 16  # pixels: their mean is free of grain and of the rounding of a JPEG's colours
FAINT = 1.5  # grey levels of chroma that a grey picture's blocks may have: a compression leaves 1
SHADES = 0.06  # of the mean chroma, that colours of one tone may lie off their line
RARE = 0.002  # of the blocks, that may have more


def chroma(levels: Tensor) -> Tensor:
    """Cb and Cr, around 0, of R, G, B (3, H, W) in 0 .. 255: the means of blocks, (2, n). What is smaller than a block is one."""
    planes = torch.einsum("oc,chw->ohw", ycbcr_matrix().to(levels), levels)[1:]
    height, width = (min(BLOCK, n) for n in planes.shape[-2:])
    return F.avg_pool2d(planes, (height, width)).flatten(1)


def is_grey(levels: Tensor) -> bool:
    """Whether R, G, B (3, H, W) in 0 .. 255 is a grey picture, grain in its colours or not."""
    strength = torch.linalg.vector_norm(chroma(levels), dim=0)
    return float((strength > FAINT).float().mean()) <= RARE


def is_toned(levels: Tensor) -> bool:
    """Whether all its colours lie on one line, as in sepia: then it was a grey picture."""
    planes = chroma(levels)
    strength = torch.linalg.vector_norm(planes, dim=0)
    if float(strength.mean()) < 2 * FAINT:
        return False
    axis = torch.linalg.eigh(planes @ planes.mT)[1][:, -1]
    along = axis @ planes
    across = (planes - axis[:, None] * along).square().sum(0).sqrt()
    same_side = float(((along > -FAINT) if float(along.mean()) > 0 else (along < FAINT)).float().mean())
    return float(across.square().mean().sqrt()) < max(FAINT / 2, SHADES * float(strength.mean())) and same_side > 0.98
