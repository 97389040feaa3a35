"""Peak memory of one guided step, counted under fake tensors: weights, and every storage that lives during `Posterior.gradient`.

`posterior_bytes` counts a whole step as it is; `network_bytes` counts one network alone, from which dmap_core/costs.py puts a step together.
Attention is the fused kernel that saves q, k, v, its result and a logarithm of sums, as CUDA's flash and efficient kernels do. Not in the
count: what a kernel allocates and frees itself (workspaces of convolutions), and what an allocator loses to fragments.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dmap_core import costs
from dmap_core.gradient import STRATEGIES, latent_gradient, linearise
from dmap_core.memory import checkpointed
from dmap_core.operators import Operator
from dmap_core.posterior import Posterior
from dmap_core.prior import DTYPES

from .live import Live, fake, weight_bytes
from .shapes import CHANNELS, FACTOR, FAMILIES, ShapePrior, build
from .step import GIB, in_a_process

SIGMA = 5.0


@dataclass(frozen=True)
class Average(Operator):
    """Stands for super-resolution x8, whose bands are made of numbers that fake tensors do not have: means of 8 x 8 pixels, of the same size."""

    scale: int = 8

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(image, self.scale)

    def measurement_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.scale, size[1] // self.scale

    def image_size(self, y: torch.Tensor) -> tuple[int, int]:
        return y.shape[-2] * self.scale, y.shape[-1] * self.scale


OPERATOR = Average()


def watched(prior: ShapePrior, *tensors: torch.Tensor) -> Live:
    live = Live()
    live.known(*(p for network in prior.networks() for p in [*network.parameters(), *network.buffers()]), prior.context, *tensors)
    return live


def empty(size: int, channels: int, factor: int, batch: int = 1) -> torch.Tensor:
    return torch.empty(batch, channels, size // factor, size // factor)


def posterior_bytes(prior: ShapePrior, size: int, strategy: str, jacobian: str = "exact", batch: int = 1, encoder: bool = False) -> int:
    """Peak bytes of one gradient, without weights. The prior's tensors are fake ones. encoder: through it as well, as PSLD's."""
    z, y = empty(size, CHANNELS, FACTOR, batch), empty(size, 3, OPERATOR.scale, batch)

    def glue(z0: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm((z0 - prior.encode(image)).flatten(1), dim=1)

    with watched(prior) as live:
        Posterior(prior, OPERATOR, y, strategy).gradient(z, SIGMA, extra=glue if encoder else None, jacobian=jacobian)
    return live.peak


@dataclass(frozen=True)
class Bytes:
    """forward: peak of a call without a graph; saved: what waits for the way back; peak: of a call and the way back."""

    forward: int
    saved: int
    peak: int


def denoiser_bytes(prior: ShapePrior, size: int, recompute: bool) -> Bytes:
    z = empty(size, CHANNELS, FACTOR)
    with watched(prior) as live, torch.no_grad():
        prior.denoise(z, SIGMA)
    forward = live.peak
    with watched(prior) as live, checkpointed(prior.blocks()) if recompute else nullcontext(), torch.enable_grad():
        z0, pull = linearise(lambda z: prior.denoise(z, SIGMA), z)
        saved = live.now
        pull(torch.empty_like(z0))
    return Bytes(forward, saved, live.peak)


def decoder_bytes(prior: ShapePrior, size: int, recompute: bool) -> Bytes:
    """With the objective behind it, which holds some pictures in fp32. `saved` is what waits for an encoder behind the picture, where there is one."""
    z0, y = empty(size, CHANNELS, FACTOR), empty(size, 3, OPERATOR.scale)
    with watched(prior) as live, torch.no_grad():
        prior.decode(z0)
    forward = live.peak

    def objective(z0, x):
        residual = OPERATOR.distance(OPERATOR(x), y)
        return residual, residual

    with watched(prior) as live, checkpointed(prior.blocks()) if recompute else nullcontext(), torch.enable_grad():
        latent_gradient(prior.decode, objective, z0)
    peak = live.peak
    with watched(prior) as live, checkpointed(prior.blocks()) if recompute else nullcontext(), torch.enable_grad():
        x, _pull = linearise(prior.decode, z0)
        saved = live.now
    return Bytes(forward, saved, peak)


def encoder_bytes(prior: ShapePrior, size: int, recompute: bool) -> Bytes:
    x = empty(size, 3, 1)
    with watched(prior, x) as live, torch.no_grad():
        prior.encode(x)
    forward = live.peak
    with watched(prior, x) as live, checkpointed(prior.blocks()) if recompute else nullcontext(), torch.enable_grad():
        z0, pull = linearise(prior.encode, x)
        saved = live.now
        pull(torch.empty_like(z0))
    return Bytes(forward, saved, live.peak)


def counted(
    family: str, decoder: str, dtype: str, size: int, strategy: str, tile: int | None = None, jacobian: str = "exact", batch: int = 1
) -> dict:
    """A row of the table. tile: latents."""
    with fake():
        prior = build(family, decoder, dtype, weights=False, tile=tile)
        weights = weight_bytes(prior.networks())
        peak = posterior_bytes(prior, size, strategy, jacobian, batch)
    row = {"family": family, "decoder": decoder, "dtype": dtype, "size": size, "strategy": strategy, "tile": tile, "jacobian": jacobian}
    return row | {"weights_gib": weights / GIB, "peak_gib": (weights + peak) / GIB}


def table(families, sizes, dtypes, tiles=True):
    """Rows, one after the other: every strategy at every size, whole and in tiles of the family's own size."""
    native = {"SDXL": 128}
    for family in families:
        for dtype in dtypes:
            for size in sizes:
                for strategy in STRATEGIES:
                    yield counted(family, "KL", dtype, size, strategy)
                yield counted(family, "KL", dtype, size, "fast", jacobian="none")
                tile = native.get(family, 64)
                if tiles and size > tile * FACTOR:
                    for strategy in ("fast", "checkpoint"):
                        yield counted(family, "KL", dtype, size, strategy, tile)


