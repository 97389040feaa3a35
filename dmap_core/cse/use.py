"""A CSE file with the base model that it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checkpoint import read_controlnet
from .loss import in_range
from .metadata import CSEMetadata

if TYPE_CHECKING:
    from ..backends.diffusers import DiffusersPrior
    from ..backends.transformer import TransformerPrior


def open_cse(path: Path, base: DiffusersPrior | TransformerPrior) -> tuple[nn.Module, CSEMetadata | None]:
    """(diffusers' ControlNet without gradients of its weights, what the file says about itself) of a CSE for this base.

    Raises ValueError, naming the file, for one that was made for another kind of base model.
    """
    weights, metadata = read_controlnet(path)
    try:
        controlnet = base.new_controlnet({name: tensor.float() for name, tensor in weights.items()})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} was made for another base model than {base.name}: {error}") from error
    if metadata and metadata.prediction != base.prediction:
        raise ValueError(
            f"{path} was trained for {metadata.prediction}-prediction, and {base.name} makes {base.prediction}-predictions; "
            f"use it with {metadata.base or 'the checkpoint that it was trained on'}"
        )
    controlnet = controlnet.requires_grad_(False).eval().to(base.device)
    dtype = base.conditioning()[0].dtype
    return controlnet if dtype == torch.float32 else controlnet.to(dtype), metadata


def hint_for(hint: Tensor, metadata: CSEMetadata | None) -> Tensor:
    """An operator's hint (B, 3, H, W) in [-1, 1] in the range that the file asks for; [0, 1], as in diffusers, where it says nothing."""
    return in_range(hint, metadata.hint_range if metadata else "0..1")
