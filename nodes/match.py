"""The last step of a restoration: the picture nearest to it that explains the measurement."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..dmap_core.consistency import ROUNDING, match, verdict
from ..dmap_core.operators import Operator as CoreOperator
from .messages import speaking_of_nodes
from .operators import Operator, measurement_input
from .pictures import from_core, measurement_to_core, to_core, with_given
from .schema import schema

NAME = "Match Measurement"
LEVELS = 127.5  # of 255, for one unit of [-1, 1] pictures


class MatchMeasurement(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_MatchMeasurement",
            display_name=NAME,
            category="DMAP/sampling",
            description="Puts back what the VAE lost: the picture nearest to the restored one whose degraded version is the measurement, up to its noise. "
            "Known pixels of an inpainting come back exactly. Takes no model, and milliseconds to seconds.",
            search_aliases=["match", "color match", "fidelity", "data consistency", "keep known pixels", "restore"],
            inputs=[
                io.Image.Input("image", tooltip="The restored picture, of DMAP Decode."),
                measurement_input("The one that DPSGuider has."),
                Operator.Input("operator", tooltip="The one that DPSGuider has."),
                io.Float.Input(
                    "noise",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    tooltip="Grain of the measurement, in grey levels of 255 (standard deviation). 0: what Known Noise says, or none. Less than the rounding to 8 bits (0.29) is "
                    "taken as that. More noise, less is put back.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=1.0,
                    round=0.1,
                    optional=True,
                    tooltip="For Operator: Inpainting: over how many pixels inside the hole a difference at its edge fades away. 0 changes nothing in the hole.",
                ),
                io.Boolean.Input(
                    "careful",
                    default=False,
                    optional=True,
                    tooltip="Leave a picture as it is if matching would move it far more than it misses the measurement, and roughen it: then the damage, or its grain, is not what was said. DMAP Restore does so.",
                ),
            ],
            outputs=[io.Image.Output(display_name="matched"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, image, measurement, operator: CoreOperator, noise=0.0, feather=0.0, careful=False) -> io.NodeOutput:
        x = to_core(image, f"{NAME}: image")
        y = measurement_to_core(measurement, operator, f"{NAME}: measurement")
        with speaking_of_nodes(f"{NAME}: "):
            found = match(operator, x, y, noise / LEVELS if noise else None, feather)
        matched = from_core(found.image).clamp(0, 1)
        if operator.name == "Inpainting" and found.noise == ROUNDING:  # y has been to [-1, 1], with rounding
            matched = with_given(matched, operator.mask, measurement)
        doubtful = found.doubtful().to(matched.device)
        if careful and doubtful.any():
            matched = torch.where(doubtful[:, None, None, None], from_core(x).clamp(0, 1), matched)
        return io.NodeOutput(matched, told(found, noise, careful))


def told(found, asked: float, careful: bool = False) -> str:
    """What was done, for people. careful: with the pictures left as they were that matching would have spoilt."""
    doubtful, count = found.doubtful(), len(found.moved)
    if careful and doubtful.all():
        return f"Not matched: {_doubt(found)}"
    assumed = found.noise * LEVELS
    before, after = (float((rms * LEVELS).max()) for rms in (found.before, found.after))
    text = f"mismatch {before:.1f} -> {after:.1f} of 255 grey levels (RMS): {verdict(after, assumed if assumed > 1 else 0.0)}."
    if found.noise == ROUNDING:
        text += f" Noise: that of rounding to 8 bits ({assumed:.2f} levels)"
        text += f", as {asked:g} is below it." if asked else "."
    else:
        text += f" Noise: {assumed:.1f} levels."
    if found.short():
        text += " The measurement could not be reached: it contradicts the operator, or has more noise than said."
    if doubtful.any():
        left = f" {int(doubtful.sum())} of {count} pictures were left as they were:" if careful else ""
        text += f"{left} {_doubt(found)}"
    return text


def _doubt(found) -> str:
    worst = int((found.moved * found.doubtful()).argmax())
    moved, missed = (float(rms[worst]) * LEVELS for rms in (found.moved, found.before))
    return (
        f"the picture misses the measurement by {missed:.1f} grey levels, and matching moves it by {moved:.0f} and roughens it {float(found.rougher[worst]):.1f} times. So the damage is not quite what was said (the length and angle of "
        "a motion, the sigma of a blur), or there is grain that was not said: change that, or say more noise."
    )


NODES = [MatchMeasurement]
