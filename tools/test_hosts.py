"""Run the tests of the nodes and of the server in every ComfyUI of setup_host.HOSTS, one after the other, and show a table of the results.

    python tools/test_hosts.py                                  # all of them: hours
    python tools/test_hosts.py --host 0.16.3 --host 0.30.0      # some
    python tools/test_hosts.py --host 0.9.2 tests/nodes/test_schemas.py -x   # the rest goes to pytest

Each has an environment of its own. What was found stays in .host/results/ as JUnit's XML.
"""

import argparse
import datetime
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from setup_host import FIRST, HOST, HOSTS, ROOT, place

RESULTS = HOST / "results"
FOLDERS = ("nodes", "server")
PARALLEL = ["--numprocesses", "logical", "--maxprocesses", "4"]


@dataclass
class Count:
    passed: int = 0
    failed: int = 0  # errors, too
    skipped: int = 0

    def __str__(self) -> str:
        if not self.passed + self.failed + self.skipped:
            return "not run"
        return f"{self.passed} passed, {self.failed} failed" + (f", {self.skipped} skipped" if self.skipped else "")


def count(results: Path) -> dict[str, Count]:
    """The tests of each folder, from pytest's XML."""
    counts = {folder: Count() for folder in FOLDERS}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        found = counts.setdefault(case.get("classname", "").split(".")[1], Count())
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            found.failed += 1
        elif "skipped" in kinds:
            found.skipped += 1
        else:
            found.passed += 1
    return counts


def environment(version: str) -> dict[str, str]:
    tree, venv = place(version)
    return {**os.environ, "COMFYUI_PATH": str(tree), "COMFYUI_PYTHON": str(venv / "bin" / "python")}


def versions(version: str) -> str:
    """The Python and the torch that run a host."""
    code = "import platform, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}')"
    return subprocess.run([environment(version)["COMFYUI_PYTHON"], "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run_host(version: str, arguments: list[str]) -> dict[str, Count]:
    set_up = [sys.executable, ROOT / "tools" / "setup_host.py", "--host", version]
    subprocess.run(set_up, check=True, env={k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"})
    results = RESULTS / f"{version}.xml"
    results.unlink(missing_ok=True)
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = [*arguments, *(f"tests/{folder}" for folder in FOLDERS)]
    if not HOSTS[version].server:
        arguments = [argument for argument in arguments if not argument.startswith("tests/server")]
    # Pytest takes the last of two options, so that `arguments` may set another number of processes.
    command = [sys.executable, ROOT / "tests" / "run.py", *PARALLEL, f"--junitxml={results}", *arguments]
    subprocess.run(command, env=environment(version), cwd=ROOT)
    return count(results) if results.exists() else {folder: Count() for folder in FOLDERS}


def table(found: dict[str, dict[str, Count]]) -> str:
    today = datetime.date.today().isoformat()
    lines = ["| ComfyUI | from | nodes | server | run by | date |", "|---|---|---|---|---|---|"]
    for version, counts in found.items():
        nodes, server = (counts[folder] for folder in FOLDERS)
        lines.append(f"| {version} | `{HOSTS[version].package}` | {nodes} | {server} | {versions(version)} | {today} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=HOSTS, action="append", help=f"one of the ComfyUIs; again for more (.venv runs {FIRST})")
    arguments, rest = parser.parse_known_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {}
    for version in arguments.host or HOSTS:
        sys.stdout.write(f"\nComfyUI {version}\n")
        sys.stdout.flush()
        found[version] = run_host(version, rest)
    sys.stdout.write(f"\n{table(found)}\n")
    return any(counts[folder].failed or not counts["nodes"].passed for counts in found.values() for folder in counts)


if __name__ == "__main__":
    sys.exit(main())
