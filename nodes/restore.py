"""DMAP Restore: one node that puts the others in its place, and the one that puts their results together."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn import functional as F

from ..dmap_core.consistency import matchable
from ..dmap_core.damage import AUTO, COLOURS, ENLARGE, LOOKS_FOR, Case, Said, case_of
from ..dmap_core.operators.colour import luma
from ..dmap_core.pictures import to_picture
from ..dmap_core.presets import AUTO as BEST_SOLVER
from ..dmap_core.presets import QUALITIES
from .host.clock import say
from .host.graph import Expansion
from .host.preview import show
from .host.prior import check_conditioning, check_model, check_vae, has_text, native_latents
from .messages import speaking_of_nodes
from .operators import Operator
from .pictures import check_mask, check_picture, from_core, to_core
from .schema import advanced, schema
from .sizes import MAX_MEGAPIXELS, check_megapixels, max_megapixels_input

NAME = "DMAP Restore"
VERSIONS = 8
MARGIN = 8  # pixels that an operator's whole scale may add at the right and below
GAP = 8  # pixels between before and after
CFG = 2.0  # with a negative prompt
QUESTIONED = 0.6  # of the photo, from which on a mask is probably inverted
FEATHER = 4.0  # pixels inside a hole, over which a difference at its edge fades away


class Restore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_Restore",
            display_name=f"{NAME} (repair, enlarge, sharpen a photo)",
            category="DMAP",
            description="Brings a damaged photo back: too small, soft, shaken, scratched, grainy, a bad JPEG, or an old photo with some of that. It finds out what it can, "
            "chooses everything else, and says how well the result explains your photo. It puts the pack's other nodes in its place: use those to change more.",
            search_aliases=[
                "restore",
                "repair",
                "photo",
                "old photo",
                "upscale",
                "enlarge",
                "deblur",
                "unblur",
                "sharpen",
                "denoise",
                "grain",
                "noise removal",
                "scratch",
                "inpaint",
                "jpeg artifacts",
                "colorize",
                "super resolution",
                "fix photo",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 1.5, 2.0, 2.1 or SDXL, a flow model (SD 3.5, Flux.1, Chroma, AuraFlow, Lumina 2, Z-Image), or the demo prior.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of that checkpoint."),
                io.Image.Input("image", tooltip="One damaged photo: Load Photo or Load Image. An alpha channel is put back in the end."),
                io.Combo.Input(
                    "damage",
                    options=list(LOOKS_FOR),
                    default=AUTO,
                    tooltip="What happened to the photo. auto looks for blur, grain, JPEG and enlargement. scratched needs a mask. custom takes what is connected to operator.",
                ),
                io.Combo.Input(
                    "enlarge",
                    options=list(ENLARGE),
                    default=AUTO,
                    tooltip="How many times wider and higher the result is. auto enlarges small photos up to what the model knows, where damage is auto, too small or old photo.",
                ),
                io.Float.Input(
                    "softness",
                    default=0.0,
                    min=0.0,
                    max=64.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How soft the photo is, in its pixels: an edge is smeared over about three times that. Of a shaken one the length of the streaks. 0: measured, where damage says so.",
                ),
                io.Float.Input(
                    "grain",
                    default=0.0,
                    min=0.0,
                    max=127.0,
                    step=0.5,
                    round=0.01,
                    tooltip="How strong noise or grain is, in grey levels of 255 (5 is visible, 20 is much). 0: measured, where damage says so.",
                ),
                io.Int.Input(
                    "jpeg_quality",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="The quality that the photo was saved with. 0: read from the file (Load Photo's jpeg to operator) or measured, where damage is JPEG or auto.",
                ),
                io.Combo.Input(
                    "colours",
                    options=list(COLOURS),
                    default=COLOURS[0],
                    tooltip="keep: a grey photo stays grey. colourise: its colours are invented.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default="good",
                    tooltip="look: quick. good: three times as long. best: four to five times as long as look.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="What is invented depends on it. The same seed makes the same picture.",
                ),
                io.Int.Input(
                    "versions",
                    default=1,
                    min=1,
                    max=VERSIONS,
                    tooltip="How many restorations, with seeds that follow. Where they differ the picture is invented: see uncertainty.",
                ),
                io.Boolean.Input(
                    "keep_known",
                    default=True,
                    tooltip="With a mask: what was not painted comes back exactly as it was, if nothing else is repaired.",
                ),
                io.Boolean.Input(
                    "match",
                    default=True,
                    tooltip="Puts back what the VAE lost, so that the result explains the photo to within half a grey level.",
                ),
                max_megapixels_input(),
                advanced(
                    io.Float.Input(
                        "shake_angle",
                        default=0.0,
                        min=-180.0,
                        max=180.0,
                        step=1.0,
                        optional=True,
                        tooltip="For shaken: the direction of the streaks in degrees, 0 horizontal, 90 vertical, counter-clockwise.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the photo is scratched or missing: paint it in the mask editor of Load Photo.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="CLIP Text Encode: an empty text, or a few words about the photo. Without it the model runs without any text, as the demo prior does.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip=f"What the photo should not show. Takes twice as long (cfg {CFG:g})."
                ),
                Operator.Input(
                    "operator",
                    optional=True,
                    tooltip="For damage custom: how it was damaged. Otherwise Load Photo's jpeg, which is used for damage JPEG and auto.",
                ),
                io.ControlNet.Input("cse", optional=True, tooltip="CSEControlNetLoader: a start that was trained for this damage."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The restored photo; several versions as a batch."),
                io.Image.Output(display_name="before_after", tooltip="The photo and the result side by side, in one size."),
                io.Image.Output(
                    display_name="mismatch",
                    tooltip="Where the result, damaged again, differs from your photo, with a scale in grey levels.",
                ),
                io.Image.Output(
                    display_name="uncertainty", tooltip="Where versions differ: what is bright was invented. Needs 2 versions or more."
                ),
                io.Mask.Output(display_name="mask", tooltip="The mask that was used, of the photo's size."),
                Operator.Output(display_name="operator", tooltip="The damage as it was understood. Goes to the pack's other nodes."),
                io.String.Output(display_name="text", tooltip="What was seen, chosen, and reached."),
            ],
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image,
        damage,
        enlarge,
        softness,
        grain,
        jpeg_quality,
        colours,
        quality,
        seed,
        versions,
        keep_known,
        match,
        max_megapixels=MAX_MEGAPIXELS,
        shake_angle=0.0,
        mask=None,
        positive=None,
        negative=None,
        operator=None,
        cse=None,
    ) -> io.NodeOutput:
        image = one_photo(image)
        photo, size = to_core(image[..., :3], f"{NAME}: image"), tuple(image.shape[1:3])
        check_megapixels(NAME, size, size, max_megapixels)
        with speaking_of_nodes(f"{NAME}: "):
            check_model(model)
            check_vae(vae, model)
        for name, prompt in (("positive", positive), ("negative", negative)):
            if prompt is not None:
                check_conditioning(prompt, model, f"{NAME}: {name}")
        mask, notes = used_mask(mask, size)
        said = Said(damage, enlarge, softness, shake_angle, grain, jpeg_quality, colours)
        native = native_latents(model) * vae.downscale_ratio
        with speaking_of_nodes(f"{NAME}: "):
            case = case_of(photo, said, mask, operator, native)
        notes = [*case.notes, *notes]
        if positive is None and has_text(model):
            notes.append("no prompt: connect CLIP Text Encode with an empty text, which this model was trained with")
        shown_mask = torch.zeros(1, *size) if mask is None else mask[None]
        if case.operator is None:
            say(case.notes[0])
            empty = torch.zeros(1, *size, 3)
            return io.NodeOutput(image, image, empty, empty, shown_mask, operator, ". ".join(notes), ui=ui.PreviewImage(image[..., :3]))
        check_megapixels(NAME, case.operator.image_size(case.measurement), tuple(case.measurement.shape[-2:]), max_megapixels)
        graph = Expansion()
        settings = {
            "quality": quality,
            "seed": seed,
            "versions": versions,
            "keep_known": keep_known,
            "match": match,
            "max_megapixels": max_megapixels,
        }
        # the photo itself where nothing was done to it: the way to the other units and back rounds
        measurement = image[..., :3] if case.measurement is photo else from_core(case.measurement)
        outputs = expanded(graph, case, measurement, model, vae, image, mask, positive, negative, cse, ". ".join(notes), settings)
        restored, before_after, mismatch, uncertainty, text = outputs
        return io.NodeOutput(restored, before_after, mismatch, uncertainty, shown_mask, case.operator, text, expand=graph.finalize())


def expanded(
    graph: Expansion, case: Case, measurement: Tensor, model, vae, image: Tensor, mask, positive, negative, cse, notes: str, settings
) -> tuple:
    """(image, before_after, mismatch, uncertainty, text): the outputs of the nodes that an expert would wire."""
    problem = {"measurement": measurement, "operator": case.operator}
    limit = {"max_megapixels": settings["max_megapixels"]}
    if positive is None:
        positive = graph.add("DMAP_DMAPUnconditional", model=model)(0)
    if cse is not None:
        strength = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        positive = graph.add("DMAP_ApplyCSE", conditioning=positive, cse=cse, model=model, **problem, **strength)(0)
    preset = graph.add("DMAP_DMAPPreset", model=model, operator=case.operator, solver=BEST_SOLVER, quality=settings["quality"])
    guider = graph.add(
        "DMAP_DPSGuider",
        model=model,
        positive=positive,
        negative=negative,
        cfg=1.0 if negative is None else CFG,
        vae=vae,
        step="auto",
        tile=AUTO,
        **problem,
        **limit,
    )(0)
    latent = graph.add("DMAP_EmptyMeasurementLatent", vae=vae, batch_size=1, **problem, **limit)(0)
    restored = None
    for i in range(settings["versions"]):
        noise = graph.add("RandomNoise", noise_seed=settings["seed"] + i)(0)
        samples = graph.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=preset(0), sigmas=preset(1), latent_image=latent)(
            0
        )
        picture = graph.add("DMAP_Decode", latent=samples, vae=vae, keep_given=settings["keep_known"], **problem)(0)
        restored = picture if restored is None else graph.add("ImageBatch", image1=restored, image2=picture)(0)
    report = graph.add("DMAP_SamplingReport", quiet=True, guider=guider, latent=samples)(0)
    matched = None
    if settings["match"] and matchable(case.operator) is None:
        found = graph.add("DMAP_MatchMeasurement", image=restored, feather=FEATHER if mask is not None else 0.0, careful=True, **problem)
        restored, matched = found(0), found(1)
    mismatch = graph.add("DMAP_MismatchMap", quiet=True, restored=restored, **problem)(0)
    finished = graph.add(
        "DMAP_FinishRestore",
        image=restored,
        photo=image,
        width=case.size[1],
        height=case.size[0],
        grey=case.grey,
        notes=notes,
        chosen=preset(2),
        report=report,
        matched=matched,
    )
    uncertainty = graph.add("DMAP_UncertaintyMap", quiet=True, images=finished(0))(0)
    return finished(0), finished(1), mismatch, uncertainty, finished(2)


class FinishRestore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_FinishRestore",
            display_name="Finish Restore (part of DMAP Restore)",
            category="DMAP/sampling",
            description="The last of the nodes that DMAP Restore puts in its place: grey stays grey, alpha comes back, before and after side by side.",
            inputs=[
                io.Image.Input("image", tooltip="The restored photo, or a batch of versions."),
                io.Image.Input("photo", tooltip="The photo as it was given. Its alpha channel, if it has one, is put back, enlarged."),
                io.Int.Input("width", default=512, min=1, max=65536, tooltip="Width of the result in pixels."),
                io.Int.Input("height", default=512, min=1, max=65536, tooltip="Height of the result in pixels."),
                io.Boolean.Input("grey", default=False, tooltip="Whether the result is made grey (BT.601 luma)."),
                io.String.Input("notes", default="", multiline=True, optional=True, tooltip="What the text begins with."),
                io.String.Input("chosen", force_input=True, optional=True, tooltip="The text of DMAPPreset."),
                io.String.Input("report", force_input=True, optional=True, tooltip="The text of DMAP Sampling Report."),
                io.String.Input("matched", force_input=True, optional=True, tooltip="The text of Match Measurement."),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Image.Output(display_name="before_after"),
                io.String.Output(display_name="text"),
            ],
        )

    @classmethod
    def execute(cls, image, photo, width, height, grey, notes="", chosen=None, report=None, matched=None) -> io.NodeOutput:
        name = "Finish Restore"
        result, given = check_picture(image, f"{name}: image")[..., :3].clamp(0, 1), one_photo(photo, name)
        result = resized(result, (height, width))
        if grey:
            result = luma(result.movedim(-1, 1)).clamp(0, 1).expand(-1, 3, -1, -1).movedim(1, -1)
        before = resized(given[..., :3], (height, width), "nearest-exact").expand(len(result), -1, -1, -1)
        gap = torch.ones(len(result), height, GAP, 3)
        both = torch.cat([before, gap, result.to(before)], dim=2)
        if given.shape[-1] == 4:
            alpha = resized(given[..., 3:], (height, width)).expand(len(result), -1, -1, -1)
            result = torch.cat([result, alpha.to(result)], dim=-1)
        text = "\n".join(line for line in (notes, chosen, report, matched) if line)
        show(to_picture(both[0].movedim(-1, 0) * 2 - 1))  # or the last preview of the run would stay
        if matched:
            say(matched)
        return io.NodeOutput(result, both, text, ui=ui.PreviewImage(both))


def one_photo(image: Tensor, name: str = NAME) -> Tensor:
    """(1, H, W, 3 or 4) in [0, 1]; grey becomes RGB. Raises ValueError for several pictures, and for what is none."""
    alpha = isinstance(image, Tensor) and image.ndim == 4 and image.shape[-1] == 4
    colours = check_picture(image[..., :3] if alpha else image, f"{name}: image").float()
    if len(colours) != 1:
        raise ValueError(
            f"{name}: image: {len(colours)} pictures were given; a photo is restored at a time: use 'ImageFromBatch' to choose one"
        )
    if colours.shape[-1] == 1:
        colours = colours.expand(-1, -1, -1, 3)
    return torch.cat([colours, image[..., 3:].float()], dim=-1) if alpha else colours


def resized(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """A picture (B, H, W, C) in [0, 1] at another size (H, W); of one that is a few pixels larger what is too much is cut off."""
    height, width = size
    if 0 <= image.shape[1] - height < MARGIN and 0 <= image.shape[2] - width < MARGIN:
        return image[:, :height, :width]
    smooth = {"antialias": True, "align_corners": False} if mode == "bicubic" else {}
    return F.interpolate(image.movedim(-1, 1), size, mode=mode, **smooth).clamp(0, 1).movedim(1, -1)


def used_mask(mask: Tensor | None, size: tuple[int, int]) -> tuple[Tensor | None, list[str]]:
    """((H, W) of zeros and ones, or None where nothing is painted; what there is to say about it). Raises ValueError where all is painted."""
    if mask is None:
        return None, []
    mask, notes = check_mask(mask, f"{NAME}: mask").cpu().float(), []
    if len(mask) != 1:
        raise ValueError(f"{NAME}: mask: {len(mask)} masks for one photo; give one")
    if not (mask >= 0.5).any():  # as Load Image gives it for a picture without alpha, at a size of its own
        return None, []
    given = tuple(mask.shape[-2:])
    if given != tuple(size):
        mask = F.interpolate(mask[None], size, mode="bilinear", align_corners=False)[0]
        notes.append(f"the mask was {given[1]}x{given[0]} and is resized to {size[1]}x{size[0]}")
    mask = (mask[0] >= 0.5).float()
    missing = float(mask.mean())
    if missing == 1:
        raise ValueError(
            f"{NAME}: mask: everything is painted, and nothing of the photo would be used; paint only what is damaged, or invert the mask"
        )
    if missing > QUESTIONED:
        notes.append(
            f"{100 * missing:.0f} % of the photo is masked: is the mask inverted? White is what is missing; 'InvertMask' turns it round"
        )
    return mask, notes


NODES = [Restore, FinishRestore]
