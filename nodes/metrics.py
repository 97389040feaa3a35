"""RestorationMetrics: how good restored pictures are, as text, as a table and as a map of errors."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..dmap_core.metrics import PICTURE_METRICS, SET_METRICS, WEIGHTS, error_map, mean_interval, miou
from ..dmap_core.metrics.pictures import saved
from ..dmap_core.metrics.summary import Column, Summary, distances
from ..dmap_core.operators import Operator as CoreOperator
from ..dmap_core.operators import Segmentation
from ..dmap_core.operators.noisy import parts
from ..dmap_core.operators.segmentation import CLASSES
from .heat import heat, page
from .host.compute import Bar, measuring, place, residuals, with_operator
from .host.folders import weights_folder
from .host.gradients import normal
from .operators import Operator
from .pictures import check_picture, measurement_of, to_core, to_image
from .reports import read_report

NAME = "RestorationMetrics"
# word of the combo: (names in the catalogue, key of the weights file)
PERCEPTUAL = {
    "none": ((), None),
    "LPIPS alex": (("lpips-alex",), "alex"),
    "LPIPS vgg": (("lpips-vgg",), "vgg"),
    "EfficientNet-Lite0": (("features",), None),
}
DISTRIBUTION = {
    "none": ((), None),
    "FID and KID": (("fid", "kid"), "inception"),
    "EfficientNet-Lite0": (("fd-efficientnet", "kd-efficientnet"), None),
}
FORMULAS = ("psnr", "ssim")  # always given; they have no network
ROWS = 16  # pictures with a line of their own in the table
FONT = 18  # pixels
HEADER = 18  # characters of a line in a column's head
FOOTER = 84  # characters of a line below the table
MARGIN = 16
LEAST = 256  # pixels: smaller error maps are enlarged, so that their numbers can be read


class RestorationMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_RestorationMetrics",
            display_name="RestorationMetrics",
            category="DMAP/studies",
            description="How close restored pictures are to their originals and to the measurement: PSNR, SSIM and more, for every picture and on "
            "average, as text and as a table, and where the errors are.",
            inputs=[
                io.Image.Input("restored", tooltip="The restored pictures, RGB, from DMAP Decode."),
                io.Image.Input(
                    "reference", tooltip="The undamaged pictures of the same size: one for all, or one for each restored picture."
                ),
                io.Combo.Input(
                    "perceptual",
                    options=list(PERCEPTUAL),
                    default="none",
                    tooltip="How different the pictures look to a network. LPIPS is what papers give; it needs a Python package and a weights file (see the help). "
                    "EfficientNet-Lite0 stands in where those cannot be had; its numbers are others.",
                ),
                io.Combo.Input(
                    "distribution",
                    options=list(DISTRIBUTION),
                    default="none",
                    tooltip="How different the set of restored pictures is from the set of references. Means little below thousands of pictures.",
                ),
                Operator.Input(
                    "operator",
                    optional=True,
                    tooltip="The damage. With the measurement: how well the pictures explain it (the residual). For 'Operator: Segmentation' also mIoU.",
                ),
                io.MultiType.Input(
                    "measurement",
                    types=[io.Image, io.Mask],
                    optional=True,
                    tooltip="The damaged picture, the same that DPSGuider got: one for all, or one for each restored picture.",
                ),
                io.String.Input(
                    "report",
                    optional=True,
                    force_input=True,
                    tooltip="The json output of DMAP Sampling Report: seconds, denoiser calls, memory plan and peak memory of the GPU are then given, too.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                io.String.Output(display_name="json"),
                io.Image.Output(display_name="table"),
                io.Image.Output(display_name="error_map", tooltip="For every picture where it differs from its reference, on one scale."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, restored, reference, perceptual, distribution, operator=None, measurement=None, report=None) -> io.NodeOutput:
        run = read_report(report, REPORTED, f"{NAME}: report") if report else None
        with measuring():
            restored, reference, y = _given(*normal((restored, reference)), operator, normal(measurement), distribution)
            found = measured(restored, reference, perceptual, distribution, operator, y, run)
            maps = error_pictures(restored, error_map(restored, reference))
        text = found.text()
        return io.NodeOutput(text, found.json(), table(found), maps, ui=ui.PreviewText(text))


def _given(
    restored: Tensor, reference: Tensor, operator: CoreOperator | None, measurement: Tensor | None, distribution: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both sets of pictures (B, 3, H, W) in [0, 1], and y. Raises ValueError, naming the input, for what does not go together."""
    restored, reference = (picture(image, f"{NAME}: {name}") for image, name in ((restored, "restored"), (reference, "reference")))
    size, wanted = (tuple(x.shape[-2:]) for x in (restored, reference))
    if size != wanted:
        raise ValueError(f"{NAME}: restored is {size[1]}x{size[0]} and reference {wanted[1]}x{wanted[0]}; crop or resize one of them")
    if distribution != "none" and min(len(restored), len(reference)) < 2:
        raise ValueError(
            f"{NAME}: distribution compares sets of pictures, and there are {len(restored)} restored and {len(reference)} reference; "
            "give several of both, or set it to none"
        )
    if len(reference) not in (1, len(restored)):
        raise ValueError(f"{NAME}: reference holds {len(reference)} pictures for {len(restored)} restored ones; give one, or one for each")
    if (operator is None) != (measurement is None):
        given, missing = ("operator", "measurement") if measurement is None else ("measurement", "operator")
        raise ValueError(f"{NAME}: {given} is connected but {missing} is not; connect both or neither")
    if operator is None:
        return restored, reference.expand_as(restored), None
    y = measurement_of(restored, measurement, operator, NAME)
    return restored, reference.expand_as(restored), y.expand(len(restored), -1, -1, -1)


