"""How far a picture is from its original: one figure per picture.

All take image and reference (B, 3, H, W), floating point in [0, 1]. Values slightly outside are clamped, as they are when a picture is
saved. ValueError says what is wrong with pictures of another shape, size or range.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights import load_into
from .backbones import Measuring, building, efficientnet, find_weights, load_weights, needed
from .pictures import pair

WINDOW = 11  # pixels, SSIM's
SIGMA = 1.5
SMALLEST = 32  # pixels; below, the last maps of the networks that compare features have no pixel left


@torch.no_grad()
def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB, float64: -10 log10 of the mean squared error, infinite for equal pictures."""
    with needed("PSNR", "torchmetrics"):
        from torchmetrics.functional.image import peak_signal_noise_ratio
    image, reference = pair(image.cpu(), reference.cpu())  # not every device has float64
    return peak_signal_noise_ratio(image.double(), reference.double(), data_range=1.0, reduction="none", dim=(1, 2, 3))


@torch.no_grad()
def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """(B,) structural similarity of Wang et al. (2004), at most 1, float32. Higher is better.

    Gaussian window of 11x11 pixels, sigma 1.5, K1 0.01, K2 0.03, every channel by itself. The mean is over the windows that lie inside
    the picture, as in the paper; torchmetrics takes in those that hang over the border, too.
    Its figures of 128x128 pictures were 0.01 to 0.05 higher.
    """
    with needed("SSIM", "torchmetrics"):
        from torchmetrics.functional.image import structural_similarity_index_measure
    image, reference = pair(image, reference, WINDOW, "SSIM")
    settings = {"gaussian_kernel": True, "sigma": SIGMA, "kernel_size": WINDOW, "data_range": 1.0, "k1": 0.01, "k2": 0.03}
    _, everywhere = structural_similarity_index_measure(image, reference, reduction="none", return_full_image=True, **settings)
    border = WINDOW // 2
    return everywhere[..., border:-border, border:-border].mean(dim=(1, 2, 3))


@torch.no_grad()
def error_map(image: Tensor, reference: Tensor) -> Tensor:
    """(B, 1, H, W) where the pictures differ: the absolute difference, in [0, 1], the mean over the channels."""
    image, reference = pair(image, reference)
    return (image - reference).abs().mean(dim=1, keepdim=True)


class Lpips(Measuring):
    """Learned perceptual similarity of Zhang et al. (2018), version 0.1, by its authors' package: (B,), 0 if equal, lower is better.

    net: "alex", which the authors recommend for comparisons, or "vgg". folder: where the backbone's weights are (`find_weights`).
    Raises MissingPackage, MissingWeights, and ValueError for another net or a file that is not the published one.
    """

    def __init__(self, net: str = "alex", folder: Path | None = None):
        if net not in ("alex", "vgg"):
            raise ValueError(f"LPIPS has no net {net!r}; it has alex and vgg")
        with needed("LPIPS", "lpips"):
            from lpips import LPIPS
        backbone = load_weights(net, folder)
        with building(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision.models")  # lpips calls it in an old way
            network = LPIPS(net=net, pnet_rand=True, verbose=False)  # pnet_rand: otherwise torchvision downloads the backbone
        # "slice2.3.weight" is the weight of the backbone's layer "features.3"
        renamed = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}
        path = find_weights(net, folder)
        load_into(network.net, {own: backbone[name] for own, name in renamed.items() if name in backbone}, path)
        super().__init__(network)

    @torch.no_grad()
    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        image, reference = (x.to(self.device) for x in pair(image, reference, SMALLEST, "LPIPS"))
        return self.network(2 * image - 1, 2 * reference - 1).flatten()


class FeatureDistance(Measuring):
    """How alike pictures look to EfficientNet-Lite0: (B,), 0 for equal pictures, lower is better.

    LPIPS' idea with another backbone, whose weights the package registry carries, and without learned weights of the layers: a stand-in
    where LPIPS' backbones cannot be had. Not comparable with LPIPS, hence the name. Raises MissingPackage.
    """

    def __init__(self):
        super().__init__(efficientnet())

    def features(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W) in [0, 1]. The last features before every halving, and the very last."""
        network, found = self.network, []
        x = network._swish(network._bn0(network._conv_stem(2 * image - 1)))
        for block in network._blocks:
            y = block(x)
            if y.shape[-1] != x.shape[-1]:
                found.append(x)
            x = y
        return [*found, x]

    @torch.no_grad()
    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        """The mean over the layers of the mean squared difference of channel-normalised features."""
        image, reference = (x.to(self.device) for x in pair(image, reference, SMALLEST, "the feature distance"))
        layers = list(zip(self.features(image), self.features(reference), strict=True))
        distances = ((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2)) for x, y in layers)
        return functools.reduce(torch.add, distances) / len(layers)
