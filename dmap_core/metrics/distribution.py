"""How far a set of pictures is from another one, by the features that a network sees in them."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .backbones import Measuring, building, efficientnet, load_weights, needed
from .pictures import saved

ENOUGH = 10_000  # pictures; Heusel et al. (2017) recommend this many at least
SUBSET = 1000  # pictures in KID's subsets, at most


def _features(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature matrices (N, D) as float64 on the CPU, or a ValueError."""
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"the {name} features have shape {tuple(features.shape)}; they must be (N, D), a row for every picture")
        if len(features) < 2:
            raise ValueError(
                f"the {name} set has {len(features)} picture(s); a distance of sets needs 2 at least, and means little below thousands"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"the {name} features hold NaN or infinite values")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake have {real.shape[1]} and {fake.shape[1]} features; they must come from the same network")
    return real.detach().cpu().double(), fake.detach().cpu().double()


class _Given(nn.Identity):
    """What torchmetrics takes for the network that extracts features: it gets features already."""

    def __init__(self, dimension: int):
        super().__init__()
        self.num_features = dimension


def frechet(real: Tensor, fake: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to features (N, D) and (M, D), in float64: FID, if Inception made them (Heusel et al. 2017).

    0 for equal sets, up to rounding; lower is better. Biased upwards for few pictures: see `frechet_warning`.
    Raises ValueError for sets of fewer than 2 pictures and features that do not fit, and MissingPackage.
    """
    with needed("the Frechet distance", "torchmetrics"):
        from torchmetrics.image.fid import FrechetInceptionDistance
    real, fake = _features(real, fake)
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def kernel(real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 0) -> tuple[float, float]:
    """(mean, standard deviation) over random subsets of the squared maximum mean discrepancy of features (N, D) and (M, D).

    KID, if Inception made the features (Binkowski et al. 2018): the polynomial kernel (x.y / D + 1)^3 and the unbiased estimate, so it may
    be negative, and its expectation does not depend on the number of pictures. Lower is better. subset_size: the smaller set's size or
    1000, whichever is less, unless given. The deviation is NaN where there is one subset only, as with a subset_size of both sets' size.
    seed: of the subsets; the same seed gives the same figures. Raises ValueError for settings without meaning, sets of fewer than 2
    pictures and features that do not fit, and MissingPackage.
    """
    with needed("the kernel distance", "torchmetrics"):
        from torchmetrics.image.kid import KernelInceptionDistance
    real, fake = _features(real, fake)
    fewest = min(len(real), len(fake))
    size = min(fewest, SUBSET) if subset_size is None else subset_size
    if subsets < 1 or not 2 <= size <= fewest:
        raise ValueError(
            f"subsets is {subsets} and subset_size {size}; they must be at least 1, and 2 to {fewest}, the size of the smaller set"
        )
    if size == len(real) == len(fake):
        subsets = 1  # they are all the same
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all", category=UserWarning)
        metric = KernelInceptionDistance(feature=_Given(real.shape[1]), subsets=subsets, subset_size=size)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would leave its mark on other devices' generators
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if subsets > 1 else float("nan")


def frechet_warning(n: int, dimension: int) -> str | None:
    """What to say beside a Frechet distance of sets with `dimension` features, the smaller one of n pictures; None from 10000 on."""
    advice = f"compare it only with distances of {n} pictures, never with a paper's of another number"
    if n <= dimension:
        return (
            f"A Frechet distance of {n} pictures with {dimension} features is far too high: their covariance is singular, "
            f"as there are no more pictures than features; {advice}. A kernel distance suits few pictures better."
        )
    if n < ENOUGH:
        return f"A Frechet distance of {n} pictures is biased upwards, as they are fewer than {ENOUGH}; {advice}."
    return None


class InceptionFeatures(Measuring):
    """The features of FID and KID: pictures (B, 3, H, W) in [0, 1] -> (B, 2048) float32, by torch-fidelity's port of their InceptionV3.

    The pictures are rounded to 8 bits, as the papers' were, and enlarged or reduced to 299x299 as TensorFlow 1 did. folder: where the
    weights are (`find_weights`). Raises MissingPackage, MissingWeights, and ValueError for a file that is not the published one.
    """

    def __init__(self, folder: Path | None = None):
        with needed("FID's Inception network", "torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        tensors = load_weights("inception", folder)
        with tempfile.TemporaryDirectory() as private, building():
            # torch-fidelity unpickles whatever its file holds, so it is given one that holds these tensors and nothing else
            clean = Path(private) / "inception.pth"
            torch.save(tensors, clean)
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(clean))
        super().__init__(network)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        return self.network((saved(image).to(self.device) * 255).round().to(torch.uint8))[0]


class EfficientNetFeatures(Measuring):
    """Pictures (B, 3, H, W) in [0, 1] -> (B, 1280) float32: the last features of EfficientNet-Lite0, the mean over the picture.

    A stand-in where Inception's weights cannot be had; distances are not comparable with FID and KID. Pictures are not resized, and
    features depend on their size: compare sets of one size. Raises MissingPackage.
    """

    def __init__(self):
        super().__init__(efficientnet())

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        return self.network.extract_features(2 * saved(image).to(self.device) - 1).mean(dim=(2, 3))
