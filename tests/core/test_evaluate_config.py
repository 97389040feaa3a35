"""Configs of table runs: what is refused, by which name, and what a row comes to."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml

from dmap_core.evaluate import command
from dmap_core.evaluate.config import ALONE, AS_GIVEN, NAMES, ConfigError, make_config, read_config, solver_class
from dmap_core.evaluate.tables import COSTS
from dmap_core.metrics import SET_METRICS
from dmap_core.presets import MODELS, preset
from dmap_core.presets import NAMES as PRESETS
from dmap_core.schedule import SPACINGS
from dmap_core.solvers import DMAP, SOLVERS, Unguided

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "studies" / "configs").rglob("*.yaml"))
DEMO = [file for file in SHIPPED if file.parent.name == "demo"]
SR8 = {"operator": "SuperResolution", "scale": 8}
FULL = {"zeta": 2.0}


def given(row=None, **more):
    """Plain values of a config with one row."""
    return {"operators": {"sr8": SR8, "blur": {"operator": "GaussianBlur", "kernel_size": 61, "sigma": 3.0}}} | {
        "rows": [{"operator": "sr8", "solver": "DPS"} | (row or {})],
        **more,
    }


def only(row=None, **more):
    """(config, its only row, its plan)."""
    config = make_config(given(row, **more))
    return config, config.rows[0], config.plan(config.rows[0])


def refused(**more):
    with pytest.raises(ConfigError) as caught:
        make_config(given(**more), "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    return message


def written(folder, text):
    file = folder / "table.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return file


def test_unknown_names_are_listed_with_the_known_ones():
    assert refused(titel="x", zeta=3).startswith("here: unknown titel, zeta; known are operators, rows, images")
    assert refused(row={"seed": 3}).startswith("here: row 1: unknown seed; known are name, operator, solver")
    assert all(name in refused(row={"solver": "dps"}) for name in (*NAMES, "'dps'"))
    assert "operator is 'sr4'; it must be one of sr8, blur" in refused(row={"operator": "sr4"})
    assert "spacing is 'cosine'; it must be one of paper, exponential, karras" in refused(row={"spacing": "cosine"})
    assert "unknown metric 'pnsr'; the metrics are psnr, ssim" in refused(metrics=["pnsr"])
    assert "precision is 'fp8'; it must be one of fp32; bf16; fp16" in refused(precision="fp8")
    assert f"must be one of {MODELS[0]}; {MODELS[1]}" in refused(settings_for="SDXL")
    assert "prediction is 'x0'; it must be one of auto; eps; v" in refused(prediction="x0")
    assert "prediction is 'x0'; it must be one of auto, eps, v" in refused(row={"prediction": "x0"})
    assert "memory is 'little'; it must be one of auto" in refused(memory="little")


@pytest.mark.parametrize("solver", PRESETS)
def test_unknown_settings_are_listed_with_the_solvers_own(solver):
    message = refused(row={"solver": solver, "settings": {"zetta": 1, "generator": 2}})
    known = list(solver_class(solver).described())
    assert f"{solver} has no setting generator, zetta; it has {', '.join(known)}" in message


def test_settings_of_rows_that_take_few():
    assert "as given has no setting zeta; it has none" in refused(row={"solver": AS_GIVEN, "settings": FULL})
    assert "CSE alone has no setting zeta; it has eta" in refused(row={"solver": ALONE, "settings": FULL, "cse": "a.safetensors"})
    assert "settings is [1]; it must map names to values" in refused(row={"settings": [1]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zeta": "5e-3"}, "the setting zeta is '5e-3'; it must be a number"),  # YAML wants 5.0e-3
        ({"zeta": None}, "the setting zeta is None; it must be a number"),
        ({"zeta": True}, "the setting zeta is True; it must be a number"),
        ({"zeta": 1, "eta": [0, 1]}, r"the setting eta is [0, 1]; it must be a number"),
        ({"zeta": 1, "optimizer": 1}, "the setting optimizer is 1; it must be text"),
    ],
)
def test_settings_of_another_kind(settings, message):
    assert message in refused(row={"settings": settings})
    assert only({"settings": {"zeta": 3, "optimizer": "adam"}})[2].solver.optimizer == "adam"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"operators": {}}, "operators must map names to operators"),
        ({"operators": [SR8]}, "operators must map names to operators"),
        ({"operators": {"sr8": "SuperResolution"}}, "operators must map names to operators"),
        ({"rows": []}, "rows must be a list of rows"),
        ({"rows": {"a": 1}}, "rows must be a list of rows"),
        ({"rows": ["DPS"]}, "row 1: it is 'DPS'; it must be a mapping"),
        ({"rows": [{"solver": "DPS"}]}, "row 1: operator is None; it must be one of sr8"),
        ({"row": {"operator": ["sr8"]}}, "row 1: operator is ['sr8']; it must be one of sr8"),
        ({"row": {"solver": ["DPS"]}}, "row 1: solver is ['DPS']; it must be one of as given"),
        ({"row": {"spacing": ["paper"]}}, "row 1: spacing is ['paper']; it must be one of paper"),
        ({"row": {"steps": 1}}, "row 1: steps is 1; it must be a whole number of at least 2"),
        ({"row": {"start": 0}}, "row 1: start is 0; it must be a number above 0 and at most 1"),
        ({"row": {"start": 1.5}}, "row 1: start is 1.5; it must be a number"),
        ({"row": {"start": "0.5"}}, "row 1: start is '0.5'; it must be a number"),
        ({"row": {"start": 0.5, "solver": "as given"}}, "row 1: start is 0.5, and 'as given' does not begin with the measurement"),
        ({"row": {"steps": 2.5}}, "row 1: steps is 2.5; it must be a whole number"),
        ({"row": {"steps": "20"}}, "row 1: steps is '20'; it must be a whole number"),
        ({"row": {"published": [3]}}, "row 1: published must map metrics to numbers"),
        ({"row": {"published": {"psnr": "24.5"}}}, "row 1: published must map metrics to numbers"),
        ({"row": {"published": {"psnr": None}}}, "row 1: published must map metrics to numbers"),
        ({"row": {"published": {"psnr": True}}}, "row 1: published must map metrics to numbers"),
        ({"row": {"solver": ALONE}}, "row 1: 'CSE alone' needs a cse"),
        ({"row": {"solver": AS_GIVEN, "guidance": "taesd.safetensors"}}, "row 1: guidance is given, and 'as given' has none; leave it out"),
        ({"count": 0}, "count is 0; it must be a whole number of at least 1"),
        ({"size": 4}, "size is 4; it must be a whole number of at least 8"),
        ({"published_n": 0}, "published_n is 0"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"batch": 0}, "batch is 0; it must be a whole number of at least 1"),
        ({"repeats": 0.5}, "repeats is 0.5; it must be a whole number of at least 1"),
        ({"metrics": 5}, "metrics is 5; it must be a list of names"),
        ({"metrics": [5]}, "unknown metric 5"),
        ({"metrics": {"psnr": 1}}, "metrics is {'psnr': 1}; it must be a list of names"),
        ({"note": 5}, "note is 5; it must be text"),
        ({"prompt": ["a"]}, "prompt is ['a']; it must be text"),
        ({"title": {"a": 1}}, "title is {'a': 1}; it must be text"),
        ({"expected": 3}, "expected is 3; it must be text"),
        ({"title": "\ud800"}, "title is '\\ud800', which is no valid text"),
        ({"row": {"name": ["a"]}}, "row 1: name is ['a']; it must be text"),
        ({"row": {"name": True}}, "row 1: name is True; it must be text"),
        ({"row": {"name": "\ud800"}}, "row 1: name is '\\ud800', which is no valid text"),
        ({"operators": {3: SR8}}, "operators: the name 3 is no text; write it in quotes"),
        ({"operators": {"": SR8}}, "operators: the name '' is no text"),
        ({"operators": {"a": {"operator": ["x"]}}}, "operators: a is {'operator': ['x']}; it must map names of settings to values"),
        ({"operators": {"a": {"operator": "Jpeg", 3: 1, "quality": 9}}}, "operators: a is {'operator': 'Jpeg', 3: 1"),
        ({"row": {"steps": 10**12}}, "row 1: steps is too large; it must be at most 1000000"),
        ({"row": {"steps": 10**400}}, "row 1: steps is too large"),
        ({"size": 10**12}, "size is too large; it must be at most 16384"),
        ({"batch": 10**12}, "batch is too large"),
        ({"repeats": 10**12}, "repeats is too large"),
        ({"count": float("inf")}, "count is inf; it must be a whole number"),
        ({"unreadable": "ignore"}, "unreadable is 'ignore'; it must be one of refuse; skip"),
    ],
)
def test_values_of_another_kind(more, message):
    assert message in refused(**more)


def test_rows_of_one_name():
    rows = [{"operator": "sr8", "solver": "DPS"}, {"operator": "sr8", "solver": "DPS", "settings": FULL}]
    with pytest.raises(ConfigError, match=r"several rows are called sr8-dps; give each a name of its own \(name: ...\)"):
        make_config(given(rows=rows))
    with pytest.raises(ConfigError, match="several rows are called sr8-dps-1"):  # their folders would be one
        make_config(given(rows=[{**rows[0], "name": "DPS 1"}, {**rows[0], "name": "dps (1)"}]))
    named = make_config(given(rows=[rows[0], {**rows[1], "name": "zeta 2"}, {**rows[0], "operator": "blur"}]))
    assert [row.slug() for row in named.rows] == ["sr8-dps", "sr8-zeta-2", "blur-dps"]


def test_folders_of_rows_in_any_language():
    """Slugs of plain names are those of earlier results; others have their letters and a hash."""
    names = ("\u8d85\u5206\u8fa8\u7387", "\u53bb\u6a21\u7cca", "../../../../home/photos/cat", "...", "plots")
    config = make_config(
        given(operators=dict.fromkeys(names, SR8), rows=[{"operator": name, "solver": "DPS", "name": "!"} for name in names])
    )
    slugs = [row.slug() for row in config.rows]
    assert len(set(slugs)) == len(names) and all(slug and "/" not in slug and "." not in slug for slug in slugs)
    assert slugs[0].startswith(names[0]) and slugs[2] == "home-photos-cat" and slugs[4] != "plots"
    assert only({"name": 4.8})[1].slug() == "sr8-4-8" and only({"name": 3})[1].name == "3"


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/nobody")
    text = given(
        {"cse": "../a.safetensors", "guidance": "t.safetensors", "checkpoint": "~/b.ckpt"},
        images="photos",
        checkpoint="/abs/c.ckpt",
        weights="./w",
    )
    (tmp_path / "sub").mkdir()
    config = read_config(written(tmp_path / "sub", text))
    here = tmp_path.resolve()
    assert (config.images, config.checkpoint, config.weights) == (here / "sub/photos", Path("/abs/c.ckpt"), here / "sub/w")
    assert config.rows[0].guidance == here / "sub" / "t.safetensors"
    assert (config.rows[0].cse, config.rows[0].checkpoint) == (here / "a.safetensors", Path("/home/nobody/b.ckpt"))
    assert config.checkpoint_of(config.rows[0]) == config.rows[0].checkpoint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [", "cannot be read"),
        ("- a", "must map names to values"),
        ("", "must map names to values"),
        (given(images=5), "images is 5; it must be a path"),
        (given({"cse": ["a"]}), r"cse is \['a'\]; it must be a path"),
        (given(rows=3), "rows must be a list of rows"),
        ({1: 2, "rows": [], "a": 3}, "unknown 1, a"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
        ("a: " + "[" * 3000 + "]" * 3000, "cannot be read"),
        ("seed: " + "1" * 5000, "cannot be read"),
        (given(images="a\0b"), "images is .* no path"),
        (given(images="~nobody-of-this-name/a"), "images is .* no path"),
    ],
)
def test_files_with_mistakes(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(written(tmp_path, text))
    assert "table.yaml" in str(caught.value)


def test_a_file_that_is_absent_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match="config: .*nowhere.yaml cannot be read"):
        read_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="config: .*binary.yaml cannot be read"):
        read_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("solver", PRESETS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("operator", ["sr8", "blur"])
def test_without_settings_a_row_is_its_preset(solver, model, operator):
    config, row, plan = only({"solver": solver, "operator": operator}, settings_for=model)
    assert plan == preset(config.operator(operator), solver, model)
    assert type(plan.solver) is solver_class(solver) is SOLVERS[solver.removesuffix(" full")]


def test_plans_of_the_paper():
    """Table 8 and B.3: super-resolution x8 on Stable Diffusion."""
    plans = {name: only({"solver": name})[2] for name in ("DPS", "DMAP", "DMAP full")}
    assert [(p.solver.zeta, p.steps, p.solver.settings().get("K")) for p in plans.values()] == [
        (4.8, 500, None),
        (9.6, 250, 2),
        (4.8, 500, 3),
    ]
    assert {p.spacing for p in plans.values()} == {"paper"}


def test_a_row_comes_before_its_preset():
    plan = only({"solver": "DMAP", "settings": {"K": 3, "eta": 0.5}})[2]
    assert plan.solver == DMAP(zeta=9.6, K=3, eta=0.5) and plan.steps == 250
    assert only({"spacing": "karras"})[2].spacing == "karras"


def test_a_start_below_one():
    plan = only({"start": 0.4, "steps": 20})[2]
    levels = torch.linspace(0.03, 14.6, 1000)
    assert plan.start == 0.4 and "start 0.4" in plan.text() and plan.solver == only({"steps": 20})[2].solver
    assert torch.equal(plan.sigmas(levels), SPACINGS[plan.spacing](levels, 20, 0.4))
    assert only({"steps": 20})[2].start == 1 and "start" not in only({"steps": 20})[2].text()
    whole = {"steps": 20, "spacing": "karras", "settings": {"zeta": 1.0}, "start": 0.4}
    assert only(whole)[2].start == 0.4


def test_steps_scale_the_preset():
    plan = only({"steps": 250})[2]
    assert plan.steps == 250 and plan.solver.zeta == pytest.approx(2 * 4.8) and "scaled from 500 to 250" in plan.source
    kept = only({"steps": 250, "settings": {"zeta": 4.8}})[2]
    assert kept.solver.zeta == 4.8
    window = only({"solver": "FreeDoM", "steps": 100})[2].solver.settings()
    assert (window["first"], window["last"]) == (5, 10)


def test_what_says_all_needs_no_preset(monkeypatch):
    def fails(*_):
        raise AssertionError("a preset was asked for")

    monkeypatch.setattr("dmap_core.evaluate.config.preset", fails)
    plan = only({"solver": "DMAP", "steps": 7, "spacing": "karras", "settings": {"zeta": 3.5}})[2]
    assert (plan.solver, plan.steps, plan.spacing) == (DMAP(zeta=3.5), 7, "karras")
    with pytest.raises(AssertionError, match="a preset was asked for"):
        only({"solver": "DMAP", "steps": 7, "settings": {"zeta": 3.5}})


def test_what_says_nearly_all_is_filled_in():
    """A preset has what the solver cannot do without, and what makes `DMAP full` another than DMAP."""
    common = {"steps": 10, "spacing": "exponential", "settings": {"zeta": 3.5}}
    assert only({"solver": "PSLD", **common})[2].solver.gamma > 0
    assert only({"solver": "DMAP full", **common})[2].solver == DMAP(zeta=3.5, K=3)
    assert only({"solver": "FreeDoM", **common})[2].solver.last < 10


@pytest.mark.parametrize("model", [*MODELS])
def test_the_cse_alone(model):
    config, row, plan = only({"solver": ALONE, "cse": "a.safetensors"}, settings_for=model)
    assert plan.solver == Unguided(eta=1.0)
    assert plan.steps == only({}, settings_for=model)[2].steps  # those of DPS
    assert only({"solver": ALONE, "cse": "a.safetensors", "steps": 7, "settings": {"eta": 0.0}})[2].solver == Unguided(eta=0.0)
    assert row.cse == Path("a.safetensors")


def test_as_given_has_no_plan():
    assert only({"solver": AS_GIVEN})[2] is None


def test_operators_without_their_weights(tmp_path):
    spec = {"operator": "NonlinearBlur", "weights": "w.pth", "sha256": "", "seed": 0}
    for weights, says in ((None, "now not given"), (tmp_path, f"now {tmp_path}")):
        config = make_config({"operators": {"b": spec}, "rows": [{"operator": "b", "solver": "DPS"}], "weights": weights})
        with pytest.raises(ConfigError, match="w.pth is needed; name its folder with --weights") as caught:
            config.operator("b")
        assert says in str(caught.value)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT / "studies" / "configs")))
def test_shipped_configs_are_read(file):
    config = read_config(file)
    assert config.title and config.settings_for in MODELS
    published = {name for row in config.rows for name in row.published}
    assert published <= {*config.metrics, *COSTS}, "figures that no column stands beside"
    assert config.published_n or not published & SET_METRICS.keys()


@pytest.mark.parametrize("file", DEMO, ids=lambda file: file.stem)
def test_shipped_demo_configs_are_ready_to_run(file):
    """Their files are there, and every row has its plan and an operator that takes the pictures."""
    from dmap_core.evaluate.run import check_files, plan_jobs

    config = read_config(file)
    check_files(config)
    jobs = plan_jobs(config)
    assert len(jobs) == len(config.rows) * config.count * config.repeats
    assert all((job.plan is None) == (job.row.solver == AS_GIVEN) for job in jobs)
    assert {job.plan.spacing for job in jobs if job.plan} == {"exponential"}


def test_there_are_shipped_configs():
    assert {"table1", "table4", "table5", "table9", "table10", "diversity"} <= {file.stem for file in DEMO}


def options(*argv):
    p = argparse.ArgumentParser()
    command.add_arguments(p)
    given = vars(p.parse_args([*argv, "--out", "results"]))
    assert given.pop("out") == Path("results")
    return given


def test_the_command_line_comes_first(tmp_path):
    file = written(tmp_path, given(images="photos", count=9, seed=5, metrics=["psnr"], prompt="a", size=64))
    more = "--images other --checkpoint c.ckpt --count 2 --size 32 --seed 0 --precision bf16 --metrics ssim,psnr --weights w --batch 4"
    config = command.config_of(**options("--config", str(file), *more.split(), "--prompt", "", "--settings-for", MODELS[1]))
    assert (config.images, config.checkpoint, config.weights) == (Path("other"), Path("c.ckpt"), Path("w"))
    assert (config.count, config.size, config.seed, config.precision, config.batch) == (2, 32, 0, "bf16", 4)
    assert (config.metrics, config.prompt, config.settings_for) == (("ssim", "psnr"), "", MODELS[1])
    untouched = command.config_of(**options("--config", str(file)))
    assert (untouched.count, untouched.seed, untouched.metrics, untouched.prompt) == (9, 5, ("psnr",), "a")


def test_a_config_of_options_alone(tmp_path):
    row = ["--steps", "7", "--spacing", "karras", "--settings", '{"zeta": 3}', "--cse", "a.safetensors"]
    config = command.config_of(**options("--operator", json.dumps(SR8), "--solver", "DPS, DMAP", *row, "--images", "p"))
    assert [r.solver for r in config.rows] == ["DPS", "DMAP"] and config.operator("operator").scale == 8
    assert all((r.steps, r.spacing, r.settings, r.cse) == (7, "karras", {"zeta": 3}, Path("a.safetensors")) for r in config.rows)
    (tmp_path / "op.json").write_text(json.dumps({"operator": "Grayscale"}))
    config = command.config_of(**options("--operator", str(tmp_path / "op.json"), "--solver", "DPS"))
    assert config.operator("operator").name == "Grayscale" and config.metrics == ("psnr", "ssim")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a --config, or an --operator and a --solver"),
        (["--solver", "DPS"], "give a --config, or an --operator and a --solver"),
        (["--operator", "{operator: Grayscale}", "--solver", "DPS"], "--operator: '{operator: Grayscale}' is not JSON"),
        (["--operator", "nowhere.json", "--solver", "DPS"], "--operator: nowhere.json cannot be read"),
        (["--operator", "[8]", "--solver", "DPS"], "operators must map names to operators"),
        (["--operator", "{}", "--solver", "DPS", "--settings", "zeta"], "--settings: 'zeta' is not JSON"),
        (["--operator", "[" * 100_000, "--solver", "DPS"], "--operator: '[[[["),
        (["--operator", "{}", "--solver", "DPS,DPS"], "several rows are called operator-dps"),
        (["--operator", "{}", "--solver", "DPS,"], "solver is ''; it must be one of"),
        (["--config", "table.yaml", "--solver", "DPS", "--steps", "3"], "--solver, --steps: the rows of table.yaml say this"),
    ],
)
def test_options_with_mistakes(argv, message):
    with pytest.raises(ConfigError) as caught:
        command.config_of(**options(*argv))
    assert message in str(caught.value)
