"""Where a restoration misses its measurement, where it is invented, and how it came near: as pictures."""

from __future__ import annotations

import numpy as np
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..dmap_core.consistency import grey_levels, verdict
from ..dmap_core.operators import Operator as CoreOperator
from ..dmap_core.operators import Segmentation
from ..dmap_core.operators.noisy import parts
from .charts import residual_curve
from .heat import UNKNOWN, heat, page
from .host.compute import measuring, with_operator
from .host.gradients import normal
from .host.report import report_of
from .operators import Operator, measurement_input
from .pictures import check_picture, measurement_of, to_core, to_image
from .schema import schema

LEVELS = 127.5  # of 255, for one unit of [-1, 1] pictures
TOPS = (4, 8, 16, 32, 64, 128, 255)  # grey levels that a scale may end at: below the first there is nothing to be seen
SHARE = 99.9  # per cent of the pixels that a scale has to hold; a few beyond it do not make all others black
INVENTED = 8  # grey levels by which versions differ (standard deviation) where a picture is the model's word


class MismatchMap(io.ComfyNode):
    NAME = "Mismatch Map"

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_MismatchMap",
            display_name=f"{cls.NAME} (fidelity)",
            category="DMAP/sampling",
            description="Where the restored picture, damaged again by the operator, is not what you gave, in grey levels of 255: dark is faithful.",
            search_aliases=["difference", "compare", "fidelity", "residual", "error map", "restore"],
            inputs=[
                io.Image.Input("restored", tooltip="The restored picture, of DMAP Decode or Match Measurement, or a batch."),
                measurement_input("The one that DPSGuider has."),
                Operator.Input("operator", tooltip="The one that DPSGuider has."),
            ],
            outputs=[io.Image.Output(display_name="map"), io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, restored, measurement, operator: CoreOperator) -> io.NodeOutput:
        with measuring():
            restored, measurement = normal((restored, measurement))
            x = to_core(restored, f"{cls.NAME}: restored").clamp(-1, 1)
            y = measurement_of(x, measurement, operator, cls.NAME).expand(len(x), -1, -1, -1)
            if isinstance(parts(operator)[-1], Segmentation):
                text = f"{operator.describe()} compares labels, which differ by no grey levels; RestorationMetrics has their mIoU"
                return shown(blank(len(x), x.shape[-2:], "labels: no grey levels"), text)
            y_hat = with_operator(operator, x, lambda f, x: f(x))
            differences = operator.difference(y_hat, y).float() * LEVELS
            rms, worst = grey_levels(operator, y_hat, y)
        hidden = operator.hidden()
        unknown = None if hidden is None else (hidden > 0).cpu().expand(len(x), -1, -1, -1)[:, 0].numpy()
        maps = in_colours(_over_channels(differences), x.shape[-2:], "difference in grey levels of 255", unknown)
        noise = LEVELS * operator.noise
        lines = []
        for i, (mean, most) in enumerate(zip(rms.tolist(), worst.tolist(), strict=True)):
            row, column = np.unravel_index(int(_over_channels(differences[i : i + 1]).argmax()), differences.shape[-2:])
            where = f"at x {column}, y {row} of the measurement"
            which = f"picture {i + 1}: " if len(x) > 1 else ""
            lines.append(f"{which}mismatch {mean:.1f} of 255 grey levels (RMS), {most:.1f} at worst {where}: {verdict(mean, noise)}.")
        return shown(maps, "\n".join(lines))


class UncertaintyMap(io.ComfyNode):
    NAME = "Uncertainty Map"

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_UncertaintyMap",
            display_name=f"{cls.NAME} (invented here)",
            category="DMAP/sampling",
            description="Where several restorations of one picture differ, in grey levels of 255: bright is invented by the model, dark is what the picture itself says.",
            search_aliases=["variance", "standard deviation", "seeds", "versions", "hallucination", "restore"],
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="Versions of one picture as a batch: the same measurement, other noise. Four or more say more than two.",
                ),
            ],
            outputs=[io.Image.Output(display_name="map"), io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images) -> io.NodeOutput:
        images = check_picture(images, f"{cls.NAME}: images")
        count, size = len(images), images.shape[1:3]
        if count < 2:
            text = "One version: what the model invented shows where versions differ. Make two or more (batch_size of Empty Measurement Latent)."
            return shown(blank(1, size, "one version: nothing to compare"), text)
        deviations = 255 * images.float().clamp(0, 1).std(dim=0)
        values = _over_channels(deviations.movedim(-1, 0)[None])
        maps = in_colours(values, size, f"invented here: {count} versions differ, grey levels of 255")
        share = 100 * float((values > INVENTED).mean())
        text = (
            f"{count} versions differ by {float(np.sqrt((values**2).mean())):.1f} of 255 grey levels (standard deviation); in {share:.0f} % of the picture "
            f"by more than {INVENTED}: what is there is invented. Where they agree they can still be wrong together."
        )
        return shown(maps, text)


