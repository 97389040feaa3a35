"""What every degradation y = f(x) has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property
from numbers import Real
from pathlib import Path
from reprlib import Repr
from typing import Any, ClassVar

import torch
from torch import Tensor

from .banded import Band, band
from .colour import luma
from .kept import Kept

Size = tuple[int, int]
Find = Callable[[str], Path]  # the weights file of that name, from the folders where the caller keeps them


SHORT = Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80


def shown(value: Any) -> str:
    """`value` for an error message: its repr, cut to 80 characters, which takes no longer for a large value than for a small one."""
    try:
        text = SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists without end
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(name: str, value: Any, least: int, most: int | None = None, odd: bool = False) -> int:
    """`value` as an int. Raises ValueError, naming it, unless it is a whole number of at least `least` and, if given, at most `most`."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    wrong = isinstance(value, (str, bool)) or (odd and number is not None and number % 2 == 0)
    if wrong or number is None or number != value or number < least or (most is not None and number > most):
        limits = f"{'be odd and ' * odd}at least {least}{f' and at most {most}' if most is not None else ''}"
        raise ValueError(
            f"{name} is {shown(value)}; it must {limits}" if odd else f"{name} is {shown(value)}; it must be a whole number of {limits}"
        )
    return number


def _within(value: Any, most: float, above: float | None) -> bool:
    return -most <= value <= most if above is None else above < value <= most


