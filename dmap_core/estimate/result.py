"""What was estimated, as an operator, as the measurement that belongs to it, and in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..operators import Compose, GaussianBlur, Grayscale, Jpeg, Noisy, Operator, SuperResolution

LEVELS = 255
FAITHFUL = 90  # JPEG quality from which on a file shows its picture to within what an eye sees
IDENTITY = GaussianBlur(3, 0.1)  # its kernel is a single pixel
ROUNDING = (1 / 12) ** 0.5 / LEVELS  # grain that 8 bits alone make


@dataclass(frozen=True)
class Estimate:
    """What damaged a picture, as far as it can be seen in it. `estimate` makes it; docs/estimates.md has its errors.

    size: (H, W) of the picture. grey: it has no colour. enlarged: the factor by which it had been enlarged, 1.0 for none.
    blur: standard deviation of a Gaussian in pixels of the picture after enlarging is undone; 0.0: none, None: unsure.
    grain: standard deviation of its noise in picture values 0..1; 0.0: none, None: unsure, which is no sign of either.
    jpeg: its compression; None: none found. grid: rows and columns above and left of the first whole block of that; (0, 0) unless it was cut afterwards.
    blocky: it was enlarged by repeating pixels. beneath: it was compressed before that, so the small picture is the file's. spent: standard deviation in picture values of what the compression rounded away.
    notes: what is uncertain and what to do about it, in sentences.
    """

    size: tuple[int, int]
    grey: bool = False
    enlarged: float = 1.0
    blur: float | None = 0.0
    grain: float | None = 0.0
    jpeg: Jpeg | None = None
    notes: tuple[str, ...] = ()
    grid: tuple[int, int] = (0, 0)
    blocky: bool = False
    beneath: bool = False
    spent: float = 0.0

    @property
    def scale(self) -> int:
        """How many times the measurement is smaller than the picture, a whole number: `enlarged`, rounded up unless it is hardly above one."""
        return max(1, int(self.enlarged + 0.75))

    def compressed(self) -> Jpeg | None:
        """The compression where it is worth modelling: a file that lost something, uncut, and whose loss is not hidden by grain anyway."""
        if self.jpeg is None or self.grid != (0, 0) or (self.scale > 1 and not self.beneath) or self.jpeg.quality >= FAITHFUL:
            return None
        return None if (self.grain or 0.0) > self.spent else self.jpeg

    def noise(self) -> float:
        """Standard deviation, in picture values 0..1, of what the operator without its noise cannot explain: grain, and a compression that is not modelled."""
        if self.compressed() is not None:  # noise on top of a compression has no nearest picture, and this one's loss is the larger
            return 0.0
        lost = self.spent if self.jpeg is not None and self.jpeg.quality < FAITHFUL else 0.0
        return ((self.grain or 0.0) ** 2 + lost**2) ** 0.5

    def operator(self) -> Operator | None:
        """What turns the restored picture into `measurement`; None where there is nothing to repair. Grey alone is no damage: colours are a choice."""
        parts: list[Operator] = []
        if self.blur:
            parts.append(GaussianBlur(61 if self.blur * self.scale <= 7 else 511, round(self.blur * self.scale, 2)))
        if self.scale > 1:
            parts.append(SuperResolution(self.scale))
        jpeg, noise = self.compressed(), self.noise()
        if jpeg is not None:
            parts.append(jpeg)
        if not parts and not noise:
            return None
        parts = [Grayscale(), *parts] if self.grey else parts or [IDENTITY]
        found = parts[0] if len(parts) == 1 else Compose(tuple(parts))
        return Noisy(found, round(noise, 4)) if noise else found

    def measurement(self, picture: Tensor) -> Tensor:
        """The picture (B, 3, H, W) in [-1, 1] as the operator's measurement (B, 3, h, w): shrunk `scale` times where it had been enlarged, or itself.

        Where H or W is no multiple of the scale, its last row and column are repeated, so the restored picture is a little larger than this one.
        """
        scale = self.scale
        if scale == 1:
            return picture
        padded = F.pad(picture, (0, -picture.shape[-1] % scale, 0, -picture.shape[-2] % scale), mode="replicate")
        with torch.no_grad():
            small = F.avg_pool2d(padded, scale) if self.blocky else SuperResolution(scale)(padded)
        return small.clamp(-1, 1)

    def text(self) -> str:
        """For people, several lines: what to repair or that there is nothing, what was seen, and what is uncertain."""
        found = self.operator()
        seen = ", ".join(self._seen())
        first = f"nothing to repair; here is what I see: {seen}." if found is None else f"found: {seen}.\nrepair: {found.describe()}."
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])

    def _seen(self) -> list[str]:
        height, width = self.size
        seen = [f"{width}x{height}", "grey" if self.grey else "colour"]
        if self.enlarged > 1:
            how = "by repeating pixels" if self.blocky else "smoothly"
            seen.append(f"enlarged {self.enlarged:.3g} times {how}, from about {width / self.enlarged:.0f}x{height / self.enlarged:.0f}")
        seen.append("softness unknown" if self.blur is None else f"soft by {self.blur:.1f} px" if self.blur else "sharp")
        levels = f"{(self.grain or 0) * LEVELS:.1f} of 255 grey levels"
        seen.append("grain unknown" if self.grain is None else f"grain of {levels}" if self.grain else "no visible grain")
        if self.jpeg is None:
            return [*seen, "no trace of JPEG"]
        own = "with tables of its own, about " if self.jpeg.tables is not None else ""
        return [*seen, f"JPEG {own}quality {self.jpeg.quality} {self.jpeg.subsampling}"]
