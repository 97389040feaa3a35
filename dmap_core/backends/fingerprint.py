"""What tells checkpoints apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLED = 1024  # values of a tensor that a fingerprint looks at


def fingerprint(unet: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that tell UNets (original names) apart: SHA-256 of values of every tensor, spread over it, in half precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.items()):
        values = tensor.detach().flatten()
        digest.update(name.encode())
        digest.update(values[:: max(1, len(values) // SAMPLED)].to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
