"""dmap_core is torch and nothing of a host; training and table runs need Pillow, and on the command line diffusers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dmap_core

PACKAGE = Path(dmap_core.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
PICTURES = [path for path in SOURCES if {PACKAGE / "cse", PACKAGE / "evaluate", PACKAGE / "pictures.py"} & {path, *path.parents}]
COMMANDS = {PACKAGE / "cli.py", PACKAGE / "studies" / "commands.py"}
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"}
EXTRAS = {"diffusers", "transformers", "accelerate", "tensorboard", "yaml", "bitsandbytes", "psutil"}
EXTRAS |= {"torchmetrics", "lpips", "torch_fidelity", "matplotlib", "torchvision", "scipy", "efficientnet_lite_pytorch"}
DIFFUSERS = {PACKAGE / "backends" / "diffusers.py", PACKAGE / "backends" / "diffusers_files.py"}
ON_DIFFUSERS = ("dmap_core.backends.diffusers", "dmap_core.backends.diffusers_files")

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


def test_sampling_metrics_and_studies_need_torch_alone():
    """Packages of `walk_packages` are imported to see what is in them; theirs are empty but for names."""
    count, names = imported(f'module.name.split(".")[1] not in ("cse", "evaluate", "pictures") and module.name not in {ON_DIFFUSERS}')
    alone = [path for path in SOURCES if path not in PICTURES]
    assert count >= len(alone) - 3  # without dmap_core itself and those on diffusers
    assert not (HOST | EXTRAS | {"PIL"}) & names


def test_training_in_a_host_needs_pillow_besides():
    count, names = imported(f"module.name not in {ON_DIFFUSERS}")
    assert count == len(SOURCES) - 3  # dmap_core itself has no dot behind it
    assert "PIL" in names
    assert not (HOST | EXTRAS) & names


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
    assert roots(path, only_at_the_top=True) & EXTRAS <= ({"diffusers", "transformers"} if path in DIFFUSERS else set())
    if path not in PICTURES:
        assert "PIL" not in roots(path, only_at_the_top=False)
    if path not in PICTURES and path not in COMMANDS and path not in DIFFUSERS:
        assert not {"diffusers", "transformers", "accelerate", "yaml"} & roots(path, only_at_the_top=False)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sources_are_ascii(path):
    path.read_text(encoding="ascii")
