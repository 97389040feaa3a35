"""dmap_core is torch and nothing of a host; the training of CSEs needs Pillow, and on the command line diffusers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dmap_core

PACKAGE = Path(dmap_core.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
CSE = [path for path in SOURCES if PACKAGE / "cse" in path.parents]
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"}
TRAINING = {"diffusers", "transformers", "accelerate", "tensorboard", "yaml", "bitsandbytes"}
DIFFUSERS = PACKAGE / "cse" / "diffusers_models.py"

IMPORT_ALL = """
import importlib, pkgutil, sys
import dmap_core
for module in pkgutil.walk_packages(dmap_core.__path__, "dmap_core."):
    if {condition}:
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("dmap_core.")]))
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def imported(condition):
    """(how many modules of dmap_core, the names of all packages) are there after an import of those that meet the condition."""
    program = IMPORT_ALL.format(condition=condition)
    run = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    count, names = run.stdout.splitlines()
    assert "torch" in names.split()
    return int(count), set(names.split())


def test_sampling_needs_torch_alone():
    count, names = imported('module.name.split(".")[1] != "cse"')
    assert count == len(SOURCES) - 1 - len(CSE) + 1  # walk_packages imports packages, cse among them, to see what is in them
    assert not (HOST | TRAINING | {"PIL", "torchvision", "scipy"}) & names


def test_training_in_a_host_needs_pillow_besides():
    count, names = imported('module.name != "dmap_core.cse.diffusers_models"')
    assert count == len(SOURCES) - 2
    assert "PIL" in names
    assert not (HOST | TRAINING | {"torchvision", "scipy"}) & names


def roots(path, only_at_the_top):
    """The packages that a source imports; those of its own, relatively, are left out."""
    tree = ast.parse(path.read_text(encoding="ascii"))
    found = set()
    for statement in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(statement, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            found.add(statement.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_source_imports(path):
    """diffusers and its like are imported where they are needed, so that their absence can be explained. A host's modules are nowhere."""
    assert not HOST & roots(path, only_at_the_top=False)
    assert roots(path, only_at_the_top=True) & TRAINING == ({"diffusers", "transformers"} if path == DIFFUSERS else set())
    if path not in CSE:
        assert not (TRAINING | {"PIL"}) & roots(path, only_at_the_top=False)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sources_are_ascii(path):
    path.read_text(encoding="ascii")
