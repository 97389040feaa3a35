"""What `comfy node pack` puts into the pack's archive: the files that git knows, without those that .comfyignore names."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def listed(*options):
    answer = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(filter(None, answer.stdout.split("\0")))


@pytest.fixture(scope="module")
def packed():
    return listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")


def test_all_that_runs_is_in_it(packed):
    for folder in ("nodes", "dmap_core", "web", "workflows", "subgraphs", "locales", "models", "studies"):
        here = listed(folder)
        assert here and here <= packed, folder
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE"} <= packed
    assert {name for name in listed("demo") if name.endswith((".safetensors", ".png"))} <= packed


def test_nothing_but_the_demo_models_is_large(packed):
    assert not [name for name in packed if name.startswith(("tests/", "tools/", "benchmarks/", ".", "CONTRIBUTING", "ARCHITECTURE"))]
    assert {name.rpartition(".")[2] for name in packed if name.startswith("docs/")} == {"md"}  # which help pages and messages name
    rest = [name for name in packed if not name.endswith(".safetensors")]
    assert sum((ROOT / name).stat().st_size for name in rest) < 5e6


def test_one_version():
    """Of the package, of the newest part of the changelog, and of the nodes in templates, by which a manager installs what is missing."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    parts = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert parts[0] == ("Unreleased", "") and parts[1][0] == version and parts[1][1]

    def versions(value):
        if isinstance(value, dict):
            if value.get("cnr_id") == "dmap":
                yield value["ver"]
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from versions(part)

    files = [path for folder in ("workflows", "subgraphs") for path in (ROOT / folder).glob("*.json")]
    assert {ver for path in files for ver in versions(json.loads(path.read_text(encoding="utf-8")))} == {version}
