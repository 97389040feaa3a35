"""Nodes that a node puts in its place while a prompt runs (ComfyUI's node expansion)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_execution.graph_utils import GraphBuilder

Outputs = Callable[[int], list[Any]]


class Expansion:
    """Nodes that are added one after the other. Inputs are other nodes' outputs, or values of any kind: an expansion is never written to a file."""

    def __init__(self):
        self._builder = GraphBuilder()

    def add(self, kind: str, quiet: bool = False, **inputs: Any) -> Outputs:
        """The outputs of a new node, by their index. None is an input that is not connected.

        What it shows is seen on the node in whose place it is, unless it is quiet.
        """
        node = self._builder.node(kind, **{name: value for name, value in inputs.items() if value is not None})
        if quiet:
            node.set_override_display_id(f"{node.id}.quiet")  # an id that is on no page; its own would be looked up without end
        return node.out

    def finalize(self) -> dict[str, Any]:
        return self._builder.finalize()
