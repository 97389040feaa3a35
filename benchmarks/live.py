"""Counting under fake tensors: bytes of all live storages, and floating-point operations. Nothing is computed, so any size fits."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that an operation inside the block returns, as long as it lives.

    torch.distributed's MemTracker does the same, but hooks gradients of parameters, and those of a frozen network have none.
    Scratch memory within an operation (a convolution's workspace) is not seen. `now` and `peak` are bytes, without what was there before.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def known(self, *tensors: torch.Tensor) -> None:
        """What was there before and is returned by an operation, such as a view of a weight, does not count."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, nbytes: int) -> None:
        self.now -= nbytes


@contextmanager
def fake() -> Iterator[None]:
    """Tensors made inside have shapes and no numbers. An operator keeps what it computes: make it inside as well."""
    with FakeTensorMode():
        yield


def weight_bytes(networks: list[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for network in networks for p in [*network.parameters(), *network.buffers()])


def flop_counter() -> FlopCounterMode:
    """torch's counter, taught the attention kernel that fake tensors on a CPU take (a product counts as two operations)."""

    def forward(q, k, v, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad_out, q, k, v, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad_out, q, k, v)

    flash = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            flash._scaled_dot_product_flash_attention_for_cpu.default.overloadpacket: forward,
            flash._scaled_dot_product_flash_attention_for_cpu_backward.default.overloadpacket: backward,
        },
    )
