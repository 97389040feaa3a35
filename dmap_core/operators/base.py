"""What every degradation y = f(x) has in common."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

Size = tuple[int, int]


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

    def __call__(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        """f^T(y), an image of `size` (H, W), in the channels of f's input. Linear operators only."""
        raise NotImplementedError(f"{self.name} has no adjoint: it is not linear")

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """||y_hat - y||, the plain l2 norm (not squared, not a mean) of every sample, (B,) float32 (Eq. 3)."""
        return torch.linalg.vector_norm((y_hat - y).float().flatten(1), dim=1)

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
        """The measurement as a picture (B, 3, H, W) of the image's size, the input of a conditional score estimator (Sec. 4.3)."""
        return y

    @property
    def name(self) -> str:
        return type(self).__name__

    def spec(self) -> dict[str, Any]:
        """The operator as JSON values; `from_spec` is its inverse."""
        names = self.settings or tuple(f.name for f in fields(self))
        return {"operator": self.name, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Operator:
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
