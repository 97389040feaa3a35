"""Each demo template as a new user meets it: a ComfyUI in which nothing was prepared, the template opened on the page, Run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from host import PACK, ROOT, Host
from PIL import Image
from variants import some_at_once

NAMES = sorted(path.stem for pattern in ("demo-*.json", "[1-6]-*-demo.json") for path in (ROOT / "workflows").glob(pattern))
# The server's tests run all of them. From the page three do where time counts, .ci/run has those of DMAP Restore too, and `make test-nightly` all.
AT_ONCE = ("demo-inpainting", "demo-toy", "4-sharpen-a-blurred-photo-demo")
TILED = "5-a-large-photo-in-tiles-demo"  # minutes on a CPU
RUN = some_at_once(
    [name for name in NAMES if name != TILED], AT_ONCE, nightly=[n for n in NAMES if n.startswith("demo-") and n not in AT_ONCE]
)
MILLISECONDS = 120_000
# Less of everything that only makes a run long; by node and widget.
SHORT = {
    "DMAP_DMAPScheduler": {"steps": 1},
    "DMAP_DMAPPreset": {"steps": 2},
    "DMAP_EmptyMeasurementLatent": {"batch_size": 2},
    "DMAP_ScoreErrorStudy": {"repeats": 1, "zetas": "1.0"},
    "DMAP_ScoreMeanStudy": {"samples": 2, "batch": 2, "zetas": "1.0"},
    "DMAP_StepsStudy": {"budget": 4, "K": "1"},
    "DMAP_SolverStudy": {"steps": 2},
    "DMAP_ToyStudy": {"samples": 100},
    "DMAP_Restore": {"quality": "look"},
}
WORDS = ["deblur", "upscale", "restore", "photo", "denoise", "scratch", "enlarge", "sharpen", "colorize", "inpaint", "repair"]
ALIASES = ["grain", "super resolution"]  # which only hosts find that know search words besides names


def files(folder: Path) -> list[Path]:
    """Those that are not the pack's own."""
    return [path for path in folder.rglob("*") if path.is_file() and path.parent != folder / "dmap"]


@pytest.fixture(scope="module")
def untouched(host: Host) -> Iterator[Host]:
    """A server into whose folder of pictures no other test has put anything: that of the other tests, as these come first, or its own."""
    if not files(host.input):
        yield host
        return
    with Host() as running:
        yield running


@pytest.fixture(scope="module")
def tab(open_page, untouched: Host) -> Iterator["playwright.sync_api.Page"]:  # noqa: F821 (imported when needed)
    new = open_page(untouched)
    yield new
    new.close()


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


@pytest.mark.parametrize("name", RUN)
def test_it_runs_with_nothing_prepared(tab, untouched: Host, name: str):
    assert not files(untouched.input)
    open_template(tab, name)
    tab.evaluate(
        """short => {
            for (const node of app.graph.nodes)
                for (const [name, value] of Object.entries(short[node.type] ?? {})) {
                    const widget = node.widgets.find(widget => widget.name === name)
                    widget.value = typeof value === "number" ? Math.min(value, widget.value || value) : value // 0: a preset's own steps
                }
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


@pytest.mark.parametrize("name", NAMES)
def test_it_opens(tab, name: str):
    """Those that are not run here lack nothing either: the server's tests run them, and this page in `make test-nightly`."""
    open_template(tab, name)
    assert not tab.evaluate("() => app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")


def test_the_search_finds_nodes_of_the_pack_by_what_people_look_for(tab, untouched: Host):
    """DMAP Restore, or where the search knows names alone, a node of that use."""
    aliases = "search_aliases" in untouched.object_info()["DMAP_Restore"]
    wanted = "DMAP Restore" if aliases else r"DMAP Restore|Operator: |DPSGuider|DMAP Decode"
    tab.keyboard.press("Escape")
    tab.evaluate("() => app.graph.clear()")
    tab.mouse.dblclick(900, 600)
    box = tab.locator("input:focus")
    box.wait_for(timeout=MILLISECONDS)
    for word in [*WORDS, *(ALIASES if aliases else [])]:
        box.fill(word)
        tab.wait_for_function(
            """pattern => [...document.querySelectorAll("[role=option]")].some(option => new RegExp(pattern).test(option.innerText))""",
            arg=wanted,
            timeout=10_000,
        )
        box.fill("nothing is called like this")
        tab.wait_for_function(
            """pattern => ![...document.querySelectorAll("[role=option]")].some(option => new RegExp(pattern).test(option.innerText))""",
            arg=wanted,
            timeout=10_000,
        )
    tab.keyboard.press("Escape")


def test_the_guiders_zeta_says_whose_it_is(tab):
    open_template(tab, "demo-cse")
    labels = tab.evaluate(
        """() => app.graph.nodes.filter(node => node.type === "DMAP_DPSGuider")
            .map(node => node.widgets.find(widget => widget.name === "zeta").label)"""
    )
    assert labels and set(labels) == {"zeta (stock samplers only)"}
