"""What a graph sees: thin V3 nodes over dmap_core."""

from comfy_api.latest import ComfyExtension, io

from . import cse, decode, estimate, guiders, maps, match, metrics, operators, photos, restore, samplers, samples, sheets, studies, training
from .host.folders import offer_folders, offer_samples


class DMAPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = (
            restore,
            photos,
            estimate,
            samples,
            operators,
            guiders,
            samplers,
            decode,
            match,
            maps,
            cse,
            training,
            sheets,
            metrics,
            studies,
        )
        return [node for module in modules for node in module.NODES]


async def comfy_entrypoint() -> DMAPExtension:
    offer_folders()
    offer_samples()
    return DMAPExtension()
