"""Run pytest where ComfyUI runs: `python tests/run.py [arguments of pytest]`; without arguments, all tests, in parallel;
with --in-comfyui, those that have a ComfyUI.

That is this interpreter, unless COMFYUI_PATH or COMFYUI_PYTHON names another one. Then the tests of the nodes, the server and the browser run
in that, with its own packages first and behind them those of this interpreter: pytest, and what else the tests need. The tests of dmap_core
and of the demo never have a ComfyUI, and stay here.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from host import HostError, comfyui_python

TESTS = Path(__file__).resolve().parent
PACKAGES = "DMAP_TESTS_PACKAGES"  # conftest.py reads it in every process
PYTHON = "DMAP_TESTS_PYTHON"  # what runs this repository's programs, where that is another interpreter than the tests'
# Each process takes up to 2 GB. What is slow is listed, so that a suite that grows is noticed.
PARALLEL = ["--numprocesses", "logical", "--maxprocesses", "4", "--durations", "20", "--durations-min", "5"]
IN_COMFYUI = [str(TESTS / name) for name in ("browser", "server", "nodes")]
ALONE = [str(TESTS / name) for name in ("demo", "core")]


def pytest_in(python: str, arguments: list[str]) -> int:
    environment = dict(os.environ)
    if not environment.get("COMFYUI_PATH"):  # into which nothing is written; elsewhere, what every process would compile is compiled once
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if python != sys.executable:
        environment |= {PACKAGES: sysconfig.get_paths()["purelib"], PYTHON: sys.executable}
    return subprocess.run([python, __file__, "--here", *arguments], env=environment).returncode


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--here"]:
        sys.path += filter(None, [os.environ.get(PACKAGES)])
        import pytest

        return pytest.main(arguments[1:])
    try:
        python = comfyui_python()
    except HostError as error:
        sys.exit(str(error))
    if arguments == ["--in-comfyui"]:
        return pytest_in(python, [*PARALLEL, *IN_COMFYUI])
    if arguments or python == sys.executable:
        return pytest_in(python, arguments or [*PARALLEL, *IN_COMFYUI, *ALONE])
    return pytest_in(python, [*PARALLEL, *IN_COMFYUI]) or pytest_in(sys.executable, [*PARALLEL, *ALONE])


if __name__ == "__main__":
    sys.exit(main())
