"""What a graph sees: thin V3 nodes over dmap_core."""

from comfy_api.latest import ComfyExtension, io

from . import cse, guiders, host, host_cse, metrics, operators, samplers, sheets, studies


class DMAPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*operators.NODES, *guiders.NODES, *samplers.NODES, *cse.NODES, *sheets.NODES, *metrics.NODES, *studies.NODES]


async def comfy_entrypoint() -> DMAPExtension:
    host.offer_demo_prior()
    host.offer_weights_folder()
    host_cse.offer_demo_cse()
    return DMAPExtension()
