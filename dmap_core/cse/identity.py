"""What a training is: two with the same identity and seed make the same weights, wherever they run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operators import Operator, spec_in_words
from ..prior import NetworkPrior
from .settings import TrainingSettings

SAMPLED = 1024  # values of a conditioning that are kept
SAME = 0.01  # relative difference of two encodings of one prompt: text encoders round differently, in half precision by some 0.001
SHOWN = 80  # characters of a setting in a message


def digest(tensor: Tensor) -> str:
    """Tells tensors apart: 16 hexadecimal digits."""
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]


def identity(prior: NetworkPrior, settings: TrainingSettings, operator: Operator, pictures: Sequence[str]) -> dict[str, Any]:
    """What must be equal for a training to go on. pictures: what tells each from others."""
    described = {"operator": operator.spec(), "base": prior.fingerprint, "prediction": prior.prediction, "pictures": list(pictures)}
    return settings.identity() | described | {"conditioning": [_seen(tensor) for tensor in prior.conditioning()]}


def _seen(tensor: Tensor) -> dict[str, Any]:
    """Values spread over a tensor, since two encodings of one prompt are equal but for rounding."""
    values = tensor.detach().flatten()
    sampled = values[:: max(1, len(values) // SAMPLED)].to("cpu", torch.float32)
    return {"digest": digest(tensor), "shape": list(tensor.shape), "values": sampled}


def _alike(found: Any, wanted: Any) -> bool:
    """Of conditionings: equal but for rounding."""
    if len(found) != len(wanted) or any(a["shape"] != b["shape"] for a, b in zip(found, wanted, strict=True)):
        return False
    norm = torch.linalg.vector_norm
    return all(bool(norm(a["values"] - b["values"]) <= SAME * norm(b["values"])) for a, b in zip(found, wanted, strict=True))


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, naming what differs, if what is at `path` was begun with other settings than are wanted now."""
    different = [name for name in wanted if not _equal(name, found.get(name), wanted[name])]
    if different:
        listed = "; ".join(f"{name} was {_short(name, found.get(name))} and is {_short(name, wanted[name])}" for name in different)
        raise ValueError(f"{path} has other settings: {listed}. Choose another name, or remove it to start again")


def _equal(name: str, found: Any, wanted: Any) -> bool:
    return _alike(found, wanted) if name == "conditioning" and found else found == wanted


def _short(name: str, value: Any) -> str:
    if name == "operator" and isinstance(value, Mapping):
        return spec_in_words(value)
    text = " ".join(seen["digest"] for seen in value) if name == "conditioning" and value else str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
