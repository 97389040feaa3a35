"""A measurement with noise of a known size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .base import Find, Operator, Size, real, shown
from .compose import Compose, check_extent

LOUDEST = 1000.0  # sigma: a thousand times the range of picture values


@dataclass(frozen=True)
class Noisy(Operator):
    """y = f(x) + noise, white and Gaussian, f being `operator`. Calling it is f alone: only who makes a measurement adds noise.

    sigma: the noise's standard deviation (above 0, at most 1000) in picture values 0 .. 1, so 5 / 255 is 5 levels of 8 bits. `noise` is the same in the
    units of [-1, 1] images, twice as much.
    Raises ValueError for another sigma, and for an operator that is noisy itself.
    """

    operator: Operator
    sigma: float

    title = "Known Noise"

    def __post_init__(self):
        if not isinstance(self.operator, Operator):
            raise ValueError(f"Noisy: operator is {shown(self.operator)}; it must be the operator whose measurement is noisy")
        if self.operator.noise:
            raise ValueError(f"Noisy: {self.operator.describe()} is noisy already; give it the sigma of all the noise")
        object.__setattr__(self, "sigma", float(real("Noisy: sigma", self.sigma, LOUDEST, unit="(picture values 0..1)")))
        check_extent(self)

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)

    @property
    def noise(self) -> float:
        return 2 * self.sigma

    @property
    def linear(self) -> bool:
        return self.operator.linear

    def __call__(self, image: Tensor) -> Tensor:
        return self.operator(image)

    def measure(self, image: Tensor) -> Tensor:
        return self.operator.measure(image)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        return self.operator.adjoint(y, size)

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """max(0, ||y_hat - y|| - sqrt(m) noise) of every sample, (B,) float32, m values being compared (Morozov's discrepancy principle).

        The noise alone puts the true f(x) about sqrt(m) noise from y. Closer than that there is only noise to fit: the gradient is zero.
        """
        return self.excess(self.operator.distance(y_hat, y), y)

    @property
    def bare(self) -> Operator:
        return self.operator

    def excess(self, distance: Tensor, y: Tensor) -> Tensor:
        return torch.relu(distance - self.operator.elements(y).sqrt() * self.noise)

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.operator.difference(y_hat, y)

    def elements(self, y: Tensor) -> Tensor:
        return self.operator.elements(y)

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        return self.operator.hidden(before, channels)

    def seen(self, y: Tensor) -> Tensor:
        return self.operator.seen(y)

    def check(self, size: Size, batch: int = 1) -> None:
        self.operator.check(size, batch)
        y = torch.zeros(()).expand(batch, self.channels(), *self.measurement_size(size))
        try:
            self.elements(y)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"operator: known noise belongs to measured values, and {self.operator.describe()} does not compare any: {error}"
            ) from error

    def to(self, device: torch.device | str) -> Noisy:
        return replace(self, operator=self.operator.to(device))

    def measurement_size(self, size: Size) -> Size:
        return self.operator.measurement_size(size)

    def image_size(self, y: Tensor) -> Size:
        return self.operator.image_size(y)

    def channels(self, image_channels: int = 3) -> int:
        return self.operator.channels(image_channels)

    def hint(self, y: Tensor) -> Tensor:
        return self.operator.hint(y)

    def picture(self, y: Tensor) -> Tensor:
        return self.operator.picture(y)

    def read(self, picture: Tensor, channels: int | None = None) -> Tensor:
        return self.operator.read(picture, channels)

    def read_masks(self, masks: Tensor) -> Tensor:
        return self.operator.read_masks(masks)

    def spec(self) -> dict[str, Any]:
        return {"operator": self.name, "of": self.operator.spec(), "sigma": self.sigma}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Noisy:
        from . import from_spec

        rest = dict(settings)
        return cls(from_spec(rest.pop("of"), find), **rest)

    def describe(self) -> str:
        return f"{self.title} ({self.operator.describe()}, sigma {self.sigma})"


def parts(operator: Operator) -> list[Operator]:
    """The operators that an operator applies one after the other."""
    if isinstance(operator, Noisy):
        return parts(operator.operator)
    return [g for f in operator.operators for g in parts(f)] if isinstance(operator, Compose) else [operator]
