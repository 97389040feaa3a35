"""The templates of DMAP Restore, for the demo prior and for Stable Diffusion, and its blueprint: written by tools/build_workflows.py."""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_graph import OURS, Graph

GREEN = {"color": "#232", "bgcolor": "#353"}
GROUP_COLOUR = "#3f789e"
HEADER = 60  # pixels of a group above its nodes
BLUEPRINT = "Restore a photo (DMAP)"


@dataclass(frozen=True)
class Template:
    """A template: what it is called, the pictures of the demo and of Stable Diffusion, what Restore is told, and what its note says."""

    title: str
    demo: str
    sd: str
    text: str
    restore: dict[str, Any]
    photo: dict[str, Any] = field(default_factory=dict)


TEMPLATES = {
    "1-restore-an-old-photo": Template(
        "Restore an old photo",
        "emoji-old-photo-64",
        "rooster-old-photo-128",
        "A small, grey, soft picture. **colours** *colourise* invents colours; *keep* leaves it grey. Scratches: paint them (right-click the photo, *Open in MaskEditor*).",
        {"damage": "old photo", "colours": "colourise"},
    ),
    "2-remove-scratches": Template(
        "Remove scratches",
        "emoji-scratched-128",
        "rooster-holes-512",
        "What is transparent in this photo is filled. In yours: right-click it, *Open in MaskEditor*, paint over the scratches, *Save*, Run. "
        "What you did not paint comes back exactly as it was.",
        {"damage": "scratched"},
        {"transparent": "is missing"},
    ),
    "3-enlarge-a-small-picture": Template(
        "Enlarge a small picture",
        "emoji-small-32",
        "rooster-small-64",
        "**enlarge** says how many times; *auto* goes up to the size that the model knows. Is it soft as well? Set **softness** to 1.",
        {"damage": "too small"},
    ),
    "4-sharpen-a-blurred-photo": Template(
        "Sharpen a blurred photo",
        "emoji-blurred-128",
        "rooster-blurred-512",
        "**softness** 0 measures the blur. Rings at edges: lower it. Still soft: raise it. Streaks of a moved camera: **damage** *shaken*.",
        {"damage": "soft"},
    ),
    "5-a-large-photo-in-tiles": Template(
        "A large photo in tiles",
        "rooster-small-64",
        "rooster-256",
        "A result larger than the model knows is made in overlapping tiles by itself, in the memory of one. It takes as much longer as there are tiles: "
        "the node says how long. **max_megapixels** stops what would take a night.",
        {"damage": "too small", "enlarge": "4", "quality": "look"},
    ),
}


FLOW = Template(
    "Restore with a flow model",
    "emoji-small-32",
    "rooster-small-64",
    "**ModelSamplingSD3** says that this small UNet is a rectified flow; its shift is 1. Models that are flows by themselves (SD 3.5, Flux.1, Chroma, AuraFlow, Lumina 2, Z-Image) "
    "need no such node: load one with its VAE, and encode an empty prompt for **positive**.",
    {"damage": "too small"},
)


def _models(name: str, url: str, sha256: str | None) -> list[dict[str, str]]:
    found = {"name": name, "url": url, "directory": "checkpoints"}
    return [found | ({"hash": sha256, "hash_type": "SHA256"} if sha256 else {})]


class Placed(Graph):
    """A graph whose nodes are in groups, from left to right."""

    def __init__(self, info: dict[str, Any]):
        super().__init__(info)
        self.groups: list[dict[str, Any]] = []
        self.right = 0

    def group(self, title: str, *nodes: int, gap: int = 40) -> None:
        """The nodes one below the other, under a title, to the right of the groups before."""
        found = [self.nodes[node - 1] for node in nodes]
        width, y = max(node["size"][0] for node in found), HEADER + 30
        for node in found:
            node["pos"], node["size"][0] = [self.right + 20, y], width
            y += node["size"][1] + gap + 30
        bounding = [self.right, 0, width + 40, y - gap - 10]
        self.groups.append(
            {"id": len(self.groups) + 1, "title": title, "bounding": bounding, "color": GROUP_COLOUR, "font_size": 24, "flags": {}}
        )
        self.right += width + 60

    def paint(self, node: int, colours: dict[str, str]) -> None:
        self.nodes[node - 1] |= colours

    def workflow(self) -> dict[str, Any]:
        found = {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links}
        view = {"ds": {"scale": 1.0, "offset": [90, 140]}}
        return found | {"groups": self.groups, "config": {}, "extra": view, "version": 0.4}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.workflow(), indent=1) + "\n", encoding="ascii")


