"""What JPEG compression leaves of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Operator, in_words, nothing_left, shown, whole
from .colour import LUMA

# ITU-T T.81 Annex K.1, rows of rising vertical frequency: luma (Table K.1) and chroma (Table K.2)
LUMA_TABLE = """
    16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
CHROMA_TABLE = """
    17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}  # luma samples for one of chroma: down, across
ROUNDINGS = ("straight-through", "cubic")
COARSEST = 65535  # of a step in a file's table, which has 16 bits at most
ORIENTATION = 0x0112  # the EXIF tag
FROM_RIGHT, FROM_BELOW, TURNED = (
    (2, 3, 7, 8),
    (3, 4, 6, 7),
    (5, 6, 7, 8),
)  # its values for which making upright reverses the file's rows, columns, swaps both
LEAN = 0.03  # less than half a step of what chroma's averages and triangles give (1/4, 1/16), so that it decides ties alone
TIE = 2e-4  # above the float32 errors of what is rounded, so that they do not decide which way a tie goes


def quantisation_tables(quality: int) -> Tensor:
    """(2, 8, 8) float64: the steps of luma and chroma coefficients, T.81's examples scaled by libjpeg's rule (jpeg_set_quality)."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([[int(step) for step in table.split()] for table in (LUMA_TABLE, CHROMA_TABLE)])
    return ((tables * percent + 50) // 100).clamp(1, 255).double().view(2, 8, 8)


def dct_matrix() -> Tensor:
    """(8, 8) float64, orthonormal: DCT-II coefficients of a column are this times it (T.81 A.3.3)."""
    n = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * n + 1) * n[:, None] * torch.pi / 16) / 2
    matrix[0] /= 2**0.5
    return matrix


def ycbcr_matrix() -> Tensor:
    """(3, 3) float64: R, G, B -> Y, Cb - 128, Cr - 128 of full range (JFIF, from BT.601)."""
    weights = torch.tensor(LUMA, dtype=torch.float64)
    red, _, blue = torch.eye(3, dtype=torch.float64)
    return torch.stack([weights, (blue - weights) / (2 - 2 * LUMA[2]), (red - weights) / (2 - 2 * LUMA[0])])


class Constants(NamedTuple):
    """What every picture of a quality is computed with. offset: (3, 1, 1), what a file's planes are more than luma and colours around 0."""

    tables: Tensor
    dct: Tensor
    ycbcr: Tensor
    rgb: Tensor
    offset: Tensor


def nearest(x: Tensor) -> Tensor:
    """x rounded, halves away from zero as in libjpeg. Its derivative is zero almost everywhere."""
    return x.sign() * (x.abs() + (0.5 + TIE)).floor()


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, to the bit, with the gradient of x."""
    return value.detach() + (x - x.detach())


def edge(x: Tensor, down: int, across: int) -> Tensor:
    """The last row and column repeated until the height is a multiple of `down` and the width of `across`."""
    return F.pad(x, (0, -x.shape[-1] % across, 0, -x.shape[-2] % down), mode="replicate")


def in_blocks(x: Tensor) -> Tensor:
    """(..., h, w) -> (..., h / 8, w / 8, 8, 8)."""
    return x.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)


def of_blocks(x: Tensor) -> Tensor:
    """The inverse of `in_blocks`."""
    return x.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def blocks_with_any(x: Tensor, height: int, width: int) -> Tensor:
    """x (B, 1, h, w), whose sides are multiples of the block's, with the largest value of every block in all of it."""
    return F.max_pool2d(x, (height, width)).repeat_interleave(height, -2).repeat_interleave(width, -1)


def triangle(x: Tensor, dim: int) -> Tensor:
    """Twice the samples along `dim`: 3/4 of the nearest and 1/4 of the next nearest, the edge repeated (libjpeg's "fancy upsampling")."""
    dim, n = dim % x.ndim, x.shape[dim]
    index = torch.arange(n, device=x.device)
    before, after = (x.index_select(dim, i.clamp(0, n - 1)) for i in (index - 1, index + 1))
    return torch.stack([(3 * x + before) / 4, (3 * x + after) / 4], dim + 1).flatten(dim, dim + 1)


def enlarged(colour: Tensor, down: int, across: int) -> Tensor:
    """Colour at its lower resolution, as libjpeg enlarges it by default."""
    for dim, times in ((-2, down), (-1, across)):
        if colour.shape[-1] <= 2:  # too narrow for libjpeg's triangles
            colour = colour.repeat_interleave(times, dim)
        elif times == 2:
            colour = triangle(colour, dim)
    return colour