def real(name: str, value: Any, most: float, above: float | None = 0.0, unit: str = "") -> float:
    """`value`, as it is if it is an int or a float. Raises ValueError, naming it, unless it is a number in (`above`, `most`].

    With `above` None it may be negative, down to -`most`. `unit`: its plural, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not _within(value, most, above):
        limits = f"from {-most:g} to {most:g}" if above is None else f"above {above:g} and at most {most:g}"
        raise ValueError(f"{name} is {shown(value)}{f' {unit}' * bool(unit)}; it must be a number {limits}")
    return value if isinstance(value, (int, float)) else float(value)


def size_of(image: Tensor) -> Size:
    """(H, W) of a picture or a measurement (..., H, W)."""
    height, width = image.shape[-2:]
    return height, width


def in_words(title: str, settings: Mapping[str, Any]) -> str:
    """An operator and its settings for people: `Gaussian Blur (kernel_size 61, sigma 3.0)`."""
    return f"{title} ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else title


def check_batch(y: Tensor, batch: int) -> None:
    """Raises ValueError unless there is one measurement y, or one for each of `batch` latents or pictures."""
    if y.ndim == 0 or len(y) not in (1, batch):
        raise ValueError(
            f"measurement: {len(y) if y.ndim else 0} measurements for a batch of {batch}; give one, or one for each sample of the batch"
        )


class Operator:
    """A degradation f: image (B, 3, H, W) in [-1, 1] -> measurement y (B, c, h, w), and what a solver has to know about it.

    Subclasses are frozen dataclasses. `linear` operators map zero to zero and have a true adjoint: <f(x), y> = <x, f^T(y)>.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    title: ClassVar[str] = ""  # what people are told it is, its name without one
    linear: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...] | None] = None  # names of the fields in spec(); all of them unless said otherwise
    noise: float = 0.0  # standard deviation of the measurement's noise, in the units of [-1, 1] images, if it is known
    parts: tuple[Operator, ...] = ()  # the operators that this one is made of

    def __call__(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def measure(self, image: Tensor) -> Tensor:
        """The noiseless measurement of a clean image: f(x), unless f gives scores of what is measured."""
        return self(image)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        """f^T(y), an image of `size` (H, W), in the channels of f's input. Linear operators only."""
        raise NotImplementedError(f"{self.name} has no adjoint: it is not linear")

    def check_size(self, y: Tensor, size: Size) -> None:
        """Raises ValueError unless y is of the height and width that f gives an image of `size`."""
        wanted = tuple(self.measurement_size(size))
        if size_of(y) != wanted:
            raise ValueError(
                f"measurement: it is {y.shape[-1]}x{y.shape[-2]}, and {self.describe()} makes {wanted[1]}x{wanted[0]} of a picture of {size[1]}x{size[0]}"
            )

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """||y_hat - y||, the plain l2 norm (not squared, not a mean) of every sample, (B,) float32 (Eq. 3).

        y_hat: (B, c, h, w), what f makes of an image; y: the measurement, of that shape, or (1, c, h, w). Raises ValueError for others.
        """
        self.check_pair(y_hat, y)
        return torch.linalg.vector_norm(self.difference(y_hat, y).float().flatten(1), dim=1)

    @property
    def bare(self) -> Operator:
        """f without what is known of its measurement's noise."""
        return self

    def excess(self, distance: Tensor, y: Tensor) -> Tensor:
        """What the measurement's known noise does not explain of a distance (B,) by `bare`: `distance`."""
        return distance

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """y_hat - y, (B, c, h, w), 0 where nothing was measured. Raises NotImplementedError where the two are not values to subtract."""
        return y_hat - y

    def elements(self, y: Tensor) -> Tensor:
        """How many values of every sample `distance` compares, (B,) float32."""
        return torch.full((len(y),), float(y[0].numel()), device=y.device)

    def check(self, size: Size, batch: int = 1) -> None:
        """Raises ValueError for images that f cannot take, without computing anything."""
        self.measurement_size(size)

    def check_pair(self, y_hat: Tensor, y: Tensor) -> None:
        """Raises ValueError unless y is shaped as y_hat behind the batch, of which it may have one sample or as many."""
        if y.shape[1:] != y_hat.shape[1:]:
            raise ValueError(
                f"measurement: it has shape {tuple(y.shape)}, and {self.describe()} makes {tuple(y_hat.shape)} of the restored picture; "
                "channels, height and width must be the same"
            )
        check_batch(y, len(y_hat))

    def check_measurement(self, y: Tensor, image_channels: int = 3) -> None:
        """Raises ValueError unless y (B, c, h, w) can be a measurement of images with that many channels, without computing anything."""
        if y.ndim != 4 or 0 in y.shape:
            raise ValueError(f"measurement: it has shape {tuple(y.shape)}; it must be (B, c, h, w), and none of them 0")
        self.measurement_size(self.image_size(y))
        wanted = self.channels(image_channels)
        if y.shape[1] != wanted:
            raise ValueError(f"measurement: it has {y.shape[1]} channel(s), and {self.describe()} measures {wanted}")

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        """(1 or B, 1, h, w) on the CPU, 1 where a measurement holds nothing of the image, 0 elsewhere; None if it holds something everywhere.

        before: the same of the image, for an operator that comes after others, and channels: how many that image has.
        """
        return None

    def seen(self, y: Tensor) -> Tensor:
        """y with 0 where it holds nothing of the image, so that whatever a damaged picture shows there counts nowhere."""
        visible = self._visible(y)
        return y if visible is None else y * visible

    def _visible(self, y: Tensor) -> Tensor | None:
        """1 where a measurement like y holds something of the image, 0 elsewhere; None if that is everywhere."""
        hidden = self.hidden()
        if hidden is None:
            return None
        if hidden.shape[-2:] != y.shape[-2:]:
            (h, w), size = hidden.shape[-2:], size_of(y)
            raise ValueError(f"{self.name}: the measurement is {size[1]}x{size[0]}; with this mask it must be {w}x{h}")
        if len(hidden) not in (1, len(y)):
            raise ValueError(f"{self.name}: {len(hidden)} masks for a batch of {len(y)} pictures; give one mask or one per picture")
        return self.kept(("visible", y.dtype, y.device), lambda: 1 - hidden.to(y))

    @cached_property
    def kept(self) -> Kept:
        """What this operator computes once for all calls: kept(key, make)."""
        return Kept()

    def to(self, device: torch.device | str) -> Operator:
        """This operator, with its network, if it has one, on `device`. What it keeps on others is dropped."""
        self.kept.only_on(device)
        return self

    def measurement_size(self, size: Size) -> Size:
        """(h, w) of the measurement of an image of `size`. Raises ValueError for an image that f cannot take."""
        return size

    def image_size(self, y: Tensor) -> Size:
        """(H, W) of the images whose measurement is shaped like y. Raises ValueError where there are none."""
        return size_of(y)

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
        """One line for people, such as `Super-Resolution (scale 8)`."""
        return in_words(self.title or self.name, {name: value for name, value in self.spec().items() if name != "operator"})


def nothing_left(count: Tensor) -> Tensor | None:
    """1 where `count`, how many known pixels a measured one is made of, is below one half; None if that is nowhere."""
    hidden = (count < 0.5).float()
    return hidden if hidden.any() else None


class Separable(Operator):
    """f(x) = M_h x M_w^T for every channel: a matrix for the rows and one for the columns, so that the adjoint is their transposes.

    A measured pixel is made of the few around it, so that the matrices are zero but near their diagonals.
    """

    def taps(self, length: int) -> tuple[Tensor, Tensor]:
        """Along one axis: which of `length` pixels a measured one is made of, (measured, k), and their float64 weights, (measured, k)."""
        raise NotImplementedError

    def matrix(self, length: int) -> Tensor:
        """The (measured, length) float64 matrix along one axis, on the CPU."""
        index, weights = self.taps(length)
        return torch.zeros(len(index), length, dtype=torch.float64).scatter_add_(1, index, weights.contiguous())

    def _band(self, length: int, like: Tensor) -> Band:
        return self.kept(("band", length, like.dtype, like.device), lambda: band(*self.taps(length), length).to(like))

    def _bands(self, size: Size, like: Tensor) -> list[Band]:
        self.measurement_size(size)
        return [self._band(n, like) for n in size]

    def __call__(self, image: Tensor) -> Tensor:
        rows, columns = self._bands(size_of(image), image)
        return columns.times(rows.times(image).mT).mT.contiguous()

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        self.check_size(y, size)
        rows, columns = self._bands(size, y)
        return columns.transposed_times(rows.transposed_times(y).mT).mT.contiguous()

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        if before is None:
            return None
        rows, columns = (g._replace(blocks=(g.blocks != 0).to(before)) for g in self._bands(size_of(before), before))
        return nothing_left(columns.times(rows.times(1 - before).mT).mT)


def squared_norm(f: Operator, size: Size, y: Tensor, iterations: int = 30) -> Tensor:
    """Largest eigenvalue of f^T f for every sample, (B, 1, 1, 1), by power iteration from a fixed start, to a few per cent from below.

    y (B, c, h, w) is an example of a measurement. The start is positive, as the pictures that blurs and averages shrink least are.
    """
    with torch.no_grad():
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(y).expand(len(y), -1, -1, -1)
        for _ in range(iterations):
            x = f.adjoint(f(x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)), size)
        return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