def picture(image: Tensor, name: str) -> Tensor:
    """(B, H, W, 3) -> (B, 3, H, W) in [0, 1], as they would be saved. Raises ValueError, naming the input."""
    to_core(image, name)
    return saved(check_picture(image, name).movedim(-1, 1), name)


REPORTED = ("solver", "operator", "memory", "seconds", "denoiser_calls")  # what is repeated of a report


def measured(
    restored: Tensor,
    reference: Tensor,
    perceptual: str,
    distribution: str,
    operator: CoreOperator | None,
    y: Tensor | None,
    run: dict[str, Any] | None,
) -> Summary:
    """All that was asked for; missing packages and weights are named before anything is computed."""
    (names, key), (set_names, set_key) = PERCEPTUAL[perceptual], DISTRIBUTION[distribution]
    metrics = [PICTURE_METRICS[name] for name in (*FORMULAS, *names)]
    networks = [metric.open(_folder(key)) for metric in metrics]
    set_metrics = [SET_METRICS[name] for name in set_names]
    features = set_metrics[0].open(_folder(set_key)) if set_metrics else None
    mean_interval([0.0, 1.0])  # raises for a package that is missing
    for network in [*networks[len(FORMULAS) :], *([features] if features else [])]:
        place(network)

    bar = Bar(len(restored))
    values: list[list[float]] = [[] for _ in metrics]
    ours, theirs = [], []
    for image, wanted in zip(restored.split(1), reference.split(1), strict=True):
        for into, network in zip(values, networks, strict=True):
            into.append(float(network(image, wanted)))
        if features:
            ours.append(features(image).cpu())
            theirs.append(features(wanted).cpu())
        bar.move()
    columns = [Column(m.name, m.label, v, m.digits) for m, v in zip(metrics, values, strict=True)]
    columns += _measurement_columns(restored, operator, y) if operator else []
    sets, warnings = distances(set_metrics, torch.cat(theirs), torch.cat(ours)) if features else ([], [])
    return Summary(tuple(restored.shape[-2:]), columns, sets, warnings, run)