@dataclass(frozen=True)
class Jpeg(Operator):
    """Baseline JPEG (ITU-T T.81, JFIF) and back, (B, 3, H, W) -> (B, 3, H, W) of any size; (B, 1, H, W) is compressed as luma alone.

    quality: 1 .. 100 of libjpeg's scale. subsampling: "4:4:4", "4:2:2" or "4:2:0", colour at full, half or quarter resolution.
    rounding: "straight-through" is what encoder and decoder do, with every value they round to 8 bits rounded and clamped, but the gradient
    is that of the same steps without rounding and clamping. It is not the derivative of f, which is zero almost everywhere.
    "cubic" rounds coefficients to round(x) + (x - round(x))^3 (Shin & Song 2017) and neither rounds nor clamps anything else: the gradient is
    f's derivative, and f only resembles JPEG. It still jumps, by 3/4 of a step, where a coefficient is half-way between two steps.
    tables: the steps of luma and of chroma coefficients of a file that is not on that scale, (2, 64) whole numbers of 1 .. 65535, rows of rising
    vertical frequency (T.81 calls Q); quality is then no more than a name for them. None: those of the quality, and the spec does not mention them.
    Raises ValueError for other settings, and for pictures of other than one or three channels.
    """

    quality: int
    subsampling: str = "4:2:0"
    rounding: str = "straight-through"
    tables: tuple[tuple[int, ...], ...] | None = None

    title = "JPEG"
    linear = False

    def __post_init__(self):
        object.__setattr__(self, "quality", whole("Jpeg: quality", self.quality, 1, 100))
        for name, known in (("subsampling", SUBSAMPLINGS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in tuple(known):
                raise ValueError(f"Jpeg: {name} is {shown(getattr(self, name))}; it must be one of {', '.join(known)}")
        if self.tables is not None:
            object.__setattr__(self, "tables", _checked(self.tables))

    def __call__(self, image: Tensor) -> Tensor:
        if image.shape[1] not in (1, 3):
            raise ValueError(f"Jpeg: the picture has {image.shape[1]} channels; it must have 1 or 3")
        x = image.to(torch.promote_types(image.dtype, torch.float32))  # half cannot tell all steps of 0 .. 255 apart
        (luma, chroma), _, ycbcr, rgb, offset = self.constants(x)
        x = self._bytes((x + 1) * 127.5)
        if x.shape[1] == 1:
            x = self._compressed(x, luma)
        else:
            x = self._bytes(torch.einsum("oc,bchw->bohw", ycbcr, x) + offset)
            x = torch.cat([self._compressed(x[:, :1], luma), self._subsampled(x[:, 1:], chroma)], 1) - offset
            x = self._bytes(torch.einsum("oc,bchw->bohw", rgb, x))
        return (x / 127.5 - 1).to(image.dtype)

    def constants(self, like: Tensor) -> Constants:
        """In the dtype and on the device of `like`."""

        def make() -> Constants:
            ycbcr, offset = ycbcr_matrix(), torch.tensor([0.0, 128.0, 128.0]).view(3, 1, 1)
            tables = quantisation_tables(self.quality) if self.tables is None else torch.tensor(self.tables).double().view(2, 8, 8)
            return Constants(*(t.to(like) for t in (tables, dct_matrix(), ycbcr, ycbcr.inverse(), offset)))

        return self.kept((like.dtype, like.device), make)

    def spec(self) -> dict[str, Any]:
        spec = super().spec()
        if self.tables is None:  # as it was before there were any
            del spec["tables"]
        return spec

    def describe(self) -> str:
        """Tables of a file are too long to be told."""
        if self.tables is None:
            return super().describe()
        settings = {"tables": f"of the file, about quality {self.quality}", "subsampling": self.subsampling, "rounding": self.rounding}
        return in_words(self.title, settings)

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        """A pixel is made of its block's, and of the blocks whose colour is smoothed into its own."""
        if before is None:
            return None
        (down, across), (height, width) = SUBSAMPLINGS[self.subsampling], before.shape[-2:]
        known = edge(1 - before, 8 * down, 8 * across)
        found = blocks_with_any(known, 8, 8)
        if channels == 3:
            colour = blocks_with_any(known, 8 * down, 8 * across)
            found = torch.maximum(found, F.max_pool2d(colour, (2 * down - 1, 2 * across - 1), 1, (down - 1, across - 1)))
        return nothing_left(found[..., :height, :width])

    def _bytes(self, x: Tensor, lean: float = 0.0) -> Tensor:
        """x as 8-bit samples, 0 .. 255. Halves of odd columns go up and those of even ones down if `lean` > 0, the reverse if it is < 0."""
        if self.rounding == "cubic":
            return x
        leaning = x + lean * (2 * (torch.arange(x.shape[-1], device=x.device) % 2) - 1) if lean else x
        return straight_through(x, nearest(leaning).clamp(0, 255))

    def _digits(self, x: Tensor, steps: float) -> Tensor:
        """x in whole steps of 1 / `steps`."""
        return x if self.rounding == "cubic" else straight_through(x, nearest(x * steps) / steps)

    def _compressed(self, plane: Tensor, table: Tensor) -> Tensor:
        """The plane (B, c, h, w) in 0 .. 255 after its blocks' DCT coefficients were rounded to multiples of `table` (8, 8)."""
        dct = self.constants(plane).dct
        padded = edge(plane, 8, 8) - 128
        blocks = in_blocks(padded)
        # the digits of libjpeg's integer DCT: with more, a coefficient near the middle of two steps is often rounded to the other one
        x = self._digits(dct @ self._digits(blocks @ dct.mT, 4 * 8**0.5), 8) / table
        whole_steps = nearest(x.detach())
        x = whole_steps + (x - whole_steps) ** 3 if self.rounding == "cubic" else straight_through(x, whole_steps)
        decoded = of_blocks(dct.mT @ (x * table) @ dct) + 128
        return self._bytes(decoded[..., : plane.shape[-2], : plane.shape[-1]])

    def _subsampled(self, colour: Tensor, table: Tensor) -> Tensor:
        """Cb and Cr (B, 2, H, W) compressed at their lower resolution, and enlarged as libjpeg does by default."""
        (down, across), (height, width) = SUBSAMPLINGS[self.subsampling], colour.shape[-2:]
        # libjpeg fills the columns of the last block before it averages, and its rows afterwards
        x = self._bytes(F.avg_pool2d(edge(colour, down, 8 * across), (down, across)), LEAN)
        x = self._compressed(x, table)[..., : -(-width // across)]  # without what filled the block: triangles end at what is seen
        x = enlarged(x, down, across)
        return self._bytes(x, LEAN if down == 1 else -LEAN)[..., :height, :width]


def _checked(tables: Any) -> tuple[tuple[int, ...], ...]:
    """Two tables of 64 steps, as whole numbers."""
    right = isinstance(tables, (list, tuple)) and len(tables) == 2 and all(isinstance(t, (list, tuple)) and len(t) == 64 for t in tables)
    if not right:
        raise ValueError(f"Jpeg: tables is {shown(tables)}; it must be two lists of 64 steps, luma's and chroma's")
    return tuple(tuple(whole("Jpeg: tables: a step", step, 1, COARSEST) for step in table) for table in tables)


def nearest_quality(luma: Tensor) -> int:
    """The quality of libjpeg's scale whose luma table is nearest to this one, (64,) or (8, 8), in the mean of the ratios' logarithms."""
    tables = torch.stack([quantisation_tables(quality)[0].flatten() for quality in range(1, 101)])
    return 1 + int((tables.log() - luma.double().flatten().log()).abs().mean(1).argmin())


def jpeg_of_file(file: Any) -> Jpeg | None:
    """What compressed a JPEG file, from its own tables; None for a file that is no JPEG, or one that `Jpeg` cannot describe.

    file: a path, or what Pillow's Image.open gave, not a copy of it: only that knows the tables. The operator belongs to the upright picture, as
    ImageOps.exif_transpose makes it. A grey file's is one for luma; put Grayscale before it.
    None as well for CMYK, colours stored as R, G, B, other subsamplings than `SUBSAMPLINGS`, two chroma tables, and turned pictures whose blocks would begin
    in their middle. Raises what Pillow raises for a file that is no picture. Needs Pillow for a path.
    """
    if isinstance(file, (str, Path)):
        from PIL import Image

        with Image.open(file) as opened:
            return jpeg_of_file(opened)
    layers, steps = getattr(file, "layer", None), getattr(file, "quantization", None)
    if not layers or not steps or file.mode not in ("L", "RGB") or file.info.get("adobe_transform") == 0:
        return None
    (_, across, down, luma), *colours = layers
    chroma = colours[0][3] if colours else luma
    if not colours:
        across = down = 1
    odd = any(layer[1:] != (1, 1, chroma) for layer in colours) or luma not in steps or chroma not in steps
    name = next((name for name, times in SUBSAMPLINGS.items() if times == (down, across)), None)
    if odd or name is None:
        return None
    orientation, (width, height) = file.getexif().get(ORIENTATION, 1), file.size
    cut = (orientation in FROM_RIGHT and width % (8 * across)) or (orientation in FROM_BELOW and height % (8 * down))
    if cut or (orientation in TURNED and name == "4:2:2"):
        return None
    tables = torch.tensor([list(steps[luma]), list(steps[chroma])]).view(2, 8, 8)
    tables = tables.mT if orientation in TURNED else tables
    quality = nearest_quality(tables[0])
    standard = quantisation_tables(quality)[: 1 + bool(colours)].long()
    if torch.equal(standard, tables[: len(standard)]):
        return Jpeg(quality, name)
    return Jpeg(quality, name, tables=tuple(map(tuple, tables.flatten(1).tolist())))
