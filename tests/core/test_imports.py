"""dmap_core is torch and nothing of a host."""

import subprocess
import sys
from pathlib import Path

import pytest

import dmap_core

PACKAGE = Path(dmap_core.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

IMPORT_ALL = """
import importlib, pkgutil, sys
import dmap_core
for module in pkgutil.walk_packages(dmap_core.__path__, "dmap_core."):
    importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("dmap_core.")]))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_all_of_it_imports_no_host():
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    count, names = run.stdout.splitlines()
    assert int(count) == len(SOURCES) - 1
    assert not {"comfy", "comfy_api", "comfy_extras", "nodes", "diffusers", "transformers", "PIL", "torchvision", "scipy"} & set(
        names.split()
    )
    assert "torch" in names.split()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sources_are_ascii(path):
    path.read_text(encoding="ascii")
