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

from .base import Find, Operator, Size, whole


@dataclass(frozen=True, eq=False)
class Inpainting(Operator):
    """f(x) = x (1 - mask). `mask` is (H, W) or (B, 1, H, W), 1 where the picture is missing (ComfyUI's convention), 0 where it is known.

    Missing pixels of the measurement are 0: mid-grey in [-1, 1]. Masks are binary: 0.5 and above count as missing.
    """

    mask: Tensor

    def __post_init__(self):
        mask = torch.as_tensor(self.mask, dtype=torch.float32)
        mask = mask.reshape(1, 1, *mask.shape) if mask.ndim == 2 else mask
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"Inpainting: mask has shape {tuple(self.mask.shape)}; it must be (H, W) or (B, 1, H, W)")
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
        self.check(tuple(x.shape[-2:]), len(x))
        return 1 - self.mask.to(x)

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

    def hint(self, y: Tensor) -> Tensor:
        return y * self._known(y)

    def measurement_size(self, size: Size) -> Size:
        if tuple(size) != tuple(self.mask.shape[-2:]):
            h, w = self.mask.shape[-2:]
            raise ValueError(f"Inpainting: the mask is {w}x{h} and the picture {size[1]}x{size[0]}; both must have the same size")
        return size

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(tuple(y.shape[-2:]))

    def spec(self) -> dict[str, Any]:
        bits = np.packbits(self.mask.cpu().numpy().astype(bool))
        packed = base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode("ascii")
        return {"operator": self.name, "shape": list(self.mask.shape), "mask": packed}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Inpainting:
        """A mask as `spec` packs it; or size: [H, W] and box: [h, w], a centred hole, which a person can write into a config."""
        if settings.keys() == {"size", "box"}:
            return cls(_box_of(settings["size"], settings["box"]))
        try:
            shape = tuple(int(n) for n in settings["shape"])
            count = math.prod(shape)
            packed = zlib.decompress(base64.b64decode(settings["mask"], validate=True))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"Inpainting: the spec's shape or mask cannot be read: {error}") from error
        bits = np.frombuffer(packed, dtype=np.uint8)
        if min(shape, default=0) < 1 or len(bits) != math.ceil(count / 8):
            raise ValueError(f"Inpainting: the spec's mask has {len(bits)} bytes, which do not make a mask of shape {shape}")
        return cls(torch.from_numpy(np.unpackbits(bits, count=count).reshape(shape).astype(np.float32)))

    def describe(self) -> str:
        h, w = self.mask.shape[-2:]
        return f"Inpainting({w}x{h}, {100 * float(self.mask.mean()):.1f} % missing)"


def _box_of(size: Any, box: Any) -> Tensor:
    for name, value in (("size", size), ("box", box)):
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ValueError(f"Inpainting: {name} is {value!r}; it must be [height, width] in pixels")
    size, box = (tuple(whole(f"Inpainting: {name}", n, 1) for n in value) for name, value in (("size", size), ("box", box)))
    if box[0] > size[0] or box[1] > size[1]:
        raise ValueError(f"Inpainting: the box {box[1]}x{box[0]} is larger than the picture, {size[1]}x{size[0]}")
    return centred_box(size, box)


def centred_box(size: Size, box: Size) -> Tensor:
    """(H, W) mask with a centred box of missing pixels, the paper's inpainting task (128x128 of 512x512, D.3)."""
    mask = torch.zeros(size)
    top, left = (size[0] - box[0]) // 2, (size[1] - box[1]) // 2
    mask[top : top + box[0], left : left + box[1]] = 1
    return mask