def _folder(key: str | None):
    return weights_folder(WEIGHTS[key].file if key else None)


def _measurement_columns(restored: Tensor, operator: CoreOperator, y: Tensor) -> list[Column]:
    pairs = list(zip(restored.split(1), y.split(1), strict=True))
    segments = isinstance(parts(operator)[-1], Segmentation)
    label = "cross-entropy of f(x) and y" if segments else "residual ||f(x)-y||"
    columns = [Column("residual", label, [float(residuals(operator, image, one)) for image, one in pairs], None)]
    if segments:
        labels = [with_operator(operator, image, lambda f, x: f.measure(2 * x - 1)) for image, _ in pairs]
        values = [float(miou(ours, one, len(CLASSES))) for ours, (_, one) in zip(labels, pairs, strict=True)]
        columns.append(Column("miou", "mIoU", values, 4))
    return columns


# pictures of it


def table(found: Summary) -> Tensor:
    """(1, H, W, 3) in [0, 1]: a line for each of the first pictures, their means, and what is said of all of them."""
    font = ImageFont.load_default(size=FONT)
    line = round(1.5 * FONT)
    shown = range(min(found.count, ROWS))
    columns = [(["picture"], [str(i + 1) for i in shown] + ["mean"])]
    for c in found.columns:
        columns.append((textwrap.wrap(c.label, HEADER, break_on_hyphens=False), [c.show(c.values[i]) for i in shown] + [c.mean()]))
    widths = [max(font.getlength(text) for text in (*head, *cells)) for head, cells in columns]
    footer = [f"{found.count - ROWS} more pictures are in the means and in the json output"] if found.count > ROWS else []
    footer = [part for text in [*footer, *found.footer()] for part in textwrap.wrap(text, FOOTER)]
    heads = max(len(head) for head, _ in columns)
    right = [2 * MARGIN + round(sum(widths[: i + 1])) + 2 * MARGIN * i for i in range(len(widths))]
    width = max(right[-1], MARGIN + round(max((font.getlength(text) for text in (*footer, found.title())), default=0))) + MARGIN
    top = MARGIN + line + MARGIN // 2
    lines = top + line * heads, top + line * (heads + len(shown)) + MARGIN // 2, top + line * (heads + len(shown) + 1) + MARGIN
    page = Image.new("RGB", (width, lines[2] + line * len(footer) + (MARGIN if footer else 0)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), found.title(), fill="black", font=font)
    for y in (lines[0], lines[1]):
        draw.line([(MARGIN, y), (right[-1], y)], fill="gray")
    for (head, cells), x in zip(columns, right, strict=True):
        for i, text in enumerate(head):
            draw.text((x, top + line * (heads - len(head) + i)), text, fill="black", font=font, anchor="ra")
        for i, text in enumerate(cells):
            y = lines[1] if i == len(shown) else lines[0] + line * i
            draw.text((x, y + 5), text, fill="black", font=font, anchor="ra")
    for i, text in enumerate(footer):
        draw.text((MARGIN, lines[2] + line * i), text, fill="black", font=font)
    return to_image([page])


def error_pictures(restored: Tensor, errors: Tensor) -> Tensor:
    """(B, H, W, 3) in [0, 1]: each map of errors (1, H, W) in colours, with a bar that says what they mean. All have the scale of the largest error."""
    top = float(errors.max())
    labels = {0.0: "0", **({0.5: f"{top / 2:.3g}", 1.0: f"{top:.3g}"} if top > 0 else {})}
    height, width = restored.shape[-2:]
    factor = max(1, math.ceil(LEAST / min(height, width)))
    pages = []
    for error in errors[:, 0].cpu().numpy():
        coloured = Image.fromarray(heat(error / top if top > 0 else error))
        enlarged = coloured.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        pages.append(page(enlarged, labels, "|restored - reference|"))
    return to_image(pages)


NODES = [RestorationMetrics]
