"""DPSGuider and the report of what a run cost."""

from __future__ import annotations

import json
from dataclasses import asdict

from comfy_api.latest import io, ui

from ..dmap_core.gradient import STRATEGIES
from ..dmap_core.posterior import JACOBIANS
from ..dmap_core.solvers import DPS
from ..dmap_core.solvers.step import STRENGTH
from .host.controlnet import check_controls
from .host.guider import AUTO, PosteriorGuider
from .host.prior import check_conditioning, unread_guidance
from .host.report import report_of
from .messages import speaking_of_nodes
from .operators import Operator, measurement_input
from .pictures import measurement_to_core
from .samplers import chosen_step, setting_input, step_input
from .schema import advanced, schema
from .sizes import MAX_MEGAPIXELS, check_megapixels, max_megapixels_input

CATEGORY = "DMAP/sampling"
TILES = (AUTO, "whole", "128", "256", "384", "512", "640", "768", "1024")  # pixels of a side


def stock_inputs() -> list[io.Input]:
    """The step of stock samplers, after what earlier versions had."""
    described = DPS.described()
    found = [step_input(), *(setting_input(*described[name]) for name in ("strength", "jacobian"))]
    for widget in found:
        widget.tooltip = f"Only for stock samplers, as zeta. {widget.tooltip}"
    return found


class DPSGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_DPSGuider",
            display_name="DPSGuider (restore, enlarge photos)",
            category=CATEGORY,
            description="The problem to solve: which picture, seen through the operator, looks like the measurement and is likely under the model? "
            "Connect it to SamplerCustomAdvanced, together with DMAPSampler (best), DPSSampler, or any stock sampler (ddpm is DPS).",
            search_aliases=[
                "restore",
                "photo",
                "restoration",
                "deblur",
                "upscale",
                "enlarge",
                "denoise",
                "scratch",
                "sharpen",
                "colorize",
                "inpaint",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 2.0 base (the paper's), 1.5, 2.1, SDXL, or a flow model: SD 3.5, Flux.1, Chroma, AuraFlow, Lumina 2, Z-Image. LoRAs are fine.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt. Empty is the paper's choice; a few words that describe the picture can help. Without a text encoder use DMAPUnconditional.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE. Its decoder is part of the gradient."),
                Operator.Input("operator", tooltip="How a clean picture became the measurement."),
                measurement_input("One measurement serves a whole batch of latents."),
                advanced(
                    io.Float.Input(
                        "zeta",
                        display_name="zeta (stock samplers only)",
                        default=4.8,
                        min=0.001,
                        max=1000.0,
                        step=0.1,
                        round=0.001,
                        optional=True,  # but first of the optional widgets, as it was: saved workflows hold widget values by place
                        tooltip="Only for stock samplers such as ddpm: this pack's samplers have a zeta of their own, and ignore this one. "
                        "Step size of the guidance in latent units (paper: 4.8 for super-resolution x8, 0.6 for Gaussian blur, at 500 steps and 512x512). "
                        "Raise it if the result does not match the measurement, lower it if it is noisy.",
                    )
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What the picture should not show. Used only if cfg is not 1."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="Classifier-free guidance: 1 is none (the paper's choice) and costs half as much.",
                ),
                io.Combo.Input(
                    "memory",
                    options=["auto", *STRATEGIES],
                    default="auto",
                    optional=True,
                    tooltip="fast keeps all activations; lean runs the denoiser twice so that its activations and the decoder's are never alive together; checkpoint recomputes "
                    "both networks block by block. auto takes the first that fits. Change it if you run out of memory.",
                ),
                max_megapixels_input(),
                *(advanced(i) for i in stock_inputs()),
                io.Combo.Input(
                    "tile",
                    options=list(TILES),
                    default=TILES[0],
                    optional=True,
                    tooltip="whole: networks see the whole picture. A number: overlapping tiles of so many pixels, with one measurement of the whole, in the memory of one tile. "
                    "auto: tiles of the size that the model was trained for, where the picture is larger than that by more than a quarter or does not fit.",
                ),
                io.Vae.Input(
                    "guidance_vae",
                    optional=True,
                    tooltip="A small decoder of the same latents (Load VAE: taesd for SD 1.5 and 2, taesdxl for SDXL), through which gradients go instead: most of a step's time and memory is the "
                    "large one's. The result is decoded by vae.",
                ),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        vae,
        operator,
        measurement,
        zeta=4.8,
        negative=None,
        cfg=1.0,
        memory="auto",
        max_megapixels=MAX_MEGAPIXELS,
        step="zeta",
        strength=STRENGTH,
        jacobian=JACOBIANS[0],
        tile="whole",  # of prompts that earlier versions wrote
        guidance_vae=None,
    ) -> io.NodeOutput:
        dps = DPS(**chosen_step({"zeta": zeta, "step": step, "strength": strength, "jacobian": jacobian}))
        if negative is None and cfg != 1:
            raise ValueError(f"DPSGuider: cfg is {cfg} but negative is not connected; connect the negative conditioning, or set cfg to 1")
        y = measurement_to_core(measurement, operator, "DPSGuider: measurement")
        with speaking_of_nodes("DPSGuider: "):
            operator.check_measurement(y)
        check_megapixels("DPSGuider", operator.image_size(y), tuple(y.shape[-2:]), max_megapixels)
        check_conditioning(positive, model, "DPSGuider: positive")
        if negative is not None:
            check_conditioning(negative, model, "DPSGuider: negative")
        guider = PosteriorGuider(model, vae, operator, y, dps, memory, tile_latents(tile, vae), guidance_vae)
        guider.set_conds(positive, positive if negative is None else negative)
        guider.set_cfg(cfg)
        guider.warnings += check_controls(positive, model, operator, "DPSGuider: positive")
        guider.warnings += unread_guidance(positive, model)
        if negative is not None:
            check_controls(negative, model, operator, "DPSGuider: negative")
        return io.NodeOutput(guider)


def tile_latents(tile: str, vae) -> int | str | None:
    """Latents of a side of a tile of so many pixels; None for whole pictures. Raises ValueError for sizes that networks cannot halve three times."""
    if tile in TILES[:2]:
        return {AUTO: AUTO, "whole": None}[tile]
    latents, rest = divmod(int(tile), vae.downscale_ratio)
    if rest or latents % 8 or latents < 16:
        least = 16 * vae.downscale_ratio
        raise ValueError(
            f"DPSGuider: tile is {tile}; it must be auto, whole, or a multiple of {least // 2} pixels of at least {least}: a latent is {vae.downscale_ratio} pixels wide"
        )
    return latents


class SamplingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_SamplingReport",
            display_name="DMAP Sampling Report",
            category=CATEGORY,
            description="What the last run of this guider cost and reached: steps, denoiser calls, seconds, the residual at every step.",
            inputs=[
                io.Guider.Input(
                    "guider", tooltip="The DPSGuider of the run. Give every sampler a guider of its own if you compare several."
                ),
                io.Latent.Input("latent", tooltip="The output of SamplerCustomAdvanced; it only says that the run is over."),
            ],
            outputs=[io.String.Output(display_name="text"), io.String.Output(display_name="json")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, guider, latent) -> io.NodeOutput:
        report = report_of(latent["samples"]) or getattr(guider, "report", None)
        if report is None:
            raise ValueError("DMAP Sampling Report: guider has no finished run; connect the DPSGuider that the sampler used")
        return io.NodeOutput(report.text(), json.dumps(asdict(report)), ui=ui.PreviewText(json.dumps(asdict(report))))


NODES = [DPSGuider, SamplingReport]
