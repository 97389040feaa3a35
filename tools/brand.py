"""Draws docs/icon.png (400x400) and docs/banner.png (21:9), which the registry shows: one landscape, damaged on the left and whole on the right.

    python tools/brand.py

Nothing in them is taken from elsewhere but Pillow's own typeface.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

DOCS = Path(__file__).resolve().parent.parent / "docs"
ICON = (400, 400)
BANNER = (1680, 720)
SMOOTH = 2  # drawn so many times larger, then shrunk
SKY = ((33, 37, 84), (214, 96, 106), (255, 203, 128))  # from above to the horizon
RIDGES = ((0.60, 0.10, (121, 78, 122)), (0.72, 0.09, (74, 54, 101)), (0.86, 0.07, (33, 31, 62)))  # height, swing, colour
SUN = (255, 240, 201)


def landscape(size: tuple[int, int], sun: float) -> Image.Image:
    """Sky, sun and three ridges; sun: where it stands, as a part of the width."""
    width, height = (n * SMOOTH for n in size)
    column = Image.new("RGB", (1, height))
    for y in range(height):
        part = min(y / (0.8 * height), 0.999) * (len(SKY) - 1)
        above, below = SKY[int(part)], SKY[int(part) + 1]
        column.putpixel((0, y), tuple(round(a + (b - a) * (part % 1)) for a, b in zip(above, below, strict=True)))
    page = column.resize((width, height))
    draw = ImageDraw.Draw(page)
    radius, middle = 0.13 * height, (sun * width, 0.47 * height)
    draw.ellipse((middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius), fill=SUN)
    for number, (level, swing, colour) in enumerate(RIDGES):
        wave = [
            (x, height * (level + swing * (math.sin(x / height * 3.1 + 2 * number) + 0.4 * math.sin(x / height * 8.3 + number)) / 1.4))
            for x in range(0, width + 4, 4)
        ]
        draw.polygon([(0, height), *wave, (width, height)], fill=colour)
    return page.resize(size, Image.LANCZOS)


def coarse(picture: Image.Image, times: int) -> Image.Image:
    return picture.resize([n // times for n in picture.size], Image.BICUBIC).resize(picture.size, Image.NEAREST)


def grey(picture: Image.Image) -> Image.Image:
    return ImageOps.grayscale(picture).convert("RGB")


def blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(picture.height / 55))


def scratched(picture: Image.Image) -> Image.Image:
    page, numbers = picture.copy(), random.Random(3)
    draw = ImageDraw.Draw(page)
    width, height = page.size
    for _ in range(width // 22):
        x, y = numbers.uniform(0, width), numbers.uniform(-0.1, 0.8) * height
        end = (x + numbers.uniform(-0.04, 0.04) * height, y + numbers.uniform(0.2, 0.6) * height)
        draw.line((x, y, *end), fill=(236, 230, 220), width=max(2, height // 240))
    return page


def icon() -> Image.Image:
    page = landscape(ICON, 0.52)
    side = page.width
    edge = [(0.60 * side, -2), (0.40 * side, side + 2)]
    mask = Image.new("L", page.size)
    ImageDraw.Draw(mask).polygon([(0, 0), *edge, (0, side)], fill=255)
    page.paste(coarse(grey(page), 25), mask=mask)
    ImageDraw.Draw(page).line(edge, fill="white", width=7)
    corners = Image.new("L", [n * SMOOTH for n in ICON])
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, *corners.size), 150, fill=255)
    page.putalpha(corners.resize(ICON, Image.LANCZOS))
    return page


def banner() -> Image.Image:
    whole = landscape(BANNER, 0.89)
    width, height = whole.size
    page = whole.copy()
    slant = 0.06 * width
    # from the oldest damage on the left to none
    edges = [0.0, 0.17, 0.34, 0.51]
    looks = [coarse(grey(whole), 30), scratched(grey(whole)), blurred(whole)]
    for look, left, right in zip(looks, edges, edges[1:], strict=False):
        mask = Image.new("L", page.size)
        start = left * width if left else -slant
        shape = [(start + slant, 0), (right * width + slant, 0), (right * width, height), (start, height)]
        ImageDraw.Draw(mask).polygon(shape, fill=255)
        page.paste(look, mask=mask)
    draw = ImageDraw.Draw(page)
    for edge in edges[1:]:
        draw.line((edge * width + slant, -4, edge * width, height + 4), fill="white", width=7)
    draw.text((0.58 * width, 0.17 * height), "DMAP", font=ImageFont.load_default(150), fill="white", anchor="lm")
    draw.text((0.585 * width, 0.315 * height), "restore damaged pictures", font=ImageFont.load_default(44), fill="white", anchor="lm")
    return page


def main() -> None:
    for name, picture in (("icon", icon()), ("banner", banner())):
        path = DOCS / f"{name}.png"
        picture.save(path, optimize=True)
        print(f"{path}  {picture.width}x{picture.height}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
