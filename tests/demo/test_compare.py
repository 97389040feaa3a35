"""demo/compare.py: a table of evaluate whose pictures ComfyUI makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from host import ROOT
from PIL import Image

from dmap_core.evaluate.config import make_config
from dmap_core.operators import Inpainting, centred_box

# The program several times in one process: what takes long is to start it. After each run, what it printed and when its figures were written.
SEVERAL = """
import contextlib, io, json, sys
from pathlib import Path
demo, out, *runs = sys.argv[1:]
sys.path.insert(0, demo)
import compare
for arguments in runs:
    sys.argv[1:] = json.loads(arguments)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare.main()
    written = {str(file): file.stat().st_mtime_ns for file in Path(out).glob("*/dmap-demo-*")}
    print(json.dumps([printed.getvalue(), written]), flush=True)
"""


@pytest.fixture
def program(monkeypatch):
    """demo/compare.py as a module, for what it refuses before it loads anything."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import compare

    monkeypatch.setattr(compare, "import_pack", lambda: pytest.fail("ComfyUI is loaded"))
    return compare


def refusal(program, monkeypatch, *arguments: str | int | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as refused:
        program.main()
    assert refused.value.code not in (0, None)
    return str(refused.value.code)


def test_a_run_is_kept_and_not_computed_again(tmp_path):
    arguments = ("--n", 1, "--operators", "super-resolution-x8", "--solvers", "as given,DMAP,DSG", "--steps", 3, "--out", tmp_path)
    run = [str(part) for part in arguments]
    command = [sys.executable, "-c", SEVERAL, ROOT / "demo", tmp_path, *map(json.dumps, (run, run, [*run, "--table"]))]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, second, only = map(json.loads, done.stdout.splitlines())
    folders = {name: tmp_path / f"super-resolution-x8-{name}" for name in ("as-given", "dmap-3-steps", "dsg-3-steps")}
    entries = {name: json.loads((folder / "dmap-demo-00.json").read_text()) for name, folder in folders.items()}
    assert [entry["denoiser_calls"] for entry in entries.values()] == [0, 3 + 2 * 2, 3]
    assert all(5 < entry["metrics"]["psnr"] < 40 and entry["metrics"]["features"] > 0 < entry["residual"] for entry in entries.values())
    assert all(entries[name]["seconds"] > 0 for name in list(entries)[1:])
    assert json.loads((folders["dmap-3-steps"] / "row.json").read_text())["backend"] == "ComfyUI"
    assert f"{entries['dmap-3-steps']['metrics']['psnr']:.2f}" in first[0] and "DSG, 3 steps" in first[0]

    figures = {str(path) for folder in folders.values() for path in folder.glob("dmap-demo-*")}
    assert first[1] == second[1] and first[1].keys() == figures and len(figures) == 6
    assert only[0] == second[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solvers", "DMAPP"), "unknown DMAPP; known are as given, DPS"),
        (("--operators", "blur"), "unknown blur"),
        (("--n", 1000), "--n: 1000"),
        (("--solvers", "CSE alone"), "needs --cse FILE"),
        (("--photographs", "--search"), "--search: settings are searched on held-out pictures"),
        (("--photographs", "--n", 11), "--n: 11 pictures wanted; there are 10 for the table"),
        (("--noise", -1), "--noise is -1.0; it must be 0 to 255 grey levels"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(program, monkeypatch, tmp_path, arguments, message):
    assert message in refusal(program, monkeypatch, *arguments, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_photographs_and_automatic_steps(program, monkeypatch, tmp_path):
    """Measurements of 8 bits with noise, of natural photographs, and rows whose steps set themselves; every figure once more, matched."""
    import photographs

    folder = photographs.prepare(tmp_path / "photographs")
    files = sorted(folder.glob("*.png"))
    assert (
        len(files) == 10
        and {Image.open(file).size for file in files} == {(128, 128)}
        and {Image.open(file).mode for file in files} == {"RGB"}
    )
    operators = {"sr4": program.OPERATORS["super-resolution-x4"], "hole": Inpainting(centred_box((128, 128), (48, 48))).spec()}
    found = program.rows(operators, list(program.AUTOMATIC), None, None, tmp_path)
    assert [row["settings"]["jacobian"] for row in found] == ["none", "exact", "none", "exact", "exact", "none"]
    config = make_config(
        {"operators": operators, "rows": found, "images": folder, "rounded": True, "match": True, "settings_for": program.MODEL}
    )
    plans = [config.plan(row) for row in config.rows]
    assert all(plan.solver.zeta is None and plan.steps == 10 and plan.spacing == "exponential" for plan in plans)


def test_figures_of_an_earlier_version_are_not_mixed_with_new_ones(program, monkeypatch, tmp_path):
    (tmp_path / "super-resolution-x8-DPS-table-12345678.json").write_text(json.dumps({"operator": "x", "pictures": {}}))
    assert "figures of an earlier version" in refusal(program, monkeypatch, "--n", 1, "--out", tmp_path)
