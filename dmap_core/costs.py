"""What a guided step costs, in operations and in memory, before it is run: constants that were counted, and the sums over them.

`python -m benchmarks costs` counts them: networks of ComfyUI's classes run under fake tensors, with torch's flop counter, and with a count of every
storage that lives. Operations of a network are lin a + quad a^2, bytes are a constant and a slope, with a the area in units of 512x512: the constants
here are fits to 512, 768, 1024 and 2048 (operations, off by 1.1% at most) and to 512 and 1024 (bytes, to which 2048 belongs as well).
Attention is fused, as on CUDA. Not in the count: workspaces of convolutions, what an allocator cannot use, libraries, and a CSE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .prior import DTYPES
from .tiles import Tiles, decoding, denoising, encoding

Size = tuple[int, int]
FACTOR = 8  # pixels along a latent's side
TERA, MEGA = 1e12, 1e6
UNIT = 512**2  # pixels of an area of 1

FAMILIES = ("SD 1.5", "SD 2.0", "SDXL", "demo prior")
DECODERS = ("KL", "TAESD")  # autoencoders, both halves of which are in memory
ENCODER = " encoder"  # behind the name of an autoencoder, which alone is its decoder's

PARAMETERS = {
    "SD 1.5": 859_520_964,
    "SD 2.0": 865_910_724,
    "SDXL": 2_567_463_684,
    "demo prior": 16_059_524,
    "KL": 83_653_863,
    "TAESD": 2_445_065,
}

# TFLOP: (lin, quad) of a call, and of the vector-Jacobian product behind it, without any gradient of weights.
FLOP = {
    "SD 1.5": ((0.68026, 0.12227), (0.68311, 0.30624)),
    "SD 2.0": ((0.68107, 0.1222), (0.68311, 0.30624)),
    "SDXL": ((1.5268, 0.044438), (1.5014, 0.11744)),
    "demo prior": ((0.096315, 0.021466), (0.096828, 0.053687)),
    "KL": ((2.4802, 0.03436), (2.4802, 0.085899)),
    "TAESD": ((0.14135, 0.0), (0.14135, 0.0)),
    "KL encoder": ((1.0823, 0.03436), (1.0823, 0.085899)),
    "TAESD encoder": ((0.12232, 0.0), (0.12232, 0.0)),
}

# Of a guided evaluation: a call without gradient, the encoder's, and its with gradient.
PLAIN_PART, ENCODER_PART, GLUE_PART = 0.3, 0.2, 0.5


@dataclass(frozen=True)
class Cost:
    """How often a run evaluates its networks: denoiser, decoder and encoder in all, and of these with gradient."""

    denoiser: int
    denoiser_gradients: int
    decoder: int
    decoder_gradients: int
    encoder: int = 0
    encoder_gradients: int = 0

    def weight(self) -> float:
        """About how many guided evaluations (denoiser and decoder with gradient) take as long: for the time left, no measurement."""
        plain = self.denoiser - self.denoiser_gradients + self.decoder - self.decoder_gradients
        guided = (1 - PLAIN_PART) * self.denoiser_gradients + PLAIN_PART * self.decoder_gradients
        encoded = ENCODER_PART * (self.encoder - self.encoder_gradients) + GLUE_PART * self.encoder_gradients
        return guided + PLAIN_PART * plain + encoded


class Bytes(NamedTuple):
    """MB of one network's activations, (constant, slope): of a call without a graph, of what waits for the way back, and at most on that way."""

    forward: tuple[float, float]
    saved: tuple[float, float]
    peak: tuple[float, float]


