"""DMAP Restore as an artist meets it: clicks, the mask editor, errors on the node, cancel, the same again. Pictures of the page are kept in SHOTS, if that is set."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import PACK, Host
from PIL import Image

MILLISECONDS = 120_000
SHOTS = os.environ.get("DMAP_TESTS_SCREENSHOTS")
TEMPLATE = "3-enlarge-a-small-picture-demo"
WATCH = """() => {
    window.dmapEnd = null
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(name, event => { window.dmapEnd = [name, event.detail] }, { once: true })
}"""


@pytest.fixture(scope="module")
def tab(open_page, host: Host) -> Iterator["playwright.sync_api.Page"]:  # noqa: F821 (imported when needed)
    new = open_page(host)
    yield new
    new.close()


@pytest.fixture(autouse=True)
def keep_a_picture(tab, request) -> Iterator[None]:
    yield
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=Path(SHOTS) / f"{request.node.name}.png")


def open_template(tab, name: str = TEMPLATE, **settings) -> None:
    """Load a template as the list of templates does, with other settings of Restore: what is quickest, if nothing is said."""
    tab.keyboard.press("Escape")
    tab.evaluate("async path => app.loadGraphData(await (await fetch(path)).json())", f"/api/workflow_templates/{PACK}/{name}.json")
    tab.wait_for_function("() => app.graph.nodes.some(node => node.type === 'DMAP_Restore')", timeout=MILLISECONDS)
    tab.evaluate(
        """settings => {
            const node = app.graph.nodes.find(node => node.type === "DMAP_Restore")
            for (const [name, value] of Object.entries(settings)) node.widgets.find(widget => widget.name === name).value = value
        }""",
        {"quality": "look", "enlarge": "2", **settings},
    )


def run(tab) -> tuple[str, dict]:
    tab.evaluate(WATCH)
    tab.evaluate("() => app.queuePrompt(0)")
    return ended(tab)


def ended(tab) -> tuple[str, dict]:
    tab.wait_for_function("() => window.dmapEnd", timeout=3 * MILLISECONDS)
    return tuple(tab.evaluate("() => window.dmapEnd"))


def node_id(tab, kind: str) -> str:
    return str(tab.evaluate("kind => app.graph.nodes.find(node => node.type === kind).id", kind))


def test_from_an_empty_page_to_a_picture_in_four_clicks(open_page, host: Host):
    """Templates, the pack, a template, Run. The list of templates is older interfaces' too, but not at the same place: there the page is opened by its name."""
    page = open_page(host)
    try:
        page.get_by_role("button", name="Templates").first.click()
        page.get_by_role("dialog").get_by_text(PACK).first.click()
        card = page.get_by_role("dialog").get_by_text(TEMPLATE, exact=True).first
        page.get_by_role("dialog").get_by_text("-demo").first.hover()
        for _ in range(40):  # the list shows what one scrolls to, in the order of the server's files
            if card.count():
                break
            page.mouse.wheel(0, 300)
            page.wait_for_timeout(250)
        card.click()
        page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'DMAP_Restore')", timeout=MILLISECONDS)
        page.evaluate(WATCH)
        page.evaluate(
            "() => { app.graph.nodes.find(n => n.type === 'DMAP_Restore').widgets.find(w => w.name === 'quality').value = 'look' }"
        )
        page.get_by_role("button", name="Run", exact=True).first.click()
        event, detail = ended(page)
        assert event == "execution_success", detail
        (path,) = host.images(host.wait(detail["prompt_id"]), node_id(page, "SaveImage"))
        assert Image.open(path).size == (128, 128)
        shown = page.evaluate("id => app.nodeOutputs[id]?.images?.length", node_id(page, "DMAP_Restore"))
        assert shown == 1, "before and after stand on DMAP Restore"
    finally:
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / "four-clicks.png")
        page.close()


def test_the_same_again_costs_nothing_and_another_seed_is_another_picture(tab, host: Host):
    open_template(tab, seed=1)
    event, first = run(tab)
    assert event == "execution_success", first
    event, second = run(tab)
    assert event == "execution_success", second
    messages = host.wait(second["prompt_id"])["status"]["messages"]
    cached = {node for kind, data in messages if kind == "execution_cached" for node in data["nodes"]}
    assert {node_id(tab, "DMAP_Restore"), node_id(tab, "SaveImage")} <= cached
    open_template(tab, seed=2)
    event, third = run(tab)
    assert event == "execution_success", third
    (one,), (other,) = (host.images(host.wait(run["prompt_id"]), node_id(tab, "SaveImage")) for run in (first, third))
    assert Image.open(one).tobytes() != Image.open(other).tobytes()


