"""Files of a training, written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.keys import DIFFUSERS_MARK, LDM_MARK, to_ldm
from ..files import locked, write_whole
from ..weights import read_tensors
from .identity import check_same
from .metadata import CSEMetadata, read_metadata
from .network import COPIED, check_controlnet

STATE_SUFFIX = ".training"  # no suffix that hosts list among models
FORMAT = 2  # of states: 1, without this mark, had the weights' names of whoever trained
PREFIX = "control_model."
PARTS = (
    *COPIED,
    "input_hint_block.",
    "zero_convs.",
    "middle_block_out.",
)  # hosts take other names in a file for marks of other architectures


class SaveError(OSError):
    """A file could not be written; what was there before still is."""


def _whole(path: Path, write) -> None:
    """Let `write` make the file under another name first, then put it in place of the old one."""
    from safetensors import SafetensorError

    def readable(part: Path) -> None:
        write(part)
        part.chmod(0o644)  # safetensors lets nobody else read it, and a server may run as somebody else

    try:
        write_whole(path, readable)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        before = "; the file of the last save is untouched" if path.exists() else ""
        raise SaveError(f"{path} could not be written (is the disk full?){before}: {error}") from error


@contextlib.contextmanager
def training_files(path: Path) -> Iterator[None]:
    """The file `path` and its state belong to one training: what a killed one had half written is removed, and a second one is refused (files.Busy)."""
    path = Path(path)
    with locked(path, "CSE"):
        for file in (path, path.with_suffix(STATE_SUFFIX)):
            for part in path.parent.glob(f"{glob.escape(file.name)}*.part"):
                part.unlink()
        yield


def write_cse(path: Path, weights: Mapping[str, Tensor], metadata: CSEMetadata, dtype: torch.dtype = torch.float16) -> None:
    """A ControlNet's weights (original names) with what is known about them, as ComfyUI and CSEControlNetLoader read them."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in weights.items()}
    _whole(Path(path), lambda part: save_file(state, part, metadata.write()))


def read_description(path: Path) -> CSEMetadata | None:
    """What a file says about itself, or None; its weights are not read. Raises ValueError, naming the file, for a description that is damaged."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            return read_metadata(file.metadata())
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_cse(path: Path) -> tuple[dict[str, Tensor], CSEMetadata | None]:
    """(weights under the original names, what the file says about itself or None) of a ControlNet of either format.

    Raises ValueError, naming the file, for one that is no ControlNet.
    """
    path = Path(path)
    weights = read_tensors(path)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    metadata = read_description(path)
    try:
        if DIFFUSERS_MARK in weights:
            weights = to_ldm(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if LDM_MARK not in weights:
        raise ValueError(f"{path} is no ControlNet of the Stable Diffusion family: there is no {LDM_MARK} in it")
    return weights, metadata


def read_controlnet(path: Path) -> tuple[dict[str, Tensor], CSEMetadata | None]:
    """`read_cse` of a file that a network is to be built of: nothing but a ControlNet's tensors, and none of its first ones missing."""
    weights, metadata = read_cse(path)
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(PARTS)}
    try:
        check_controlnet(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return weights, metadata


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """All that a training needs to go on: tensors, numbers, texts, and lists and dicts of them."""
    _whole(Path(path), lambda part: torch.save(dict(state), part))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote. Nothing in the file is executed. Raises ValueError for a damaged file, and for one that holds something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes mean
        raise ValueError(f"{path} is not a training state that can be read ({type(error).__name__}); remove it to start again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a training state: it holds something else; remove it to start again")
    return state


def state_of(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the training of that identity. Raises ValueError for a file of something else, or of another training."""
    state = read_state(path)
    if not isinstance(state.get("identity"), dict):
        raise ValueError(f"{path} is not a training state: it holds something else; remove it to start again")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} was written by another version of this pack, and this one cannot go on from it; end that training with the version "
            "that began it, choose another name, or remove it to start again"
        )
    check_same(state["identity"], identity, path)
    return state


@contextlib.contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Turns what a state raises that lacks something, or does not fit, into a ValueError that names the file."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} does not fit this training ({reason}); remove it to start again") from error
