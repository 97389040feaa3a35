"""OPERATOR nodes, Degrade and EmptyMeasurementLatent."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io

from ..dmap_core.operators import (
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    Jpeg,
    KernelBlur,
    MotionBlur,
    Noisy,
    NonlinearBlur,
    Segmentation,
    SuperResolution,
)
from ..dmap_core.operators import Operator as CoreOperator
from ..dmap_core.operators.jpeg import ROUNDINGS, SUBSAMPLINGS
from ..dmap_core.operators.nonlinear_blur import load_kernel_wizard
from ..dmap_core.operators.segmentation import load_room_layout
from ..dmap_core.schedule import generators, randn_like
from .host.compute import with_operator
from .host.folders import NO_WEIGHTS, WEIGHTS_FOLDER, find_weights, weights_files
from .host.prior import latent_size, warm_latent
from .messages import speaking_of_nodes
from .pictures import check_mask, check_picture, from_core, measurement_to_core, to_core
from .schema import schema
from .sizes import MAX_MEGAPIXELS, check_megapixels, max_megapixels_input

Operator = io.Custom("OPERATOR")
CATEGORY = "DMAP/operators"


def operator_output():
    return Operator.Output(
        display_name="operator", tooltip="How a clean picture becomes the measurement. Goes to DPSGuider, Degrade, Compose."
    )


def measurement_input(more: str = ""):
    return io.MultiType.Input(
        "measurement",
        types=[io.Image, io.Mask],
        tooltip=f"The damaged picture, or a batch. For 'Operator: Segmentation' the picture of labels, or five masks per picture. {more}".strip(),
    )


def built(kind: type[CoreOperator], *settings, **named) -> io.NodeOutput:
    """The operator as a node's output."""
    with speaking_of_nodes():
        return io.NodeOutput(kind(*settings, **named))


