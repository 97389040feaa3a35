"""What makes loaded networks ready for gradients: weights, attention, quantised and fast layers as autograd needs them.

Nodes run under torch.inference_mode(), where no graph is recorded, on weights that autograd may not save; some attention back ends drop
gradients, and so do nodes that reuse outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...dmap_core.memory import blocks_of, wrapped
from .static import check_static

IN_PLACE = ("DoubleStreamBlock", "SingleStreamBlock")  # classes of blocks that add to their input in place
# Keys of the wrappers by which nodes of ComfyUI reuse outputs of earlier steps, and the names of those nodes.
CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
QUANTISED_GRADIENT = 0.2  # relative error of a quantised layer's gradient above which it is not one: rounding makes a few per cent

# By name: the host may prefer cuDNN's, and other back ends may be registered that have no backward pass.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def normal(value: Any) -> Any:
    """The same nested lists, tuples and dicts with every inference tensor replaced by a copy that autograd may save."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {k: normal(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(normal(v) for v in value)
    return value


@contextmanager
def frozen(networks: list[nn.Module]) -> Iterator[None]:
    """Weights of the networks can stand in a graph but get no gradient themselves; values and flags are afterwards what they were."""
    flagged = []
    for network in networks:
        for module in network.modules():
            for name, p in module._parameters.items():
                if p is not None and p.is_inference():
                    host_notes = vars(p)  # the precision that the host reserves memory for, for one
                    p = module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
                    vars(p).update(host_notes)
                if p is not None and p.requires_grad:
                    p.requires_grad_(False)
                    flagged.append(p)
            for name, b in module._buffers.items():
                if b is not None and b.is_inference():
                    module._buffers[name] = b.clone()
    try:
        yield
    finally:
        for p in flagged:
            p.requires_grad_(True)


def pytorch_attention(
    func: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask=None,
    attn_precision=None,
    skip_reshape=False,
    skip_output_reshape=False,
    **kwargs,
) -> Tensor:
    """ComfyUI's attention, called as its overrides are, on back ends of PyTorch through which gradients flow.

    q, k, v: (B, tokens, heads * width), or (B, heads, tokens, width) with skip_reshape; the result likewise with skip_output_reshape.
    """
    if not skip_reshape:
        q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    extra = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    with sdpa_kernel(ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@contextmanager
def differentiable_attention(networks: list[nn.Module]) -> Iterator[None]:
    """Attention with gradients in networks that the host gives no options, as it does ControlNets."""

    def with_override(module: nn.Module, args: tuple) -> tuple:
        x, context, options = (*args, None, None)[:3]
        return x, context, {**(options or {}), "optimized_attention_override": pytorch_attention}

    blocks = [m for network in networks for m in network.modules() if isinstance(m, SpatialTransformer)]
    hooks = [block.register_forward_pre_hook(with_override) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def own_input(networks: list[nn.Module]) -> Iterator[None]:
    """Blocks that add to their input in place (Flux, Chroma), and the norms in them, work on copies of it.

    Autograd still needs what a norm was given, and a block that runs again on the way back needs it as it was.
    """

    def owned(value: Any) -> Any:
        # also what has no gradient yet: a sum in place may give it one
        return value.clone() if isinstance(value, Tensor) and torch.is_grad_enabled() else value

    def on_copies(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        return forward(*map(owned, args), **{name: owned(value) for name, value in kwargs.items()})

    blocks = blocks_of(networks, IN_PLACE)
    with wrapped([m for block in blocks for m in block.modules() if m is block or isinstance(m, nn.LayerNorm)], on_copies):
        yield


@contextmanager
def as_in_training(denoiser: nn.Module) -> Iterator[None]:
    """Transformers take the operations that newer hosts keep for their training node: their fast ones have no gradient. UNets have no such operations."""
    host = comfy.model_management
    if not hasattr(host, "in_training") or isinstance(denoiser, UNetModel):
        yield
        return
    before, host.in_training = host.in_training, True
    try:
        yield
    finally:
        host.in_training = before


def without_caches(model) -> tuple[Any, list[str]]:
    """(the model without nodes that reuse outputs, the names of those nodes). Raises ValueError for a model that is spread over several GPUs."""
    multigpu = getattr(model, "get_additional_models_with_key", None)
    if multigpu and multigpu("multigpu"):
        raise ValueError("model: it is spread over several GPUs, where no gradients are computed; leave out the node 'MultiGPU CFG Split'")
    found = [key for key in CACHES if any(key in by_key for by_key in model.wrappers.values())]
    if found:
        model = model.clone()
        for key in found:
            for by_key in model.wrappers.values():
                by_key.pop(key, None)
    return model, [CACHES[key] for key in found]


@contextmanager
def exact_layers(networks: list[nn.Module]) -> Iterator[None]:
    """Layers for matrix products of 8-bit floats (--fast fp8_matrix_mult), which have no gradient, compute as they do without that option."""
    fast = [m for network in networks for m in network.modules() if isinstance(m, comfy.ops.fp8_ops.Linear)]
    for layer in fast:
        layer.forward_comfy_cast_weights = functools.partial(comfy.ops.manual_cast.Linear.forward_comfy_cast_weights, layer)
    try:
        yield
    finally:
        for layer in fast:
            del layer.forward_comfy_cast_weights


def check_quantised(networks: list[nn.Module]) -> None:
    """Raises ValueError, naming the format, for quantised layers without a gradient: such a layer may stop it without a sign."""
    kinds = {}
    for module in (m for network in networks for m in network.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and is_traceable_wrapper_subclass(weight):
            kinds.setdefault(getattr(weight, "_layout_cls", type(weight).__name__), module)
    for format_, layer in kinds.items():
        weight = layer.weight
        x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
        try:
            with torch.enable_grad():
                out = layer(x.requires_grad_())
                (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
            exact = weight.dequantize().to(x.dtype).sum(0)
            error = torch.linalg.vector_norm((gradient - exact).float()) / torch.linalg.vector_norm(exact.expand_as(gradient).float())
            reason = f"its gradient is off by {100 * float(error):.0f} %" if not error < QUANTISED_GRADIENT else None
        except (RuntimeError, NotImplementedError, TypeError) as failure:
            reason = str(failure)
        if reason:
            raise ValueError(
                f"model: its weights are quantised as {format_}, through which no gradients flow here ({reason}). "
                "Load an fp16, bf16 or fp8 file of the model"
            )


def own_skip(h: Tensor, options: dict) -> Tensor:
    """The next block works on a copy: ControlNets add to skip connections in place, which autograd still needs as that block's input."""
    return h.clone() if h.requires_grad else h


def add_own_skip(transformer_options: dict) -> None:
    """Puts `own_skip` before what other nodes do with skip connections."""
    name = "input_block_patch_after_skip"
    patches = transformer_options.get("patches", {})
    transformer_options["patches"] = {**patches, name: [own_skip, *patches.get(name, [])]}


def check_whole(patchers) -> None:
    """Raises RuntimeError for models of which a part had to stay out of the GPU, or whose weights move while they run."""
    check_static(patchers)
    for patcher in patchers:
        if getattr(patcher.model, "model_lowvram", False):
            raise RuntimeError(
                f"{type(patcher.model).__name__} does not fit into the GPU's memory as a whole, which gradients need. "
                "Use a smaller picture or model, half precision weights, or unload other models first"
            )
