"""The last step of a restoration: the picture nearest to it that explains the measurement."""

from __future__ import annotations

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
            ],
            outputs=[io.Image.Output(display_name="matched"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, image, measurement, operator: CoreOperator, noise=0.0, feather=0.0) -> io.NodeOutput:
        x = to_core(image, f"{NAME}: image")
        y = measurement_to_core(measurement, operator, f"{NAME}: measurement")
        with speaking_of_nodes(f"{NAME}: "):
            found = match(operator, x, y, noise / LEVELS if noise else None, feather)
        matched = from_core(found.image).clamp(0, 1)
        if operator.name == "Inpainting" and found.noise == ROUNDING:  # y has been to [-1, 1], with rounding
            matched = with_given(matched, operator.mask, measurement)
        return io.NodeOutput(matched, told(found, noise))


def told(found, asked: float) -> str:
    """What was done, for people."""
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
    return text


NODES = [MatchMeasurement]
