"""Where imports come from: the repository's folder is never on the path of a test, and the installed package is dmap_core alone."""

import csv
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WITHOUT = ("torchvision", "lpips", "torch_fidelity")

TABLE = """
operators: {sr8: {operator: SuperResolution, scale: 8}}
images: %s
checkpoint: %s
settings_for: demo prior, 128 pixels
count: 1
metrics: [psnr]
rows: [{operator: sr8, solver: DPS}]
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_repository_is_not_on_the_path():
    """Nor on that of a program that a test starts: dmap_core is there because it is installed."""
    assert ROOT not in {Path(entry).resolve() for entry in sys.path}
    program = "import dmap_core, importlib.util; print(dmap_core.__file__, importlib.util.find_spec('demo'))"
    assert run(sys.executable, "-c", program, cwd=ROOT.parent).split() == [str(ROOT / "dmap_core" / "__init__.py"), "None"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the repository, in which a build leaves folders; without its pictures and weights, which are large."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    files = run("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.endswith((".png", ".safetensors")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, copy)
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_dmap_core_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (commands,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert names == {path.relative_to(ROOT).as_posix() for path in (ROOT / "dmap_core").rglob("*.py")}
    assert commands.split() == ["[console_scripts]", "dmap", "=", "dmap_core.cli:main"]


@pytest.mark.nightly
def test_the_installed_command_restores_a_picture(wheel, tmp_path):
    """In an environment of its own, in another folder, from the wheel alone.

    Proves: the wheel lacks no file of dmap_core, the command is there, and a table of one picture with the demo prior needs nothing of the
    repository but the files that its config names. Proves not: that pip finds the packages of the extra "studies", since the environment
    takes them from the one that runs this test, without torchvision and what imports it: here its compiled part may not fit torch.
    """
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    others = tmp_path / "others"
    others.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("dmap", "__editable__", *WITHOUT)):
            (others / entry.name).symlink_to(entry)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "others.pth").write_text(f"{others}\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert str(own) in run(python, "-c", "import dmap_core; print(dmap_core.__file__)", cwd=elsewhere)
    assert "evaluate" in run(environment / "bin" / "dmap", "--help", cwd=elsewhere)
    prior = ROOT / "models" / "checkpoints" / "dmap-demo-prior.safetensors"
    (elsewhere / "table.yaml").write_text(TABLE % (ROOT / "demo" / "held-out", prior))
    run(environment / "bin" / "dmap", "evaluate", "--config", "table.yaml", "--out", "out", cwd=elsewhere)
    (row,) = csv.DictReader((elsewhere / "out" / "table.csv").open())
    psnr = float(row["psnr"])
    assert psnr > 16, row  # 16.9 here, of three steps 14.2
    assert len(list(elsewhere.glob("out/*/*.png"))) >= 1
