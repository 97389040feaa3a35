"""Each demo template as a new user meets it: a ComfyUI in which nothing was prepared, the template opened on the page, Run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import PACK, ROOT, Host
from PIL import Image

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("demo-*.json"))
MILLISECONDS = 120_000
# Less of everything that only makes a run long; by node and widget.
SHORT = {
    "DMAP_DMAPScheduler": {"steps": 2},
    "DMAP_DMAPPreset": {"steps": 3},
    "DMAP_EmptyMeasurementLatent": {"batch_size": 1},
    "DMAP_ScoreErrorStudy": {"repeats": 1, "zetas": "1.0"},
    "DMAP_ScoreMeanStudy": {"samples": 2, "batch": 2, "zetas": "1.0"},
    "DMAP_StepsStudy": {"budget": 4, "K": "1"},
    "DMAP_SolverStudy": {"steps": 2},
    "DMAP_ToyStudy": {"samples": 100},
}
WORDS = "deblur upscale restore photo denoise scratch enlarge sharpen colorize inpaint".split()


@pytest.fixture(scope="module")
def untouched() -> Iterator[Host]:
    """A server of its own, into whose folders no other test has put anything."""
    with Host() as running:
        running.post("/api/settings/Comfy.TutorialCompleted", True)  # otherwise a tour covers the canvas
        yield running


@pytest.fixture(scope="module")
def tab(page, untouched: Host) -> Iterator["playwright.sync_api.Page"]:  # noqa: F821 (imported when needed)
    new = page.context.browser.new_page(viewport={"width": 1600, "height": 1000})
    new.goto(untouched.url, timeout=MILLISECONDS)
    new.wait_for_function("() => window.app?.extensionManager && app.graph", timeout=MILLISECONDS)
    yield new
    new.close()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def open_template(tab, name: str) -> None:
    """Load a template as the list of templates does."""
    tab.keyboard.press("Escape")
    workflow = tab.evaluate(
        """async path => {
            const workflow = await (await fetch(path)).json()
            await app.loadGraphData(workflow)
            return workflow
        }""",
        f"/api/workflow_templates/{PACK}/{name}.json",
    )
    tab.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]), timeout=MILLISECONDS)
    return workflow


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_with_nothing_prepared(tab, untouched: Host, name: str):
    assert not files(untouched.input)
    open_template(tab, name)
    tab.evaluate(
        """short => {
            for (const node of app.graph.nodes)
                for (const [name, value] of Object.entries(short[node.type] ?? {}))
                    node.widgets.find(widget => widget.name === name).value = value
            window.dmapEnd = null
            for (const name of ["execution_success", "execution_error", "execution_interrupted"])
                app.api.addEventListener(name, event => { window.dmapEnd = [name, event.detail] }, { once: true })
        }""",
        SHORT,
    )
    tab.evaluate("() => app.queuePrompt(0)")
    tab.wait_for_function("() => window.dmapEnd", timeout=4 * MILLISECONDS)
    event, detail = tab.evaluate("() => window.dmapEnd")
    assert event == "execution_success", detail
    entry = untouched.wait(detail["prompt_id"])
    pictures = untouched.images(entry)
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
    assert not files(untouched.input)


@pytest.mark.parametrize("word", WORDS)
def test_the_search_finds_a_node_of_the_pack(tab, word: str):
    """Double click on the canvas, type the word, read the list."""
    tab.keyboard.press("Escape")
    tab.evaluate("() => { app.graph.clear(); app.canvas.setDirty(true, true) }")
    tab.mouse.dblclick(900, 500)
    box = tab.locator(".comfy-vue-node-search-container input, [role=dialog] input").first
    box.wait_for(timeout=MILLISECONDS)
    box.fill(word)
    shown = tab.locator("[role=option], [role=listbox] li, [data-testid=result-item]")
    shown.first.wait_for(timeout=MILLISECONDS)
    tab.wait_for_timeout(300)  # the list is redrawn while it is searched
    found = " ".join(shown.all_inner_texts())
    tab.keyboard.press("Escape")
    assert "DMAP" in found or "Operator: " in found or "DPSGuider" in found, json.dumps(found)
