"""Nonlinear blur: a network trained on pairs of sharp and blurred photographs (GoPro) blurs as a moving camera would.

The network is the one of Tran et al., "Explore Image Deblurring via Encoded Blur Kernel Space", CVPR 2021 (repository: blur kernel space
exploring, BSD-3-Clause), of which only the half that applies a blur is needed. Diffusion posterior sampling (Chung et al., ICLR 2023) made
it a test problem, with the weights GOPRO_wVAE.pth and a random code for the blur. As a command, this module turns that file into one that
holds nothing but the tensors needed:

    python -m dmap_core.operators.nonlinear_blur GOPRO_wVAE.pth GOPRO_wVAE.safetensors
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_whole
from ..weights import fingerprint, load_into, read_tensors
from .base import Find, Operator, Size, shown, size_of, whole

WIDTH, FRONT, BACK = 64, 10, 20  # of the published weights
KERNEL_SCALE = 1.2  # standard deviation of random codes in the published generate_blur.py and in diffusion posterior sampling
SEEDS = 2**64  # generators take no larger ones


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), (B, width, h, w) -> the same"""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Level(nn.Module):
    """One level of the U-Net that mixes a picture's features with a blur code. `submodule` is the next deeper level.

    (B, outer, h, w) -> (B, 2 outer, h, w): the result and the skipped input; the outermost level gives the result alone, in (-1, 1).
    """

    def __init__(self, outer: int, inner: int, submodule: Level | None, outermost: bool = False):
        super().__init__()
        down = nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=False)
        self.down = nn.Sequential(down) if outermost else nn.Sequential(nn.LeakyReLU(0.2), down)
        self.submodule = submodule
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * inner, outer, 4, stride=2, padding=1, bias=outermost))
        self.outermost = outermost

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        y = self.down(x)
        y = torch.cat([y, kernel.expand(len(y), -1, -1, -1)], dim=1) if self.submodule is None else self.submodule(y, kernel)
        y = self.up(y)
        return y.tanh() if self.outermost else torch.cat([y, x], dim=1)


