"""Several degradations, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Find, Operator, Size


@dataclass(frozen=True)
class Compose(Operator):
    """f = f_n ... f_2 f_1: the first operator of the list touches the image first. An old photo is grayscale, blur, downsampling."""

    operators: tuple[Operator, ...]

    def __post_init__(self):
        object.__setattr__(self, "operators", tuple(self.operators))
        if not self.operators:
            raise ValueError("Compose: needs at least one operator")
        noisy = [f.name for f in self.operators if f.noise]
        if noisy:
            raise ValueError(f"Compose: {noisy[0]} cannot be a part; noise comes last, so put it around the Compose")

    @property
    def linear(self) -> bool:
        return all(f.linear for f in self.operators)

    def __call__(self, image: Tensor) -> Tensor:
        for f in self.operators:
            image = f(image)
        return image

    def measure(self, image: Tensor) -> Tensor:
        for f in self.operators:
            image = f.measure(image)
        return image

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        sizes = [size]
        for f in self.operators[:-1]:
            sizes.append(f.measurement_size(sizes[-1]))
        for f, before in zip(reversed(self.operators), reversed(sizes), strict=True):
            y = f.adjoint(y, before)
        return y

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.operators[-1].distance(y_hat, y)

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.operators[-1].difference(y_hat, y)

    def elements(self, y: Tensor) -> Tensor:
        return self.operators[-1].elements(y)

    def check(self, size: Size, batch: int = 1) -> None:
        for f in self.operators:
            f.check(size, batch)
            size = f.measurement_size(size)

    def to(self, device: torch.device | str) -> Compose:
        return Compose(tuple(f.to(device) for f in self.operators))

    def picture(self, y: Tensor) -> Tensor:
        return self.operators[-1].picture(y)

    def read(self, picture: Tensor, channels: int | None = None) -> Tensor:
        return self.operators[-1].read(picture, channels or self.channels())

    def read_masks(self, masks: Tensor) -> Tensor:
        return self.operators[-1].read_masks(masks)

    def measurement_size(self, size: Size) -> Size:
        for f in self.operators:
            size = f.measurement_size(size)
        return size

    def image_size(self, y: Tensor) -> Size:
        for f in reversed(self.operators):
            size = f.image_size(y)
            y = y.new_empty((0, 1, *size))
        return size

    def channels(self, image_channels: int = 3) -> int:
        for f in self.operators:
            image_channels = f.channels(image_channels)
        return image_channels

    def hint(self, y: Tensor) -> Tensor:
        for f in reversed(self.operators):
            y = f.hint(y)
        return y

    def spec(self) -> dict[str, Any]:
        return {"operator": self.name, "operators": [f.spec() for f in self.operators]}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Compose:
        from . import from_spec

        return cls(tuple(from_spec(spec, find) for spec in settings["operators"]))

    def describe(self) -> str:
        return f"Compose[{', '.join(f.describe() for f in self.operators)}]"
