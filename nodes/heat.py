"""Values of a picture as colours, with a bar that says what they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # black, violet, red, orange, pale yellow: ever lighter
UNKNOWN = (128, 128, 128)  # no colour of HEAT
LEAST_BAR = 6  # its height at least, in heights of its numbers


def heat(values: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W, 3) uint8 in the colours of HEAT."""
    places = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, places, channel) for channel in zip(*HEAT, strict=True)], axis=-1).round().astype(np.uint8)


def page(coloured: Image.Image, labels: Mapping[float, str], caption: str) -> Image.Image:
    """The picture in the left upper corner of a white page, pixel for pixel; to its right a bar of HEAT with labels at their parts of it, below it a caption.

    No labels: no bar.
    """
    width, height = coloured.size
    size = max(14, height // 28)
    font = ImageFont.load_default(size=size)
    bar, gap, tall = size, size // 2, max(height, LEAST_BAR * size)
    right = round(3 * gap + bar + max(map(font.getlength, labels.values()))) if labels else 0
    sheet = Image.new("RGB", (max(width + right, round(font.getlength(caption)) + gap), tall + 2 * size), "white")
    sheet.paste(coloured, (0, 0))
    draw = ImageDraw.Draw(sheet)
    if labels:
        ramp = heat(np.linspace(1, 0, tall - size)[:, None].repeat(bar, axis=1))
        sheet.paste(Image.fromarray(ramp), (width + gap, size // 2))
    for part, text in labels.items():
        draw.text((width + 2 * gap + bar, size // 2 + (1 - part) * (tall - size)), text, fill="black", font=font, anchor="lm")
    draw.text((2, tall + size), caption, fill="black", font=font, anchor="lm")
    return sheet
