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
OPENS_PICTURES = PACKAGE / "operators" / "jpeg.py"  # of a path only, where it is called
COMMANDS = {PACKAGE / "cli.py", PACKAGE / "studies" / "commands.py"}
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"}
EXTRAS = {"diffusers", "transformers", "accelerate", "tensorboard", "yaml", "bitsandbytes", "psutil"}
EXTRAS |= {"torchmetrics", "lpips", "torch_fidelity", "matplotlib", "torchvision", "scipy", "efficientnet_lite_pytorch"}
ON_DIFFUSERS = ("dmap_core.backends.diffusers", "dmap_core.backends.diffusers_files", "dmap_core.backends.transformer_files")
DIFFUSERS = {PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in ON_DIFFUSERS}

IMPORT_ALL = """
import importlib, pkgutil, sys
import dmap_core
for wanted in (lambda name: {first}, lambda name: {second}):
    for module in pkgutil.walk_packages(dmap_core.__path__, "dmap_core."):
        if wanted(module.name):
            importlib.import_module(module.name)
    print(len([name for name in sys.modules if name.startswith("dmap_core.")]))
    print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


@pytest.fixture(scope="module")
def imported():
    """(how many modules of dmap_core, the names of all packages) are there in a process that has imported what a host needs without training
    and tables; and what is there when the rest follows, without the back end on diffusers."""
    first = f'name.split(".")[1] not in ("cse", "evaluate", "pictures") and name not in {ON_DIFFUSERS}'
    program = IMPORT_ALL.format(first=first, second=f"name not in {ON_DIFFUSERS}")
    run = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    found = [(int(count), set(names.split())) for count, names in zip(lines[::2], lines[1::2], strict=True)]
    assert len(found) == 2 and "torch" in found[0][1]
    return found


def test_sampling_metrics_and_studies_need_torch_alone(imported):
    """Packages of `walk_packages` are imported to see what is in them; theirs are empty but for names."""
    count, names = imported[0]
    alone = [path for path in SOURCES if path not in PICTURES]
    assert count >= len(alone) - 4  # without dmap_core itself and those on diffusers
    assert not (HOST | EXTRAS | {"PIL"}) & names


def test_training_in_a_host_needs_pillow_besides(imported):
    count, names = imported[1]
    assert count == len(SOURCES) - 4  # dmap_core itself has no dot behind it
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


def test_what_sources_import():
    """diffusers and its like are imported where they are needed, so that their absence can be explained. A host's modules are nowhere."""
    wrong = []
    for path in SOURCES:
        anywhere, at_the_top = (roots(path, only_at_the_top) for only_at_the_top in (False, True))
        refused = (HOST & anywhere) | ((at_the_top & EXTRAS) - ({"diffusers", "transformers"} if path in DIFFUSERS else set()))
        if path not in PICTURES:
            refused |= {"PIL"} & (at_the_top if path == OPENS_PICTURES else anywhere)
        if path not in PICTURES and path not in COMMANDS and path not in DIFFUSERS:
            refused |= {"diffusers", "transformers", "accelerate", "yaml"} & anywhere
        wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in sorted(refused)]
    assert wrong == []


def test_sources_are_ascii():
    assert [str(path.relative_to(PACKAGE)) for path in SOURCES if not path.read_bytes().isascii()] == []


# Rooms are packages and files at the top of dmap_core. Each may import those that stand below it here, and nothing above.
ORDER = (
    "cli",
    "studies",
    "evaluate",
    "cse",
    "restore",
    "presets",
    "solvers",
    "backends",
    "posterior",
    "costs",
    "tiles",
    "gradient",
    "memory",
    "prior",
    "consistency",
    "damage",
    "estimate",
    "metrics",
    "operators",
    "schedule",
    "plots",
    "pictures",
    "weights",
    "files",
    "errors",
)


def targets(path):
    """Modules of dmap_core, as tuples of names below it, that a source imports anywhere; None for what lies outside of dmap_core, relatively."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for statement in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
        if isinstance(statement, ast.Import):
            names = [alias.name.split(".") for alias in statement.names]
            yield from (tuple(name[1:]) for name in names if name[0] == "dmap_core")
        elif isinstance(statement, ast.ImportFrom) and statement.level:
            above = statement.level - 1
            module = (*package[: len(package) - above], *(statement.module.split(".") if statement.module else ()))
            yield from [None] if above > len(package) else [(*module, alias.name) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module.partition(".")[0] == "dmap_core":
            yield from [(*statement.module.split(".")[1:], alias.name) for alias in statement.names]


def test_arrows_between_rooms_point_downwards():
    """So there is no cycle. dmap_core imports nothing around it, such as nodes/."""
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert sorted(rooms) == sorted(ORDER), "a room has no place in ORDER, or ORDER has one that is not there"
    wrong = []
    for path in SOURCES:
        name = path.relative_to(PACKAGE)
        room = name.parts[0].removesuffix(".py")
        for target in targets(path):
            if target is None:
                wrong.append(f"{name} imports from outside of dmap_core")
            elif room in ORDER and target[0] in ORDER and ORDER.index(target[0]) < ORDER.index(room):
                wrong.append(f"{name} -> {target[0]}, which is above {room}")
    assert wrong == []


def test_no_two_files_import_each_other():
    """Nor do more of them in a circle, whether at the top or where they are needed."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in SOURCES}
    graph = {}
    for name, path in files.items():
        found = [target for target in targets(path) if target]
        # `from .a import b`: b is a file, or a name in the file a, or in the package a
        reached = {t for target in found for t in (target, target[:-1], (*target[:-1], "__init__")) if t in files}
        graph[name] = reached - {name, (*name[:-1], "__init__")}  # names of its own package
    circles, done = [], set()

    def walk(name, way):
        if name in way:
            circles.append(" -> ".join("/".join(part) for part in (*way[way.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph[name]):
                walk(target, (*way, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())
    assert circles == []
