"""Several degradations, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .base import Find, Operator, Size, shown

MOST = 32  # operators that are parts of one, parts of parts included: more only come from a hostile spec
DEEPEST = 8  # how many of them are inside each other


@dataclass(frozen=True)
class Compose(Operator):
    """f = f_n ... f_2 f_1: the first operator of the list touches the image first. An old photo is grayscale, blur, downsampling.

    Raises ValueError for parts that are no operators or have noise, for none, for more than 32 in all, and for more than 8 inside each other.
    """

    operators: tuple[Operator, ...]

    title = "Compose"

    def __post_init__(self):
        if not isinstance(self.operators, (list, tuple)):
            raise ValueError(f"Compose: operators is {shown(self.operators)}; it must be a list of operators")
        object.__setattr__(self, "operators", tuple(self.operators))
        wrong = [f for f in self.operators if not isinstance(f, Operator)]
        if wrong:
            raise ValueError(f"Compose: {shown(wrong[0])} cannot be a part; only operators can")
        if not self.operators:
            raise ValueError("Compose: needs at least one operator")
        noisy = [f.title for f in self.operators if f.noise]
        if noisy:
            raise ValueError(f"Compose: {noisy[0]} cannot be a part; noise comes last, so put it around the Compose")
        check_extent(self)

    @property
    def parts(self) -> tuple[Operator, ...]:
        return self.operators

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
        """The last operator's, of what holds something of the image: pixels that an earlier Inpainting took do not count."""
        return self.operators[-1].distance(*self._seen_pair(y_hat, y))

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.operators[-1].difference(*self._seen_pair(y_hat, y))

    def _seen_pair(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._hidden is None:
            return y_hat, y
        self.operators[-1].check_pair(y_hat, y)
        return self.seen(y_hat), self.seen(y)

    def elements(self, y: Tensor) -> Tensor:
        elements, visible = self.operators[-1].elements(y), self._visible(y)
        return elements if visible is None else y.shape[1] * visible.sum(dim=(1, 2, 3), dtype=torch.float32).expand(len(y))

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        return self._hidden if before is None and channels == 3 else self._propagated(before, channels)

    @cached_property
    def _hidden(self) -> Tensor | None:
        return self._propagated(None, 3)

    def _propagated(self, before: Tensor | None, channels: int) -> Tensor | None:
        with torch.inference_mode(False), torch.no_grad():  # a host may call this under inference mode, and the cache outlives that
            for f in self.operators:
                before, channels = f.hidden(before, channels), f.channels(channels)
        return before

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
        y = self.seen(y)  # first: enlarging would carry the hole's pixels past its edge
        for f in reversed(self.operators):
            y = f.hint(y)
        return y

    def spec(self) -> dict[str, Any]:
        return {"operator": self.name, "operators": [f.spec() for f in self.operators]}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Compose:
        from . import from_spec

        rest = dict(settings)
        parts = rest.pop("operators")
        if not isinstance(parts, (list, tuple)) or rest:
            raise ValueError(f"Compose: its settings are {shown(settings)}; there must be one, operators, a list of operators")
        return cls(tuple(from_spec(spec, find) for spec in parts))

    def describe(self) -> str:
        return f"{self.title} [{', '.join(f.describe() for f in self.operators)}]"


def check_extent(f: Operator) -> None:
    """Raises ValueError for an operator of more parts than `MOST`, or more than `DEEPEST` inside each other."""
    level, count, depth = list(f.parts), 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MOST or depth > DEEPEST:
            raise ValueError(f"{f.name}: it is made of too many operators; {MOST} are the most, and {DEEPEST} inside each other")
        level = [part for g in level for part in g.parts]
