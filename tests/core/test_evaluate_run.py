"""Table runs on a base model as small as diffusers' blocks allow: what is computed, once, and what survives."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from host import import_torchvision
from PIL import Image
from tiny_models import pictures, tiny_checkpoint, tiny_cse

from dmap_core.cse.checkpoint import read_cse, write_cse
from dmap_core.errors import Diverged
from dmap_core.evaluate import backend, report, results, run, tables
from dmap_core.evaluate.config import ConfigError, make_config
from dmap_core.operators import Jpeg, Noisy, SuperResolution
from dmap_core.presets import MODELS, NAMES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SECONDS = 300  # until a process is taken for hung
SR8 = {"operator": "SuperResolution", "scale": 8}
STEPS = {"steps": 2, "spacing": "exponential"}
DPS = {"operator": "sr8", "solver": "DPS", "settings": {"zeta": 5.0}, **STEPS}
DMAP = {"operator": "sr8", "solver": "DMAP", "settings": {"zeta": 5.0, "K": 2}, **STEPS}
GIVEN = {"operator": "sr8", "solver": "as given"}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        import_torchvision()
        yield


@pytest.fixture(scope="module")
def given(on_the_cpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    base = tiny_checkpoint(folder / "base.safetensors")
    cse = tiny_cse(folder / "cse.safetensors", base, prediction="v", hint_range="-1..1")
    return SimpleNamespace(base=base, cse=cse, photos=pictures(folder / "photos", 4))


@pytest.fixture(scope="module")
def table(given):
    def table(rows=(GIVEN, DPS, DMAP), **more):
        common = {"images": given.photos, "checkpoint": given.base, "count": 2, "size": 32, "metrics": ["psnr"], "prediction": "v"}
        return make_config({"operators": {"sr8": SR8, "gray": {"operator": "Grayscale"}}, "rows": list(rows)} | common | more)

    return table


def make(config, out):
    jobs = run.evaluate(config, out)
    lines = tables.read_lines(config, jobs, out)
    results.write_text(out / "table.csv", tables.table_csv(config, lines))
    results.write_text(out / "pictures.csv", tables.pictures_csv(config, jobs, out))
    results.write_text(out / "table.md", tables.markdown(config, jobs, lines))
    return jobs


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    """A whole run of three rows on two pictures, not to be changed."""
    config, out = table(), tmp_path_factory.mktemp("finished") / "out"
    report.write_table(config, run.evaluate(config, out), out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def calls(monkeypatch):
    """(solver, seeds) of every restoration."""
    seen, restore = [], backend.restore

    def spy(*given, **more):
        seen.append((given[5].name(), list(given[6])))
        return restore(*given, **more)

    monkeypatch.setattr(backend, "restore", spy)
    return seen


@pytest.fixture
def nothing_to_restore(monkeypatch):
    def fails(*_, **__):
        raise AssertionError("something was restored")

    monkeypatch.setattr(backend, "restore", fails)
    monkeypatch.setattr("dmap_core.backends.diffusers_files.open_base", fails)


def files(out, pattern="*"):
    """Contents and times of all files below."""
    return {str(f.relative_to(out)): (f.read_bytes(), f.stat().st_mtime_ns) for f in out.rglob(pattern) if f.is_file()}


def untimed(path):
    """A CSV file without its seconds."""
    records = list(csv.DictReader(io.StringIO(path.read_text())))
    assert records
    return [{name: value for name, value in record.items() if not name.startswith("seconds")} for record in records]


def same_tables(a, b):
    return untimed(a / "table.csv") == untimed(b / "table.csv") and untimed(a / "pictures.csv") == untimed(b / "pictures.csv")


def refused(config, out):
    with pytest.raises(ConfigError) as caught:
        run.evaluate(config, out)
    return str(caught.value)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_whole_run(finished, given):
    names = {f"sr8-{row}/{picture}.{kind}" for row in ("as-given", "dps", "dmap") for picture in "01" for kind in ("png", "json")}
    names |= {f"sr8-{row}/row.json" for row in ("as-given", "dps", "dmap")} | {"run.json", "versions.json"}
    names |= {"table.md", "table.csv", "pictures.csv", "pictures-sr8.png"}
    names |= {f"plots/{name}.png" for name in ("psnr", "residual", "mismatch", "seconds")}
    assert set(files(finished)) == names
    for row, calls in (("as-given", 0), ("dps", 2), ("dmap", 2 + 1 * 2)):
        for i in (0, 1):
            entry = json.loads((finished / f"sr8-{row}" / f"{i}.json").read_text())
            original = Image.open(given.photos / f"{i}.png").resize((38, 32), Image.Resampling.LANCZOS)
            assert original.size[0] == round(48 * 32 / 40)
            assert entry["original"]["file"] == f"{i}.png" and entry["denoiser_calls"] == calls
            assert Image.open(finished / f"sr8-{row}" / f"{i}.png").size == (32, 32)
            x = run.Picture(given.photos / f"{i}.png", i).open(32)[0].permute(1, 2, 0).numpy()
            x = ((x + 1) * 127.5).round()
            error = ((pixels(finished / f"sr8-{row}" / f"{i}.png") - x) ** 2).mean()
            assert entry["metrics"]["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)


def test_the_picture_is_that_of_its_seed(finished, given, table):
    """The second picture's is the seed after the first one's; restored here by hand."""
    from dmap_core.backends.diffusers_files import open_base
    from dmap_core.restore import restore
    from dmap_core.schedule import exponential_sigmas
    from dmap_core.solvers import DPS

    base, f = open_base(given.base, prediction="v"), SuperResolution(8)
    y = f(run.Picture(given.photos / "1.png", 1).open(32))
    sigmas = exponential_sigmas(base.sigmas, 2)
    done = restore(base.sized((32, 32)), f, y, (4, 4, 4), sigmas, DPS(zeta=5.0), [3])
    wanted = ((done.image[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(pixels(finished / "sr8-dps" / "1.png") - wanted).max() <= 1
    entry = json.loads((finished / "sr8-dps" / "1.json").read_text())
    residual = float((f(done.image) - y).norm())
    assert entry["residual"] == pytest.approx(residual, rel=1e-3)
    assert untimed(finished / "pictures.csv")[4] == {
        "operator": "sr8",
        "row": "DPS",
        "picture": "1.png",
        "seed": "3",
        "residual": str(entry["residual"]),
        "mismatch": str(entry["mismatch"]),
        "mismatch_worst": str(entry["mismatch_worst"]),
        "denoiser_calls": "2",
        "peak_memory": "",
        "psnr": str(entry["metrics"]["psnr"]),
        "diverged": "",
    }


def test_a_finished_run_is_left_alone(copy, table, nothing_to_restore):
    before = files(copy, "*.png") | files(copy, "[01].json")
    make(table(), copy)
    kept = {name: found for name, found in (files(copy, "*.png") | files(copy, "[01].json")).items() if name.startswith("sr8-")}
    assert len(kept) == 12 and kept.items() <= before.items()


def test_more_pictures_later(copy, table, calls):
    before = files(copy, "[01].*")
    jobs = make(table(count=3), copy)
    assert sorted(calls) == [("DMAP", [6]), ("DPS", [6])]
    assert len(jobs) == 9 and files(copy, "[01].*") == before
    assert [(r["row"], r["n"]) for r in untimed(copy / "table.csv")] == [("as given", "3"), ("DPS", "3"), ("DMAP", "3")]


def test_fewer_pictures_later(copy, table, nothing_to_restore):
    make(table(count=1), copy)
    assert {r["n"] for r in untimed(copy / "table.csv")} == {"1"}


def test_more_rows_later(copy, table, calls):
    make(table([DPS, {**DPS, "name": "PF-ODE", "settings": {"zeta": 5.0, "eta": 0.0}}]), copy)
    assert calls == [("DPS", [0]), ("DPS", [3])]
    assert [r["row"] for r in untimed(copy / "table.csv")] == ["DPS", "PF-ODE"]


@pytest.mark.parametrize("suffix", [".png", ".json"])
def test_what_was_taken_away_is_computed_again(finished, copy, table, calls, suffix):
    (copy / "sr8-dps" / "0").with_suffix(suffix).unlink()
    make(table(), copy)
    assert calls == [("DPS", [0])]
    assert pixels(copy / "sr8-dps" / "0.png").tolist() == pixels(finished / "sr8-dps" / "0.png").tolist()
    assert same_tables(copy, finished)  # though this one was finished last


def test_a_metric_later_is_of_the_saved_pictures(copy, table, nothing_to_restore):
    Image.new("RGB", (32, 32), "gray").save(copy / "sr8-dps" / "0.png")
    make(table(metrics=["psnr", "ssim"]), copy)
    entries = {(r["row"], r["picture"]): r for r in untimed(copy / "pictures.csv")}
    assert all(0 < float(r["ssim"]) <= 1 for r in entries.values())
    assert float(entries["DPS", "0.png"]["ssim"]) < 0.9 and len({r["ssim"] for r in entries.values()}) == 6
    assert entries["DPS", "0.png"]["psnr"] == str(json.loads((copy / "sr8-dps" / "0.json").read_text())["metrics"]["psnr"])


CHANGES = {
    "seed": {"seed": 1},
    "size": {"size": 24},
    "precision": {"precision": "bf16"},
    "prompt": {"prompt": "a"},
    "settings": {"rows": [GIVEN, DPS, {**DMAP, "settings": {"zeta": 0.6, "K": 2}}]},
    "steps": {"rows": [GIVEN, DPS, {**DMAP, "steps": 3}]},
    "spacing": {"rows": [GIVEN, DPS, {**DMAP, "spacing": "paper"}]},
    "solver": {"rows": [GIVEN, DPS, {**DPS, "name": "DMAP"}]},
    "operator": {"operators": {"sr8": {"operator": "SuperResolution", "scale": 4}}},
    "prediction": {"rows": [GIVEN, DPS, {**DMAP, "prediction": "eps"}]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_results_of_other_settings_are_not_mixed(copy, table, nothing_to_restore, name):
    before = files(copy)
    message = refused(table(**CHANGES[name]), copy)
    assert "holds results of other settings" in message and f"{name} was " in message and "Choose another folder" in message
    assert files(copy) == before


def test_results_of_earlier_versions_go_on(copy, table, nothing_to_restore):
    """They named neither settings at their defaults nor the stride of seeds."""
    for file in copy.glob("*/row.json"):
        row = json.loads(file.read_text())
        if "settings" in row:
            assert {"eta", "optimizer"} < row["settings"].keys()
            row["settings"] = {name: value for name, value in row["settings"].items() if name in ("zeta", "K")}
            file.write_text(json.dumps(row))
    shared = json.loads((copy / "run.json").read_text())
    assert shared.pop("stride") == 3
    (copy / "run.json").write_text(json.dumps(shared))
    run.evaluate(table(), copy)
    assert "settings was" in refused(table([GIVEN, {**DPS, "settings": DPS["settings"] | {"eta": 0.5}}, DMAP]), copy)
    assert "stride was 3 and is 1" in refused(table(stride=1), copy)


class Painter:
    """A backend whose restorations say which seed they are of."""

    device, identity = torch.device("cpu"), {"backend": "painter"}

    def __init__(self):
        self.seen = []

    def restore(self, row, plan, operator, y, seeds):
        self.seen.append((row.name, plan.solver.name(), tuple(y.shape), list(seeds)))
        if 6 in seeds:
            raise Diverged("step 1: NaN")
        images = torch.stack([torch.full((3, *operator.image_size(y)), seed / 10 - 0.5) for seed in seeds])
        return images, [{"seconds": 0.5, "denoiser_calls": 7} for _ in seeds]


def test_another_backend(table, tmp_path, nothing_to_restore):
    painter = Painter()
    jobs = run.evaluate(table(count=3, batch=2), tmp_path, painter)
    assert [(name, seeds) for name, _, _, seeds in painter.seen] == [("DPS", [0, 3]), ("DMAP", [0, 3]), ("DPS", [6]), ("DMAP", [6])]
    assert {shape for _, _, shape, _ in painter.seen} == {(2, 3, 4, 4), (1, 3, 4, 4)}
    assert {solver for _, solver, _, _ in painter.seen} == {"DPS", "DMAP"} and len(jobs) == 9
    entry = json.loads((tmp_path / "sr8-dps" / "1.json").read_text())
    assert (entry["seconds"], entry["denoiser_calls"]) == (0.5, 7) and entry["residual"] > 0 and entry["metrics"]["psnr"] > 0
    assert set(pixels(tmp_path / "sr8-dps" / "1.png").flat) == {round((0.3 - 0.5 + 1) * 127.5)}
    assert "diverged" in json.loads((tmp_path / "sr8-dmap" / "2.json").read_text())
    assert "backend was painter and is None" in refused(table(count=3, batch=2), tmp_path)


def test_one_seed_for_all_and_the_last_pictures(table, tmp_path, nothing_to_restore):
    painter = Painter()
    run.evaluate(table([DPS], count=2, stride=0, last=True, seed=4), tmp_path, painter)
    assert [seeds for *_, seeds in painter.seen] == [[4], [4]]
    assert {file.stem for file in (tmp_path / "sr8-dps").glob("*.png")} == {"2", "3"}


def test_another_model_or_cse(given, table, tmp_path, nothing_to_restore, monkeypatch):
    config, out = table([{**DPS, "cse": str(given.cse)}], count=1), tmp_path / "out"
    identity = run.row_identity(config, config.rows[0], config.plan(config.rows[0]), run.checkpoint_identity)
    results.write_json(out / "sr8-dps" / "row.json", identity)
    other = tiny_cse(tmp_path / "cse.safetensors", given.base, seed=1)
    assert "cse was cse.safetensors" in refused(table([{**DPS, "cse": str(other)}], count=1), out)
    assert "cse was cse.safetensors" in refused(table([DPS], count=1), out)
    base = tiny_checkpoint(tmp_path / "base.safetensors", seed=1)
    message = refused(table([{**DPS, "cse": str(given.cse)}], count=1, checkpoint=base), out)
    assert "checkpoint was base.safetensors" in message and "cse was" not in message


@pytest.mark.parametrize("what", ["changed", "moved"])
def test_originals_that_are_no_longer_the_same(copy, given, table, tmp_path, nothing_to_restore, what):
    photos = shutil.copytree(given.photos, tmp_path / "photos")
    if what == "changed":
        Image.open(photos / "0.png").rotate(180).save(photos / "0.png")
    else:
        shutil.copy(photos / "3.png", photos / "-first.png")
    before = files(copy)
    message = refused(table(images=photos, count=2 if what == "changed" else 3), copy)
    assert "0.json was made of another picture, or of one at another place in the list" in message
    assert {name: found for name, found in files(copy).items() if "row" not in name and "/" in name}.items() <= before.items()


def test_batches_change_nothing_but_rounding(finished, table, tmp_path, calls):
    make(table(batch=2), tmp_path / "out")
    assert calls == [("DPS", [0, 3]), ("DMAP", [0, 3])]
    for row in ("dps", "dmap"):
        for i in (0, 1):
            assert np.abs(pixels(tmp_path / f"out/sr8-{row}/{i}.png") - pixels(finished / f"sr8-{row}/{i}.png")).max() <= 1
            assert json.loads((tmp_path / f"out/sr8-{row}/{i}.json").read_text())["batch"] == 2


def test_repeats_have_seeds_of_their_own(finished, table, tmp_path, calls):
    make(table([DPS], count=1, repeats=3), tmp_path)
    assert calls == [("DPS", [3 * i]) for i in range(3)]  # a restoration takes its own, and the two after it
    found = [pixels(tmp_path / f"sr8-dps/0-000{k}.png") for k in range(3)]
    assert np.array_equal(found[0], pixels(finished / "sr8-dps" / "0.png"))
    assert all(np.abs(a - b).max() > 3 for a, b in ((found[0], found[1]), (found[1], found[2]), (found[0], found[2])))
    assert [(r["picture"], r["seed"]) for r in untimed(tmp_path / "pictures.csv")] == [("0.png", str(3 * k)) for k in range(3)]


def test_one_that_diverges_does_not_end_the_others(table, tmp_path, monkeypatch, caplog):
    seen, restore = [], backend.restore

    def spy(*given, **more):
        seen.append(list(given[6]))
        if 3 in given[6]:  # the second picture
            raise Diverged("step 1 of 2: NaN; lower zeta")
        return restore(*given, **more)

    monkeypatch.setattr(backend, "restore", spy)
    config = table([DPS, DMAP], count=3, batch=3)
    make(config, tmp_path)
    assert seen == [[0, 3, 6], [0], [3], [6]] * 2
    assert json.loads((tmp_path / "sr8-dps" / "1.json").read_text())["diverged"] == "step 1 of 2: NaN; lower zeta"
    assert not (tmp_path / "sr8-dps" / "1.png").exists() and "DPS on 1.png: step 1 of 2: NaN" in caplog.text
    assert [(r["row"], r["n"], r["diverged"]) for r in untimed(tmp_path / "table.csv")] == [("DPS", "2", "1"), ("DMAP", "2", "1")]
    assert "| 2 (1 diverged) |" in (tmp_path / "table.md").read_text()
    assert [r["diverged"] for r in untimed(tmp_path / "pictures.csv")] == ["", "", *["step 1 of 2: NaN; lower zeta"] * 2, "", ""]
    seen.clear()
    make(config, tmp_path)
    assert seen == []


def test_a_row_that_always_diverges_stays_in_the_table(table, tmp_path):
    make(table([DPS, {**DPS, "name": "absurd", "settings": {"zeta": 1e38}}]), tmp_path)
    assert [(r["row"], r["n"], r["diverged"]) for r in untimed(tmp_path / "table.csv")] == [("DPS", "2", "0"), ("absurd", "0", "2")]
    assert "| absurd | 0 (2 diverged) |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("solver", NAMES)
def test_every_solver_runs(table, tmp_path, solver):
    """With the settings of its preset, scaled to three steps."""
    rows = [{"operator": "sr8", "solver": solver, "steps": 3, "settings": {"iterations": 2} if solver == "ReSample" else {}}]
    make(table(rows, count=1, settings_for=MODELS[1]), tmp_path)
    (line,) = untimed(tmp_path / "table.csv")
    assert (line["n"], line["diverged"]) in (("1", "0"), ("0", "1"))
    assert (line["n"], solver) != ("0", "DSG")


def test_rows_with_a_cse(given, table, tmp_path, calls):
    rows = [
        {"operator": "sr8", "solver": "CSE alone", "cse": str(given.cse), **STEPS},
        {**DPS, "name": "DPS + CSE", "cse": str(given.cse), "settings": {"zeta": 50}},
        {**DPS, "settings": {"zeta": 50}},
    ]
    make(table(rows, count=1), tmp_path)
    assert calls == [("Unguided", [0]), ("DPS", [0]), ("DPS", [0])]
    found = [pixels(tmp_path / f"sr8-{name}" / "0.png") for name in ("cse-alone", "dps-cse", "dps")]
    assert all(np.abs(a - b).max() > 3 for a, b in ((found[0], found[1]), (found[1], found[2]), (found[0], found[2])))
    assert "CSE cse.safetensors" in (tmp_path / "table.md").read_text()
    entry = json.loads((tmp_path / "sr8-cse-alone" / "0.json").read_text())
    assert entry["denoiser_calls"] == 2


def test_several_base_models(given, table, tmp_path, calls, monkeypatch):
    """One after the other, so that every one is opened once."""
    from dmap_core.backends import diffusers_files

    opened, open_base = [], diffusers_files.open_base
    monkeypatch.setattr(diffusers_files, "open_base", lambda path, *rest: opened.append(path.name) or open_base(path, *rest))
    other = tiny_checkpoint(tmp_path / "other.safetensors", seed=1)
    make(table([DPS, {**DPS, "name": "other", "checkpoint": str(other)}, DMAP]), tmp_path / "out")
    assert opened == ["base.safetensors", "other.safetensors"]
    assert np.abs(pixels(tmp_path / "out/sr8-dps/0.png") - pixels(tmp_path / "out/sr8-other/0.png")).max() > 3


MISSING = {
    "checkpoint": ({"checkpoint": "nowhere.safetensors"}, "checkpoint: there is no nowhere.safetensors"),
    "no checkpoint": ({"checkpoint": None}, r"checkpoint: no base model is given \(--checkpoint\)"),
    "a row's checkpoint": ({"rows": [{**DPS, "checkpoint": "nowhere.ckpt"}]}, "checkpoint: there is no nowhere.ckpt"),
    "cse": ({"rows": [DPS, {**DMAP, "cse": "nowhere.safetensors"}]}, r"cse: there is no nowhere.safetensors \(row DMAP\); train it"),
    "images": ({"images": "nowhere"}, "images: there is no folder nowhere. This table expects faces"),
    "no images": ({"images": None}, r"images: no folder of pictures is given \(--images\)"),
    "count": ({"count": 9}, "images: 9 pictures are wanted and .* holds 4"),
    "scale": ({"size": 36}, r"row 'as given' \(sr8\): .*36x36"),
    "setting of an operator": ({"operators": {"sr8": {"operator": "SuperResolution", "factor": 8}}}, r"row 'as given' \(sr8\): .*factor"),
    "operator": ({"operators": {"sr8": {"operator": "Rain"}}}, r"row 'as given' \(sr8\): unknown operator 'Rain'"),
    "linear": (
        {
            "operators": {"sr8": {"operator": "Jpeg", "quality": 10}},
            "rows": [{**DPS, "solver": "PSLD", "settings": {"zeta": 1, "gamma": 1}}],
        },
        r"row 'PSLD' \(sr8\): operator: .* is not linear, and PSLD needs its transpose",
    ),
    "miou": ({"metrics": ["miou"]}, "metrics: miou is of segmentations, and row 'as given' has Super-Resolution"),
    "weights of a metric": ({"metrics": ["lpips-vgg"], "weights": "nowhere"}, "the weights file vgg16-397923af.pth is missing"),
    "weights of a set's metric": ({"metrics": ["fid"], "weights": "nowhere"}, "weights file weights-inception.* is missing"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_before_anything_is_done(table, tmp_path, nothing_to_restore, monkeypatch, name):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    more, message = MISSING[name]
    count = {} if name in ("count", "images", "no images") else {"count": None}
    with pytest.raises(ValueError, match=message):
        run.evaluate(table(**count | {"expected": "faces"} | more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_as_given_needs_no_model(table, tmp_path, nothing_to_restore):
    make(table([GIVEN], checkpoint=None), tmp_path)
    (line,) = untimed(tmp_path / "table.csv")
    assert line["denoiser_calls"] == "0.0" and line["n"] == "2"


def test_pictures_that_come_back_unharmed(given, table, tmp_path):
    """Their PSNR is infinite, and so are their mean's and their differences' figures, where there are any."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.open(given.photos / "0.png").convert("L").convert("RGB").save(photos / "gray.png")
    rows = [{**GIVEN, "operator": "gray"}, {**DPS, "operator": "gray"}, {**DMAP, "operator": "gray"}]
    operators = {"gray": {"operator": "Inpainting", "size": [32, 32], "box": [8, 8]}}
    config = table(rows, images=photos, operators=operators, count=1)
    jobs = run.evaluate(config, tmp_path / "out")
    for job in jobs:
        file = job.file(tmp_path / "out")
        results.write_json(file, json.loads(file.read_text()) | {"metrics": {"psnr": float("inf")}})
    report.write_table(config, jobs, tmp_path / "out")
    assert {r["psnr"] for r in untimed(tmp_path / "out" / "table.csv")} == {"inf"}


