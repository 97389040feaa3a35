"""Values over the steps of a training or a run, as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 360)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 32
SMOOTHING = 50  # the thick line's mean is over this part of the curve: loss of single batches jumps with their timesteps
DOT = 4  # its radius, pixels

Place = Callable[[float, float], tuple[float, float]]  # of a value at a step, on the page


def _smoothed(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // SMOOTHING)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def _paper(title: str, values: Sequence[float], last: int) -> tuple[Image.Image, ImageDraw.ImageDraw, Place | None]:
    """A page with a title and axes: steps up to `last`, and the range of the values that are finite and above 0 on a log scale; no axes without any."""
    page = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    shown = [v for v in values if 0 < v < math.inf]
    draw.text((LEFT, 6), title, fill="black", font=font)
    if not shown:
        return page, draw, None
    low, high = math.log10(min(shown)) - 0.02, math.log10(max(shown)) + 0.02

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (SIZE[0] - LEFT - RIGHT) * step / last
        return x, TOP + (SIZE[1] - TOP - BOTTOM) * (high - math.log10(max(value, 10**low))) / (high - low)

    for i in range(5):
        value = 10 ** (low + (high - low) * i / 4)
        y = at(0, value)[1]
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill="lightgray")
        draw.text((4, y - 8), f"{value:.3g}", fill="black", font=font)
    for step in sorted({0, last // 2, last}):
        draw.text((at(step, 1)[0] - 12, SIZE[1] - BOTTOM + 8), str(step), fill="black", font=font)
    return page, draw, at


def _line(draw: ImageDraw.ImageDraw, at: Place, values: Sequence[float], colour: str, width: int) -> None:
    """Through the values of step 1, 2, ..., as far as they are finite."""
    points = [at(step, value) for step, value in enumerate(values, 1) if math.isfinite(value)]
    if len(points) > 1:
        draw.line(points, fill=colour, width=width)


def _dot(draw: ImageDraw.ImageDraw, at: Place, step: float, value: float) -> None:
    x, y = at(step, value)
    draw.ellipse([x - DOT, y - DOT, x + DOT, y + DOT], fill="darkorange")


def loss_curve(losses: Sequence[float], validations: Sequence[Sequence[float]] = (), title: str = "training loss") -> Image.Image:
    """Losses of step 1, 2, ... (thin: each; thick: running mean) and validation losses as dots at their (step, loss), on a log scale.

    What is not finite, such as a validation loss in a precision that is too low, is left out.
    """
    last = max(len(losses), *(int(step) for step, _ in validations), 1) if validations else max(len(losses), 1)
    page, draw, at = _paper(title, [*losses, *(loss for _, loss in validations)], last)
    if at is None:
        return page
    for values, colour, width in ((losses, "lightsteelblue", 1), (_smoothed(losses), "steelblue", 3)):
        _line(draw, at, values, colour, width)
    for step, loss in ((step, loss) for step, loss in validations if math.isfinite(loss)):
        _dot(draw, at, step, loss)
    return page


def residual_curve(residuals: Sequence[Sequence[float]], finished: Sequence[float], title: str) -> Image.Image:
    """A line for every sample of residuals[step][sample], on a log scale, and a dot where its finished picture is."""
    last = max(len(residuals), 1)
    page, draw, at = _paper(title, [*(value for step in residuals for value in step), *finished], last)
    if at is None:
        return page
    for values in zip(*residuals, strict=True):
        _line(draw, at, values, "steelblue", 2)
    for value in finished:
        _dot(draw, at, last, value)
    return page
