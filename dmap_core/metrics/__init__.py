"""How good restored pictures are: by their originals, by the distribution of a set of them, and by their labels.

Pictures are (B, 3, H, W), floating point in [0, 1]. Importing this needs torch alone; a metric says which package or weights file it lacks
when it is made. Nothing is downloaded.
"""

from .backbones import WEIGHTS, MissingPackage, MissingWeights, Weights, find_weights, load_weights
from .catalogue import PICTURE_METRICS, SET_METRICS, Metric, SetMetric, check_names
from .distribution import EfficientNetFeatures, InceptionFeatures, frechet, frechet_warning, kernel
from .interval import PLUS_MINUS, Interval, mean_interval
from .reference import FeatureDistance, Lpips, error_map, psnr, ssim
from .segmentation import miou

__all__ = [
    "PICTURE_METRICS",
    "PLUS_MINUS",
    "SET_METRICS",
    "WEIGHTS",
    "EfficientNetFeatures",
    "FeatureDistance",
    "InceptionFeatures",
    "Interval",
    "Lpips",
    "Metric",
    "MissingPackage",
    "MissingWeights",
    "SetMetric",
    "Weights",
    "check_names",
    "error_map",
    "find_weights",
    "frechet",
    "frechet_warning",
    "kernel",
    "load_weights",
    "mean_interval",
    "miou",
    "psnr",
    "ssim",
]
