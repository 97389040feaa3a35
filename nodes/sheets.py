"""Pictures side by side, with what each of them cost."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from PIL import Image, ImageFont

from ..dmap_core.pictures import Layout, Tile
from ..dmap_core.pictures import sheet as painted
from .pictures import check_picture, to_image
from .reports import read_report

NAME = "DMAP Comparison Sheet"
REPORTED = ("solver", "residuals", "denoiser_calls", "seconds")
PLACES = 8
TALLEST = 3  # times the width: a taller picture is shown narrower
MARGIN = 8


class ComparisonSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        places = range(1, PLACES + 1)
        return io.Schema(
            node_id="DMAP_ComparisonSheet",
            display_name=NAME,
            category="DMAP/sampling",
            description="Several restorations of one measurement side by side, each with its solver, residual, denoiser calls and seconds, and PSNR if the original is known.",
            inputs=[
                io.Image.Input("measurement", optional=True, tooltip="The damaged picture, shown first, enlarged without smoothing."),
                io.Image.Input(
                    "original",
                    optional=True,
                    tooltip="The undamaged picture, shown last, if there is one. Every restoration is then given its PSNR.",
                ),
                *(
                    io.Image.Input(f"image_{i}", optional=True, tooltip="A restored picture; of a batch the first is shown.")
                    for i in places
                ),
                *(
                    io.String.Input(
                        f"report_{i}",
                        optional=True,
                        force_input=True,
                        tooltip=f"The json output of the DMAP Sampling Report of image_{i}: what its caption says.",
                    )
                    for i in places
                ),
                io.Int.Input(
                    "width", default=256, min=64, max=2048, optional=True, tooltip="Width of every picture on the sheet, in pixels."
                ),
                io.String.Input(
                    "names",
                    default="",
                    optional=True,
                    tooltip="Names of the restorations in the order of the pictures, with commas between them. Empty: what their reports say.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet")],
        )

    @classmethod
    def execute(cls, measurement=None, original=None, width=256, names="", **given) -> io.NodeOutput:
        restored = [name for name in (f"image_{i}" for i in range(1, PLACES + 1)) if given.get(name) is not None]
        own = [name.strip() for name in names.split(",")] if names.strip() else []
        if own and len(own) != len(restored):
            raise ValueError(f"{NAME}: names holds {len(own)} names for {len(restored)} pictures; give one for each, or none")
        original = None if original is None else check_picture(original, f"{NAME}: original")
        tiles = []
        for name, picture in (("damaged", measurement), *((f"image_{i}", given.get(f"image_{i}")) for i in range(1, PLACES + 1))):
            if picture is None:
                continue
            picture = check_picture(picture, f"{NAME}: {name}")
            captions = [f"{picture.shape[2]}x{picture.shape[1]}"]
            if name != "damaged":
                title, captions = cls._captions(name, given.get(name.replace("image", "report")), picture, original)
                name = own[restored.index(name)] if own else title
            tiles.append((name, captions, picture[0]))
        if not tiles:
            raise ValueError(f"{NAME}: nothing is connected; connect image_1")
        if original is not None:
            tiles.append(("original", [], original[0]))
        return io.NodeOutput(sheet(tiles, width))

    @staticmethod
    def _captions(name: str, report: str | None, picture, original) -> tuple[str, list[str]]:
        lines = []
        if report:
            cost = read_report(report, REPORTED, f"{NAME}: {name.replace('image', 'report')}")
            name = cost["solver"].split(" (")[0]
            residual = f"residual {cost['residuals'][-1][0]:.4g}" if cost["residuals"] else "no residual"
            lines = [residual, f"{cost['denoiser_calls']} calls, {cost['seconds']:.1f} s"]
        if original is not None:
            if original.shape[1:] != picture.shape[1:]:
                raise ValueError(
                    f"{NAME}: {name} has the shape {tuple(picture.shape[1:])} and original {tuple(original.shape[1:])}; crop or resize one"
                )
            error = (picture[0].clamp(0, 1) - original[0].clamp(0, 1)).cpu().double().square().mean()
            lines.append(f"{float(-10 * error.log10()):.2f} dB")
        return name, lines


def _size(width: int, height: int, wanted: int) -> tuple[int, int]:
    """(width, height) in which a picture is shown: as wide as wanted, unless it would be too tall then. Never without pixels."""
    tall = round(wanted * height / width)
    if tall > TALLEST * wanted:
        return max(1, round(TALLEST * wanted * width / height)), TALLEST * wanted
    return wanted, max(1, tall)


def sheet(tiles: list[tuple[str, list[str], torch.Tensor]], width: int) -> torch.Tensor:
    """(1, H, W, 3) in [0, 1]: (name, lines below it, picture (h, w, C)) from left to right, at most four in a row."""
    text = max(12, width // 16)
    line = round(1.3 * text)
    shown = []
    for name, lines, picture in tiles:
        wide, height = _size(picture.shape[1], picture.shape[0], width)
        picture = picture.expand(-1, -1, 3) if picture.shape[-1] == 1 else picture
        pixels = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
        enlarged = height > picture.shape[0]
        resized = Image.fromarray(pixels).resize((wide, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
        shown.append(Tile(resized.convert("RGB"), [name, *lines]))
    columns = min(4, len(shown)) if len(shown) > 5 else len(shown)
    below = line * max(len(tile.captions) for tile in shown) + 2 * MARGIN
    layout = Layout(
        (width, max(tile.picture.height for tile in shown)),
        (MARGIN, below),
        (MARGIN, MARGIN, MARGIN, below),
        line=line,
        font=ImageFont.load_default(size=text),
    )
    return to_image([painted([shown[i : i + columns] for i in range(0, len(shown), columns)], layout)])


NODES = [ComparisonSheet]