def test_noise_is_the_pictures_own():
    x, f = torch.rand(2, 3, 32, 32) * 2 - 1, Noisy(SuperResolution(2), 0.1)
    y = run.measurement(f, x, [5, 6])
    noise = y - f.measure(x)
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.2, 0.2], rel=0.1)
    assert torch.equal(run.measurement(f, x[1:], [6]), y[1:])
    assert float(torch.corrcoef(noise.flatten(1))[0, 1]) == pytest.approx(0, abs=0.15)
    assert torch.equal(run.measurement(SuperResolution(2), x, [5, 6]), SuperResolution(2)(x))


def test_jobs_come_picture_by_picture(table):
    jobs = run.plan_jobs(table(count=3))
    assert [(job.picture.name, job.row.name) for job in jobs] == [(i, row) for i in "012" for row in ("as given", "DPS", "DMAP")]
    groups = run.batches(jobs, 2)
    assert [[job.picture.name for job in group] for group in groups] == [["0", "1"]] * 3 + [["2"]] * 3
    assert all(len({job.row.name for job in group}) == 1 for group in groups)
    assert run.batches(jobs, 1) == [[job] for job in jobs]


def test_a_full_disk(copy, table, monkeypatch):
    (copy / "sr8-dps" / "0.json").unlink()
    before, replace = files(copy), os.replace

    def full(part, path):
        if str(path).endswith("0.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        message = refused(table(), copy)
    assert "0.png could not be written (is the disk full?): [Errno 28] No space left" in message
    after = files(copy)
    assert after.keys() == before.keys() and not list(copy.rglob("*.part"))
    assert after["sr8-dps/0.png"] == before["sr8-dps/0.png"]
    make(table(), copy)
    assert {r["n"] for r in untimed(copy / "table.csv")} == {"2"}


def test_what_a_killed_process_left_half_written_is_no_result(copy, table, calls):
    (copy / "sr8-dps" / "0.json").rename(copy / "sr8-dps" / "0.json.77.part")
    (copy / "sr8-dps" / "0.png").rename(copy / "sr8-dps" / "0.png.77.part")
    make(table(), copy)
    assert calls == [("DPS", [0])]


def test_a_damaged_result_is_named(copy, table):
    (copy / "sr8-dps" / "0.json").write_text('{"metrics": ')
    message = refused(table(), copy)
    assert "sr8-dps/0.json cannot be read" in message and "remove it to compute it again" in message


def wait(process, log, condition=lambda: False):
    """Until the condition holds, or the process ends, whose exit status this is."""
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            if condition():
                return None
            if process.poll() is not None:
                return process.returncode
            time.sleep(0.005)
        raise AssertionError(f"no end after {SECONDS} seconds:\n{log.read_text()}")
    finally:
        if process.poll() is None and not condition():
            os.killpg(process.pid, signal.SIGKILL)


def config_file(given, folder, **more):
    """On the command line, and as `read_config` makes it."""
    text = {
        "operators": {"sr8": SR8},
        "images": str(given.photos),
        "checkpoint": str(given.base),
        "size": 32,
        "metrics": ["psnr"],
        "prediction": "v",
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(text | more))
    return folder / "table.yaml"


def test_killed_and_started_again(given, table, forks, tmp_path):
    rows = [GIVEN, {**DPS, "steps": 4}, DMAP]
    file, out, log = config_file(given, tmp_path, rows=rows), tmp_path / "out", tmp_path / "log"
    process = forks.start(["evaluate", "--config", file, "--out", out], log)
    assert wait(process, log, lambda: len(list(out.glob("*/[0-9].json"))) >= 4) is None, log.read_text()
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = files(out, "[0-9].json")
    assert 4 <= len(before) < 12 and not (out / "table.csv").exists()
    measured = {name: found for name, found in before.items() if b"psnr" in found[0]}  # the last one may be without its figures
    restored = {name: found for name, found in files(out, "[0-9].png").items() if name.replace("png", "json") in before}
    again, whole = table(rows, count=None), tmp_path / "whole"
    make(again, out)
    assert len(measured) >= 3 and measured.items() <= files(out, "[0-9].json").items() and len(files(out, "[0-9].json")) == 12
    assert restored.keys() == {name.replace("json", "png") for name in before} and restored.items() <= files(out, "[0-9].png").items()
    make(again, whole)
    assert same_tables(out, whole)
    assert {n: c for n, (c, _) in files(out, "[0-9].png").items()} == {n: c for n, (c, _) in files(whole, "[0-9].png").items()}


TWO = """
import os, sys, time
from dmap_core import cli
from dmap_core.evaluate import run

looked, end = run.unfinished, []
def late(job, out, measures):
    end.append(time.monotonic() + 6 * (os.environ["RANK"] == "1"))
    while time.monotonic() < end[0] and len(list(out.glob("*/[0-9].json"))) < 2:
        time.sleep(0.01)
    return looked(job, out, measures)
run.unfinished = late
cli.main(sys.argv[1:])
"""


def test_two_processes(given, table, forks, tmp_path):
    """Of which one looks late which jobs are left, when the other could have done two already."""
    rows = [GIVEN, DPS, DMAP]
    file, out = config_file(given, tmp_path, rows=rows), tmp_path / "out"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    argv = ["evaluate", "--config", file, "--out", out]
    both = [forks.start(argv, log, TWO, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank, log in enumerate(logs)]
    assert [wait(process, log) for process, log in zip(both, logs, strict=True)] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert "12 of 12 jobs are to be done, by 2 processes" in logs[0].read_text() and "jobs are to be done" not in logs[1].read_text()
    make(table(rows, count=None), tmp_path / "alone")
    assert same_tables(out, tmp_path / "alone")
    found, wanted = files(out, "[0-9].png"), files(tmp_path / "alone", "[0-9].png")
    assert len(found) == 12 and {n: c for n, (c, _) in found.items()} == {n: c for n, (c, _) in wanted.items()}
    assert not list(out.rglob("*.part"))


# ---- names


def test_nothing_is_written_outside_the_results_folder(table, given, tmp_path, nothing_to_restore):
    """Whatever rows, operators and pictures are called; and no name takes another's file, or that of the settings."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate(("run", "psnr")):
        shutil.copy(given.photos / f"{i}.png", photos / f"{name}.png")
    names = ["../../../../home/photos/cat", "\u8d85\u5206\u8fa8\u7387", "\u53bb\u6a21\u7cca", "...", "plots", "/etc/x", "a\0b"]
    operators = dict.fromkeys(names, SR8)
    rows = [{"operator": name, "solver": "as given", "name": "!"} for name in names]
    config = table(rows, operators=operators, images=photos)
    before = files(tmp_path)
    out = tmp_path / "deep" / "er" / "out"
    report.write_table(config, run.evaluate(config, out), out)
    written = files(tmp_path).keys() - before.keys()
    assert {name.split(os.sep)[:3] == ["deep", "er", "out"] for name in written} == {True}
    restored = [name for name in written if name.endswith(("/run.png", "/psnr.png")) and "/plots/" not in name]
    sheets = [name for name in written if "out/pictures-" in name]
    assert len(restored) == 2 * len(names) and len(sheets) == len(names)
    assert json.loads((out / "run.json").read_text())["size"] == 32
    run.evaluate(config, out)  # and it goes on


def test_a_run_leaves_out_what_cannot_be_read(table, given, tmp_path, nothing_to_restore, caplog):
    photos = shutil.copytree(given.photos, tmp_path / "photos")
    (photos / "0.png").write_bytes((photos / "0.png").read_bytes()[:300])
    message = refused(table([GIVEN], images=photos), tmp_path / "out")
    assert f"images: {photos / '0.png'} cannot be read" in message and not (tmp_path / "out").exists()
    jobs = make(table([GIVEN], images=photos, unreadable="skip"), tmp_path / "out")
    assert [job.picture.file.name for job in jobs] == ["1.png", "2.png"] and "are left out: 0.png" in caplog.text


def test_a_cse_of_another_operator(table, given, tmp_path, caplog):
    """As in the graph: it runs, with a warning. A damaged one is named before anything is restored."""
    cse = given.cse
    rows = [{**DPS, "cse": str(cse)}, {**DPS, "operator": "gray", "name": "other", "cse": str(cse)}]
    described = read_cse(cse)[1]
    write_cse(tmp_path / "cse.safetensors", read_cse(cse)[0], replace(described, operator=SR8))
    rows = [{**row, "cse": str(tmp_path / "cse.safetensors")} for row in rows]
    wanted = "the CSE cse.safetensors was trained for Super-Resolution (scale 8), and the operator here is Grayscale"
    assert run.cse_warnings(table(rows)) == [f"row 'other' (gray): {wanted}"]
    alone = [{**GIVEN, "operator": "gray", "cse": str(tmp_path / "cse.safetensors")}]
    make(table(alone, count=1), tmp_path / "out")
    assert wanted in caplog.text and f"**Warning:** row 'as given' (gray): {wanted}." in (tmp_path / "out" / "table.md").read_text()
    weights, _ = read_cse(cse)
    write_cse(tmp_path / "cse.safetensors", {n: t for n, t in weights.items() if not n.startswith("time_embed.")}, described)
    with pytest.raises(ValueError, match=r"cse\.safetensors: it lacks 4 tensors of a ControlNet: time_embed\.0\.weight"):
        run.evaluate(table(rows), tmp_path / "out")


def test_records_of_others(copy, table):
    """JSON that is not ours is named."""
    for name, text, words in (
        ("run.json", "[]", "run.json cannot be read .*no JSON object"),
        ("sr8-dps/0.json", "3", "0.json cannot be read"),
        ("sr8-dps/0.json", "[" * 100_000, "0.json cannot be read"),
    ):
        file = copy / name
        before = file.read_bytes()
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            run.evaluate(table(), copy)
        file.write_bytes(before)
    file = copy / "sr8-dps" / "0.json"
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({"original": entry["original"]}))
    with pytest.raises(ConfigError, match="0.json lacks figures; remove it"):
        run.evaluate(table(), copy)


def test_pictures_are_measured_once_more_when_matched(table, copy, calls):
    """Results of a run without `match` get the figures added, and nothing is restored again; noise on a JPEG has no match, and no such figure."""
    config = table(match=True)
    jobs = make(config, copy)
    assert calls == []
    (given, dps, _) = tables.read_lines(config, jobs, copy)
    for line in (given, dps):
        assert len(line.values["psnr matched"]) == 2
        assert all(b > a for a, b in zip(line.values["psnr"], line.values["psnr matched"], strict=True))
    text = (copy / "table.md").read_text()
    assert "PSNR (dB)" in text and "PSNR (dB) matched" in text and "mismatch (levels)" in text and "worst (levels)" in text
    (entry,) = [json.loads(p.read_text()) for p in (copy / config.rows[0].slug()).glob("*.json") if p.stem == jobs[0].picture.name]
    assert 0 < entry["mismatch"] < entry["mismatch_worst"] < 255
    assert config.measured(Noisy(Jpeg(20), 0.1)) == ["psnr"] and table().measured(SuperResolution(2)) == ["psnr"]


def test_a_warm_start(table, tmp_path):
    """Another picture, from the measurement's own; and another row than one from noise, whose results are not taken for it."""
    (job,) = make(table([DPS | {"start": 0.3}], count=1), tmp_path)
    row = json.loads((tmp_path / "sr8-dps" / "row.json").read_text())
    assert row["start"] == 0.3 and "start 0.3" in (tmp_path / "table.md").read_text()
    assert json.loads(job.file(tmp_path).read_text())["plan"]["start"] == 0.3
    with pytest.raises(ConfigError, match=r"start was 0\.3 and is 1\.0"):
        run.evaluate(table([DPS], count=1), tmp_path)


def test_measurements_of_eight_bits(table, copy):
    """With noise, and what a file cannot hold is cut off."""
    x = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
    y = run.measurement(Noisy(SuperResolution(2), 0.2), x, [0], rounded=True)
    levels = (y + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    exact = run.measurement(Noisy(SuperResolution(2), 0.2), x, [0])
    assert y.abs().max() <= 1 < exact.abs().max()
    torch.testing.assert_close(y, exact.clamp(-1, 1), rtol=0, atol=1.001 / 255)
    with pytest.raises(ConfigError, match="rounded was False and is True"):  # they are another table
        run.evaluate(table(rounded=True), copy)
    segmentation = {"operator": "Segmentation", "weights": "x.safetensors"}
    with pytest.raises(ConfigError, match="rounded is Yes; it must be true or false"):
        make_config({"operators": {"s": segmentation}, "rows": [{"operator": "s", "solver": "DMAP"}], "rounded": "Yes"})
