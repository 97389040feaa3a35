"""Weights files of learned operators. Nobody knows who made them, so nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PICKLES = (".pth", ".pt", ".ckpt", ".tar", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
WRAPPERS = ("state_dict", "params", "model")  # what training programs call the weights in a checkpoint that holds more
# PyTorch Lightning of 2021 wrote this class itself, as a key, beside the weights (the room layout checkpoint does). An empty class in its place
# lets such files be read; nothing of Lightning is imported or run.
LIGHTNING = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
SHOWN = 3  # missing or misshaped tensors named in an error message


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch checkpoint, by name, on the CPU.

    A checkpoint may hold them one level down, under "state_dict", "params" or "model". A "module." before all the names (the mark of
    a network trained with DataParallel) is taken off. Things that are not tensors are left out.

    Raises ValueError, naming the file, where it is absent, damaged, of another kind, or cannot be read without executing code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    suffix = path.suffix.lower()
    with torch.inference_mode(False):  # a host may call this under inference mode, and autograd refuses to save what is made there
        if suffix == ".safetensors":
            found = _read_safetensors(path)
        elif suffix in PICKLES:
            found = _read_pickle(path)
        else:
            raise ValueError(f"{path} is not a weights file: its name should end in .safetensors or one of {', '.join(PICKLES)}")
    tensors = _tensors(found)
    if not tensors:
        raise ValueError(f"{path} holds no weights: no names with tensors were found in it")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a `.safetensors` file says of itself; nothing for other files. Raises ValueError for damaged ones."""
    if Path(path).suffix.lower() != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (is the download complete?): {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # Imported here, as the rest of the package needs torch alone.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (is the download complete?): {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([LIGHTNING]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever the opcodes that it happens to contain raise
        # Torch's own message is not passed on: it explains how to switch the protection off.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path} holds more than tensors ({code[1]}) and reading it could execute code, which is refused. "
                "Get it as .safetensors, or, if you trust its source, save its state dict alone with torch.save"
            ) from error
        raise ValueError(f"{path} is not a readable PyTorch checkpoint (is the download complete?): {type(error).__name__}") from error


def _tensors(found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        return {}
    inner = next((found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)), found)
    return {name: value.detach() for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Puts copies of the tensors that the network names into it, in its dtypes, then freezes it and sets eval mode; others are ignored.

    The network may be on the meta device: it then ends up on the CPU. Its parameters are new ones that autograd may save, even where
    the network was made, and this is called, under inference mode.

    Raises ValueError, naming the file, for tensors that are missing or have another shape. The count of batches that a batch norm saw
    is not asked for: old checkpoints do not have it, and only training uses it.
    """
    wanted = network.state_dict()
    check_tensors(wanted, tensors, type(network).__name__, path)
    with torch.inference_mode(False), torch.no_grad():
        state = {}
        for name, own in wanted.items():
            device = "cpu" if own.is_meta else own.device
            value = tensors.get(name, torch.zeros(own.shape))
            state[name] = value.detach().to(device, own.dtype, copy=True).contiguous()
        network.load_state_dict(state, assign=True)
    network.requires_grad_(False).eval()


def check_tensors(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], network: str, path: Path) -> None:
    """Raises ValueError, naming the file and the first tensors, where some of those that a network wants are missing or have another shape."""
    missing = [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]
    wrong = [name for name in wanted if name in tensors and not _fits(tensors[name], wanted[name])]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the {len(wanted)} tensors of {network}: {first(missing)}")
    if wrong:
        shapes = [f"{name} is {_kind(tensors[name])} and must be {_kind(wanted[name])}" for name in wrong]
        raise ValueError(f"{path} has tensors that do not fit {network}: {first(shapes)}")


def _fits(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and found.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    shape = "x".join(str(n) for n in tensor.shape) or "a single number"
    return shape if tensor.is_floating_point() else f"{shape} ({str(tensor.dtype).removeprefix('torch.')})"


def first(items: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the weights by name, as float32 numbers, 64 hexadecimal digits: the same for every file format that they are kept in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):  # which not every file has
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
