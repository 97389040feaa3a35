"""Missing pixels."""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Find, Operator, Size, shown, size_of, whole

PIXELS = 2**24  # of all the masks of a spec together, such as 64 of 512x512: a few bytes of a stranger's file may ask for any number


@dataclass(frozen=True, eq=False)
class Inpainting(Operator):
    """f(x) = x (1 - mask). `mask` is (H, W) or (B, 1, H, W), 1 where the picture is missing (ComfyUI's convention), 0 where it is known.

    Missing pixels of the measurement are 0: mid-grey in [-1, 1]. Masks are binary: 0.5 and above count as missing.
    Raises ValueError for masks of another shape or without pixels, with NaN, and for those that hide nothing or everything.
    """

    mask: Tensor

    title = "Inpainting"

    def __post_init__(self):
        try:
            mask = torch.as_tensor(self.mask, dtype=torch.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"Inpainting: mask is {shown(self.mask)}; it must be numbers, (H, W) or (B, 1, H, W): {error}") from error
        mask = mask.reshape(1, 1, *mask.shape) if mask.ndim == 2 else mask
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"Inpainting: mask has shape {tuple(mask.shape)}; it must be (H, W) or (B, 1, H, W)")
        if not mask.numel():
            raise ValueError(f"Inpainting: mask has shape {tuple(mask.shape)}, which is no pixel at all; give one of the picture's size")
        if not torch.isfinite(mask).all():
            raise ValueError("Inpainting: mask holds NaN or infinite values")
        mask = (mask >= 0.5).float()
        missing = mask.mean(dim=(1, 2, 3))
        if (missing == 0).any():
            raise ValueError(
                "Inpainting: mask is empty (nothing is missing); paint the hole white, or invert the mask if it shows what is known"
            )
        if (missing == 1).any():
            raise ValueError("Inpainting: mask is full (everything is missing); leave some of the picture black, or invert the mask")
        object.__setattr__(self, "mask", mask)

    def check(self, size: Size, batch: int = 1) -> None:
        self.measurement_size(size)
        if self.mask.shape[0] not in (1, batch):
            raise ValueError(f"Inpainting: {self.mask.shape[0]} masks for a batch of {batch} pictures; give one mask or one per picture")

    def _known(self, x: Tensor) -> Tensor:
        self.check(size_of(x), len(x))
        return self.kept((x.dtype, x.device), lambda: 1 - self.mask.to(x))

    def __call__(self, image: Tensor) -> Tensor:
        return image * self._known(image)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        self.measurement_size(size)
        return y * self._known(y)

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """That of the known pixels: whatever a damaged picture shows in its holes does not count."""
        return y_hat - y * self._known(y)

    def elements(self, y: Tensor) -> Tensor:
        return y.shape[1] * self._known(y).sum(dim=(1, 2, 3), dtype=torch.float32).expand(len(y))

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        if before is None:
            return self.mask.cpu()
        self.check(size_of(before), len(before) if len(before) > 1 else len(self.mask))
        return torch.maximum(self.mask.cpu(), before)

    def hint(self, y: Tensor) -> Tensor:
        return y * self._known(y)

    def measurement_size(self, size: Size) -> Size:
        if tuple(size) != size_of(self.mask):
            h, w = self.mask.shape[-2:]
            raise ValueError(f"Inpainting: the mask is {w}x{h} and the picture {size[1]}x{size[0]}; both must have the same size")
        return size

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(size_of(y))

    def spec(self) -> dict[str, Any]:
        bits = np.packbits(self.mask.cpu().numpy().astype(bool))
        packed = base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode("ascii")
        return {"operator": self.name, "shape": list(self.mask.shape), "mask": packed}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Inpainting:
        """A mask as `spec` packs it; or size: [H, W] and box: [h, w], a centred hole, which a person can write into a config."""
        if settings.keys() == {"size", "box"}:
            return cls(_box_of(settings["size"], settings["box"]))
        shape, count = _shape_of(settings), cls.pixels(settings)
        text = settings["mask"]
        if not isinstance(text, str):
            raise ValueError(f"Inpainting: the spec's mask is {shown(text)}; it must be text")
        expected = -(-count // 8)
        try:
            stream = zlib.decompressobj()
            # no byte more than shows that there are too many
            packed = stream.decompress(base64.b64decode(text, validate=True), expected + 1)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"Inpainting: the spec's mask cannot be read: {error}") from error
        if len(packed) != expected or not stream.eof:
            raise ValueError(f"Inpainting: the spec's mask has more or fewer bytes than the {expected} that make a mask of shape {shape}")
        bits = np.frombuffer(packed, dtype=np.uint8)
        return cls(torch.from_numpy(np.unpackbits(bits, count=count).reshape(shape).astype(np.float32)))

    @staticmethod
    def pixels(settings: dict[str, Any]) -> int:
        """How many the masks of a spec have, without making them. Raises ValueError for more than `PIXELS`, or a shape that is none."""
        shape = _sides("size", settings["size"], 2) if settings.keys() == {"size", "box"} else _shape_of(settings)
        count = math.prod(shape)
        if count > PIXELS:
            raise ValueError(f"Inpainting: the spec asks for masks of {shape}, {count} pixels; {PIXELS} are the most that one may have")
        return count

    def describe(self) -> str:
        h, w = self.mask.shape[-2:]
        return f"{self.title} ({w}x{h}, {100 * float(self.mask.mean()):.1f} % missing)"


def _sides(name: str, value: Any, count: int) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        what = "[height, width] in pixels" if count == 2 else "[masks, 1, height, width]"
        raise ValueError(f"Inpainting: {name} is {shown(value)}; it must be {what}")
    return tuple(whole(f"Inpainting: {name}", n, 1, PIXELS) for n in value)


def _shape_of(settings: dict[str, Any]) -> tuple[int, ...]:
    if settings.keys() != {"shape", "mask"}:
        given = ", ".join(sorted(settings)) or "nothing"
        raise ValueError(f"Inpainting: the spec has {given}; it must have shape and mask, or size and box")
    return _sides("shape", settings["shape"], 4)


def _box_of(size: Any, box: Any) -> Tensor:
    size, box = _sides("size", size, 2), _sides("box", box, 2)
    if box[0] > size[0] or box[1] > size[1]:
        raise ValueError(f"Inpainting: the box {box[1]}x{box[0]} is larger than the picture, {size[1]}x{size[0]}")
    return centred_box(size, box)


def centred_box(size: Size, box: Size) -> Tensor:
    """(H, W) mask with a centred box of missing pixels, the paper's inpainting task (128x128 of 512x512, D.3)."""
    mask = torch.zeros(size)
    top, left = (size[0] - box[0]) // 2, (size[1] - box[1]) // 2
    mask[top : top + box[0], left : left + box[1]] = 1
    return mask
