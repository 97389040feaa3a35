"""A loss over the steps of a training, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 360)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 32
SMOOTHING = 50  # the thick line's mean is over this part of the curve: loss of single batches jumps with their timesteps


def _smoothed(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // SMOOTHING)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def loss_curve(losses: Sequence[float], validations: Sequence[Sequence[float]] = (), title: str = "training loss") -> Image.Image:
    """Losses of step 1, 2, ... (thin: each; thick: running mean) and validation losses as dots at their (step, loss), on a log scale.

    What is not finite, such as a validation loss in a precision that is too low, is left out.
    """
    page = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    shown = [v for v in [*losses, *(loss for _, loss in validations)] if 0 < v < math.inf]
    draw.text((LEFT, 6), title, fill="black", font=font)
    if not shown:
        return page
    low, high = math.log10(min(shown)) - 0.02, math.log10(max(shown)) + 0.02
    last = max(len(losses), *(int(step) for step, _ in validations), 1) if validations else max(len(losses), 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (SIZE[0] - LEFT - RIGHT) * step / last
        return x, TOP + (SIZE[1] - TOP - BOTTOM) * (high - math.log10(max(loss, 10**low))) / (high - low)

    for i in range(5):
        loss = 10 ** (low + (high - low) * i / 4)
        y = at(0, loss)[1]
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill="lightgray")
        draw.text((4, y - 8), f"{loss:.3g}", fill="black", font=font)
    for step in sorted({0, last // 2, last}):
        draw.text((at(step, 1)[0] - 12, SIZE[1] - BOTTOM + 8), str(step), fill="black", font=font)
    steps = range(1, len(losses) + 1)
    for values, colour, width in ((losses, "lightsteelblue", 1), (_smoothed(losses), "steelblue", 3)):
        points = [at(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=width)
    for step, loss in ((step, loss) for step, loss in validations if math.isfinite(loss)):
        x, y = at(step, loss)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="darkorange")
    return page
