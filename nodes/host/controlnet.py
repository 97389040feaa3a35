"""CSEs as ComfyUI's ControlNets: load one, attach it to a conditioning, and check what it was made for."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.utils
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor
from torch.nn import functional as F

from ...dmap_core.cse.checkpoint import read_controlnet
from ...dmap_core.cse.metadata import CSEMetadata
from ...dmap_core.cse.network import encoder_shapes
from ...dmap_core.operators import Operator
from ...dmap_core.weights import check_tensors
from .prior import prediction_of

log = logging.getLogger(__name__)
FROM_FILE = "from file"
TAG = "dmap_cse"  # attribute of a loaded network, which all copies of a CONTROL_NET share
LATENT_INPUT = "input_blocks.0.0.weight"


def load_cse(path: Path) -> tuple[Any, CSEMetadata | None]:
    """(CONTROL_NET, what the file says about itself or None). Every ControlNet node is to give it a hint in [0, 1], whatever it was trained with.

    Raises ValueError, naming the file, for one that lacks tensors or has some of another shape: ComfyUI itself would leave those uninitialised.
    """
    weights, metadata = read_controlnet(path)
    try:
        control = comfy.controlnet.load_controlnet_state_dict(dict(weights))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"cse: {path.name} is no ControlNet that ComfyUI can build: tensors are missing or do not fit together ({reason})"
        ) from error
    if control is None:
        raise ValueError(f"cse: {path.name} is no ControlNet that ComfyUI knows")
    check_tensors(control.control_model.state_dict(), weights, "its ControlNet", path)
    if metadata and metadata.hint_range == "-1..1":
        control.preprocess_image = _signed
    setattr(control.control_model, TAG, (path.name, metadata))
    return control, metadata


def _signed(hint: Tensor) -> Tensor:
    return hint * 2 - 1


def _unchanged(hint: Tensor) -> Tensor:
    return hint


def description(control: Any) -> tuple[str, CSEMetadata | None]:
    """(file name, metadata) of a CONTROL_NET; ("", None) for one that another node loaded."""
    return getattr(getattr(control, "control_model", None), TAG, ("", None))


def blocked(message: str) -> ExecutionBlocker:
    """An output that stops the nodes behind it, and only those, with a message."""
    return ExecutionBlocker(message)


def attach(conditioning: list, control: Any, hint: Tensor, strength: float, start: float, end: float, hint_range: str = FROM_FILE) -> list:
    """The conditioning with the CSE added, for the negative one too. hint: (B, 3, H, W) in [0, 1]; its edges are repeated up to whole latents."""
    h, w = (-n % control.compression_ratio for n in hint.shape[-2:])
    hint = F.pad(hint, (0, w, 0, h), mode="replicate")
    out = []
    for tensor, values in conditioning:
        own = control.copy().set_cond_hint(hint, strength, (start, end))
        own.set_previous_controlnet(values.get("control"))
        if hint_range != FROM_FILE:
            own.preprocess_image = _signed if hint_range == "-1..1" else _unchanged
        out.append([tensor, {**values, "control": own, "control_apply_to_uncond": True}])
    return out


def controls_of(conds: dict[str, list[dict]]) -> Iterator[Any]:
    """The ControlNets, T2I adapters and control LoRAs of the conditioning, with those chained before them."""
    for cond in itertools.chain(*conds.values()):
        control = cond.get("control")
        while control is not None:
            yield control
            control = control.previous_controlnet


WHOLE = {"area": "areas", "mask": "a mask"}  # of a conditioning: what is made for the whole picture


def untied(conds: dict[str, list[dict]]) -> str | None:
    """What of the conditioning cannot be cut into tiles, for people; None if all of it can."""
    for cond in itertools.chain(*conds.values()):
        for name, words in WHOLE.items():
            if cond.get(name) is not None:
                return words
    for control in controls_of(conds):
        cuttable = isinstance(control, comfy.controlnet.ControlNet) and not control.global_average_pooling
        if not cuttable or control.vae is not None or control.latent_format is not None or control.extra_concat_orig:
            return f"{type(control).__name__} {description(control)[0]}".rstrip()
    return None


def cut(conds: dict[str, list[dict]], part: tuple[slice, slice], size: Sequence[int]) -> dict[str, list[dict]]:
    """The conditioning of a tile: ControlNets, made ready for a run, see that part of their hint. size: (h, w) of the whole latents."""

    def of_part(control: Any, previous: Any) -> Any:
        own = copy.copy(control)
        rows, columns = (slice(control.compression_ratio * s.start, control.compression_ratio * s.stop) for s in part)
        height, width = (control.compression_ratio * n for n in size)
        hint = comfy.utils.common_upscale(control.cond_hint_original, width, height, control.upscale_algorithm, "center")
        own.cond_hint_original, own.cond_hint = hint[..., rows, columns], None
        own.previous_controlnet = previous
        return own

    return with_controls(conds, of_part)


def with_controls(conds: dict[str, list[dict]], own: Callable[[Any, Any], Any]) -> dict[str, list[dict]]:
    """The conditioning with own(control, what stands in the place of the one chained before it) for every ControlNet, each asked once."""
    twins: dict[int, Any] = {}

    def twin(control: Any) -> Any:
        if control is not None and id(control) not in twins:
            twins[id(control)] = own(control, twin(control.previous_controlnet))
        return control and twins[id(control)]

    return {
        name: [{**cond, "control": twin(cond["control"])} if cond.get("control") else cond for cond in listed]
        for name, listed in conds.items()
    }


def check_base(control: Any, model: Any, name: str) -> None:
    """Raises ValueError for a ControlNet made for another kind of base model. Adapters of other architectures are not looked at."""
    network = getattr(control, "control_model", None)
    if not isinstance(network, comfy.cldm.cldm.ControlNet):
        return
    file, metadata = description(control)
    which = f"the ControlNet {file}".rstrip()
    theirs, ours = encoder_shapes(network.state_dict()), encoder_shapes(model.model.diffusion_model.state_dict())
    # models for inpainting and editing read more channels; ControlNets are given the latents alone
    theirs, ours = ({**shapes, LATENT_INPUT: shapes.get(LATENT_INPUT, ())[:1]} for shapes in (theirs, ours))
    different = next((key for key in theirs if ours.get(key) != theirs[key]), None) or next(
        (key for key in ours if key not in theirs), None
    )
    if different:
        raise ValueError(
            f"{name}: {which} was made for another base model: {different} is {theirs.get(different, 'absent')} in it and "
            f"{ours.get(different, 'absent')} in the model. Load the one for {type(model.model).__name__} models, or the checkpoint that it was trained on"
            f"{f' ({metadata.base})' if metadata else ''}"
        )
    kind = prediction_of(model)
    if metadata and metadata.prediction != kind:
        raise ValueError(
            f"{name}: {which} was trained on a {metadata.prediction}-prediction model ({metadata.base}), and this model predicts {kind}. "
            "Load the checkpoint that it was trained on, or one of its relatives"
        )


def check_controls(conditioning: list, model: Any, operator: Operator, name: str) -> list[str]:
    """Warnings about the CSEs in a conditioning: those trained for another operator. Raises ValueError for those of another base model."""
    warnings = []
    for _, values in conditioning:
        control = values.get("control")
        while control is not None:
            check_base(control, model, name)
            file, metadata = description(control)
            warning = metadata.other_operator(operator, file) if metadata else ""
            if warning and warning not in warnings:
                log.warning("%s: %s", name, warning)
                warnings.append(warning)
            control = control.previous_controlnet
    return warnings