# By network, bytes of a number, and whether blocks recompute. A decoder waits for an encoder alone: its own way back follows at once.
BYTES = {
    ("SD 1.5", 4, False): Bytes((0.0, 136.4), (7.7, 1539.7), (7.7, 1592.3)),
    ("SD 1.5", 4, True): Bytes((0.0, 136.4), (0.0, 156.2), (0.2, 329.7)),
    ("SD 1.5", 2, False): Bytes((0.0, 68.2), (3.9, 770.8), (3.9, 797.1)),
    ("SD 1.5", 2, True): Bytes((0.0, 68.2), (0.0, 78.2), (0.1, 165.1)),
    ("SD 2.0", 4, False): Bytes((0.0, 136.4), (7.7, 1447.0), (7.7, 1504.8)),
    ("SD 2.0", 4, True): Bytes((0.0, 136.4), (0.0, 156.2), (0.2, 324.3)),
    ("SD 2.0", 2, False): Bytes((0.0, 68.2), (3.9, 724.3), (3.9, 753.3)),
    ("SD 2.0", 2, True): Bytes((0.0, 68.2), (0.0, 78.2), (0.1, 162.4)),
    ("SDXL", 4, False): Bytes((0.0, 82.6), (51.3, 2651.7), (51.3, 2657.2)),
    ("SDXL", 4, True): Bytes((0.0, 82.6), (0.0, 128.6), (7.9, 395.3)),
    ("SDXL", 2, False): Bytes((0.0, 41.3), (25.6, 1327.6), (25.6, 1330.4)),
    ("SDXL", 2, True): Bytes((0.0, 41.3), (0.0, 64.4), (4.0, 198.0)),
    ("demo prior", 4, False): Bytes((0.0, 115.4), (0.2, 288.8), (0.2, 294.3)),
    ("demo prior", 4, True): Bytes((0.0, 115.4), (0.0, 52.6), (0.2, 205.1)),
    ("demo prior", 2, False): Bytes((0.0, 57.7), (0.1, 144.6), (0.1, 147.3)),
    ("demo prior", 2, True): Bytes((0.0, 57.7), (0.0, 26.4), (0.1, 102.7)),
    ("KL", 4, False): Bytes((0.0, 671.2), (0.0, 5976.0), (0.0, 6116.8)),
    ("KL", 4, True): Bytes((0.0, 671.2), (0.0, 1471.3), (0.0, 2283.2)),
    ("KL", 2, False): Bytes((0.0, 335.6), (0.0, 2989.6), (0.0, 3064.9)),
    ("KL", 2, True): Bytes((0.0, 335.6), (0.0, 737.3), (0.0, 1146.5)),
    ("TAESD", 4, False): Bytes((0.0, 201.5), (0.0, 580.1), (0.0, 720.8)),
    ("TAESD", 4, True): Bytes((0.0, 201.5), (0.0, 291.7), (0.0, 566.7)),
    ("TAESD", 2, False): Bytes((0.0, 100.7), (0.0, 291.6), (0.0, 365.3)),
    ("TAESD", 2, True): Bytes((0.0, 100.7), (0.0, 147.5), (0.0, 288.2)),
    ("KL encoder", 4, False): Bytes((0.0, 402.7), (1.1, 3180.0), (1.1, 3188.5)),
    ("KL encoder", 4, True): Bytes((0.0, 402.7), (0.0, 721.6), (0.0, 1208.2)),
    ("KL encoder", 2, False): Bytes((0.0, 202.9), (0.5, 1591.6), (0.5, 1595.9)),
    ("KL encoder", 2, True): Bytes((0.0, 202.9), (0.0, 362.4), (0.0, 605.7)),
    ("TAESD encoder", 4, False): Bytes((0.0, 204.5), (0.0, 491.8), (0.0, 494.1)),
    ("TAESD encoder", 4, True): Bytes((0.0, 204.5), (0.0, 225.5), (0.0, 406.0)),
    ("TAESD encoder", 2, False): Bytes((0.0, 103.8), (0.0, 246.0), (0.0, 248.0)),
    ("TAESD encoder", 2, True): Bytes((0.0, 103.8), (0.0, 112.8), (0.0, 203.1)),
}
PICTURES = 2 * 3 * 4 * UNIT / MEGA  # MB of a whole picture and its cotangent in float32, beside a tile


def area(size: Size) -> float:
    """Of a picture (H, W), in units of 512x512."""
    return size[0] * size[1] / UNIT


def width(dtype: str) -> int:
    """Bytes of a number of one of prior.DTYPES."""
    return torch.finfo(DTYPES[dtype]).bits // 8


def _parts(size: Size, tiles: Tiles | None) -> tuple[int, Size]:
    """(how many tiles a picture has, the size (H, W) of each)."""
    if tiles is None:
        return 1, size
    latents = [math.ceil(n / FACTOR) for n in size]
    h, w = (min(n, tiles.size) * FACTOR for n in latents)
    return len(tiles.spans(latents[0])) * len(tiles.spans(latents[1])), (h, w)


def _operations(name: str, size: Size) -> tuple[float, float]:
    a = area(size)
    forward, back = ((lin * a + quad * a**2) * TERA for lin, quad in FLOP[name])
    return forward, back


def flop(
    family: str, decoder: str, size: Size, strategy: str = "fast", tile: int | None = None, jacobian: str = "exact", batch: int = 1
) -> float:
    """Floating-point operations of one guided step: Posterior.gradient for pictures (H, W) of one of FAMILIES and of DECODERS.

    strategy: one of gradient.STRATEGIES. tile: latents of a side, None for whole pictures. jacobian: one of posterior.JACOBIANS.
    A strategy's own evaluations are in it: the denoiser's second of "lean", those of all blocks of "checkpoint", those of tiles on the way back.
    Without the way back through the denoiser, "none" runs it once. A product and its sum are two operations. Raises KeyError for other names.
    """
    return run_flop(family, decoder, size, Cost(1, int(jacobian != "none"), 1, 1), strategy, tile, batch)


