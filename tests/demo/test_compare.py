"""demo/compare.py: the comparison of all solvers, and the search for their settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host import ROOT

sys.path.insert(0, str(ROOT / "demo"))

from compare import table, variants, vertex  # noqa: E402

from dmap_core.operators import SuperResolution  # noqa: E402
from dmap_core.presets import MODELS, preset  # noqa: E402

DPS = preset(SuperResolution(8), "DPS", MODELS[1])


def compare(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "demo" / "compare.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)


def test_vertex_finds_the_top_of_a_parabola_in_the_logarithm():
    factors = [0.4, 1.0, 2.5]
    psnrs = [25 - 3 * float(torch.tensor(f / 1.3).log()) ** 2 for f in factors]
    assert vertex(factors, psnrs) == "the best factor is about 1.30"
    assert "outside" in vertex(factors, [20.0, 21.0, 23.0])
    assert "outside" in vertex(factors, [23.0, 20.0, 23.0])  # a valley has no top
    assert "three" in vertex([1.0, 2.0], [20.0, 21.0])


def test_sweeps_multiply_the_presets_setting():
    assert variants(DPS, None) == [DPS]
    half, same = variants(DPS, "zeta=0.5,1")
    assert half.solver.zeta == DPS.solver.zeta / 2 and same == DPS
    with pytest.raises(SystemExit, match="no setting 'K'.*zeta"):
        variants(DPS, "K=1,2")


def test_a_run_is_kept_and_not_computed_again(tmp_path):
    arguments = ("--n", 1, "--operators", "super-resolution-x8", "--solvers", "as given,DMAP,DSG", "--steps", 3, "--out", tmp_path)
    first = compare(*arguments)
    assert first.returncode == 0, first.stderr
    files = sorted(tmp_path.glob("*.json"))
    entries = [json.loads(file.read_text()) for file in files]
    assert [(e["operator"], e["solver"], e["steps"], e["set"], len(e["pictures"])) for e in entries] == [
        ("super-resolution-x8", "DMAP", 3, "table", 1),
        ("super-resolution-x8", "DSG", 3, "table", 1),
        ("super-resolution-x8", "as given", 0, "table", 1),
    ]
    rows = [next(iter(e["pictures"].values())) for e in entries]
    assert [row["denoiser_calls"] for row in rows] == [3 + 2 * 2, 3, 0]
    assert all(5 < row["psnr"] < 40 and row["features"] > 0 and row["residual"] > 0 for row in rows)
    assert all(row["seconds"] > 0 for row in rows[:2])
    printed = table(tmp_path, "table").splitlines()
    assert len(printed) == 5 and f"{rows[0]['psnr']:.2f}" in printed[2]
    assert printed[2] in first.stdout

    written = {file: file.stat().st_mtime_ns for file in files}
    second = compare(*arguments)
    assert second.returncode == 0, second.stderr
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
    only = compare("--table", "--out", tmp_path)
    assert printed[3] in only.stdout


def test_what_it_cannot_do_is_said_before_anything_is_loaded(tmp_path):
    for arguments, message in (
        (("--solvers", "DMAPP"), "unknown DMAPP; known are as given, DPS"),
        (("--operators", "blur"), "unknown blur"),
        (("--n", 1000), "--n: 1000"),
    ):
        refused = compare(*arguments, "--out", tmp_path)
        assert refused.returncode != 0 and message in refused.stderr, refused.stderr
    assert not list(tmp_path.glob("*.json"))
