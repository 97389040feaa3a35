"""What an operator computes once and uses at every call, such as kernels in a picture's dtype on its device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

MOST = 2**27  # bytes that one operator keeps: taps and indices are some kB, the largest spectrum of a kernel (4096 x 4096) half of it


def tensors_in(value: Any) -> list[Tensor]:
    """A tensor, or all in tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def size_in_bytes(value: Any) -> int:
    return sum(t.nbytes for t in tensors_in(value))


class Kept:
    """Values by key. The ones used last stay, up to `most` bytes in all; a larger one is made whenever it is asked for."""

    def __init__(self, most: int = MOST):
        self.most = most
        self._values: dict[Hashable, Any] = {}  # the one used last is the last

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, from make() if it is not there: a tensor without gradient, or tuples of them."""
        if key in self._values:
            self._values[key] = self._values.pop(key)
            return self._values[key]
        with torch.inference_mode(False), torch.no_grad():  # a host may call this under inference mode, and what is kept outlives that
            value = make()
        if (size := size_in_bytes(value)) <= self.most:
            while self.bytes() + size > self.most:
                self._values.pop(next(iter(self._values)))
            self._values[key] = value
        return value

    def only_on(self, device: torch.device | str) -> None:
        """Forgets what is on other devices, so that a run's end leaves nothing in the memory of its GPU."""
        device = torch.device(device)
        self._values = {key: value for key, value in self._values.items() if all(t.device == device for t in tensors_in(value))}

    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(map(size_in_bytes, self._values.values()))
