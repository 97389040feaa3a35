"""The metrics that an evaluation can ask for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .backbones import needed
from .distribution import EfficientNetFeatures, InceptionFeatures
from .reference import FeatureDistance, Lpips, psnr, ssim


@dataclass(frozen=True)
class Metric:
    """A metric of pictures. label: for tables; better: "higher" or "lower"; digits: behind the point; unit: "dB" or "".

    open(folder) returns a callable with `.to(device)`: (image, reference), both (B, 3, H, W) in [0, 1] -> (B,). folder: where weights are,
    or None. It raises backbones.MissingPackage and MissingWeights at once, before there are pictures.
    """

    name: str
    label: str
    better: str
    digits: int
    unit: str
    open: Callable[[Path | None], Callable[..., Tensor]]


@dataclass(frozen=True)
class SetMetric(Metric):
    """A metric of sets. open(folder) returns a callable with `.to(device)`, too: image (B, 3, H, W) in [0, 1] -> features (B, D).

    distance: "frechet" or "kernel", the function of `distribution` that compares the features of two sets. features: the name of what
    `open` returns; metrics that share it share the features, which need to be extracted only once.
    """

    distance: str
    features: str


class Formula:
    """A function of pictures in place of a network: it works on any device."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.function = function

    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        return self.function(image, reference)

    def to(self, device: torch.device | str) -> Formula:
        return self


def _need_torchmetrics(label: str) -> None:
    with needed(label, "torchmetrics"):
        import torchmetrics  # noqa: F401


def _psnr(folder: Path | None = None) -> Formula:
    _need_torchmetrics("PSNR")
    return Formula(psnr)


def _ssim(folder: Path | None = None) -> Formula:
    _need_torchmetrics("SSIM")
    return Formula(ssim)


def _lpips_alex(folder: Path | None = None) -> Lpips:
    return Lpips("alex", folder)


def _lpips_vgg(folder: Path | None = None) -> Lpips:
    return Lpips("vgg", folder)


def _feature_distance(folder: Path | None = None) -> FeatureDistance:
    return FeatureDistance()


def _inception(folder: Path | None = None) -> InceptionFeatures:
    _need_torchmetrics("FID or KID")
    return InceptionFeatures(folder)


def _efficientnet(folder: Path | None = None) -> EfficientNetFeatures:
    _need_torchmetrics("a distance of distributions")
    return EfficientNetFeatures()


_OF_PICTURES = (
    Metric("psnr", "PSNR (dB)", "higher", 2, "dB", _psnr),
    Metric("ssim", "SSIM", "higher", 4, "", _ssim),
    Metric("lpips-alex", "LPIPS (alex)", "lower", 4, "", _lpips_alex),
    Metric("lpips-vgg", "LPIPS (vgg)", "lower", 4, "", _lpips_vgg),
    Metric("features", "EfficientNet-Lite0 feature distance", "lower", 4, "", _feature_distance),
)
_OF_SETS = (
    SetMetric("fid", "FID", "lower", 2, "", _inception, "frechet", "inception"),
    SetMetric("kid", "KID", "lower", 5, "", _inception, "kernel", "inception"),
    SetMetric("fd-efficientnet", "Frechet distance (EfficientNet-Lite0)", "lower", 2, "", _efficientnet, "frechet", "efficientnet"),
    SetMetric("kd-efficientnet", "Kernel distance (EfficientNet-Lite0)", "lower", 5, "", _efficientnet, "kernel", "efficientnet"),
)
PICTURE_METRICS = {metric.name: metric for metric in _OF_PICTURES}
SET_METRICS = {metric.name: metric for metric in _OF_SETS}


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError, listing all names that there are, if one of these is not among them."""
    known = [*PICTURE_METRICS, *SET_METRICS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}; the metrics are {', '.join(known)}")
