"""How well labels of pixels agree with a reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from .backbones import needed


def _indices(labels: Tensor, classes: int, name: str) -> Tensor:
    """(B, H, W) int64 of labels (B, 1, H, W) or (B, H, W), or a ValueError."""
    if labels.ndim == 4 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 3 or 0 in labels.shape:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; it must be (B, 1, H, W) or (B, H, W)")
    indices = labels.long()
    if not torch.isfinite(labels).all() or (indices != labels).any() or indices.min() < 0 or indices.max() >= classes:
        raise ValueError(f"{name} must hold whole numbers from 0 to {classes - 1}, the class of every pixel; it holds other values")
    return indices


def miou(labels: Tensor, reference: Tensor, classes: int = 5) -> Tensor:
    """(B,) mean intersection over union, float32 in [0, 1], higher is better. Labels: (B, 1, H, W) or (B, H, W), whole numbers.

    The mean is over the classes that are in the picture's labels or its reference: a class that both lack is no merit.
    Raises ValueError for different shapes and for other values than 0 to classes - 1, and MissingPackage.
    """
    with needed("the mean intersection over union", "torchmetrics"):
        from torchmetrics.functional.segmentation import mean_iou
    found, wanted = _indices(labels, classes, "labels"), _indices(reference, classes, "reference").to(labels.device)
    if found.shape != wanted.shape:
        raise ValueError(
            f"labels and reference have shapes {tuple(labels.shape)} and {tuple(reference.shape)}; crop one, or resize it by nearest-exact"
        )
    scores = mean_iou(found, wanted, num_classes=classes, include_background=True, per_class=True, input_format="index")
    each = torch.arange(classes, device=found.device)
    present = ((found[..., None] == each) | (wanted[..., None] == each)).flatten(1, 2).any(dim=1)
    # what torchmetrics says of absent classes has changed between its versions
    return scores.where(present, 0).sum(dim=1) / present.sum(dim=1)