class ResidualCurve(io.ComfyNode):
    NAME = "Residual Curve"

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_ResidualCurve",
            display_name=cls.NAME,
            category="DMAP/sampling",
            description="How the restoration came nearer to the measurement, step by step, of the last run of a guider.",
            search_aliases=["plot", "chart", "loss", "convergence", "progress"],
            inputs=[
                io.Guider.Input("guider", tooltip="The DPSGuider of the run."),
                io.Latent.Input("latent", tooltip="The output of SamplerCustomAdvanced: it says which run."),
            ],
            outputs=[io.Image.Output(display_name="curve")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, guider, latent) -> io.NodeOutput:
        report = report_of(latent["samples"]) or getattr(guider, "report", None)
        if report is None or not report.residuals:
            raise ValueError(f"{cls.NAME}: guider has no finished run; connect the DPSGuider that the sampler used")
        if report.levels:
            curve = residual_curve(
                report.levels, report.mismatch, "mismatch in grey levels of 255, over the steps (dot: the finished picture)"
            )
        else:
            curve = residual_curve(report.residuals, (), "residual over the steps")
        image = to_image([curve])
        return io.NodeOutput(image, ui=ui.PreviewImage(image))


def shown(maps: Tensor, text: str) -> io.NodeOutput:
    return io.NodeOutput(maps, text, ui=ui.PreviewImage(maps))


def _over_channels(differences: Tensor) -> np.ndarray:
    """(B, h, w): the root mean square of every pixel's channels, so that the map's own is that of all values. differences: (B, c, h, w)."""
    return differences.square().mean(dim=1).sqrt().cpu().numpy()


def blank(count: int, size: tuple[int, int], caption: str) -> Tensor:
    """Maps (count, H, W, 3) of pictures of `size` (H, W) that show nothing, and why."""
    return to_image([page(Image.new("RGB", (size[1], size[0]), UNKNOWN), {}, caption)] * count)


def in_colours(values: np.ndarray, size: tuple[int, int], caption: str, unknown: np.ndarray | None = None) -> Tensor:
    """Maps (B, H', W', 3) in [0, 1] of values (B, h, w) in grey levels, all on one scale, their left upper corner being the map itself.

    They have their own size, enlarged to `size` (H, W) where that is a whole multiple. unknown: True where there is no value.
    """
    known = values if unknown is None else values[~unknown]
    needed = float(np.percentile(known, SHARE)) if known.size else 0.0
    top = next((top for top in TOPS if top >= needed), TOPS[-1])
    more = "+" if known.size and known.max() > top else ""
    labels = {0.0: "0", 0.25: f"{top / 4:g}", 0.5: f"{top / 2:g}", 0.75: f"{0.75 * top:g}", 1.0: f"{top}{more}"}
    if unknown is not None:
        caption += "; grey: not measured"
    pages = []
    for i, value in enumerate(values):
        coloured = heat(np.minimum(value / top, 1))
        if unknown is not None:
            coloured[unknown[i]] = UNKNOWN
        pages.append(page(_enlarged(Image.fromarray(coloured), (size[1], size[0])), labels, caption))
    return to_image(pages)


def _enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """As wide and high as `size` where that is a whole multiple of it, otherwise as it is."""
    whole = all(wanted % n == 0 for wanted, n in zip(size, picture.size, strict=True))
    return picture.resize(size, Image.Resampling.NEAREST) if whole else picture


NODES = [MismatchMap, UncertaintyMap, ResidualCurve]
