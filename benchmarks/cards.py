"""README's table of graphics cards: memory and minutes, counted, and nothing measured.

Memory is the peak of dmap_core/costs.py in half precision. Minutes are a run's operations, with a preset's number of calls, divided by an assumed share of
what NVIDIA gives as a card's rate of dense fp16 products that are summed in fp32, which is what PyTorch uses: twice the rate in fp32.
"""

from __future__ import annotations

import torch

from dmap_core import costs, presets
from dmap_core.gradient import STRATEGIES
from dmap_core.operators import Inpainting, Operator, SuperResolution

CARDS = {  # GiB, and TFLOP/s
    "RTX 4060": (8, 30.2),
    "RTX 3060": (12, 25.5),
    "RTX 4070": (12, 58.3),
    "RTX 4080": (16, 97.5),
    "RTX 3090": (24, 71.2),
    "RTX 4090": (24, 165.2),
}
SHARE = 0.25
SPARE = 1.0  # GiB for CUDA itself, workspaces of convolutions and the desktop
JOBS = {  # family, size, latents of a tile's side
    "SD 1.5 or 2.0, 512x512": ("SD 2.0", (512, 512), None),
    "SD 1.5 or 2.0, 1024x1024 in tiles": ("SD 2.0", (1024, 1024), 64),
    "SDXL, 1024x1024": ("SDXL", (1024, 1024), None),
}


def plan(family: str, size: tuple[int, int], tile: int | None, gib: float, jacobian: str = "none") -> tuple[str | None, float]:
    """The first plan that fits a card of so many GiB, and the GiB that it takes; (None, GiB of the leanest) where none does."""
    peaks = {name: costs.peak(family, "KL", size, "fp16", name, tile, jacobian) / 2**30 for name in STRATEGIES}
    return next(((name, peak) for name, peak in peaks.items() if peak + SPARE <= gib), (None, min(peaks.values())))


def tflop(operator: Operator, quality: str, family: str, size: tuple[int, int], tile: int | None, strategy: str) -> float:
    """Of a run with DMAPPreset's solver auto."""
    preset = presets.automatic(operator, presets.AUTO, quality)
    return costs.run_flop(family, "KL", size, preset.solver.cost(preset.steps), strategy, tile) / costs.TERA


def minutes(job: tuple, rate: float, strategy: str) -> list[float]:
    """Of look, good and best."""
    return [tflop(SuperResolution(4), quality, *job, strategy) / (SHARE * rate) / 60 for quality in presets.QUALITIES]


def told(time: float) -> str:
    """Minutes, or seconds where they are few."""
    return f"{60 * time:.0f} s" if time < 1.5 else f"{time:.1f} min" if time < 9.95 else f"{time:.0f} min"


def table() -> list[str]:
    """The lines of the table in Markdown."""
    lines = [f"| card | {' | '.join(JOBS)} |", "|---|" + "---|" * len(JOBS)]
    for card, (gib, rate) in CARDS.items():
        cells = []
        for job in JOBS.values():
            name, peak = plan(*job, gib)
            cells.append(f"{peak:.1f} GiB; {', '.join(map(told, minutes(job, rate, name)))}" if name else f"no: {peak:.1f} GiB at least")
        lines.append(f"| {card}, {gib} GiB | {' | '.join(cells)} |")
    return lines


def holes() -> tuple[float, float]:
    """How many times as much work a hole is at least and at most, of the table's jobs, in quality look."""
    hole = Inpainting(torch.eye(8))
    ratios = [tflop(hole, "look", *job, "fast") / tflop(SuperResolution(4), "look", *job, "fast") for job in JOBS.values()]
    return min(ratios), max(ratios)


def main() -> None:
    print("\n".join(table()))
    print("holes: {:.2f} to {:.2f} times".format(*holes()))
