"""What damaged a picture, estimated from the picture: an operator and the measurement that belongs to it."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmap_core.estimate import IDENTITY, estimate
from ..dmap_core.operators import Jpeg
from ..dmap_core.operators import Operator as CoreOperator
from .operators import Operator, operator_output
from .pictures import check_picture, from_core
from .schema import schema

NAME = "Estimate Degradation"


class EstimateDegradation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_EstimateDegradation",
            display_name=f"{NAME} (what is wrong with a photo)",
            category="DMAP/operators",
            description="Looks at a photo and says how soft, grainy, enlarged or compressed it is, and whether it has colour, as an operator for DPSGuider. "
            "Says where it is unsure. Takes no model, and a second or two.",
            search_aliases=["estimate", "detect", "analyse", "analyze", "blind", "blur", "noise", "jpeg", "restore", "photo"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The damaged photo, in its own size. Of a batch the first picture is looked at, and all are taken for its like.",
                ),
                Operator.Input(
                    "jpeg",
                    optional=True,
                    tooltip="The JPEG operator of the photo's file, which DMAP Load Photo reads from it: exact, where the picture alone would have to be guessed from.",
                ),
            ],
            outputs=[
                operator_output(),
                io.Image.Output(
                    display_name="measurement",
                    tooltip="The photo as DPSGuider's measurement. It is smaller than the photo where that had been enlarged.",
                ),
                io.String.Output(display_name="text", tooltip="What was found, and what is uncertain."),
            ],
        )

    @classmethod
    def execute(cls, image, jpeg: CoreOperator | None = None) -> io.NodeOutput:
        image = check_picture(image, f"{NAME}: image").movedim(-1, 1).float() * 2 - 1
        picture = image.expand(-1, 3, -1, -1)
        if jpeg is not None and not isinstance(jpeg, Jpeg):
            raise ValueError(
                f"{NAME}: jpeg is {jpeg.describe()}; give 'Operator: JPEG' or the jpeg of DMAP Load Photo, or leave it unconnected"
            )
        found = estimate(picture[:1], jpeg)
        text = found.text()
        if len(picture) > 1:
            text += f"\nnote: the first of {len(picture)} pictures was looked at; put them in one by one if they are damaged differently"
        return io.NodeOutput(found.operator() or IDENTITY, from_core(found.measurement(picture)), text)


NODES = [EstimateDegradation]
