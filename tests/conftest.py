"""What tests share: one ComfyUI server for the whole session and one browser page that shows it.

Nothing is skipped when a part is missing: a test that did not run would look like one that passed.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import ROOT, Host, HostError, comfyui_path

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
def page(host: Host) -> Iterator["playwright.sync_api.Page"]:  # noqa: F821 (imported when needed)
    """A browser page with ComfyUI's interface, ready for `app.loadGraphData` and friends."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("Playwright is not installed.")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing(f"There is no browser ({', '.join(BROWSERS)}).")
    # The page asks once which pictures there are, and marks every node whose picture is none of them.
    for name in {*workflow_pictures()} - {path.name for path in host.input.iterdir()}:
        shutil.copy(PICTURE, host.input / name)
    host.post("/api/settings/Comfy.TutorialCompleted", True)  # otherwise a tour covers the canvas
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        tab = browser.new_page(viewport={"width": 1600, "height": 1000})
        tab.goto(host.url, timeout=UI_MILLISECONDS)
        tab.wait_for_function("() => window.app?.extensionManager && app.graph", timeout=UI_MILLISECONDS)
        yield tab
        browser.close()
