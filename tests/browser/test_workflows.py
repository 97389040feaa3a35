"""The shipped workflows in ComfyUI's interface: they load whole, queue, and are found with their help pages."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import PACK, ROOT, Host
from PIL import Image
from prompts import NOTES, node_inputs, titled, to_prompt

FILES = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
SD2 = [name for name in FILES if name.startswith("sd2-") or name.endswith("-sd")]
STEPS = 2
TITLE_BAR = 30  # pixels above a node's position
# What the page says when it cannot reach something: a picture that is not there yet, the internet.
NETWORK = re.compile(r"Failed to load resource|Content Security Policy|Error fetching|Failed to fetch|net::ERR|NetworkError")
MILLISECONDS = 60_000


@pytest.fixture(scope="module")
def info(host: Host) -> dict:
    return host.object_info()


@pytest.fixture
def complaints(page) -> Iterator[list[str]]:
    """Errors on the page during a test that are not about the network, or that are about a file of this pack."""
    found: list[str] = []

    def console(message) -> None:
        address = (message.location or {}).get("url", "")
        if message.type == "error" and (f"extensions/{PACK}" in address or not NETWORK.search(message.text)):
            found.append(f"{message.text} ({address})")

    def uncaught(error) -> None:
        found.append(str(error))

    page.on("console", console)
    page.on("pageerror", uncaught)
    yield found
    page.remove_listener("console", console)
    page.remove_listener("pageerror", uncaught)


@pytest.fixture
def fresh_page(page, host: Host, open_page) -> Iterator["playwright.sync_api.Page"]:  # noqa: F821 (imported when needed)
    """Another page, as a user's first look: nothing is open, and no dialog of a workflow before is still fading out."""
    tab = open_page(host)
    yield tab
    tab.context.close()


def load(page, name: str) -> dict:
    """Open a workflow on the page; returns what its file holds. Dialogs stay open."""
    workflow = json.loads(FILES[name].read_text(encoding="utf-8"))
    page.keyboard.press("Escape")  # a dialog of the workflow before
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]), timeout=MILLISECONDS)
    return workflow


@pytest.mark.parametrize("name", FILES)
def test_workflow_loads_whole(page, info: dict, complaints: list[str], name: str):
    workflow = load(page, name)
    nodes = page.evaluate(
        """() => app.graph.nodes.map(node => ({
            id: Number(node.id), type: node.type, known: node.type in LiteGraph.registered_node_types, broken: Boolean(node.has_errors),
            x: node.pos[0], y: node.pos[1], width: node.size[0], height: node.size[1]
        }))"""
    )
    # their checkpoint is missing, and newer interfaces mark its node
    marked = {node["type"] for node in nodes if node["broken"]} - ({"CheckpointLoaderSimple"} if name in SD2 else set())
    assert [node["type"] for node in nodes if not node["known"]] == [] and not marked
    assert not re.search(r"missing nodes|node types were not found", page.inner_text("body"), re.IGNORECASE)
    if name not in SD2:  # a dialog of older interfaces says that the checkpoint is missing
        assert page.get_by_role("dialog").count() == 0

    saved = page.evaluate("() => app.graph.serialize()")
    expected = {node["id"]: node for node in workflow["nodes"]}
    for node in saved["nodes"]:
        values = expected[int(node["id"])].get("widgets_values", [])
        if node["type"] not in NOTES:  # some interfaces add values of widgets of their own behind a node's
            assert node.get("widgets_values", [])[: len(values)] == values, node["type"]
    links = [[*link[:5], str(link[5])] for link in saved["links"]]
    assert sorted(links) == sorted(workflow["links"])

    shown = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in shown.values():  # the interface adds widgets of its own, which the server ignores
        known = {input_name for input_name, _, _ in node_inputs(info[node["class_type"]])}
        node["inputs"] = {input_name: value for input_name, value in node["inputs"].items() if input_name in known}
    written = to_prompt(workflow, info)
    assert {key: (node["class_type"], node["inputs"]) for key, node in shown.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in written.items()
    }

    for i, a in enumerate(nodes):
        for b in nodes[:i]:
            beside = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            above = a["y"] + a["height"] <= b["y"] - TITLE_BAR or b["y"] + b["height"] <= a["y"] - TITLE_BAR
            assert beside or above, f"{a} overlaps {b}"
    at = {node["id"]: node["x"] for node in nodes}
    assert all(at[source] <= at[target] for _, source, _, target, _, _ in workflow["links"])  # it reads from left to right
    assert complaints == []


