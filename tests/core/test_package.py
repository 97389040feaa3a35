"""What `comfy node pack` puts into the pack's archive: the files that git knows, without those that .comfyignore names."""

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