class OperatorSuperResolution(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorSuperResolution",
            display_name="Operator: Super-Resolution (upscale)",
            category=CATEGORY,
            description="The picture was made smaller: bicubic downsampling with antialiasing. Restoring it is super-resolution.",
            search_aliases=["upscale", "enlarge", "upscaler", "super resolution", "restore", "photo", "sharpen"],
            inputs=[
                io.Int.Input(
                    "scale",
                    default=8,
                    min=2,
                    max=64,
                    tooltip="How many times the restored picture is wider and higher than the measurement. 4 or 8 are usual. "
                    "Width and height of the measurement times scale is the size of the result.",
                )
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, scale) -> io.NodeOutput:
        return built(SuperResolution, scale)


class OperatorGaussianBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorGaussianBlur",
            display_name="Operator: Gaussian Blur (deblur)",
            category=CATEGORY,
            description="The picture is out of focus. Restoring it is deblurring.",
            search_aliases=["deblur", "sharpen", "unblur", "out of focus", "restore", "photo"],
            inputs=[
                io.Float.Input(
                    "sigma",
                    default=3.0,
                    min=0.1,
                    max=64.0,
                    step=0.1,
                    tooltip="Standard deviation of the blur in pixels (paper: 3). Raise it if the restored picture is still soft, lower it if "
                    "edges show rings.",
                ),
                io.Int.Input(
                    "kernel_size",
                    default=61,
                    min=3,
                    max=511,
                    step=2,
                    tooltip="Largest width of the blur kernel in pixels, odd (paper: 61). The kernel is cut at 4 sigma anyway: change it only to "
                    "match a blur that was cut earlier.",
                ),
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, sigma, kernel_size) -> io.NodeOutput:
        return built(GaussianBlur, kernel_size=kernel_size, sigma=sigma)


class OperatorMotionBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorMotionBlur",
            display_name="Operator: Motion Blur (deblur)",
            category=CATEGORY,
            description="The camera moved along a straight line. Restoring it is motion deblurring.",
            search_aliases=["deblur", "sharpen", "unblur", "camera shake", "restore", "photo"],
            inputs=[
                io.Float.Input(
                    "length",
                    default=15.0,
                    min=1.1,
                    max=255.0,
                    step=0.5,
                    tooltip="How far the camera moved, in pixels: the length of the streaks that points of light leave.",
                ),
                io.Float.Input(
                    "angle",
                    default=45.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    tooltip="Direction of the streaks in degrees: 0 is horizontal, 90 vertical, counter-clockwise.",
                ),
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, length, angle) -> io.NodeOutput:
        return built(MotionBlur, length, angle)


class OperatorKernelBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorKernelBlur",
            display_name="Operator: Kernel Blur (sharpen)",
            category=CATEGORY,
            description="The picture was blurred by a kernel that you have as a small picture, for example a point of light in the blurred photo.",
            search_aliases=["deblur", "sharpen", "unblur", "point spread function", "deconvolution"],
            inputs=[
                io.Image.Input(
                    "kernel",
                    tooltip="The kernel as a picture with odd width and height; bright is strong. Its grey values are scaled to sum 1. Black out everything that is not the kernel.",
                )
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, kernel) -> io.NodeOutput:
        kernel = check_picture(kernel, "Operator: Kernel Blur: kernel")
        if len(kernel) != 1:
            raise ValueError(f"Operator: Kernel Blur: kernel is a batch of {len(kernel)} pictures; give one")
        return built(KernelBlur, tuple(map(tuple, kernel[0].mean(-1).tolist())))


class OperatorInpainting(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorInpainting",
            display_name="Operator: Inpainting (holes, scratches)",
            category=CATEGORY,
            description="Parts of the picture are missing or damaged. What the measurement shows inside the mask is ignored.",
            search_aliases=["inpaint", "scratch", "hole", "restore", "photo", "remove"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip="White (1) where the picture is missing, black where it is good. The same size as the picture. Values of 0.5 and above count as white.",
                )
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, mask) -> io.NodeOutput:
        return built(Inpainting, check_mask(mask, "Operator: Inpainting: mask").unsqueeze(1))


class OperatorGrayscale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorGrayscale",
            display_name="Operator: Grayscale (colorize)",
            category=CATEGORY,
            description="The picture lost its colours (BT.601 luma). Restoring it is colourisation. A colour picture given as its measurement is turned grey first.",
            search_aliases=["colorize", "colourise", "colorise", "black and white", "restore", "photo"],
            inputs=[],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return built(Grayscale)


class OperatorJpeg(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorJpeg",
            display_name="Operator: JPEG (artifacts)",
            category=CATEGORY,
            description="The picture was saved as a JPEG of low quality: blocks, rings at edges, smeared colours. Restoring it is artifact removal.",
            search_aliases=["artifact removal", "deblock", "compression", "restore", "photo"],
            inputs=[
                io.Int.Input(
                    "quality",
                    default=20,
                    min=1,
                    max=100,
                    tooltip="The quality that the picture was saved with, as most programs count it (libjpeg). If you do not know it, try: too high leaves blocks, too low washes detail out.",
                ),
                io.Combo.Input(
                    "subsampling",
                    options=list(SUBSAMPLINGS),
                    default="4:2:0",
                    tooltip="How colours were stored: 4:2:0 at half the width and height (usual), 4:2:2 at half the width, 4:4:4 in full.",
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(ROUNDINGS),
                    default="straight-through",
                    optional=True,
                    tooltip="What the gradient sees of the rounding in a JPEG, which has none of its own. straight-through ignores it and compares with the very JPEG; "
                    "cubic compares with a smoothed one.",
                ),
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, quality, subsampling, rounding="straight-through") -> io.NodeOutput:
        return built(Jpeg, quality, subsampling, rounding)


def weights_input(example: str):
    return io.Combo.Input(
        "weights",
        options=weights_files() or [NO_WEIGHTS],
        tooltip=f"File with the network's weights in models/{WEIGHTS_FOLDER}, such as {example}; .safetensors, or a .pth that holds nothing but tensors. "
        "The help page says where to get it.",
    )


class OperatorNonlinearBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorNonlinearBlur",
            display_name="Operator: Nonlinear Blur (deblur)",
            category=CATEGORY,
            description="The camera shook and things moved, each in its own way: the blur of a network that was trained on such photos (GoPro). The paper's nonlinear deblurring.",
            search_aliases=["deblur", "sharpen", "unblur", "camera shake"],
            inputs=[
                weights_input("GOPRO_wVAE.pth"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Which blur, out of those that the network knows. It must be the same where the picture is damaged and where it is restored.",
                ),
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, weights, seed) -> io.NodeOutput:
        path = find_weights(weights, "GOPRO_wVAE.pth")
        return built(NonlinearBlur, load_kernel_wizard(path), seed, weights)


class OperatorSegmentation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_OperatorSegmentation",
            display_name="Operator: Segmentation",
            category=CATEGORY,
            description="All that is known of a room is where its walls, floor and ceiling are (LSUN room layout). The measurement is a picture of labels or five masks; "
            "restoring is making a room that looks like that.",
            inputs=[weights_input("the room layout checkpoint")],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, weights) -> io.NodeOutput:
        return built(Segmentation, load_room_layout(find_weights(weights, "the room layout checkpoint")), weights)


class OperatorNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorNoise",
            display_name="Operator: Known Noise (denoise)",
            category=CATEGORY,
            description="The measurement is noisy as well, by a known amount. The restoration then stops where only the noise is left to explain, instead of painting it in.",
            search_aliases=["denoise", "noise removal", "grain", "restore", "photo"],
            inputs=[
                Operator.Input(
                    "operator", tooltip="The damage without the noise. For several kinds of damage put this node after Compose."
                ),
                io.Float.Input(
                    "sigma",
                    default=0.02,
                    min=0.001,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="Standard deviation of the noise in picture values 0..1: 0.02 is about 5 of 255. Too high leaves the picture blurry, too low keeps the noise.",
                ),
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, operator, sigma) -> io.NodeOutput:
        return built(Noisy, operator, sigma)


class OperatorCompose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_OperatorCompose",
            display_name="Operator: Compose (old photo)",
            category=CATEGORY,
            description="Several kinds of damage in the order in which they happened. An old photo is grayscale, then blur, then super-resolution.",
            search_aliases=["restore", "old photo", "combine operators"],
            inputs=[
                Operator.Input("first", tooltip="What happened first to the clean picture. Grayscale belongs here."),
                Operator.Input("second", tooltip="What happened then."),
                Operator.Input("third", optional=True, tooltip="What happened then, if anything."),
                Operator.Input("fourth", optional=True, tooltip="What happened last, if anything. For more, connect another Compose."),
            ],
            outputs=[operator_output()],
        )

    @classmethod
    def execute(cls, first, second, third=None, fourth=None) -> io.NodeOutput:
        return built(Compose, tuple(f for f in (first, second, third, fourth) if f is not None))