def test_an_error_is_shown_on_the_node_that_the_artist_sees(tab):
    open_template(tab, damage="scratched")
    event, detail = run(tab)
    assert event == "execution_error"
    assert detail["node_id"] == node_id(tab, "DMAP_Restore") and "nothing is painted" in detail["exception_message"]
    details = tab.get_by_role("button", name="View details")  # newer interfaces: a notice that opens the error
    message = tab.get_by_text("nothing is painted").first
    details.or_(message).first.wait_for(timeout=MILLISECONDS)
    if details.count():
        details.first.click()
    message.wait_for(timeout=MILLISECONDS)
    tab.keyboard.press("Escape")


def test_an_error_of_a_node_inside_is_shown_there_as_well(tab):
    open_template(tab, enlarge="8", max_megapixels=0.01)
    event, detail = run(tab)
    assert event == "execution_error" and detail["node_id"] == node_id(tab, "DMAP_Restore")
    assert "megapixels" in detail["exception_message"]
    tab.keyboard.press("Escape")


def test_cancel_and_run_again(tab, host: Host):
    open_template(tab, quality="best", enlarge="4", seed=3)
    tab.evaluate(WATCH)
    tab.evaluate("() => { window.dmapSteps = 0; app.api.addEventListener('progress_state', () => window.dmapSteps++) }")
    tab.evaluate("() => app.queuePrompt(0)")
    tab.wait_for_function("() => window.dmapSteps > 6", timeout=MILLISECONDS)
    tab.evaluate("() => app.api.interrupt()")
    event, detail = ended(tab)
    assert event == "execution_interrupted", detail
    open_template(tab, seed=3)
    event, detail = run(tab)
    assert event == "execution_success", detail


def test_a_mask_painted_in_the_mask_editor_arrives(tab, host: Host):
    """With the mouse, in the editor that the node's menu opens."""
    open_template(tab, "2-remove-scratches-demo", enlarge="1")
    photo = node_id(tab, "DMAP_LoadPhoto")
    tab.evaluate(
        """id => {
            const node = app.graph.nodes.find(node => String(node.id) === id)
            node.widgets.find(widget => widget.name === "transparent").value = "auto"
            const image = node.widgets.find(widget => widget.name === "image")
            image.value = "dmap/emoji-blurred-128.png"
            image.callback?.(image.value)
        }""",
        photo,
    )
    tab.wait_for_function(
        "id => app.graph.nodes.find(node => String(node.id) === id).imgs?.[0]?.naturalWidth === 128", arg=photo, timeout=MILLISECONDS
    )
    tab.evaluate(
        """id => {
            const node = app.graph.nodes.find(node => String(node.id) === id)
            app.canvas.selectNode(node)
            return app.extensionManager.command.execute("Comfy.MaskEditor.OpenMaskEditor")
        }""",
        photo,
    )
    canvas = tab.locator("#maskEditor-canvas-container, #maskEditorCanvasContainer, [class*=mask-editor], #maskEditor").first
    canvas.wait_for(timeout=MILLISECONDS)
    tab.wait_for_timeout(2000)
    tab.mouse.move(760, 480)
    tab.mouse.down()
    tab.mouse.move(860, 540, steps=8)
    tab.mouse.up()
    tab.wait_for_timeout(500)
    tab.get_by_role("dialog").get_by_role("button", name="Save").first.click()
    tab.wait_for_function(
        """id => app.graph.nodes.find(node => String(node.id) === id).widgets.find(w => w.name === "image").value.includes("clipspace")""",
        arg=photo,
        timeout=MILLISECONDS,
    )
    event, detail = run(tab)
    assert event == "execution_success", detail
    (path,) = host.images(host.wait(detail["prompt_id"]), node_id(tab, "SaveImage"))
    assert Image.open(path).size == (128, 128)


def test_the_blueprint_opens_and_has_its_nodes(tab, host: Host):
    (name,) = [entry["name"] for entry in host.get("/global_subgraphs").values() if "DMAP" in entry["name"]]
    (path,) = (Path(__file__).resolve().parents[2] / "subgraphs").glob("*.json")
    assert path.stem == name
    tab.keyboard.press("Escape")
    tab.evaluate("workflow => app.loadGraphData(workflow)", json.loads(path.read_text(encoding="utf-8")))
    tab.wait_for_function("() => app.graph.nodes.length === 1 && app.graph.nodes[0].subgraph", timeout=MILLISECONDS)
    inside = tab.evaluate("() => app.graph.nodes[0].subgraph.nodes.map(node => [node.type, node.type in LiteGraph.registered_node_types])")
    assert ["DMAP_Restore", True] in inside and all(known for _, known in inside)
    assert tab.evaluate("() => app.graph.nodes[0].inputs.map(slot => slot.name)")[:2] == ["image", "mask"]
    widgets = tab.evaluate(
        "() => app.graph.nodes[0].widgets.map(widget => widget.name)"
    )  # some interfaces put the number of the node inside before them
    assert [name.split(": ")[-1] for name in widgets][:3] == ["ckpt_name", "damage", "enlarge"]
