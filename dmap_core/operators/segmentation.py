"""The layout of a room: which pixels show a wall, the floor or the ceiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..weights import fingerprint, load_into, read_tensors
from .base import Find, Operator, Size, size_of

CLASSES = ("frontal", "left", "right", "floor", "ceiling")
PALETTE = ((249, 69, 93), (255, 229, 170), (144, 206, 181), (81, 81, 119), (241, 247, 210))  # RGB of 0..255, of each class
TOLERANCE = 2  # of 255, in each channel: what 8-bit files and their rounding change at most

RESNET101 = (3, 4, 23, 3)
WIDEST = 1024  # channels that a file may ask for; the published network has 64 and 37
STRIDE = 64  # the head doubles and adds maps of 1/64, 1/32 and 1/16 of the image's size, which only fit if 64 divides it
KNOWN_COLOURS = ", ".join(f"{name} {colour}" for name, colour in zip(CLASSES, PALETTE, strict=True))


def _conv(channels_in: int, channels_out: int, side: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, side, stride, padding=side // 2, bias=False)


class Bottleneck(nn.Module):
    """ResNet's residual block of three convolutions, (B, channels_in, H, W) -> (B, 4 channels, H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(channels_in, channels), nn.BatchNorm2d(channels)
        # ResNet's authors put the stride into conv1; the trunk that was published has it here
        self.conv2, self.bn2 = _conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, 4 * channels), nn.BatchNorm2d(4 * channels)
        self.downsample = None
        if stride != 1 or channels_in != 4 * channels:
            self.downsample = nn.Sequential(_conv(channels_in, 4 * channels, 1, stride), nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


class Trunk(nn.Module):
    """A ResNet of bottlenecks: (B, 3, H, W) -> its maps of 1/16, 1/32 and 1/64 of that size, with 16, 32 and 32 `width` channels."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, layers: Sequence[int], width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels_in = width
        for i, blocks in enumerate(layers):
            channels = width * 2**i
            strides = (1 if i == 0 else 2, *[1] * (blocks - 1))
            stage = nn.Sequential(*(Bottleneck(4 * channels if j else channels_in, channels, s) for j, s in enumerate(strides)))
            self.add_module(f"layer{i + 1}", stage)
            channels_in = 4 * channels
        self.fc = nn.Linear(channels_in, 1000)  # ImageNet's classifier: never used, but part of the published file

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        sixteenth = self.layer3(self.layer2(self.layer1(x)))
        thirtysecond = self.layer4(sixteenth)
        return sixteenth, thirtysecond, self.maxpool(thirtysecond)


class PlanarHead(nn.Module):
    """The trunk's three maps, from the smallest one up -> the scores of the classes (B, 5, H, W) at the image's size.

    Upsampling is learned (transposed convolutions), not interpolation. The dropout of the training is left out.
    """

    def __init__(self, features: int, bottleneck: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(features)
        self.fc_conv = _conv(features, features)
        self.clf1 = _conv(features, bottleneck)
        self.clf2 = _conv(features, bottleneck)
        self.clf3 = _conv(features // 2, bottleneck)
        self.dec1 = nn.ConvTranspose2d(bottleneck, bottleneck, 4, 2, padding=1, bias=False)
        self.dec2 = nn.ConvTranspose2d(bottleneck, bottleneck, 4, 2, padding=1, bias=False)
        self.dec3 = nn.ConvTranspose2d(bottleneck, bottleneck, 32, 16, padding=8, bias=False)
        self.fc_stage2 = _conv(bottleneck, len(CLASSES))

    def forward(self, sixteenth: Tensor, thirtysecond: Tensor, sixtyfourth: Tensor) -> Tensor:
        x = self.clf1(F.relu(self.bn(self.fc_conv(sixtyfourth))))
        x = self.clf2(thirtysecond) + self.dec1(x)
        x = self.clf3(sixteenth) + self.dec2(x)
        return self.fc_stage2(self.dec3(x))


class RoomLayout(nn.Module):
    """Room layout estimation of Lin et al. (ICPR 2018): image (B, 3, H, W) in [-1, 1] -> scores (B, 5, H, W). 64 must divide H and W.

    The names and shapes of the parameters are those of the checkpoint of https://github.com/leVirve/lsun-room (MIT licence).
    It was trained on pictures resized to 320x320.
    """

    def __init__(self, layers: Sequence[int] = RESNET101, width: int = 64, bottleneck: int = 37):
        super().__init__()
        self.resnet = Trunk(layers, width)
        self.planar_seg = PlanarHead(32 * width, bottleneck)

    def forward(self, image: Tensor) -> Tensor:
        return self.planar_seg(*self.resnet(image))


def _meta_like(tensors: dict[str, Tensor]) -> RoomLayout:
    """A network without memory, of the depth and widths that the file's tensors have, where they tell; published ones elsewhere.

    The public training code lets people choose the trunk (ResNet-50, -101, -152), and its files do not name it.
    """
    layers = tuple(len({key.split(".")[2] for key in tensors if key.startswith(f"resnet.layer{n}.")}) for n in (1, 2, 3, 4))
    widths = {"width": "resnet.conv1.weight", "bottleneck": "planar_seg.clf1.weight"}
    known = {name: len(tensors[key]) for name, key in widths.items() if key in tensors and tensors[key].ndim == 4}
    known = {name: count for name, count in known.items() if 0 < count <= WIDEST}
    with torch.device("meta"):
        return RoomLayout(layers if all(layers) else RESNET101, **known)


def load_room_layout(path: Path) -> RoomLayout:
    """The network of a checkpoint, on the CPU, frozen, in evaluation mode.

    Keys may start with `model.`, as in the published file. Raises ValueError for a file that cannot be read or is of something else.
    """
    tensors = {key.removeprefix("model."): tensor for key, tensor in read_tensors(Path(path)).items()}
    network = _meta_like(tensors)
    load_into(network, tensors, Path(path))
    return network


def random_room_layout(seed: int = 0, layers: Sequence[int] = RESNET101, width: int = 64, bottleneck: int = 37) -> RoomLayout:
    """A network with random weights that depend on the seed alone, frozen, in evaluation mode: its labels mean nothing, but vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            network = RoomLayout(layers, width, bottleneck)
        network = network.to_empty(device="cpu")
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                mean, variance, batches = module.buffers()
                mean.normal_(0, 0.1, generator=generator)
                variance.uniform_(0.8, 1.2, generator=generator)
                batches.zero_()
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.ConvTranspose2d):
                taps = (module.kernel_size[0] // module.stride[0]) ** 2  # of the kernel, that meet in one pixel
                module.weight.normal_(0, math.sqrt(1 / (taps * module.in_channels)), generator=generator)
        for module in network.modules():
            if isinstance(module, Bottleneck):
                module.bn3.weight.mul_(0.3)  # otherwise the variance of the activations doubles with every block
        network.planar_seg.fc_stage2.weight.mul_(0.1)  # otherwise the softmax saturates, and gradients vanish
    return network.requires_grad_(False).eval()


def _labels(y: Tensor) -> Tensor:
    """y as class indices (B, H, W), int64. Raises ValueError unless y is (B, 1, H, W) and holds nothing else."""
    if y.ndim != 4 or y.shape[1] != 1:
        raise ValueError(f"Segmentation: the labels have shape {tuple(y.shape)}; they must be (B, 1, H, W)")
    labels = y[:, 0].long()
    if not ((labels == y[:, 0]) & (labels >= 0) & (labels < len(CLASSES))).all():
        raise ValueError(f"Segmentation: the labels must be whole numbers, 0 to {len(CLASSES) - 1} ({', '.join(CLASSES)})")
    return labels


@dataclass(frozen=True, eq=False)
class Segmentation(Operator):
    """f(x) = scores of the five surfaces of a room for every pixel, before the softmax; the measurement is the best class of each.

    Measurements are (B, 1, H, W) class indices, 0.0 to 4.0, in the order of CLASSES. Pictures must be RGB, and 64 must divide their
    height and width. `weights` is the name of the network's file, for spec().
    """

    network: nn.Module
    weights: str = ""

    title = "Segmentation"
    linear = False
    settings = ("weights", "sha256")

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.network)

    def __call__(self, image: Tensor) -> Tensor:
        """Logits (B, 5, H, W), in the dtype of the network, whatever that of the image."""
        self.measurement_size(size_of(image))
        self.channels(image.shape[1])
        return self.network(image.to(next(self.network.parameters()).dtype))

    def measure(self, image: Tensor) -> Tensor:
        """The class indices (B, 1, H, W) of an image, float32. They have no gradient."""
        with torch.no_grad():
            return self(image).argmax(dim=1, keepdim=True).float()

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of logits (B, 5, H, W) and labels (B, 1, H, W), in nats, the mean over each sample's pixels: (B,) float32.

        The paper gives no formula; a mean over the pixels is what the network was trained with. Raises ValueError for other labels.
        """
        labels = _labels(y)
        if labels.shape[-2:] != y_hat.shape[-2:] or len(labels) not in (1, len(y_hat)):
            raise ValueError(f"Segmentation: labels of shape {tuple(y.shape)} do not fit scores of shape {tuple(y_hat.shape)}")
        labels = labels.expand(len(y_hat), -1, -1)
        return F.cross_entropy(y_hat.float(), labels, reduction="none").mean(dim=(1, 2))

    def difference(self, y_hat: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError("Segmentation: scores and labels have no difference")

    def elements(self, y: Tensor) -> Tensor:
        raise ValueError(
            "Segmentation: the distance is a cross-entropy between labels, not a norm of measured values, so it has no noise level; "
            "leave the noise at 0"
        )

    def measurement_size(self, size: Size) -> Size:
        """`size` itself. Raises ValueError unless 64 divides height and width, which the network's head needs."""
        h, w = size
        if h < STRIDE or w < STRIDE or h % STRIDE or w % STRIDE:
            near = "x".join(str(max(STRIDE, STRIDE * round(n / STRIDE))) for n in (w, h))
            raise ValueError(f"Segmentation: the picture is {w}x{h}; width and height must be multiples of {STRIDE}, such as {near}")
        return size

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(size_of(y))

    def channels(self, image_channels: int = 3) -> int:
        if image_channels != 3:
            raise ValueError(f"Segmentation: the picture has {image_channels} channel(s); it must have 3 (RGB)")
        return 1

    def to(self, device: torch.device | str) -> Segmentation:
        with torch.inference_mode(False):  # a network that inference mode has moved could not be differentiated any more
            self.network.to(device)
        return self

    def hint(self, y: Tensor) -> Tensor:
        return self.picture(y)

    def picture(self, y: Tensor) -> Tensor:
        """The labels in the colours of PALETTE, (B, 3, H, W) in [-1, 1], float32. Raises ValueError for other labels."""
        palette = torch.tensor(PALETTE, dtype=torch.float32, device=y.device) / 127.5 - 1
        return palette[_labels(y)].permute(0, 3, 1, 2).contiguous()

    def read(self, picture: Tensor, channels: int | None = None) -> Tensor:
        """The labels (B, 1, h, w) of a picture (B, 3, h, w) in the colours of PALETTE. Raises ValueError for any other colour."""
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise ValueError(
                f"Segmentation: the label picture has shape {tuple(picture.shape)}; it must be (B, 3, H, W), in the colours {KNOWN_COLOURS}"
            )
        if not torch.isfinite(picture).all():
            raise ValueError("Segmentation: the label picture holds NaN or infinite values")
        rgb = (picture.float() + 1) * 127.5
        y = torch.full_like(rgb[:, :1], -1)
        for i, colour in enumerate(PALETTE):
            near = (rgb - rgb.new_tensor(colour).view(1, 3, 1, 1)).abs().amax(dim=1, keepdim=True) <= TOLERANCE + 1e-3
            y[near] = i
        unknown = y[:, 0] < 0
        if unknown.any():
            first = rgb.permute(0, 2, 3, 1)[unknown][0].round().int().tolist()
            raise ValueError(
                f"Segmentation: {int(unknown.sum())} of {unknown.numel()} pixels of the label picture have a colour of no class; "
                f"the first is RGB {tuple(first)}. Known are {KNOWN_COLOURS}. "
                "Resized or JPEG pictures have in-between colours: resize label pictures with nearest-exact and save as PNG"
            )
        return y

    def read_masks(self, masks: Tensor) -> Tensor:
        """The labels (B, 1, H, W) of masks (5 B, H, W) in [0, 1]: five masks per picture, one after the other, in the order of CLASSES.

        0.5 and above count as covered. Raises ValueError unless every pixel is covered by exactly one of its picture's masks.
        """
        order = ", ".join(CLASSES)
        if masks.ndim != 3 or len(masks) == 0 or len(masks) % len(CLASSES):
            raise ValueError(
                f"Segmentation: the masks have shape {tuple(masks.shape)}; they must be ({len(CLASSES)} B, H, W), for every picture "
                f"one mask per class, in the order {order}"
            )
        covered = masks.unflatten(0, (-1, len(CLASSES))) >= 0.5
        count = covered.sum(dim=1)
        none, several = int((count == 0).sum()), int((count > 1).sum())
        if none or several:
            raise ValueError(
                f"Segmentation: every pixel must be white in exactly one of the masks ({order}); "
                f"{none} pixels are in none and {several} in several of them"
            )
        return covered.float().argmax(dim=1, keepdim=True).float()

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> Segmentation:
        """Raises ValueError if there is no `find`, if the spec names no file, or if the file is not the one that the spec was made with."""
        name, sha256 = settings["weights"], settings["sha256"]
        if not name:
            raise ValueError("Segmentation: the spec names no weights file (it was made with a network that came from none)")
        if find is None:
            raise ValueError(f"Segmentation: the weights {name!r} are needed, and nobody said where weights are")
        found = cls(load_room_layout(Path(find(name))), name)
        if found.sha256 != sha256:
            raise ValueError(
                f"Segmentation: {name!r} is not the file that the spec was made with: its weights' sha256 is {found.sha256}, not {sha256}"
            )
        return found

    def describe(self) -> str:
        return f"{self.title} ({self.weights or 'room layout'})"
