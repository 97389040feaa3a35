"""Files of a training, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operators.weights import read_tensors
from .keys import DIFFUSERS_MARK, LDM_MARK, to_ldm
from .metadata import CSEMetadata, read_metadata

STATE_SUFFIX = ".training"  # no suffix that hosts list among models
PREFIX = "control_model."


class SaveError(OSError):
    """A file could not be written; what was there before still is."""


def _whole(path: Path, write) -> None:
    """Let `write` make the file under another name first, then put it in place of the old one."""
    from safetensors import SafetensorError

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)  # safetensors lets nobody else read it, and a server may run as somebody else
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):  # as where the folder could not be made
            part.unlink()
        before = "; the file of the last save is untouched" if path.exists() else ""
        raise SaveError(f"{path} could not be written (is the disk full?){before}: {error}") from error


def write_cse(path: Path, weights: Mapping[str, Tensor], metadata: CSEMetadata, dtype: torch.dtype = torch.float16) -> None:
    """A ControlNet's weights (original names) with what is known about them, as ComfyUI and CSEControlNetLoader read them."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in weights.items()}
    _whole(Path(path), lambda part: save_file(state, part, metadata.write()))


def read_cse(path: Path) -> tuple[dict[str, Tensor], CSEMetadata | None]:
    """(weights under the original names, what the file says about itself or None) of a ControlNet of either format.

    Raises ValueError, naming the file, for one that is no ControlNet.
    """
    from safetensors import safe_open

    path = Path(path)
    weights = read_tensors(path)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    described = None
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, "pt") as file:
            described = file.metadata()
    try:
        metadata = read_metadata(described)
        if DIFFUSERS_MARK in weights:
            weights = to_ldm(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if LDM_MARK not in weights:
        raise ValueError(f"{path} is no ControlNet of the Stable Diffusion family: there is no {LDM_MARK} in it")
    return weights, metadata


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """All that a training needs to go on: tensors, numbers, texts, and lists and dicts of them."""
    _whole(Path(path), lambda part: torch.save(dict(state), part))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote. Nothing in the file is executed. Raises ValueError for a damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes mean
        raise ValueError(f"{path} is not a training state that can be read ({type(error).__name__}); remove it to start again") from error


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, naming what differs, if what is at `path` was begun with other settings than are wanted now."""
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        listed = "; ".join(f"{name} was {_short(found.get(name))} and is {_short(wanted[name])}" for name in different)
        raise ValueError(f"{path} has other settings: {listed}. Choose another name, or remove it to start again")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
