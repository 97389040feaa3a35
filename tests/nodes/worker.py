"""The process in which the tests of this folder run: ComfyUI's modules are on its path, this repository is not. See conftest.py.

Usage: python worker.py ROOT SITE_PACKAGES. It reads lines of JSON, [id of a test, id of the next one or null], and answers each with a
line that holds the reports of that test.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def make_ready(root, site_packages):
    """Make ComfyUI importable, on the CPU, where runs repeat bit by bit; and pytest, if this Python has none of its own."""
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (root, root / "tests", FOLDER)]
    spec = importlib.util.spec_from_file_location("dmap_tests_host", root / "tests" / "host.py")
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    host.import_comfy()
    from comfy.cli_args import args

    args.cpu = True
    if importlib.util.find_spec("pytest") is None:
        sys.path.append(site_packages)


class OneByOne:
    """Pytest plugin: runs the tests that the other process asks for instead of all that were collected."""

    def __init__(self, requests, answers):
        self.requests, self.answers = requests, answers

    def pytest_configure(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_runtestloop(self, session):
        import torch

        items = {item.nodeid: item for item in session.items}
        for line in self.requests:
            nodeid, following = json.loads(line)
            self.reports = []
            with torch.inference_mode():  # as ComfyUI runs a prompt
                self.config.hook.pytest_runtest_protocol(item=items[nodeid], nextitem=items.get(following))
            self.answers.write(json.dumps(self.reports) + "\n")
            self.answers.flush()
        return True


def main():
    root, site_packages = Path(sys.argv[1]).resolve(), sys.argv[2]
    # Requests and answers keep the pipes to themselves; what ComfyUI and pytest print goes to the log.
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    make_ready(root, site_packages)
    import pytest

    options = ["--rootdir", root, "-c", root / "pyproject.toml", "--confcutdir", FOLDER, "-p", "no:cacheprovider"]
    overrides = ["-o", "pythonpath=", "-o", "addopts=--import-mode=importlib"]  # the repository is not to be on the path
    return pytest.main([*map(str, options), *overrides, str(FOLDER)], plugins=[OneByOne(requests, answers)])


if __name__ == "__main__":
    sys.exit(main())
