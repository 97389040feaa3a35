"""How large a restoration may become before somebody is asked."""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..dmap_core.costs import flop
from ..dmap_core.tiles import wanted

MAX_MEGAPIXELS = 4.0
NATIVE = 64  # latents of a side, of Stable Diffusion 2.0


def max_megapixels_input():
    return io.Float.Input(
        "max_megapixels",
        default=MAX_MEGAPIXELS,
        min=0.01,
        max=1000.0,
        step=0.1,
        round=0.01,
        optional=True,
        tooltip="Larger results are refused before any work, with what they would cost. Raise it if you mean it.",
    )


def step_cost(size: tuple[int, int]) -> float:
    """Operations of a guided step of Stable Diffusion 2.0 at `size` (H, W), as a multiple of one at 512x512: in the tiles that `tile` auto takes, or whole."""
    latents = math.ceil(size[0] / 8), math.ceil(size[1] / 8)
    tile = NATIVE if wanted(latents, NATIVE) else None
    return flop("SD 2.0", "KL", size, tile=tile) / flop("SD 2.0", "KL", (512, 512))


def check_megapixels(name: str, size: tuple[int, int], y_size: tuple[int, int], limit: float) -> None:
    """Raises ValueError, saying what it would cost and what would fit, for a result `size` (H, W) of more than `limit` million pixels.

    y_size: (h, w) of the measurement that makes a result of that size.
    """
    megapixels = size[0] * size[1] / 1e6
    if megapixels <= limit:
        return
    shrink = math.sqrt(limit / megapixels)
    fits = f"a measurement of at most {math.floor(y_size[1] * shrink)}x{math.floor(y_size[0] * shrink)}"
    scale = math.floor(size[0] / y_size[0] * shrink)
    if size != y_size and scale >= 2:
        fits += f", or a scale of {scale}"
    raise ValueError(
        f"{name}: the measurement of {y_size[1]}x{y_size[0]} makes a picture of {size[1]}x{size[0]}, {megapixels:.1f} megapixels: every step costs "
        f"{step_cost(size):.0f} times a step at 512x512. What fits {limit:g} megapixels: {fits}. Or raise max_megapixels (now {limit:g})"
    )
