"""Training pictures: from a folder or from memory, augmented (B.2), each example a function of the seed and its number alone.

Therefore a training that goes on after a crash sees what it would have seen, and so do several processes that share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset

from ..pictures import PictureError, open_rgb, to_tensor
from .settings import TrainingSettings

SEEDS = 2**62


def _scaled(picture: Image.Image, scale: float, size: int) -> Image.Image:
    """The picture with its shorter side `scale * size` pixels long."""
    factor = scale * size / min(picture.size)
    width, height = (max(1, round(n * factor)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _crop(picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random size x size part. Where the picture is smaller than that, it is put at a random place and mirrored at its edges."""
    missing = [max(0, size - n) for n in picture.size]
    if any(missing):
        left, top = (int(rng.integers(n + 1)) for n in missing)
        margins = ((top, missing[1] - top), (left, missing[0] - left), (0, 0))
        picture = Image.fromarray(np.pad(np.array(picture), margins, mode="symmetric"))
    left, top = (int(rng.integers(n - size + 1)) for n in picture.size)
    return picture.crop((left, top, left + size, top + size))


def _jittered(picture: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue (a part of the colour circle) changed at random by up to `strength`, in a random order."""
    amounts = rng.uniform(-strength, strength, 4)
    for kind in rng.permutation(4):
        if kind == 3:
            hue, *rest = picture.convert("HSV").split()
            turned = (np.asarray(hue).astype(int) + round(float(amounts[3]) * 255)) % 256
            picture = Image.merge("HSV", [Image.fromarray(turned.astype(np.uint8)), *rest]).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
            picture = enhance(picture).enhance(1 + float(amounts[kind]))
    return picture


def augmented(picture: Image.Image, settings: TrainingSettings, rng: np.random.Generator) -> Image.Image:
    """Random resize, crop, flip and colour jitter of B.2. The resize sets the shorter side to 0.8 to 2 times the crop."""
    size = settings.size
    picture = _crop(_scaled(picture, float(rng.uniform(*settings.resize)), size), size, rng)
    if rng.random() < settings.flip:
        picture = ImageOps.mirror(picture)
    return _jittered(picture, settings.jitter, rng) if settings.jitter else picture


class Examples(Dataset):
    """Example k of a training: picture, augmentation, timestep and noise, all from (seed, k). Every picture comes once an epoch.

    pictures: files, or images already open. Raises PictureError for fewer pictures than a batch, which would be in it more than once.
    """

    def __init__(self, pictures: Sequence[Path | Image.Image], settings: TrainingSettings, timesteps: int):
        if len(pictures) < settings.batch_size:
            raise PictureError(
                f"pictures: there are {len(pictures)}, fewer than batch_size {settings.batch_size}. "
                f"Give more pictures, or set batch_size to {len(pictures)} or less"
            )
        self.pictures, self.settings, self.timesteps = pictures, settings, timesteps
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.settings.seed, 1, epoch]).permutation(len(self.pictures))

    def __len__(self) -> int:
        return self.settings.steps * self.settings.batch_size

    def __getitem__(self, k: int) -> dict:
        epoch, i = divmod(k, len(self.pictures))
        picture = self.pictures[self._order(epoch)[i]]
        picture = picture if isinstance(picture, Image.Image) else open_rgb(picture)
        rng = np.random.default_rng([self.settings.seed, 0, k])
        image = to_tensor(augmented(picture, self.settings, rng))
        timestep, noise, measurement = (int(rng.integers(n)) for n in (self.timesteps, SEEDS, SEEDS))
        return {"image": image, "timestep": timestep, "noise_seed": noise, "measurement_seed": measurement}

    def __getstate__(self) -> dict:  # a data loader's processes get a copy, and the cache of a method cannot travel
        return {key: value for key, value in vars(self).items() if key != "_order"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)


def collate(examples: list[dict]) -> dict:
    """A batch: images (B, 3, S, S) in [-1, 1], timesteps (B,) int64, and the seeds of every sample's latent noise and measurement noise."""
    return {
        "image": torch.stack([e["image"] for e in examples]),
        "timestep": torch.tensor([e["timestep"] for e in examples]),
        "noise_seeds": [e["noise_seed"] for e in examples],
        "measurement_seeds": [e["measurement_seed"] for e in examples],
    }
