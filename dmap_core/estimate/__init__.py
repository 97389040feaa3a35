"""What damaged a picture, estimated from the picture alone: colour, compression, enlarging, grain and softness.

One small file for each. docs/estimates.md has how far each is off, and where it fails.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..operators import Jpeg
from . import colours, grain, lattice, repeated, spectrum
from .lattice import Lattice
from .result import IDENTITY, LEVELS, Estimate
from .samples import luma_of, tiles_of

SMALLEST = 32  # pixels along a side, below which nothing but colour is looked for
SOFT = 0.8  # pixels: a photograph's own softness is below
LEAST_ENLARGED = 1.4  # less is taken for softness
CLEARLY, LIKELY, MOST_OF_IT = 0.05, 0.02, 0.7  # cost that enlarging has to explain: so much, or less and that share of all
WIDE = 0.35  # of a sigma: an estimate whose range is wider is none
NARROW = 0.05  # cycles per pixel: where the picture shows in less of its spectrum, softness cannot be told
HARMLESS = 96  # JPEG quality from which on grain may be measured as if there were none
LUMA_ROUNDING = 0.447 / 12  # variance of the luma of three rounded values, the sum of its weights' squares being 0.447

TONED = "all colours are shades of one, as in a toned print; turn the picture grey first if it was black and white"
NOWHERE_FLAT = "nowhere is the picture flat and neither black nor white; look at its grain yourself, and put Known Noise behind the operator if it shows"
BENEATH = "if the small picture was a JPEG, that was enlarged with it and is not seen here; take the small file itself if you have it"
FEW_BLOCKS = "in a picture as small as this fine texture may be taken for grain; if it does not look grainy, leave Known Noise away"
SOFTNESS_HIDDEN = (
    "grain, compression or a picture with little in it hide how soft it is; look at an edge, count the pixels that it is wide, "
    "and give a third of them to Operator: Gaussian Blur as sigma"
)

__all__ = ["IDENTITY", "Estimate", "estimate", "is_grey"]


def estimate(picture: Tensor, jpeg: Jpeg | None = None) -> Estimate:
    """What damaged a picture (1, 3, H, W) in [-1, 1]. jpeg: its compression, from the file's tables, where they are known: it is not guessed then.

    Takes the same picture to the same answer; no network, no draw. Raises ValueError for another shape, and for values that are not finite.
    """
    with torch.no_grad():
        return _of_levels(_checked_levels(picture), jpeg)


def is_grey(picture: Tensor) -> bool:
    """Whether a picture (1, 3, H, W) in [-1, 1] has no colour: what `estimate` says of it, without the rest. Raises ValueError as that does."""
    with torch.no_grad():
        return colours.is_grey(_checked_levels(picture))


def _checked_levels(picture: Tensor) -> Tensor:
    if picture.ndim != 4 or len(picture) != 1 or picture.shape[1] != 3 or 0 in picture.shape:
        raise ValueError(f"estimate: the picture has shape {tuple(picture.shape)}; it must be (1, 3, H, W), one picture")
    if not bool(torch.isfinite(picture).all()):
        raise ValueError("estimate: the picture has values that are NaN or infinite; look at what made it")
    return _levels(picture)


def _levels(picture: Tensor) -> Tensor:
    """(3, H, W) in 0 .. 255 of (1, 3, H, W) in [-1, 1]."""
    return ((picture[0].detach().cpu().float().clamp(-1, 1) + 1) * (LEVELS / 2)).round()


def _of_levels(levels: Tensor, jpeg: Jpeg | None) -> Estimate:
    """Of R, G, B (3, H, W) in whole levels."""
    height, width = levels.shape[-2:]
    found = Estimate(size=(height, width), grey=colours.is_grey(levels), jpeg=jpeg, blur=None, grain=None)
    notes = [TONED] if not found.grey and colours.is_toned(levels) else []
    if min(height, width) < SMALLEST:
        return replace(found, notes=(*notes, too_small(SMALLEST, "softness, grain, enlarging and compression")))
    tiles = tiles_of(levels)
    luma = luma_of(tiles)
    times = repeated.factor(luma)
    if times > 1 and jpeg is None:
        return _repeated(found, levels, times)
    trace = lattice.find(tiles, luma) if jpeg is None else lattice.of(jpeg, tiles, luma)
    if trace is not None:
        found = replace(found, jpeg=trace.jpeg, grid=trace.grid, spent=lattice.spent(trace) / LEVELS)
        notes += [cut_after(trace.grid)] * (trace.grid != (0, 0))
    found, more = _grain(found, tiles, luma, trace)
    notes += more
    found, more = _softness(found, luma, trace)
    notes += more
    if found.enlarged > 1:
        small = tiles_of(_levels(found.measurement(levels.unsqueeze(0) * (2 / LEVELS) - 1)))
        found, more = _grain(found, small, luma_of(small), None)
        notes += more
    return replace(found, notes=tuple(dict.fromkeys(notes)))


def _repeated(found: Estimate, levels: Tensor, times: int) -> Estimate:
    """Of a picture whose pixels are repeated: all is as in the small one, whose values are all there."""
    inner = _of_levels(levels[:, ::times, ::times], None)
    return replace(inner, size=found.size, enlarged=inner.enlarged * times, blocky=inner.enlarged == 1, beneath=inner.enlarged == 1)


def _grain(found: Estimate, tiles: Tensor, luma: Tensor, trace: Lattice | None) -> tuple[Estimate, list[str]]:
    """Grain, of every channel's values, or of a compression's luma, which is all that it leaves."""
    if trace is not None and trace.jpeg.quality < HARMLESS:
        sigma, most = grain.of_compressed(trace)
        if most <= grain.FAINT or (sigma is not None and sigma < grain.VISIBLE):
            sigma = 0.0
        unknown = hidden_grain(trace.jpeg, most)
    else:
        sigma, unknown = grain.of_channels(luma.unsqueeze(1) if found.grey else tiles), NOWHERE_FLAT
    if sigma is None:
        return replace(found, grain=None), [unknown]
    few = min(found.size) < spectrum.LENGTH and sigma > grain.FAINT
    return replace(found, grain=sigma / LEVELS if sigma > grain.FAINT else 0.0), [FEW_BLOCKS] * few


def _softness(found: Estimate, luma: Tensor, trace: Lattice | None) -> tuple[Estimate, list[str]]:
    """Softness and smooth enlarging."""
    if min(luma.shape[-2:]) < spectrum.LENGTH:
        return found, [too_small(spectrum.LENGTH, "softness and smooth enlarging")]
    rounding = 1 / 12 if found.grey else LUMA_ROUNDING
    if trace is not None and trace.jpeg.quality < HARMLESS:
        noise, reach = (LEVELS * found.spent) ** 2 + rounding, lattice.reach(trace)
    else:
        noise, reach = (grain.of_channels(luma.unsqueeze(1)) or 0.0) ** 2 + rounding, 0.5
    measured = spectrum.power(luma)
    frequencies = spectrum.models()[2]
    trusted = (frequencies <= max(reach, 4 / spectrum.LENGTH)).float()
    shown = int(((measured[spectrum.FIRST :] > 3 * noise) & (trusted > 0)).sum()) / spectrum.LENGTH
    if shown == 0:
        return replace(found, blur=None), [SOFTNESS_HIDDEN]
    plain, enlarged = spectrum.fit(measured, noise, trusted)
    gain = plain.cost - enlarged.cost
    if enlarged.enlarged >= LEAST_ENLARGED and (gain > CLEARLY or (gain > LIKELY and gain > MOST_OF_IT * plain.cost)):
        return replace(found, enlarged=enlarged.enlarged, blur=enlarged.sigma if enlarged.sigma >= SOFT else 0.0), [BENEATH]
    if plain.high >= SOFT and (plain.high - plain.low > WIDE * max(plain.sigma, 1.0) or shown < NARROW):
        return replace(found, blur=None), [SOFTNESS_HIDDEN]
    return replace(found, blur=plain.sigma if plain.sigma >= SOFT else 0.0), []


def too_small(side: int, what: str) -> str:
    return f"the picture is smaller than {side} pixels; {what} cannot be told from so little"


def hidden_grain(jpeg: Jpeg, most: float) -> str:
    amount = f"up to {most:.0f} of 255 grey levels of it" if most < LEVELS else "any amount of it"
    return (
        f"a JPEG of quality {jpeg.quality} hides grain: there may be {amount}, or none. "
        "If the picture looks grainy where it should be flat, put Known Noise behind the operator"
    )


def cut_after(grid: tuple[int, int]) -> str:
    rows, columns = grid
    return (
        f"the picture was cut after it had been saved as a JPEG: its blocks begin {rows} rows and {columns} columns inside. The compression is taken for grain; "
        f"cut off {rows} rows at the top and {columns} columns at the left to have it undone as what it is"
    )
