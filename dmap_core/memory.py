"""What autograd saves: counted against a budget, or recomputed block by block instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

SHARE = 0.75  # of the free memory that saved activations may take; the backward pass needs room for its own


class ShortOfMemory(RuntimeError):
    """Saving the activations would take more than there is."""


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """What holds the tensor's bytes. A quantised tensor is a wrapper around several others, and holds none itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


class Budget:
    """Counts the bytes that autograd saves inside `with budget.counted():` and raises ShortOfMemory where they exceed the limit."""

    def __init__(self, limit: float, networks: Iterable[nn.Module]):
        self.limit = limit
        self.saved = 0
        self._seen = {s.data_ptr() for network in networks for p in network.parameters() for s in storages(p)}

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        for storage in storages(tensor):
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.saved += storage.nbytes()
        if self.saved > self.limit:
            raise ShortOfMemory(f"activations of more than {self.limit / 2**30:.1f} GiB")
        return tensor.detach(), tensor._version  # the tensor itself would keep a graph alive that is given up

    @staticmethod
    def _unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:  # autograd checks this only where there are no hooks
            raise RuntimeError(f"a tensor {tuple(tensor.shape)} that the gradient needs was changed in place after it was saved")
        return tensor

    def counted(self):
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)


def _own(value: Any) -> Any:
    return dict(value) if type(value) is dict else value


def _checkpoint(forward, *args, **kwargs):
    """torch's checkpoint for a block whose caller goes on changing the dicts it passes, as ComfyUI's transformer_options are for every block."""

    def run(*args, **kwargs):
        return forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})  # the block may change them as well

    args, kwargs = [_own(value) for value in args], {name: _own(value) for name, value in kwargs.items()}
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def blocks_of(networks: Iterable[nn.Module], names: Collection[str]) -> list[nn.Module]:
    """The modules of the networks whose classes are called so: those that may recompute their activations."""
    return [module for network in networks for module in network.modules() if type(module).__name__ in names]


@contextmanager
def wrapped(modules: Iterable[nn.Module], wrapper: Callable[..., Any]) -> Iterator[None]:
    """A call of one of the modules is wrapper(its forward, *args, **kwargs) while the context lasts."""
    modules = dict.fromkeys(modules)
    replaced = {module: module.__dict__["forward"] for module in modules if "forward" in module.__dict__}
    for module in modules:
        # an attribute of the instance hides the method of the class; deleting it brings the method back
        module.forward = functools.partial(wrapper, module.forward)
    try:
        yield
    finally:
        for module in modules:
            if module in replaced:
                module.forward = replaced[module]
            else:
                del module.forward


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[int]:
    """The blocks recompute their activations in the backward pass while the context lasts. Yields how many there are.

    Blocks within others do it within their recomputation.
    """
    blocks = dict.fromkeys(blocks)
    with wrapped(blocks, _checkpoint):
        yield len(blocks)
