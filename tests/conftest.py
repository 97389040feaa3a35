"""What tests share: a ComfyUI server and a browser page that shows it, the paths of imports, and who runs what in parallel.

Nothing is skipped when a part is missing: a test that did not run would look like one that passed.
"""

import json
import os
import shutil
import site
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import ROOT, Host, HostError, comfyui_path

# `python -m pytest` puts the working folder there; in the repository's root, its folder `nodes` would hide ComfyUI's module of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
if "DMAP_TESTS_PACKAGES" in os.environ:  # another interpreter's: see run.py
    site.addsitedir(os.environ["DMAP_TESTS_PACKAGES"])
# The pictures are tiny: more threads only wait for each other. For what the tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
UI_MILLISECONDS = 120_000
PICTURE = ROOT / "demo" / "held-out" / "dmap-demo-00.png"
TOGETHER = {f"core-test_{name}": "core-processes" for name in ("evaluate_run", "cse_train", "cli")}  # their processes come from one
LEFT_OUT = pytest.StashKey[int]()
# In parallel, what takes longest comes first: these groups, then the rest of the folders.
LONGEST = (
    "browser",
    "server",
    "core-processes",
    "nodes-test_cse_training",
    "nodes-test_solver_nodes",
    "nodes-test_families",
    "nodes-test_tiles",
    "nodes-test_study_nodes",
)
FOLDERS = ("browser", "server", "nodes", "demo", "core")
# What a run leaves out, by the value of DMAP_TESTS_ALL.
LEFT_OUT_BY = {"": ("thorough", "nightly"), "1": ("nightly",), "nightly": ()}
SECOND_HOST = bool(os.environ.get("DMAP_TESTS_SECOND_HOST"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a file stay in one process, for what they share; those of the fixture `host` in two, each with its server: the browser's, and the others.

    What is marked `thorough` is another case of what the rest proves, or costs far more than it: .ci/run runs it, with DMAP_TESTS_ALL=1.
    What is marked `nightly` is so dear that only `make test-nightly` runs it. What is marked `hosts("one")` proves the same in every ComfyUI:
    with DMAP_TESTS_SECOND_HOST=1 it is left out, as .ci/run does in the newest one.
    """
    wanted = os.environ.get("DMAP_TESTS_ALL", "")
    if wanted not in LEFT_OUT_BY:
        raise pytest.UsageError(f"DMAP_TESTS_ALL is {wanted!r}: it should be one of {', '.join(map(repr, LEFT_OUT_BY))}.")

    def unwanted(item: pytest.Item) -> bool:
        hosts = item.get_closest_marker("hosts")
        return any(map(item.get_closest_marker, LEFT_OUT_BY[wanted])) or bool(SECOND_HOST and hosts and hosts.args == ("one",))

    left_out = [item for item in items if unwanted(item)]
    if left_out:
        items[:] = [item for item in items if not unwanted(item)]
        config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(ROOT / "tests").parts[0]

    def group(item: pytest.Item) -> str:
        if "host" in item.fixturenames:
            return "browser" if folder(item) == "browser" else "server"
        name = f"{folder(item)}-{item.path.stem}"
        return TOGETHER.get(name, name)

    def place(item: pytest.Item) -> tuple[int, int]:
        return LONGEST.index(group(item)) if group(item) in LONGEST else len(LONGEST), FOLDERS.index(folder(item))

    items.sort(key=place)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            "Tests are not grouped: every process would start a ComfyUI of its own. Run them with --dist=loadgroup, and pytest below 9.2."
        )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Every process of xdist collects the same tests, and this one none."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", node.config.stash.get(LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        where = "make test-nightly" if os.environ.get("DMAP_TESTS_ALL") else ".ci/run (DMAP_TESTS_ALL=1) or make test-nightly"
        terminalreporter.write_line(f"{count} tests run in {where} only")


def missing(what: str) -> None:
    pytest.fail(f"{what} `make test` installs all that the tests need.", pytrace=False)


def workflow_pictures() -> Iterator[str]:
    """The pictures of the input folder that the shipped workflows load."""
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "LoadImage":
                yield node["widgets_values"][0]


@pytest.fixture(scope="session")
def comfyui_tree() -> Path:
    """The folder of the ComfyUI under test."""
    try:
        return comfyui_path()
    except HostError as error:
        missing(str(error))


@pytest.fixture(scope="session")
def host(comfyui_tree: Path) -> Iterator[Host]:
    """A running ComfyUI with this pack in it."""
    with Host() as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator["playwright.sync_api.Browser"]:  # noqa: F821 (imported when needed)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("Playwright is not installed.")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing(f"There is no browser ({', '.join(BROWSERS)}).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def open_page(browser):
    """open_page(host): a new page of the browser with ComfyUI's interface, ready for `app.loadGraphData` and friends."""

    def open_page(host: Host) -> "playwright.sync_api.Page":  # noqa: F821
        host.post("/api/settings/Comfy.TutorialCompleted", True)  # otherwise a tour covers the canvas
        tab = browser.new_page(viewport={"width": 1600, "height": 1000})
        tab.goto(host.url, timeout=UI_MILLISECONDS)
        tab.wait_for_function("() => window.app?.extensionManager && app.graph", timeout=UI_MILLISECONDS)
        return tab

    return open_page


@pytest.fixture(scope="module")
def page(host: Host, open_page) -> Iterator["playwright.sync_api.Page"]:  # noqa: F821
    """The page that tests share. It paints as long as it is open, which takes a part of a core from the tests behind."""
    # It asks once which pictures there are, and marks every node whose picture is none of them.
    for name in {*workflow_pictures()} - {path.name for path in host.input.iterdir()}:
        shutil.copy(PICTURE, host.input / name)
    tab = open_page(host)
    yield tab
    tab.close()
