"""demo/compare.py: a table of evaluate whose pictures ComfyUI makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from host import ROOT


def compare(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "demo" / "compare.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)


def test_a_run_is_kept_and_not_computed_again(tmp_path):
    arguments = ("--n", 1, "--operators", "super-resolution-x8", "--solvers", "as given,DMAP,DSG", "--steps", 3, "--out", tmp_path)
    first = compare(*arguments)
    assert first.returncode == 0, first.stderr
    folders = {name: tmp_path / f"super-resolution-x8-{name}" for name in ("as-given", "dmap-3-steps", "dsg-3-steps")}
    entries = {name: json.loads((folder / "dmap-demo-00.json").read_text()) for name, folder in folders.items()}
    assert [entry["denoiser_calls"] for entry in entries.values()] == [0, 3 + 2 * 2, 3]
    assert all(5 < entry["metrics"]["psnr"] < 40 and entry["metrics"]["features"] > 0 < entry["residual"] for entry in entries.values())
    assert all(entries[name]["seconds"] > 0 for name in list(entries)[1:])
    assert json.loads((folders["dmap-3-steps"] / "row.json").read_text())["backend"] == "ComfyUI"
    assert f"{entries['dmap-3-steps']['metrics']['psnr']:.2f}" in first.stdout and "DSG, 3 steps" in first.stdout

    figures = [path for folder in folders.values() for path in folder.glob("dmap-demo-*")]
    written = {file: file.stat().st_mtime_ns for file in figures}
    second = compare(*arguments)
    assert second.returncode == 0, second.stderr
    assert {file: file.stat().st_mtime_ns for file in figures} == written and len(written) == 6
    only = compare(*arguments, "--table")
    assert only.stdout == second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solvers", "DMAPP"), "unknown DMAPP; known are as given, DPS"),
        (("--operators", "blur"), "unknown blur"),
        (("--n", 1000), "--n: 1000"),
        (("--solvers", "CSE alone"), "needs --cse FILE"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(tmp_path, arguments, message):
    refused = compare(*arguments, "--out", tmp_path)
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr
    assert not list(tmp_path.iterdir())


def test_figures_of_an_earlier_version_are_not_mixed_with_new_ones(tmp_path):
    (tmp_path / "super-resolution-x8-DPS-table-12345678.json").write_text(json.dumps({"operator": "x", "pictures": {}}))
    refused = compare("--n", 1, "--out", tmp_path)
    assert refused.returncode != 0 and "figures of an earlier version" in refused.stderr