class KernelWizard(nn.Module):
    """The blurring half of the published network. Names of the parameters are those of the published weights.

    `width` channels (the published 64), `front` and `back` residual blocks before and after the U-Net.
    """

    def __init__(self, width: int = WIDTH, front: int = FRONT, back: int = BACK):
        super().__init__()
        self.code_channels = 8 * width
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            *(ResidualBlock(width) for _ in range(front)),
        )
        level = None
        for outer, inner in [(8, 8), (4, 8), (2, 4), (1, 2)]:
            level = Level(outer * width, inner * width, level)
        self.adapter = nn.ModuleDict({"model": Level(width, width, level, outermost=True)})
        self.recon_trunk = nn.Sequential(
            *(ResidualBlock(width) for _ in range(back)),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    @property
    def stride(self) -> int:
        """Pixels per element of the blur code, 128: the feature extractor halves the picture twice and the U-Net five times.

        Sides of pictures have to be multiples of it, or the U-Net's way up meets skipped features of another size.
        """
        return math.prod(layer.stride[0] for layer in self.modules() if isinstance(layer, nn.Conv2d))

    def forward(self, image: Tensor, kernel: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] and blur code (1 or B, code_channels, H / stride, W / stride) -> blurred (B, 3, H, W).

        The network computes the change, so that results may leave [0, 1].
        """
        x = self.adapter["model"](self.feature_extractor(image), kernel)
        return image + self.recon_trunk(x)


def _empty(width: int, front: int, back: int) -> KernelWizard:
    """A float32 network without storage, for `load_into`: no weights are drawn from the global generator only to be replaced."""
    with torch.device("meta"):
        return KernelWizard(width, front, back).float()


def load_kernel_wizard(path: Path, width: int = WIDTH, front: int = FRONT, back: int = BACK) -> KernelWizard:
    """The network of a weights file (GOPRO_wVAE.pth, or the result of `convert`), float32 on the CPU, frozen, in eval mode.

    Tensors of the parts that are not needed may be there. Raises ValueError, naming the file, if it cannot be used.
    """
    network = _empty(width, front, back)
    load_into(network, read_tensors(path), path)
    return network


def random_kernel_wizard(seed: int, width: int = WIDTH, front: int = FRONT, back: int = BACK) -> KernelWizard:
    """The network with random weights of that seed, for experiments without the file. It distorts pictures visibly; it is no camera."""
    network = _empty(width, front, back)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for prefix, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            continue
        # Every layer keeps the size of its input (He et al. 2015), but for the small changes that residual blocks and the network make.
        taps = math.prod(layer.kernel_size) / (math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else 1)
        gain = 0.06 if layer is network.recon_trunk[-1] else 0.2 if prefix.endswith("conv2") else 1.0
        scale = gain * math.sqrt(2 / (layer.in_channels * taps))
        tensors[f"{prefix}.weight"] = scale * torch.randn(layer.weight.shape, generator=generator, device="cpu", dtype=torch.float32)
        if layer.bias is not None:
            tensors[f"{prefix}.bias"] = 0.02 * torch.randn(layer.bias.shape, generator=generator, device="cpu", dtype=torch.float32)
    load_into(network, tensors, Path(f"random weights {seed}"))
    return network


def save_kernel_wizard(network: KernelWizard, target: Path) -> None:
    """Writes the network's weights as a `.safetensors` file. `target` appears when complete, or not at all."""
    from safetensors.torch import save_file

    target = Path(target)
    if target.suffix.lower() != ".safetensors":
        raise ValueError(f"{target}: weights are written as .safetensors, so the name has to end like that")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_whole(target, lambda part: save_file(tensors, part, metadata={"format": "pt"}))


def convert(source: Path, target: Path, width: int = WIDTH, front: int = FRONT, back: int = BACK) -> None:
    """Writes the needed tensors of the weights file `source` to `target`, a `.safetensors` file. Raises ValueError, naming the file."""
    save_kernel_wizard(load_kernel_wizard(source, width, front, back), target)


@dataclass(frozen=True, eq=False)
class NonlinearBlur(Operator):
    """f(x) = clamp(2 network((x + 1) / 2, k) - 1, -1, 1) with a random blur code k, as in diffusion posterior sampling (Chung et al. 2023).

    The code is 1.2 times standard normal numbers of `seed`: the same for every call, picture of a batch and device, so that the
    measurement and the guidance see one blur (code published with that paper draws another on every call). It grows with the picture,
    and two sizes have unrelated blurs. x is not clamped before the network, as in that code.

    Computed in the dtype of the network; y has that of the image. `weights` is the name of the network's file, for `spec`.
    """

    network: KernelWizard
    seed: int = 0
    weights: str = ""

    title = "Nonlinear Blur"
    linear = False

    def __post_init__(self):
        object.__setattr__(self, "seed", whole("NonlinearBlur: seed", self.seed, 0))
        if self.seed >= SEEDS:
            raise ValueError(f"NonlinearBlur: seed is {shown(self.seed)}; it must be less than 2^64")

    def kernel(self, size: Size) -> Tensor:
        """The blur code (1, 512, H / 128, W / 128) for images of `size` (H, W), float32 on the CPU."""
        rows, columns = (n // self.network.stride for n in self.measurement_size(size))
        generator = torch.Generator().manual_seed(self.seed)
        shape = (1, self.network.code_channels, rows, columns)
        return KERNEL_SCALE * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    def __call__(self, image: Tensor) -> Tensor:
        self.channels(image.shape[1])
        size, weight = size_of(image), next(self.network.parameters())
        kernel = self.kept((*size, weight.dtype, weight.device), lambda: self.kernel(size).to(weight))
        blurred = self.network((image.to(weight.dtype) + 1) / 2, kernel)
        return (2 * blurred - 1).clamp(-1, 1).to(image.dtype)

    def to(self, device: torch.device | str) -> NonlinearBlur:
        with torch.inference_mode(False):  # weights moved under inference mode could not be differentiated through later
            self.network.to(device)
        self.kept.only_on(device)
        return self

    def measurement_size(self, size: Size) -> Size:
        step = self.network.stride
        if any(n < 1 or n % step for n in size):
            h, w = (max(1, round(n / step)) * step for n in size)
            raise ValueError(
                f"NonlinearBlur: the picture is {size[1]}x{size[0]}; width and height must be multiples of {step}. "
                f"The nearest size is {w}x{h}"
            )
        return size

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(size_of(y))

    def channels(self, image_channels: int = 3) -> int:
        if image_channels != 3:
            raise ValueError(f"NonlinearBlur: the picture has {image_channels} channel(s), but the network blurs 3. Put Grayscale after it")
        return 3

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.network)

    def spec(self) -> dict[str, Any]:
        return {"operator": self.name, "seed": self.seed, "weights": self.weights, "sha256": self.sha256}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], find: Find | None = None) -> NonlinearBlur:
        """Raises ValueError where `find` is None or the file that it finds does not hold the weights of the spec."""
        name, wanted, seed = settings["weights"], settings["sha256"], settings["seed"]
        if not isinstance(name, str) or not name:
            raise ValueError("NonlinearBlur: the spec names no weights file; its network did not come from one")
        if find is None:
            raise ValueError(f"NonlinearBlur: the weights file {name} is needed, and nothing was given that finds it")
        path = find(name)
        found = cls(load_kernel_wizard(path), seed, name)
        if found.sha256 != wanted:
            raise ValueError(f"NonlinearBlur: {path} holds other weights than the spec's: sha256 {found.sha256}, wanted {wanted}")
        return found

    def describe(self) -> str:
        return f"{self.title} ({self.weights or 'weights of no file'}, seed {self.seed})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert the weights of the nonlinear blur to a .safetensors file of the needed tensors.")
    parser.add_argument("source", type=Path, help="GOPRO_wVAE.pth of blur kernel space exploring")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.target)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    sys.stdout.write(f"wrote {options.target}\n")


if __name__ == "__main__":
    main()