CALIBRATION = (("SD 2.0", 256, "fast"), ("SD 2.0", 256, "lean"), ("SD 2.0", 256, "checkpoint"), ("SD 2.0", 512, "checkpoint"))
HEAD = (
    "| model | dtype | size | plan | tile | jacobian | peak GiB | of it weights | in closed form |\n|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict) -> str:
    size = (row["size"], row["size"])
    summed = costs.peak(row["family"], row["decoder"], size, row["dtype"], row["strategy"], row["tile"], row["jacobian"]) / GIB
    cells = [row["family"], row["dtype"], row["size"], row["strategy"], row["tile"] or "", row["jacobian"]]
    return "| " + " | ".join([*map(str, cells), f"{row['peak_gib']:.2f}", f"{row['weights_gib']:.2f}", f"{summed:.2f}"]) + " |"


def calibrated(family: str, size: int, strategy: str) -> dict:
    """A real step in fp32 on the CPU, in a process of its own, and its count. ratio: of activations, measured to counted."""
    job = {"family": family, "decoder": "KL", "size": size, "dtype": "fp32", "how": strategy, "device": "cpu", "threads": 1, "seed": 0}
    row = in_a_process(job)
    row["counted_gib"] = costs.peak(family, "KL", (size, size), "fp32", strategy) / GIB
    return row | {"ratio": (row["peak_gib"] - row["before_gib"]) / (row["counted_gib"] - row["weights_gib"])}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["SD 1.5", "SD 2.0", "SDXL"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16", "fp32"])
    parser.add_argument("--calibrate", action="store_true", help="measure real steps of Stable Diffusion 2.0 instead (10 GiB, minutes)")
    parser.add_argument("--json", type=Path, help="file for all rows")
    args = parser.parse_args(arguments)
    found = []
    if args.calibrate:
        print("| size | plan | before GiB | peak GiB | counted GiB | activations, measured to counted |\n|---|---|---|---|---|---|")
        for family, size, strategy in CALIBRATION:
            found.append(row := calibrated(family, size, strategy))
            cells = [size, strategy, *(f"{row[name]:.2f}" for name in ("before_gib", "peak_gib", "counted_gib", "ratio"))]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    else:
        print(HEAD)
        for row in table(args.families, args.sizes, args.dtypes):
            found.append(row)
            print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
