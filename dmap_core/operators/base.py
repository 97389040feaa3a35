"""What every degradation y = f(x) has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .colour import luma

Size = tuple[int, int]
Find = Callable[[str], Path]  # the weights file of that name, from the folders where the caller keeps them


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises ValueError, naming it, unless it is a whole number of at least `least`."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if isinstance(value, str) or number is None or number != value or number < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return number


class Operator:
    """A degradation f: image (B, 3, H, W) in [-1, 1] -> measurement y (B, c, h, w), and what a solver has to know about it.

    Subclasses are frozen dataclasses. `linear` operators map zero to zero and have a true adjoint: <f(x), y> = <x, f^T(y)>.
    """

    linear: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...] | None] = None  # names of the fields in spec(); all of them unless said otherwise
    noise: float = 0.0  # standard deviation of the measurement's noise, in the units of [-1, 1] images, if it is known

    def __call__(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def measure(self, image: Tensor) -> Tensor:
        """The noiseless measurement of a clean image: f(x), unless f gives scores of what is measured."""
        return self(image)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        """f^T(y), an image of `size` (H, W), in the channels of f's input. Linear operators only."""
        raise NotImplementedError(f"{self.name} has no adjoint: it is not linear")

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """||y_hat - y||, the plain l2 norm (not squared, not a mean) of every sample, (B,) float32 (Eq. 3)."""
        return torch.linalg.vector_norm(self.difference(y_hat, y).float().flatten(1), dim=1)

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """y_hat - y, (B, c, h, w), 0 where nothing was measured. Raises NotImplementedError where the two are not values to subtract."""
        return y_hat - y

    def elements(self, y: Tensor) -> Tensor:
        """How many values of every sample `distance` compares, (B,) float32."""
        return torch.full((len(y),), float(y[0].numel()), device=y.device)

    def check(self, size: Size, batch: int = 1) -> None:
        """Raises ValueError for images that f cannot take, without computing anything."""
        self.measurement_size(size)

    def to(self, device: torch.device | str) -> Operator:
        """This operator, with its network, if it has one, on `device`."""
        return self

    def measurement_size(self, size: Size) -> Size:
        """(h, w) of the measurement of an image of `size`. Raises ValueError for an image that f cannot take."""
        return size

    def image_size(self, y: Tensor) -> Size:
        """(H, W) of the images whose measurement is shaped like y. Raises ValueError where there are none."""
        return tuple(y.shape[-2:])

    def channels(self, image_channels: int = 3) -> int:
        """Channels of the measurement of an image with that many."""
        return image_channels

    def hint(self, y: Tensor) -> Tensor:
        """The measurement as a picture (B, 3, H, W) of the image's size, the input of a conditional score estimator (Sec. 4.2)."""
        return y

    def picture(self, y: Tensor) -> Tensor:
        """The measurement as people see it, (B, 3, h, w) in [-1, 1]."""
        return y.expand(-1, 3, -1, -1) if y.shape[1] == 1 else y

    def read(self, picture: Tensor, channels: int | None = None) -> Tensor:
        """The measurement y that a picture (B, 1 or 3, h, w) in [-1, 1] shows. Raises ValueError for a picture that shows none.

        channels: those of y where f is not alone, the last part of a Compose.
        """
        wanted, given = channels or self.channels(), picture.shape[1]
        if wanted == given:
            return picture
        if wanted == 1 and given == 3:
            return luma(picture)
        raise ValueError(
            f"the picture has {given} channel(s), but {self.describe()} measures {wanted} here. "
            "For a black-and-white picture put Grayscale first in a Compose"
        )

    def read_masks(self, masks: Tensor) -> Tensor:
        """The measurement that masks (N, h, w) in [0, 1] show, for operators that measure classes."""
        raise ValueError(f"{self.describe()} measures a picture, and a mask was given; connect the damaged picture")

    @property
    def name(self) -> str:
        return type(self).__name__

    def spec(self) -> dict[str, Any]:
        """The operator as JSON values; `from_spec` is its inverse."""
        names = self.settings or tuple(f.name for f in fields(self))
        return {"operator": self.name, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Operator:
        """The operator of a spec; `find` is asked for the weights of a learned one."""
        return cls(**settings)

    def describe(self) -> str:
        """One line for people, such as `SuperResolution(scale=8)`."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.spec().items() if k != 'operator')})"


class Separable(Operator):
    """f(x) = M_h x M_w^T for every channel: a matrix for the rows and one for the columns, so that the adjoint is their transposes."""

    def matrix(self, length: int) -> Tensor:
        """The (measured, length) float64 matrix along one axis."""
        raise NotImplementedError

    def _matrices(self, size: Size, like: Tensor) -> tuple[Tensor, Tensor]:
        self.measurement_size(size)
        return tuple(self.matrix(n).to(like) for n in size)

    def __call__(self, image: Tensor) -> Tensor:
        rows, columns = self._matrices(tuple(image.shape[-2:]), image)
        return rows @ image @ columns.mT

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        rows, columns = self._matrices(size, y)
        return rows.mT @ y @ columns