# A page of its own for each takes long; they differ in nothing but what the other tests compare.
@pytest.mark.parametrize("name", [SD2[0], *(pytest.param(name, marks=pytest.mark.nightly) for name in SD2[1:])])
def test_missing_checkpoint_is_offered_for_download(fresh_page, name: str):
    load(fresh_page, name)
    dialog = fresh_page.get_by_text("checkpoints / 512-base-ema.safetensors")
    panel = fresh_page.get_by_text("512-base-ema.safetensors is missing")  # since frontend 1.40 or so a notice that opens a list of errors
    dialog.or_(panel).first.wait_for(timeout=MILLISECONDS)
    if panel.count():
        fresh_page.get_by_role("button", name="View details").click()
    fresh_page.get_by_role("button", name=re.compile("Download")).first.wait_for(timeout=MILLISECONDS)


def test_workflow_runs_from_the_page(page, host: Host, info: dict, complaints: list[str], tmp_path: Path):
    workflow = load(page, "demo-super-resolution-x8")
    page.evaluate(
        """steps => {
            for (const node of app.graph.nodes.filter(node => node.type === "DMAP_DMAPScheduler"))
                node.widgets.find(widget => widget.name === "steps").value = steps
            window.dmapEnd = null
            for (const name of ["execution_success", "execution_error", "execution_interrupted"])
                app.api.addEventListener(name, event => { window.dmapEnd = [name, event.detail] }, { once: true })
        }""",
        STEPS,
    )
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_function("() => window.dmapEnd", timeout=2 * MILLISECONDS)
    event, detail = page.evaluate("() => window.dmapEnd")
    assert event == "execution_success", detail

    entry = host.wait(detail["prompt_id"])
    prompt = to_prompt(workflow, info)
    for solver, calls in (("DPS", STEPS), ("DMAP", STEPS + (STEPS - 1) * 2)):
        save = titled(prompt, f"{solver}: save")
        (path,) = host.images(entry, save)
        assert Image.open(path).size == (128, 128)
        assert json.loads(entry["outputs"][titled(prompt, f"{solver}: report")]["text"][0])["denoiser_calls"] == calls
        page.wait_for_function("([id, name]) => app.nodeOutputs[id]?.images?.[0]?.filename === name", arg=[save, path.name])
    page.wait_for_timeout(500)  # for the canvas to draw what the run made
    page.screenshot(path=tmp_path / "after-the-run.png")
    assert complaints == []


def test_help_pages_are_served(page, info: dict):
    ours = {node_id: node for node_id, node in info.items() if node_id.startswith("DMAP_")}
    assert ours
    for node_id, node in ours.items():
        status, text = page.evaluate(
            "async path => { const answer = await fetch(path); return [answer.status, await answer.text()] }",
            f"/extensions/{PACK}/docs/{node_id}.md",
        )
        assert status == 200, node_id
        assert text == (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {node['display_name']}\n")
        assert len(text.split()) > 20, node_id


def test_the_help_of_a_node_opens_with_its_text_and_its_picture(page):
    """By the button that stands above a node that is selected."""
    load(page, "3-enlarge-a-small-picture-demo")
    for node_id in ("DMAP_Restore", "DMAP_LoadPhoto"):
        page.evaluate("type => app.canvas.selectNode(app.graph.nodes.find(node => node.type === type))", node_id)
        page.get_by_test_id("info-button").click(timeout=MILLISECONDS)
        text = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        title, picture = text.partition("\n")[0].removeprefix("# "), re.compile(r"!\[.*\)")
        shown = page.locator(".node-help-content").filter(has=page.get_by_role("heading", name=title, exact=True))
        shown.wait_for(timeout=MILLISECONDS)
        assert re.findall(r"\w+", shown.inner_text()) == re.findall(r"\w+", picture.sub("", text))
        page.wait_for_function("picture => picture.naturalWidth > 0", arg=shown.get_by_role("img").element_handle(), timeout=MILLISECONDS)


def test_templates_are_listed_and_served(page):
    listed, served = page.evaluate(
        """async ([pack, names]) => {
            const listed = await (await fetch("/api/workflow_templates")).json()
            const served = names.map(async name => (await fetch(`/api/workflow_templates/${pack}/${name}.json`)).json())
            return [listed, await Promise.all(served)]
        }""",
        [PACK, list(FILES)],
    )
    assert sorted(listed[PACK]) == sorted(FILES)
    assert served == [json.loads(path.read_text(encoding="utf-8")) for path in FILES.values()]