class Degrade(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_Degrade",
            display_name="Degrade",
            category=CATEGORY,
            description="Damages a good picture on purpose, y = f(x) + noise, to try a restoration whose answer is known. Not needed for a picture that is damaged already.",
            inputs=[
                io.Image.Input("image", tooltip="The good picture, RGB."),
                Operator.Input("operator", tooltip="The damage."),
                io.Float.Input(
                    "noise_sigma",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="Standard deviation of Gaussian noise that is added, in picture values 0..1 (0.02 is about 5 of 255). The paper uses none.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip="Seed of that noise."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="measurement", tooltip="The damaged picture. Values may leave 0..1 a little; they are kept for the guider."
                )
            ],
        )

    @classmethod
    def execute(cls, image, operator: CoreOperator, noise_sigma, seed) -> io.NodeOutput:
        x = to_core(image, "Degrade: image")
        with speaking_of_nodes("Degrade: image: "):
            y = with_operator(operator, x, lambda f, image: f.measure(image))
            noise = math.hypot(2 * noise_sigma, operator.noise)
            if noise > 0:
                operator.elements(y)  # raises for measurements that no noise can be added to
                y = y + noise * randn_like(y, generators(seed, len(y)))
            return io.NodeOutput(from_core(operator.picture(y)))


class EmptyMeasurementLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_EmptyMeasurementLatent",
            display_name="Empty Measurement Latent",
            category="DMAP/sampling",
            description="An empty latent of the size that the restored picture will have. Where that size is no multiple of the VAE's factor (8), the latent is "
            "rounded up, and DMAP Decode cuts the picture to its size.",
            inputs=[
                measurement_input(),
                Operator.Input("operator", tooltip="The damage."),
                io.Vae.Input("vae", tooltip="The model's VAE: it says how many pixels a latent stands for, and how many channels it has."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="How many different restorations of one measurement to make at once. A batch of measurements gives one each; leave this at 1 then.",
                ),
                max_megapixels_input(),
                io.Combo.Input(
                    "content",
                    options=["empty", "measurement"],
                    default="empty",
                    optional=True,
                    tooltip="empty: a run begins with noise alone. measurement: with your picture, enlarged and encoded; give DMAPPreset or DMAPScheduler a start below 1. "
                    "Half as many steps are then about as good, but not for holes, which it would be filled from.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Int.Output(display_name="width", tooltip="Width of the restored picture in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the restored picture in pixels."),
            ],
        )

    @classmethod
    def execute(cls, measurement, operator: CoreOperator, vae, batch_size, max_megapixels=MAX_MEGAPIXELS, content="empty") -> io.NodeOutput:
        y = measurement_to_core(measurement, operator, "Empty Measurement Latent: measurement")
        if batch_size > 1 and len(y) > 1:
            raise ValueError(
                f"Empty Measurement Latent: batch_size is {batch_size} for {len(y)} measurements; leave it at 1 to restore each once"
            )
        with speaking_of_nodes("Empty Measurement Latent: measurement: "):
            height, width = operator.image_size(y)
        check_megapixels("Empty Measurement Latent", (height, width), tuple(y.shape[-2:]), max_megapixels)
        if content == "measurement":
            latent = warm_latent(vae, operator, y)
            return io.NodeOutput({"samples": latent.expand(max(len(y), batch_size), -1, -1, -1).clone()}, width, height)
        h, w = latent_size(vae, (height, width))
        return io.NodeOutput({"samples": torch.zeros(max(len(y), batch_size), vae.latent_channels, h, w)}, width, height)


NODES = [
    OperatorSuperResolution,
    OperatorGaussianBlur,
    OperatorMotionBlur,
    OperatorKernelBlur,
    OperatorInpainting,
    OperatorGrayscale,
    OperatorJpeg,
    OperatorNonlinearBlur,
    OperatorSegmentation,
    OperatorNoise,
    OperatorCompose,
    Degrade,
    EmptyMeasurementLatent,
]
