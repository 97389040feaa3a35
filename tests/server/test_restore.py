"""DMAP Restore's templates, through ComfyUI's API: they run as shipped, and what they make is a restoration."""

import hashlib
import json
import urllib.error

import numpy as np
import pytest
from host import FLOW_PRIOR, PRIOR, ROOT, Host
from PIL import Image
from prompts import NOTES, titled, to_prompt

FILES = {path.stem: path for path in sorted((ROOT / "workflows").glob("[1-6]-*.json"))}
DEMO = [name for name in FILES if name.endswith("-demo")]
SD = [name for name in FILES if name.endswith("-sd")]
GOOD = ROOT / "demo" / "held-out" / "dmap-demo-18.png"
NODES, WIRES = 5, 8  # at most, and without the note
TILED = "5-a-large-photo-in-tiles-demo"  # minutes on a CPU: its kind of run is tested in tests/nodes/test_tiles.py
AT_ONCE = ("2-remove-scratches-demo", "3-enlarge-a-small-picture-demo")


@pytest.fixture(scope="module")
def info(host: Host) -> dict:
    return host.object_info()


def load(name: str) -> dict:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def prompt_of(name: str, info: dict, **restore) -> tuple[dict, str]:
    """(prompt, id of its save node) at the quickest quality, with other settings of Restore."""
    prompt = to_prompt(load(name), info)
    prompt[titled(prompt, "DMAP Restore")]["inputs"] |= {"quality": "look", **restore}
    return prompt, titled(prompt, "Restored photo")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2)))


def given_of(prompt: dict) -> Image.Image:
    name = prompt[titled(prompt, "Your photo")]["inputs"]["image"].removeprefix("dmap/")
    return Image.open(ROOT / "demo" / "samples" / name)


def test_five_templates_for_each_prior_in_the_order_of_their_numbers():
    """And one for the demo prior that is a flow."""
    assert [name[0] for name in FILES] == [*(n for n in "12345" for _ in range(2)), "6"]
    assert (len(DEMO), len(SD)) == (6, 5)


@pytest.mark.parametrize("name", FILES)
def test_few_nodes_in_groups_with_their_packs_and_versions(name):
    workflow = load(name)
    nodes = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    assert len(nodes) <= NODES and len(workflow["links"]) <= WIRES
    assert all(node["properties"]["cnr_id"] in ("dmap", "comfy-core") and node["properties"]["ver"] for node in nodes)
    assert workflow["extra"]["ds"]["scale"] == 1
    for node in workflow["nodes"]:  # each in one group, with its title
        x, y = node["pos"]
        inside = [
            group
            for group in workflow["groups"]
            if group["bounding"][0] <= x
            and x + node["size"][0] <= group["bounding"][0] + group["bounding"][2]
            and group["bounding"][1] + 60 <= y
            and y + node["size"][1] <= group["bounding"][1] + group["bounding"][3]
        ]
        assert len(inside) == 1, node["type"]
    (loader,) = [node for node in nodes if node["type"] == "CheckpointLoaderSimple"]
    if name in DEMO:
        (model,) = loader["properties"]["models"]
        assert model["name"] == (FLOW_PRIOR if "flow" in name else PRIOR)
        assert model["hash"] == hashlib.sha256((ROOT / "models" / "checkpoints" / model["name"]).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [n if n in AT_ONCE else pytest.param(n, marks=pytest.mark.thorough) for n in DEMO if n != TILED])
def test_it_runs_as_shipped_and_restores(host: Host, info: dict, name: str):
    prompt, save = prompt_of(name, info)
    entry = host.run(prompt)
    (path,) = host.images(entry, save)
    restored, good, given = pixels(path), pixels(GOOD), given_of(prompt)
    assert restored.shape == good.shape
    bicubic = pixels_of(given.convert("RGB").resize((128, 128), Image.BICUBIC))
    assert psnr(restored, good) > psnr(bicubic, good) + 1
    if "A" in given.getbands():
        known = np.asarray(given.getchannel("A")) == 255
        assert (restored[known] == pixels_of(given.convert("RGB"))[known]).all()
    # what the node shows in the end is before and after, and nothing of the nodes inside
    shown = [output for node, output in entry["outputs"].items() if "images" in output]
    sizes = sorted(Image.open(p).size for p in host.images(entry))
    assert len(shown) >= 2 and (128 * 2 + 8, 128) in sizes


def pixels_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


@pytest.mark.parametrize("name", [SD[2], *(pytest.param(n, marks=pytest.mark.thorough) for n in (SD[0], SD[1], SD[3]))])
def test_the_one_for_stable_diffusion_lacks_nothing_but_its_checkpoint(host: Host, info: dict, name: str):
    prompt, save = prompt_of(name, info, enlarge="1", damage="soft", softness=1.0, max_megapixels=0.01)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        host.post("/prompt", {"prompt": prompt})
    problems = [
        (node["class_type"], error["extra_info"]["input_name"])
        for node in json.loads(refusal.value.read())["node_errors"].values()
        for error in node["errors"]
    ]
    assert problems == [("CheckpointLoaderSimple", "ckpt_name")]


def test_a_photo_that_is_too_large_says_what_fits_on_the_node(host: Host, info: dict):
    from host import PromptFailed

    prompt, _ = prompt_of("3-enlarge-a-small-picture-demo", info, max_megapixels=0.01)
    with pytest.raises(PromptFailed, match="DMAP Restore: .*megapixels"):
        host.run(prompt)


def test_the_blueprint_is_offered(host: Host):
    """By servers that know blueprints (0.3.70 or so), and of nodes that are there."""
    try:
        offered = host.get("/global_subgraphs")
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return
    ours = [entry for entry in offered.values() if "DMAP" in entry["name"]]
    assert len(ours) == 1 and ours[0]["info"]["node_pack"].startswith("custom_nodes.")
    (path,) = (ROOT / "subgraphs").glob("*.json")
    (graph,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    known = host.object_info()
    assert {node["type"] for node in graph["nodes"]} <= set(known)
