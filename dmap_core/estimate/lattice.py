"""Traces of JPEG in a picture: its blocks' DCT coefficients are multiples of the steps they were rounded to.

A decoder rounds to 8 bits, which moves a coefficient by RATTLE only. So where the blocks begin, and how coarse each step is, shows in how near to a
lattice the coefficients lie. The score of a step d is the log likelihood ratio of "rounded to multiples of d" and "anywhere", summed over coefficients that
rounding to 8 bits alone cannot make.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..operators.jpeg import SUBSAMPLINGS, Jpeg, dct_matrix, in_blocks, quantisation_tables
from ..operators.jpeg_cells import unsmoothed

RATTLE = 0.4  # grey levels, standard deviation: rounding of Y (0.29) and of R, G, B (0.19), and a little of the decoder's arithmetic
SEEN = 1.6  # grey levels, four times that: a larger coefficient was not zero in the file
OUTLIER = 0.03  # share of coefficients that lie anywhere, in spite of a lattice
COARSEST = 128  # the largest step that is looked for
BLOCKS = 2000  # looked at
USUAL = "4:2:0"
COLOURFUL, APART = 50, 0.1  # coefficients of colours, and the difference of mean scores, that subsampling is told from
PART = 256  # pixels, of the sides of what is looked at for colours
FEW = 600  # looked at for every place where blocks may begin
WELL_KNOWN = 0.03  # share of a frequency's coefficients that are not zero, for their size to be known
LEFT = 0.1  # the same, for a spectrum to be that of the picture
MOST = 12000  # coefficients that a score is made of
SURE = 40.0  # score of a lattice, for it to be one
ROUND = 2.0  # of it for a round number: e^2 times as many files have one as have its neighbour
PER_COEFFICIENT = 0.12  # of it besides, in the mean


@dataclass(frozen=True)
class Lattice:
    """A compression, where its first whole block begins (row, column), and coefficients (n, 64) of blocks that are not clipped."""

    jpeg: Jpeg
    grid: tuple[int, int]
    coefficients: Tensor


def coefficients(luma: Tensor, visible: Tensor, grid: tuple[int, int], most: int) -> Tensor:
    """(blocks, 64) of luma (n, h, w) in 0 .. 255, whose blocks begin at `grid`; those all visible, evenly spread, at most so many."""
    (top, left), (height, width) = grid, luma.shape[-2:]
    bottom, right = top + (height - top) // 8 * 8, left + (width - left) // 8 * 8
    whole = in_blocks(visible[:, top:bottom, left:right]).flatten(0, 2).flatten(1).all(1).nonzero().flatten()
    chosen = whole[torch.linspace(0, len(whole) - 1, min(most, len(whole))).long()] if len(whole) else whole
    blocks = in_blocks(luma[:, top:bottom, left:right] - 128).flatten(0, 2)[chosen]
    dct = dct_matrix().to(luma)
    return (dct @ blocks @ dct.mT).flatten(1)


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # a host may call this under inference mode, and the cache outlives that
def standard_tables() -> Tensor:
    """(2, 64, 100), whole numbers: steps of luma and chroma for the qualities 1 .. 100."""
    return torch.stack([quantisation_tables(quality).flatten(1).long() for quality in range(1, 101)], -1)


def _large(found: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (m,) of (n, 64) that rounding to 8 bits did not make, and their frequencies, at most MOST."""
    place, frequency = (found.abs() > SEEN).nonzero(as_tuple=True)
    thinned = slice(None, None, max(1, -(-len(place) // MOST)))
    place, frequency = place[thinned], frequency[thinned]
    return found[place, frequency], frequency


def _ratio(values: Tensor, step: Tensor | int) -> Tensor:
    """The log likelihood ratio of "rounded to a multiple of `step`" and "anywhere", for every value."""
    index = (values / step).round()
    near = torch.exp((values - index * step).square() * (-0.5 / RATTLE**2)) * (step * ((1 - OUTLIER) / (RATTLE * math.sqrt(2 * math.pi))))
    return (near * (index != 0) + OUTLIER).log()


def scores(values: Tensor, frequencies: Tensor) -> Tensor:
    """(64, COARSEST): the score of steps 1, 2, ... of every frequency."""
    result = values.new_zeros(64, COARSEST)
    for step in range(1, COARSEST + 1):
        result[:, step - 1].index_add_(0, frequencies, _ratio(values, step))
    return result


def of_qualities(table: Tensor) -> Tensor:
    """(100,): the scores of the qualities 1 .. 100 of luma, given those of steps. People choose round numbers, which decides between neighbours that fit alike."""
    round_numbers = (torch.arange(1, 101) % 5 == 0).to(table)
    return table.gather(1, standard_tables()[0].clamp(max=COARSEST) - 1).sum(0) + ROUND * round_numbers


def zeros(luma: Tensor, visible: Tensor) -> list[tuple[int, int]]:
    """Where blocks may begin, the likeliest first: where most coefficients vanish."""
    found, luma, visible = {}, luma[:4, :512, :512], visible[:4, :512, :512]
    for top in range(8):
        for left in range(8):
            c = coefficients(luma, visible, (top, left), FEW)
            found[top, left] = float((c[:, 1:].abs() < SEEN / 2).float().mean()) if len(c) else 0.0
    return sorted(found, key=lambda place: -found[place])


def find(tiles: Tensor, luma: Tensor) -> Lattice | None:
    """The compression of R, G, B tiles (n, 3, h, w) in 0 .. 255 with this luma (n, h, w); None if there is no trace of one, or too little to see."""
    if min(luma.shape[-2:]) < 16:
        return None
    visible = ((tiles > 0) & (tiles < 255)).all(1)
    places = zeros(luma, visible)
    best = None
    for place in dict.fromkeys([(0, 0), *places[:3]]):
        c = coefficients(luma, visible, place, BLOCKS)
        if len(c) == 0:
            continue
        values, frequencies = _large(c)
        qualities = of_qualities(scores(values, frequencies))
        score, counted = float(qualities.max()), len(values)
        if best is None or score > best[0]:
            best = score, counted, 1 + int(qualities.argmax()), place, c
    if best is None or best[0] < SURE or best[0] < PER_COEFFICIENT * best[1]:
        return None
    _, _, quality, place, c = best
    return Lattice(Jpeg(quality, subsampling(tiles, quality, place)), place, c)


def subsampling(tiles: Tensor, quality: int, grid: tuple[int, int]) -> str:
    """How colours were stored: as where their coefficients are best on their lattice, in the mean. "4:2:0", which is usual, where that cannot be told."""
    if bool((tiles[:, :1] == tiles[:, 1:]).all()):
        return USUAL
    tiles, dct, found = tiles[:2, :, :PART, :PART], dct_matrix().to(tiles), {}
    for name, (down, across) in SUBSAMPLINGS.items():
        for top in range(grid[0], 8 * down, 8):
            for left in range(grid[1], 8 * across, 8):
                part = tiles[..., top:, left:]
                height, width = part.shape[-2] // (8 * down) * 8 * down, part.shape[-1] // (8 * across) * 8 * across
                if height and width:
                    planes = unsmoothed(Jpeg(quality, name), part[..., :height, :width])
                    values, frequencies = _large((dct @ in_blocks(planes[1]) @ dct.mT).flatten(0, 3).flatten(1))
                    ratio = _ratio(values, standard_tables()[1, frequencies, quality - 1])
                    if len(values) >= COLOURFUL:
                        found[name] = max(found.get(name, -math.inf), float(ratio.mean()))
    ranked = sorted(found, key=lambda name: -found[name])
    sure = len(ranked) > 1 and found[ranked[0]] - found[ranked[1]] > APART
    return ranked[0] if sure else USUAL


def spent(lattice: Lattice) -> float:
    """Standard deviation, in grey levels, of what the compression rounded away of luma: errors even in their cells, Laplacian in those of zero."""
    steps = lattice.jpeg.constants(lattice.coefficients).tables[0].flatten()
    if len(lattice.coefficients) == 0:
        return 0.0
    known = share_known(lattice).clamp(1e-6, 0.999)
    # P(|c| > d / 2) = known makes b the Laplacian's scale in steps; its variance within +-1/2
    b = -0.5 / known.log()
    inside = (2 * b**2 - known / (1 - known) * (b + 0.25)).clamp(0, 1 / 12) * steps**2
    # of a frequency of which hardly anything is left, that says little: a picture's power falls on, as it does where it is seen
    order = (torch.arange(8.0)[:, None].square() + torch.arange(8.0).square()).flatten().clamp(min=1).log()
    enough = (known > WELL_KNOWN) & (torch.arange(64) > 0)
    if int(enough.sum()) >= 3:
        seen = lattice.coefficients.square().mean(0).clamp(min=1e-6).log()
        x, y = order[enough] - order[enough].mean(), seen[enough] - seen[enough].mean()
        slope = ((x * y).sum() / x.square().sum()).clamp(max=-1.0)
        expected = (seen[enough].mean() + slope * (order - order[enough].mean())).exp()
        inside = torch.where(enough, inside, torch.minimum(inside, expected))
    return float((known * steps**2 / 12 + (1 - known) * inside).mean().sqrt())


def share_known(lattice: Lattice) -> Tensor:
    """(64,): the share of every frequency's coefficients that are not zero."""
    steps = lattice.jpeg.constants(lattice.coefficients).tables[0].flatten()
    return ((lattice.coefficients / steps).round() != 0).float().mean(0)


def reach(lattice: Lattice) -> float:
    """The frequency, in cycles per pixel, up to which the compression left a picture's rows and columns as they were, about."""
    known = share_known(lattice).view(8, 8)
    along = (known[0] + known[:, 0]) / 2
    lost = (along < LEFT).nonzero().flatten()
    return float(lost[0] - 0.5) / 16 if len(lost) else 0.5


def of(jpeg: Jpeg, tiles: Tensor, luma: Tensor) -> Lattice:
    """The same of a compression that is known."""
    visible = ((tiles > 0) & (tiles < 255)).all(1)
    return Lattice(jpeg, (0, 0), coefficients(luma, visible, (0, 0), BLOCKS))