def template(info: dict[str, Any], about: Template, checkpoint: tuple[str, str, str | None], demo: bool, flow: bool = False) -> Placed:
    """flow: the checkpoint is a UNet that was trained as a flow, which no loader can tell."""
    name, url, sha256 = checkpoint
    g = Placed(info)
    prepared = (
        f"### Press Run: nothing has to be prepared\n\nThe checkpoint `{name}` comes with the pack: a small model of emoji, which runs in seconds on a CPU. "
        f"For photographs open this template's sister, which ends in *-sd*."
        if demo
        else f"### With a checkpoint chosen, press Run: the picture comes with the pack\n\n[{name}]({url}) (Stable Diffusion 2.0 base) goes to "
        "`ComfyUI/models/checkpoints/`. Stable Diffusion 1.5, 2.1 and SDXL work as well: choose yours in *Load Checkpoint*."
    )
    text = (
        f"## {about.title}\n\n{prepared}\n\n### Your own\n\nUpload it in **DMAP Load Photo**, or drop it there. {about.text}\n\n### What to change\n\n"
        "- **quality**: *look* is quick, *best* takes four to five times as long.\n"
        "- **seed**: another one, another restoration. **versions** 2 or more shows where they differ: that was invented.\n"
        "- **text** (connect *Preview Any*) says what was seen and chosen, and how well the result explains your photo."
    )
    note = g._place("MarkdownNote", 0, about.title, (320, 470), [], [], {}, [text])
    loader = g.add("CheckpointLoaderSimple", 0, models=_models(name, url, sha256), ckpt_name=name)
    sampling = g.add("ModelSamplingSD3", 0, title="The model is a flow", size=(320, 60), model=(loader, 0), shift=1.0) if flow else None
    photo = g.add(
        "DMAP_LoadPhoto", 1, title="Your photo", size=(320, 420), image=f"dmap/{about.demo if demo else about.sd}.png", **about.photo
    )
    prompt = None
    if not demo:
        prompt = g.add("CLIPTextEncode", 1, title="Prompt (may stay empty)", size=(340, 110), clip=(loader, 1), text="")
    restore = g.add(
        "DMAP_Restore",
        2,
        title="DMAP Restore",
        size=(380, 760),
        model=(sampling or loader, 0),
        vae=(loader, 2),
        image=(photo, 0),
        mask=(photo, 1),
        operator=(photo, 3),
        positive=(prompt, 0) if prompt else None,
        **about.restore,
    )
    g.paint(restore, GREEN)
    save = g.add("SaveImage", 3, title="Restored photo", size=(360, 460), images=(restore, 0), filename_prefix="dmap/restored")
    g.group("1  Model", note, loader, *([sampling] if sampling else []))
    g.group("2  Your photo", *([photo, prompt] if prompt else [photo]))
    g.group("3  Restore", restore)
    g.group("4  Result", save)
    return g


def blueprint(info: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """A subgraph of one node for any workflow: a photo in, the restored one out; checkpoint, prompt and Restore inside."""
    g = Placed(info)
    loader = g.add("CheckpointLoaderSimple", 0, ckpt_name=checkpoint)
    prompt = g.add("CLIPTextEncode", 0, title="Prompt (may stay empty)", size=(340, 110), clip=(loader, 1), text="")
    restore = g.add("DMAP_Restore", 1, size=(400, 760), model=(loader, 0), vae=(loader, 2), positive=(prompt, 0))
    g.group("Model", loader, prompt)
    g.group("Restore", restore)
    inner = g.nodes
    links = [dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True)) for link in g.links]
    slots = {slot["name"]: i for i, slot in enumerate(inner[restore - 1]["inputs"])}
    ins = [("image", "IMAGE"), ("mask", "MASK")]
    outs = [("image", "IMAGE"), ("before_after", "IMAGE"), ("text", "STRING")]
    names = info["DMAP_Restore"]["output_name"]
    inputs, outputs = [], []
    for name, kind in ins:
        number = len(links) + 1
        links.append(
            {"id": number, "origin_id": -10, "origin_slot": len(inputs), "target_id": restore, "target_slot": slots[name], "type": kind}
        )
        inner[restore - 1]["inputs"][slots[name]]["link"] = number
        inputs.append({"id": _uuid("in", name), "name": name, "type": kind, "linkIds": [number], "pos": [-90, 120 + 20 * len(inputs)]})
    for name, kind in outs:
        number, slot = len(links) + 1, names.index(name)
        links.append({"id": number, "origin_id": restore, "origin_slot": slot, "target_id": -20, "target_slot": len(outputs), "type": kind})
        inner[restore - 1]["outputs"][slot]["links"].append(number)
        outputs.append(
            {"id": _uuid("out", name), "name": name, "type": kind, "linkIds": [number], "pos": [g.right + 80, 120 + 20 * len(outputs)]}
        )
    shown = [(loader, "ckpt_name"), (restore, "damage"), (restore, "enlarge"), (restore, "quality"), (restore, "seed")]
    identity = _uuid("graph", BLUEPRINT)
    graph = {
        "id": identity,
        "version": 1,
        "state": {"lastGroupId": len(g.groups), "lastNodeId": len(inner), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": BLUEPRINT,
        "inputNode": {"id": -10, "bounding": [-200, 100, 120, 80]},
        "outputNode": {"id": -20, "bounding": [g.right + 60, 100, 140, 100]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": inner,
        "groups": g.groups,
        "links": links,
        "extra": {},
        "category": "DMAP",
        "description": "Brings a damaged photo back: too small, soft, scratched, grainy, a bad JPEG, an old photo.",
    }
    outside = {
        "id": 1,
        "type": identity,
        "pos": [0, 0],
        "size": [400, 260],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": None} for name, kind in ins],
        "outputs": [{"name": name, "type": kind, "links": None} for name, kind in outs],
        "title": BLUEPRINT,
        "properties": {"proxyWidgets": [[str(node), widget] for node, widget in shown], **OURS},
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [graph]},
        "extra": {},
    }


def _uuid(*parts: str) -> str:
    """The same for the same words, so that a file that is written again is the same file."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join((OURS["cnr_id"], *parts))))
