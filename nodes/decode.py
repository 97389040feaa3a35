"""From the latent of a restoration to its picture."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmap_core.operators import Inpainting
from ..dmap_core.operators import Operator as CoreOperator
from .host.prior import latent_size
from .messages import speaking_of_nodes
from .operators import Operator, measurement_input
from .pictures import measurement_to_core, with_given
from .schema import schema

NAME = "DMAP Decode"


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_Decode",
            display_name=f"{NAME} (restored picture)",
            category="DMAP/sampling",
            description="The picture of a restored latent: VAE Decode, cut to the size that belongs to the measurement, and for Operator: Inpainting with the given pixels "
            "put back outside the mask, exactly as they were.",
            search_aliases=["vae decode", "restore", "restored photo", "crop", "paste"],
            inputs=[
                io.Latent.Input("latent", tooltip="The output of SamplerCustomAdvanced."),
                io.Vae.Input("vae", tooltip="The VAE that DPSGuider has."),
                measurement_input("The one that DPSGuider has."),
                Operator.Input("operator", tooltip="The one that DPSGuider has."),
                io.Boolean.Input(
                    "keep_given",
                    default=True,
                    tooltip="For Operator: Inpainting, put back the given pixels outside the mask. Switch it off to see what the VAE makes of them. Other operators have no such pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="restored")],
        )

    @classmethod
    def execute(cls, latent, vae, measurement, operator: CoreOperator, keep_given) -> io.NodeOutput:
        y = measurement_to_core(measurement, operator, f"{NAME}: measurement")
        with speaking_of_nodes(f"{NAME}: measurement: "):
            height, width = operator.image_size(y)
        z, wanted = latent["samples"], latent_size(vae, (height, width))
        if z.ndim != 4 or tuple(z.shape[-2:]) != wanted:
            raise ValueError(
                f"{NAME}: latent has shape {tuple(z.shape)}, but measurement and operator, {operator.describe()}, belong to latents of "
                f"{wanted[1]}x{wanted[0]}; connect latent, VAE, measurement and operator of one run"
            )
        image = vae.decode(z)[:, :height, :width]
        if keep_given and isinstance(operator, Inpainting):
            if len(y) not in (1, len(image)):
                raise ValueError(f"{NAME}: {len(image)} pictures for {len(y)} measurements; give one measurement, or one per picture")
            with speaking_of_nodes(f"{NAME}: "):
                operator.check((height, width), len(image))
            image = with_given(image, operator.mask, measurement)  # y has been to [-1, 1], with rounding
        return io.NodeOutput(image)


NODES = [Decode]
