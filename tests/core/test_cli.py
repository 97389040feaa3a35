"""The command line: what its commands write, and how they end."""

import csv
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host import import_torchvision
from PIL import Image
from tiny_models import pictures, tiny_checkpoint, tiny_cse

from dmap_core import backends, cli
from dmap_core.cse.checkpoint import read_cse, write_cse

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
SR8 = json.dumps({"operator": "SuperResolution", "scale": 8})
COMMANDS = ("evaluate", "score-error", "score-mean", "diversity", "toy", "spread")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        import_torchvision()
        yield


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="module")
def given(on_the_cpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    base = tiny_checkpoint(folder / "base.safetensors")
    return SimpleNamespace(base=base, cse=tiny_cse(folder / "cse.safetensors", base), photos=pictures(folder / "photos", 2))


@pytest.fixture
def problem(given, tmp_path):
    """The options that the studies of scores share."""
    where = ["--checkpoint", given.base, "--picture", given.photos / "0.png", "--operator", SR8, "--size", 32]
    return [*where, "--spacing", "exponential", "--out", tmp_path / "out"]


@pytest.fixture
def table(given, tmp_path):
    """The options that the tables share."""
    row = ["--operator", SR8, "--solver", "DPS", "--settings", '{"zeta": 5.0}', "--steps", 2, "--spacing", "exponential"]
    return [*row, "--images", given.photos, "--checkpoint", given.base, "--size", 32, "--metrics", "psnr", "--out", tmp_path / "out"]


def main(*argv):
    cli.main([str(part) for part in argv])


def refusal(capsys, *argv):
    """What a command that fails says: one line."""
    with pytest.raises(SystemExit) as caught:
        main(*argv)
    assert caught.value.code not in (0, None)
    message = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert "error: " in message and "\n" not in message and "Traceback" not in message
    return message


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_help_and_errors_of_a_process(forks, tmp_path):
    """Without diffusers, accelerate and matplotlib: only what a command needs is imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dmap_core.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"diffusers", "accelerate", "transformers", "matplotlib", "torchvision", "yaml"}
    assert all(command in done.stdout for command in COMMANDS)

    argv = ["evaluate", "--config", tmp_path / "nowhere.yaml", "--out", tmp_path / "out"]
    process = forks.start(argv, tmp_path / "log", errors=tmp_path / "errors")
    assert process.wait() == 1 and (tmp_path / "log").read_text() == ""
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("error: config: ") and "nowhere.yaml cannot be read" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command, "--help")
    assert caught.value.code == 0 and "--out" in capsys.readouterr().out


def test_no_command_and_an_unknown_one(capsys):
    assert "the following arguments are required: COMMAND" in refusal(capsys)
    assert "invalid choice: 'evaluat'" in refusal(capsys, "evaluat")
    assert "--out" in refusal(capsys, "evaluate")
    assert "invalid choice: 'fp8'" in refusal(capsys, "evaluate", "--out", "x", "--precision", "fp8")


def test_evaluate(table, tmp_path):
    main("evaluate", *table)
    (line,) = read(tmp_path / "out" / "table.csv")
    assert (line["operator"], line["row"], line["n"], line["diverged"]) == ("operator", "DPS", "2", "0")
    assert 0 < float(line["psnr"]) < 60 and float(line["denoiser_calls"]) == 2
    assert {"table.md", "pictures.csv", "pictures-operator.png", "run.json", "versions.json"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    assert json.loads((tmp_path / "out" / "versions.json").read_text())["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "nowhere"], "error: images: there is no folder nowhere."),
        (["--checkpoint", "nowhere.ckpt"], "error: checkpoint: there is no nowhere.ckpt"),
        (["--cse", "nowhere.safetensors"], "error: cse: there is no nowhere.safetensors"),
        (["--solver", "DDRM"], "error: options: row 1: solver is 'DDRM'; it must be one of as given, DPS"),
        (["--settings", '{"K": 2}'], "error: options: row 1: DPS has no setting K; it has zeta"),
        (["--settings", '{"zeta": -1}'], "error: row 'DPS' (operator): zeta is -1"),
        (["--settings", '{"zeta": "much"}'], "error: options: row 1: the setting zeta is 'much'; it must be a number"),
        (["--metrics", "psnr,beauty"], "unknown metric 'beauty'"),
        (["--count", "0"], "count is 0"),
        (["--count", "3"], "error: images: 3 pictures are wanted"),
    ],
)
def test_evaluate_with_mistakes(table, capsys, more, message):
    assert message in refusal(capsys, "evaluate", *table, *more)


def test_a_file_in_place_of_the_results(table, tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    assert "could not be written" in refusal(capsys, "evaluate", *table)
    assert (tmp_path / "out").read_text() == "precious"


def test_a_checkpoint_that_is_none(table, tmp_path, capsys):
    (tmp_path / "odd.safetensors").write_text("<!DOCTYPE html>")
    assert "odd.safetensors" in refusal(capsys, "evaluate", *table, "--checkpoint", tmp_path / "odd.safetensors")


def test_a_config_that_is_no_yaml_in_one_line(tmp_path, capsys):
    (tmp_path / "table.yaml").write_text("rows:\n  - {a: 1\n  b: [")
    assert "table.yaml cannot be read" in refusal(capsys, "evaluate", "--config", tmp_path / "table.yaml", "--out", tmp_path / "out")


@pytest.mark.parametrize("package", ["accelerate", "tqdm.auto", "diffusers"])
def test_a_missing_package_is_named(table, capsys, monkeypatch, package):
    if package == "diffusers":
        monkeypatch.delitem(sys.modules, "dmap_core.backends.diffusers_files", raising=False)
        monkeypatch.delattr(backends, "diffusers_files", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(capsys, "evaluate", *table)
    assert f"this needs {package}, which is not installed: pip install accelerate diffusers" in message


def test_no_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    message = refusal(capsys, "evaluate", "--config", tmp_path / "table.yaml", "--out", tmp_path / "out")
    assert "this needs yaml, which is not installed: pip install" in message and "pyyaml" in message


def test_ctrl_c(table, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dmap_core.evaluate.backend.restore", interrupt)
    with pytest.raises(SystemExit) as caught:
        main("evaluate", *table)
    assert caught.value.code == 130


def test_diversity(table, given, tmp_path):
    main("diversity", *table, "--count", 1, "--repeats", 3)
    out = tmp_path / "out"
    (line,) = read(out / "diversity.csv")
    assert (line["picture"], line["operator"], line["row"], line["k"]) == ("0.png", "operator", "DPS", "3")
    found = [torch.tensor(list(Image.open(out / f"operator-dps/0-000{k}.png").tobytes())).double() / 255 for k in range(3)]
    assert float(line["mean standard deviation"]) == pytest.approx(float(torch.stack(found).std(0).mean()), rel=1e-5)
    assert float(line["standard error"]) > 0 and min(Image.open(out / "diversity-0.png").size) > 50
    assert (out / "table.csv").exists()


def test_diversity_needs_repeats(table, capsys, tmp_path):
    for more in ([], ["--repeats", 1]):
        assert "--repeats: a spread needs at least 2" in refusal(capsys, "diversity", *table, *more)
    assert "repeats is -2" in refusal(capsys, "diversity", *table, "--repeats", -2)
    assert not (tmp_path / "out").exists()


def test_score_error(problem, given, tmp_path):
    main("score-error", *problem, "--cse", given.cse, "--steps", 3, "--repeats", 2, "--zeta", "0.5,4")
    lines = read(tmp_path / "out" / "score-error.csv")
    assert list(lines[0]) == ["sigma", "t", "method", "zeta", "mean", "standard_error", "n", "conditional_norm"]
    assert [(line["method"], line["zeta"]) for line in lines] == [
        (method, zeta) for method, zeta in (("unconditional", ""), ("DPS", "0.5"), ("DPS", "4.0")) for _ in range(3)
    ]
    assert [float(line["t"]) for line in lines[:3]] == pytest.approx([999, lines and float(lines[1]["t"]), 0], abs=0.01)
    assert all(line["n"] == "2" and float(line["mean"]) > 0 and float(line["standard_error"]) >= 0 for line in lines)
    assert min(Image.open(tmp_path / "out" / "score-error.png").size) > 100
    settings = json.loads((tmp_path / "out" / "score-error.json").read_text())
    assert settings["settings"]["zeta"] == "0.5,4" and settings["settings"]["seed"] == 0 and "torch" in settings["versions"]


@pytest.mark.parametrize("with_cse", [True, False])
def test_score_mean(problem, given, tmp_path, with_cse):
    main("score-mean", *problem, *(["--cse", given.cse] if with_cse else []), "--samples", 4, "--batch", 3, "--steps", 3, "--zeta", "4.8")
    lines = read(tmp_path / "out" / "score-mean.csv")
    assert [line["score"] for line in lines] == ["unconditional", "DPS, zeta 4.8", *(["CSE"] if with_cse else [])]
    assert list(lines[0])[:2] == ["score", "samples"] and len(lines[0]) == 6
    assert all(line["samples"] == "4" and all(float(v) > 0 for name, v in line.items() if name != "score") for line in lines)
    assert len({line["norm of the mean over samples"] for line in lines}) == len(lines)
    assert min(Image.open(tmp_path / "out" / "score-mean.png").size) > 100
    assert json.loads((tmp_path / "out" / "score-mean.json").read_text())["settings"]["samples"] == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--zeta", "0.3,much"], "--zeta is '0.3,much'; it must be numbers with commas between them"),
        (["--zeta", ""], "--zeta is ''; it must be numbers"),
        (["--zeta", "0.3,-1"], "--zeta is '0.3,-1'; step sizes must be above 0"),
        (["--zeta", "nan"], "--zeta is 'nan'; step sizes must be above 0"),
        (["--spacing", "cosine"], "--spacing is 'cosine'; it must be one of paper, exponential, karras"),
        (["--picture", "nowhere.png"], "--picture: there is no nowhere.png"),
        (["--checkpoint", "nowhere.ckpt"], "--checkpoint: there is no nowhere.ckpt"),
        (["--cse", "nowhere.safetensors"], "--cse: there is no nowhere.safetensors"),
        (["--operator", "{operator: Grayscale}"], "is not JSON"),
        (["--size", 36], "36x36"),
        (["--samples", 0], "k is 0; it must be a whole number of at least 1"),
        (["--batch", 0], "batch is 0; it must be a whole number of at least 1"),
    ],
)
def test_studies_with_mistakes(problem, tmp_path, capsys, more, message):
    assert message in refusal(capsys, "score-mean", *problem, "--samples", 2, *more)
    assert not (tmp_path / "out").exists()


def test_score_error_needs_a_cse(problem, capsys):
    assert "the following arguments are required: --cse" in refusal(capsys, "score-error", *problem)


def test_toy(tmp_path, capsys):
    main("toy", "--samples", 50, "--out", tmp_path / "out")
    lines = {line["method"]: line for line in read(tmp_path / "out" / "toy.csv")}
    assert {"true posterior, closed form", "true posterior", "DPS", "DSG", "DMAP"} == set(lines)
    assert all(0 <= float(line["upper"]) <= 1 and float(line["residual"]) >= 0 for line in lines.values()) and lines["DPS"]["n"] == "50"
    assert min(Image.open(tmp_path / "out" / "toy.png").size) > 100
    assert json.loads((tmp_path / "out" / "toy.json").read_text())["settings"]["zeta"] == 0.05
    assert "samples is 1" in refusal(capsys, "toy", "--samples", 1, "--out", tmp_path / "one")
    assert "zeta is 0" in refusal(capsys, "toy", "--samples", 9, "--zeta", 0, "--out", tmp_path / "none")


INTERRUPTED = """
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {during!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from {module} import main
main({argv!r})
"""


@pytest.mark.parametrize(
    ("during", "argv"),
    [
        ("torch", ["toy", "--out", "x"]),
        pytest.param("dmap_core.metrics", ["toy", "--out", "x"], marks=pytest.mark.thorough),
        (
            "accelerate",
            ["train-cse", "--checkpoint", "x", "--pictures", "x", "--operator", '{"operator": "Grayscale"}', "--out", "x.safetensors"],
        ),
    ],
)
def test_ctrl_c_while_packages_are_imported(tmp_path, during, argv):
    code = INTERRUPTED.format(module="dmap_core.cli", during=during, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("command", "more"),
    [("score-error", ["--steps", 10**12]), ("score-mean", ["--samples", 10**12]), ("toy", ["--samples", 10**12])],
)
def test_numbers_that_no_machine_could_do(problem, given, tmp_path, capsys, command, more):
    base = ["--out", tmp_path / "out"] if command == "toy" else [*problem, *(["--cse", given.cse] if command == "score-error" else [])]
    assert f"{more[0]} is too large; it must be at most" in refusal(capsys, command, *base, *more)


def test_a_cse_of_another_operator(problem, given, caplog, tmp_path):
    """Said by the studies as by the node and by `evaluate`."""
    weights, described = read_cse(given.cse)
    write_cse(tmp_path / "gray.safetensors", weights, replace(described, operator={"operator": "Grayscale"}))
    argv = [*problem, "--samples", 2, "--steps", 3, "--zeta", "4.8", "--cse"]
    main("score-mean", *argv, tmp_path / "gray.safetensors")
    assert "the CSE gray.safetensors was trained for Grayscale, and the operator here is Super-Resolution (scale 8)" in caplog.text
