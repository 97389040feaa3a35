"""What a graph sees: thin V3 nodes over dmap_core."""

from comfy_api.latest import ComfyExtension, io

from . import guiders, host, operators, samplers, sheets


class DMAPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*operators.NODES, *guiders.NODES, *samplers.NODES, *sheets.NODES]


async def comfy_entrypoint() -> DMAPExtension:
    host.offer_demo_prior()
    host.offer_weights_folder()
    return DMAPExtension()
