"""Dynamic VRAM: weights that come and go while a network runs, which autograd cannot use.

Under dynamic VRAM (ComfyUI 0.16 and later, the default on NVIDIA) the parameters of a network stay in the file's precision on the CPU, and every
layer is handed its weights in a buffer that the next layer overwrites. A backward pass would read what came later. So a run with gradients
works on copies that a plain patcher loads whole, and gives them back at its end.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from .controlnet import with_controls

Static = Callable[[Any], Any]  # a patcher -> the patcher to use instead

# What dynamic VRAM leaves on modules and on the model: handles into buffers of its own, which a copy must not share.
MODULE_STATE = ("_v", "_v_signature", "_v_weight", "_v_bias", "_v_block", "_prefetch", "_pin_state", "_pins", "_pin")
MODULE_STATE += ("weight_lowvram_function", "bias_lowvram_function", "comfy_cast_weights", "weight_function", "bias_function")
EMPTY = ()
MODEL_STATE = ("dynamic_vbars", "dynamic_pins", "dynamic_patchers", "current_weight_patches_uuid")
MODEL_STATE += ("model_loaded_weight_memory", "lowvram_patch_counter", "model_lowvram", "model_offload_buffer_memory")


def is_dynamic(patcher: Any) -> bool:
    """Whether a patcher of ComfyUI, or anything else, moves its weights about while its network runs."""
    ask = getattr(patcher, "is_dynamic", None)
    return callable(ask) and bool(ask())


def check_static(patchers: list) -> None:
    """Raises RuntimeError for patchers through which a gradient would be wrong without a sign."""
    for patcher in patchers:
        if is_dynamic(patcher):
            raise RuntimeError(
                f"{type(patcher.model).__name__} is managed by ComfyUI's dynamic VRAM, which overwrites weights that gradients need. "
                "Start ComfyUI with --disable-dynamic-vram, or leave out the node that added this model"
            )


@contextmanager
def static_patchers() -> Iterator[Static]:
    """Yields a function: patcher -> one without dynamic VRAM, of the same weights, patches and options; itself if it has none.

    Copies are made once for each network, and given back when the context ends.
    """
    copies: dict[nn.Module, nn.Module] = {}
    made = []

    def static(patcher: Any) -> Any:
        if not is_dynamic(patcher):
            return patcher
        if patcher.model not in copies:
            unload(patcher)  # the weights are the file's again, without another clone's patches
            copies[patcher.model] = _copied(patcher)
        plain = comfy.model_patcher.ModelPatcher(copies[patcher.model], patcher.load_device, patcher.offload_device)
        made.append(patcher.clone(disable_dynamic=True, model_override=plain.get_clone_model_override()))
        made[-1].size = 0  # of the copy in its own precision, not of the file
        return made[-1]

    try:
        yield static
    finally:
        for patcher in made:
            unload(patcher)
        if made:
            for module in itertools.chain.from_iterable(model.modules() for model in copies.values()):
                module._parameters.clear()  # whoever still holds the network, a traceback say, holds no memory
            made.clear()
            copies.clear()
            gc.collect()
            comfy.model_management.soft_empty_cache()


def static_controls(conds: dict[str, list[dict]], static: Callable) -> dict[str, list[dict]]:
    """The conditioning with copies of those ControlNets, T2I adapters and control LoRAs whose weights move while they run."""

    def at_rest(control: Any, previous: Any) -> Any:
        moving = {name: value for name, value in vars(control).items() if is_dynamic(value)}
        own = control
        if moving or previous is not control.previous_controlnet:
            own = control.copy()
            own.set_previous_controlnet(previous)
            for name, patcher in moving.items():
                plain = static(patcher)
                changed = {other: plain.model for other, value in vars(own).items() if value is patcher.model}
                vars(own).update({**changed, name: plain})
        return own

    return with_controls(conds, at_rest)


def unload(patcher: Any) -> None:
    """ComfyUI forgets that the patcher's network is loaded, under whatever clone it was."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if entry.model is not None and patcher.is_clone(entry.model)]:
        entry.model_unload()
        loaded.remove(entry)


def _copied(patcher: Any) -> nn.Module:
    """The patcher's network with weights of its own, in the precision that the host computes in."""
    model = patcher.model
    memo: dict[int, Any] = {}
    if hasattr(model, "model_config"):  # says what the model is, and does not change
        memo[id(model.model_config)] = model.model_config
    for module in model.modules():
        memo.update(_left_out(module, MODULE_STATE))
        for tensors, wrap in ((module._parameters, _parameter), (module._buffers, _unchanged)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    memo[id(tensor)] = wrap(_own(tensor, vars(module).get(f"{name}_comfy_model_dtype")))
    memo.update(_left_out(model, (*MODEL_STATE, "current_patcher")))  # the patcher of a run is None between runs
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise RuntimeError(
            f"{type(model).__name__} is managed by ComfyUI's dynamic VRAM, which overwrites weights that gradients need, and it cannot be "
            f"copied ({error}). Start ComfyUI with --disable-dynamic-vram"
        ) from error
    for module in twin.modules():
        _forget(module, MODULE_STATE)
    _forget(twin, MODEL_STATE)
    return twin


def _left_out(module: nn.Module, names: tuple[str, ...]) -> dict[int, None]:
    """Entries of deepcopy's memo for the attributes of that name. Small values are shared by everybody: their entries would hide them elsewhere."""
    found = (vars(module).get(name) for name in names)
    return {id(value): None for value in found if not isinstance(value, (type(None), bool, int, float, str)) and value is not EMPTY}


def _forget(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        vars(module).pop(name, None)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_meta:  # absent from the file: what the host makes of it when it is first used
        return torch.zeros(tensor.shape, dtype=dtype or tensor.dtype)
    if dtype is None or type(tensor) not in (Tensor, nn.Parameter):  # a quantised tensor knows its precision itself
        return tensor.clone()
    return tensor.to(dtype, copy=True)