def run_flop(
    family: str,
    decoder: str,
    size: Size,
    cost: Cost,
    strategy: str = "fast",
    tile: int | None = None,
    batch: int = 1,
    guidance: str | None = None,
) -> float:
    """Floating-point operations of a run that evaluates its networks as often as `cost` says. The rest as of `flop`.

    guidance: the decoder of gradients, None for the same.
    """
    denoised, decoded, encoded = (denoising(tile), decoding(tile), encoding(tile)) if tile else (None, None, None)
    again = int(strategy == "checkpoint")
    sums = (
        (cost.denoiser - cost.denoiser_gradients) * _call(family, size, denoised),
        cost.denoiser_gradients * _gradient(family, size, denoised, again + (strategy == "lean")),
        (cost.decoder - cost.decoder_gradients) * _call(decoder, size, decoded),
        cost.decoder_gradients * _gradient(guidance or decoder, size, decoded, again),
        (cost.encoder - cost.encoder_gradients) * _call(decoder + ENCODER, size, encoded),
        cost.encoder_gradients * _gradient(decoder + ENCODER, size, encoded, again),
    )
    return batch * sum(sums)


def _call(name: str, size: Size, tiles: Tiles | None) -> float:
    """Of a network without a gradient."""
    count, part = _parts(size, tiles)
    return count * _operations(name, part)[0]


def _gradient(name: str, size: Size, tiles: Tiles | None, again: int) -> float:
    """Of a network and its way back, with so many calls more that a strategy makes, and that of tiles."""
    count, part = _parts(size, tiles)
    forward, back = _operations(name, part)
    return count * ((1 + again + (count > 1)) * forward + back)


def denoiser_flop(family: str, size: Size, tile: int | None = None, batch: int = 1) -> float:
    """Floating-point operations of one call of the denoiser without a gradient. Arguments as of `flop`."""
    return batch * _call(family, size, denoising(tile) if tile else None)


def weight_bytes(family: str, decoder: str, dtype: str = "fp16", vae_dtype: str | None = None) -> float:
    """Bytes of the weights of a denoiser in dtype, one of prior.DTYPES, and an autoencoder in vae_dtype (None: the same)."""
    return PARAMETERS[family] * width(dtype) + PARAMETERS[decoder] * width(vae_dtype or dtype)


def peak(
    family: str,
    decoder: str,
    size: Size,
    dtype: str = "fp16",
    strategy: str = "fast",
    tile: int | None = None,
    jacobian: str = "exact",
    batch: int = 1,
    vae_dtype: str | None = None,
) -> float:
    """Bytes that one guided step needs at most, weights included. Arguments as of `flop` and `weight_bytes`.

    Whole steps that were counted themselves, in fp16 and fp32, from 512 to 2048, every strategy, with tiles and without, agree within 3%.
    """
    step = Cost(1, int(jacobian != "none"), 1, 1)
    return run_peak(family, decoder, size, step, dtype, strategy, tile, batch, vae_dtype)


def run_peak(
    family: str,
    decoder: str,
    size: Size,
    cost: Cost,
    dtype: str = "fp16",
    strategy: str = "fast",
    tile: int | None = None,
    batch: int = 1,
    vae_dtype: str | None = None,
    guidance: str | None = None,
) -> float:
    """Bytes that a run needs at most, weights included, with its result decoded. Arguments as of `run_flop` and `peak`.

    A run without gradients keeps nothing: it needs the largest of its networks' calls, under every strategy.
    """
    vae, again = width(vae_dtype or dtype), strategy == "checkpoint"
    denoiser, tiled = _activations(family, width(dtype), size, denoising(tile) if tile else None, batch, again)
    own, _ = _activations(decoder, vae, size, decoding(tile) if tile else None, batch, again)
    guide, _ = _activations(guidance or decoder, vae, size, decoding(tile) if tile else None, batch, again)
    encoder, _ = _activations(decoder + ENCODER, vae, size, encoding(tile) if tile else None, batch, again)
    pictures = PICTURES * batch * area(size) if tiled else 0.0
    found = [denoiser.forward, own.forward + pictures]
    if cost.denoiser_gradients:
        found.append(denoiser.peak)
    if cost.decoder_gradients:
        waiting = denoiser.saved if cost.denoiser_gradients and strategy != "lean" else 0.0
        found.append(waiting + guide.peak + pictures)
        if cost.encoder_gradients:
            found.append(waiting + guide.saved + pictures + encoder.peak)
    if cost.encoder:
        found.append(encoder.forward + pictures)
    weights = weight_bytes(family, decoder, dtype, vae_dtype)
    if guidance and guidance != decoder:
        weights += PARAMETERS[guidance] * vae
    return weights + max(found) * MEGA


class _Activations(NamedTuple):
    """MB of one network at a size; as of Bytes."""

    forward: float
    saved: float
    peak: float


def _activations(name: str, of: int, size: Size, tiles: Tiles | None, batch: int, again: bool) -> tuple[_Activations, bool]:
    """(a network's, whether it runs on tiles). of: bytes of a number; again: whether blocks recompute."""
    count, part = _parts(size, tiles)
    a = batch * area(part)
    forward, saved, most = (constant + slope * a for constant, slope in BYTES[name, of, again])
    return _Activations(forward, 0.0 if count > 1 else saved, most), count > 1  # a tile runs again on the way back, and nothing of it waits
