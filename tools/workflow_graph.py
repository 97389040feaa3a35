"""A workflow in the interface's format (schema 0.4), node by node."""

import json
from pathlib import Path
from typing import Any

import tomllib
from prompts import is_widget, node_inputs

ROOT = Path(__file__).resolve().parent.parent
PACK = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"cnr_id": PACK["project"]["name"], "ver": PACK["project"]["version"]}
STOCK = {"cnr_id": "comfy-core", "ver": PACK["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")}
COLUMN, ROW = 360, 30


class Graph:
    """Nodes in columns, each below the one before it."""

    def __init__(self, object_info: dict[str, Any]):
        self.info = object_info
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.bottom: dict[int, int] = {}

    def add(
        self, kind: str, column: int, title: str | None = None, models: list | None = None, size: tuple[int, int] | None = None, **values
    ):
        """A node; values are widget values, or (node, output) pairs for links. Widgets without a value keep their default."""
        info = self.info[kind]
        slots, widgets = [], []
        for name, type_, options in node_inputs(info):
            value = values.pop(name, None)
            if is_widget(type_, options):
                choices = type_ if isinstance(type_, list) else options.get("options")
                default = options.get("default", choices[0] if choices else None)
                widgets.append(default if value is None else value)
                if options.get("control_after_generate"):
                    widgets.append("fixed")
                if options.get("image_upload"):
                    widgets.append("image")
            else:
                slots.append({"name": name, "type": type_, "link": self._link(value, len(self.nodes) + 1, len(slots))})
        if values:
            raise ValueError(f"{kind} has no input {', '.join(values)}")
        outputs = [
            {"name": n, "type": t, "slot_index": i, "links": []}
            for i, (n, t) in enumerate(zip(info["output_name"], info["output"], strict=True))
        ]
        size = size or (320, 6 + 20 * max(len(slots), len(outputs)) + (8 + 24 * len(widgets) if widgets else 0))
        properties: dict[str, Any] = {"Node name for S&R": kind, **(OURS if kind.startswith("DMAP_") else STOCK)}
        if models:
            properties["models"] = models
        return self._place(kind, column, title, size, slots, outputs, properties, widgets)

    def note(self, text: str, height: int):
        """What to change, left of everything else and wide enough to be read."""
        width = 480
        node = self._place("MarkdownNote", -1, "What to change", (width, height), [], [], {}, [text])
        self.nodes[node - 1]["pos"][0] = -width - 40

    def _place(self, kind, column, title, size, slots, outputs, properties, widgets) -> int:
        y = self.bottom.get(column, 0)
        self.bottom[column] = y + size[1] + ROW + 30
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [column * COLUMN, y],
            "size": list(size),
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
        }
        node |= {"inputs": slots, "outputs": outputs, "properties": properties, "widgets_values": widgets}
        if title:
            node["title"] = title
        self.nodes.append(node)
        return node["id"]

    def _link(self, source, target: int, slot: int) -> int | None:
        if source is None:
            return None
        node, output = source
        link = len(self.links) + 1
        end = self.nodes[node - 1]["outputs"][output]
        self.links.append([link, node, output, target, slot, end["type"]])
        end["links"].append(link)
        return link

    def save(self, path: Path) -> None:
        workflow = {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links}
        workflow |= {"groups": [], "config": {}, "extra": {"ds": {"scale": 1.0, "offset": [600, 130]}}, "version": 0.4}
        path.write_text(json.dumps(workflow, indent=1) + "\n", encoding="ascii")
