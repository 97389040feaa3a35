"""Training from the command line and as a host does it, on a base model as small as diffusers' blocks allow, with random weights.

One training is killed in a process of its own, and one is shared by two processes; all others run in this one.
"""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host import import_torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import pictures, tiny_checkpoint
from variants import some_at_once

from dmap_core import backends, cli
from dmap_core.cse import options, trainer, validation
from dmap_core.cse.checkpoint import FORMAT, read_cse, read_state, training_files
from dmap_core.operators import Inpainting, from_spec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

ROOT = Path(cli.__file__).resolve().parents[1]
OPERATOR = {"operator": "SuperResolution", "scale": 8}
STEPS, HALF, SAVED = 12, 6, 3
# Pictures for people are made with two steps instead of twenty, here and in the processes.
TRAIN = """
import sys
from dmap_core import cli
from dmap_core.cse import validation
validation.restore.__wrapped__.__defaults__ = (2,)
cli.main(["train-cse", *sys.argv[1:]])
"""
SECONDS = 300  # until a process is taken for hung
ROUNDING = 0.002  # of the way that the weights went; it was 0.00006 with two processes


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(validation.restore.__wrapped__, "__defaults__", (2,))  # behind torch.no_grad
        import_torchvision()
        yield


@pytest.fixture(scope="module")
def given(on_the_cpu, tmp_path_factory):
    """Inputs, and `options(out, ...)`, a whole command line."""
    folder = tmp_path_factory.mktemp("given")
    base, photos, looked_at = (
        tiny_checkpoint(folder / "base.safetensors"),
        pictures(folder / "photos", 6),
        pictures(folder / "looked-at", 1),
    )

    def options(out, *more):
        common = f"--size 32 --batch-size 4 --learning-rate 1e-3 --steps {STEPS} --save-every {SAVED} --validate-every {HALF} --workers 0"
        where = ["--checkpoint", base, "--pictures", photos, "--validation", looked_at, "--out", out, "--operator", json.dumps(OPERATOR)]
        return [*map(str, where), *common.split(), *map(str, more)]

    return SimpleNamespace(base=base, photos=photos, looked_at=looked_at, options=options)


def run(argv):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # what a new process has
    GradientState._reset_state()
    cli.main(["train-cse", *argv])


def refusal(argv, capsys):
    """What a run that ends with an error says."""
    with pytest.raises(SystemExit) as caught:
        run(argv)
    assert caught.value.code not in (0, None)
    return caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err


def wait(process, log, condition=None):
    """Until the condition holds; without one, until the process ends, whose exit status this is."""
    try:
        for _ in range(SECONDS * 100):
            if condition and condition():
                return None
            try:
                status = process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
            assert condition is None, f"ended too early, with {status}:\n{log.read_text()}"
            return status
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"no end after {SECONDS} seconds:\n{log.read_text()}")


def state_of(out):
    return read_state(out.with_suffix(".training"))


def equal(a, b):
    """Bit by bit, in all that lists and dicts hold."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def different(out, wanted):
    """The parts of a saved training that are not as wanted."""
    found = state_of(out)
    return [name for name in wanted if not equal(found[name], wanted[name])]


def distance(a, b):
    """Of two states: the norm of the difference of their weights, and of what was kept of their averages."""
    return sum(
        float(sum((x[name] - y[name]).double().square().sum() for name in x)) ** 0.5
        for x, y in ((a["weights"], b["weights"]), (a["average"]["weights"], b["average"]["weights"]))
    )


def finite(out):
    weights, metadata = read_cse(out)
    state = state_of(out)
    assert metadata.steps == state["step"]
    return all(t.isfinite().all() for t in [*weights.values(), *state["weights"].values()])


@pytest.fixture(scope="module")
def killed(given, forks, tmp_path_factory):
    """A training with an average, in a process that is killed after its first save: its file, command line and exit status."""
    out = tmp_path_factory.mktemp("killed") / "cse.safetensors"
    argv, log = given.options(out, "--licence", "CC0-1.0", "--source", "made up", "--ema", 0.5), out.with_suffix(".log")

    def train_and_kill():
        process = forks.start(argv, log, TRAIN)
        wait(process, log, out.with_suffix(".training").exists)
        os.killpg(process.pid, signal.SIGKILL)
        return out, argv, wait(process, log)

    with ThreadPoolExecutor() as pool:  # while others train in this process
        yield pool.submit(train_and_kill)


@pytest.fixture(scope="module")
def half(killed, given, tmp_path_factory):
    """Half a training, with an average."""
    out = tmp_path_factory.mktemp("half") / "cse.safetensors"
    run(given.options(out, "--ema", 0.5, "--steps", HALF))
    return out


@pytest.fixture(scope="module")
def prolonged(half, given, tmp_path_factory):
    """Its continuation."""
    out = tmp_path_factory.mktemp("prolonged") / "cse.safetensors"
    for suffix in (".safetensors", ".training"):
        shutil.copy(half.with_suffix(suffix), out.with_suffix(suffix))
    run(given.options(out, "--ema", 0.5))
    return out


@pytest.fixture(scope="module")
def whole(killed, given, tmp_path_factory):
    """A whole training with an average."""
    out = tmp_path_factory.mktemp("average") / "cse.safetensors"
    run(given.options(out, "--ema", 0.5))
    return out


@pytest.fixture
def copy(half, tmp_path):
    """The half training, to be changed by a test."""
    out = tmp_path / "copy.safetensors"
    for suffix in (".safetensors", ".training"):
        shutil.copy(half.with_suffix(suffix), out.with_suffix(suffix))
    return out


def test_killed_and_started_again_in_processes(killed, forks, whole):
    out, argv, status = killed.result()
    assert status == -signal.SIGKILL and SAVED <= state_of(out)["step"] < STEPS
    for left in ("cse.safetensors.77.part", "cse.training.77.part", "cse.safetensors.part"):
        (out.parent / left).touch()
    log = out.with_suffix(".log")
    assert wait(forks.start(argv, log, TRAIN), log) == 0, log.read_text()
    assert not [file for file in out.parent.iterdir() if file.suffix in (".part", ".lock")]
    assert not different(out, state_of(whole))
    assert equal(read_cse(out)[0], read_cse(whole)[0])
    assert [step for step, _ in state_of(out)["validations"]] == [HALF, STEPS]

    metadata = read_cse(out)[1]
    assert metadata.operator == OPERATOR and metadata.base == "base.safetensors" and len(metadata.fingerprint) == 16
    assert (metadata.steps, metadata.pictures, metadata.batch_size, metadata.size) == (STEPS, 6, 4, 32)
    assert (metadata.licence, metadata.source, metadata.learning_rate, metadata.prediction) == ("CC0-1.0", "made up", 1e-3, "eps")
    with safe_open(out, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118

    logs = out.with_suffix(".logs")
    for step in (HALF, STEPS):
        assert Image.open(logs / f"step-{step:06d}.png").size == (3 * 32 + 8, 32)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, validations = {}, {}
    for file in logs.rglob("events.out.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag, found in (("loss", losses), ("validation loss", validations)):
            if tag in events.Tags()["scalars"]:
                found.update({event.step: event.value for event in events.Scalars(tag)})
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert [losses[step] for step in sorted(losses)] == pytest.approx(state_of(out)["losses"], rel=1e-6)
    assert sorted(validations) == [HALF, STEPS]


@pytest.mark.thorough
def test_the_average_is_what_is_written(half, given, tmp_path):
    plain = tmp_path / "plain.safetensors"
    run(given.options(plain, "--steps", HALF, "--validate-every", 0))
    assert equal(state_of(half)["weights"], state_of(plain)["weights"])
    written = read_cse(half)[0]
    assert equal(written, {name: tensor.half() for name, tensor in state_of(half)["average"]["weights"].items()})
    assert not equal(written, read_cse(plain)[0])


def in_a_host(given, out, steps):
    """The training of `given.options(out, "--ema", 0.5)` as TrainCSE does it: one process, with nothing but torch."""
    from dmap_core.backends.diffusers_files import open_base
    from dmap_core.cse.data import Examples
    from dmap_core.cse.identity import identity
    from dmap_core.cse.metadata import CSEMetadata
    from dmap_core.cse.network import initial_controlnet
    from dmap_core.cse.session import Session
    from dmap_core.cse.settings import TrainingSettings
    from dmap_core.pictures import centred, file_identity, open_rgb, picture_files, to_tensor

    settings = TrainingSettings(steps=steps, batch_size=4, size=32, learning_rate=1e-3, ema=0.5)
    prior, operator, files = open_base(given.base), from_spec(OPERATOR), picture_files(given.photos)
    examples = Examples(files, settings, len(prior.sigmas))
    controlnet = prior.new_controlnet(initial_controlnet(prior.original_weights(), settings.seed))
    looked_at = torch.stack([to_tensor(centred(open_rgb(file), 32)) for file in picture_files(given.looked_at)])
    same = identity(prior, settings, operator, [file_identity(file) for file in files])
    described = CSEMetadata.of_training(prior, settings, operator, prior.name, len(files), "", "")
    made = Session(trainer.Trainer(prior, controlnet, operator, examples, settings), out, same, described, looked_at)
    made.train(SAVED, HALF)


@pytest.mark.parametrize("first", some_at_once(["a host", "the command line"], ["a host"]))
def test_a_training_crosses_over(given, half, whole, copy, tmp_path, first):
    """Begun by a host and ended at the command line, or the other way; and with one implementation of the networks it is equal to the bit."""
    if first == "a host":
        out = tmp_path / "cse.safetensors"
        in_a_host(given, out, HALF)
        assert not different(out, state_of(half))
        run(given.options(out, "--ema", 0.5))
    else:
        out = copy
        in_a_host(given, out, STEPS)
    assert not different(out, state_of(whole))
    assert equal(read_cse(out)[0], read_cse(whole)[0]) and read_cse(out)[1] == read_cse(whole)[1]


def test_ctrl_c_while_weights_change(given, half, tmp_path):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    out, calls = tmp_path / "cse.safetensors", []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == SAVED + 2:
            signal.raise_signal(signal.SIGINT)

    argv = given.options(out, "--ema", 0.5, "--steps", HALF)
    hook = register_optimizer_step_post_hook(interrupt)
    try:
        with pytest.raises(SystemExit) as caught:
            run(argv)
    finally:
        hook.remove()
    assert caught.value.code == 130 and state_of(out)["step"] == SAVED + 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(argv)
    assert not different(out, state_of(half))


def test_prolonged(prolonged, whole):
    assert not different(prolonged, state_of(whole))


def test_a_finished_training_is_left_alone(given, half, caplog):
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (half, half.with_suffix(".training"))}
    run(given.options(half, "--ema", 0.5, "--steps", HALF))
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert f"is trained for {HALF} steps already" in caplog.text


@pytest.mark.parametrize("found", ["older", "none"])
def test_a_finished_training_whose_file_was_not_written(given, half, copy, found):
    copy.unlink()
    if found == "older":
        with safe_open(half, "pt") as file:
            metadata = file.metadata()
        described = json.loads(metadata["dmap_cse"]) | {"steps": SAVED}
        save_file(load_file(half), copy, metadata | {"dmap_cse": json.dumps(described)})
    run(given.options(copy, "--ema", 0.5, "--steps", HALF))
    assert equal(read_cse(copy), read_cse(half))


def test_the_loss_goes_down(given, whole, tmp_path):
    """By a fifth at least: of the steps' mean, and of validation, whose noise is always the same, against that after a few small steps."""
    out = tmp_path / "cse.safetensors"
    run(given.options(out, "--steps", 30, "--learning-rate", 2e-3, "--save-every", 30, "--validate-every", 30))
    losses = state_of(out)["losses"]
    assert len(losses) == 30 and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert state_of(out)["validations"][-1][1] < 0.8 * state_of(whole)["validations"][0][1]


@pytest.fixture(scope="module")
def start_weights(given):
    from dmap_core.backends.diffusers_files import open_base
    from dmap_core.cse.network import initial_controlnet

    base = open_base(given.base)
    weights = initial_controlnet(base.original_weights(), 0)
    return {"weights": weights, "average": {"weights": weights}}


def near(found, wanted, start):
    """Losses to six digits; weights to a small part of the way they went."""
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    return distance(found, wanted) < ROUNDING * distance(wanted, start)


def start_two(forks, argv, folder):
    """Two processes that train together, and their logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"{rank}.log" for rank in (0, 1)]
    return [forks.start(argv, log, TRAIN, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank, log in enumerate(logs)], logs


@pytest.mark.thorough
def test_two_processes_and_ctrl_c_that_one_of_them_sees(given, forks, start_weights, tmp_path):
    """They stop at the end of the same step, with what one process makes in as many."""
    out, alone = tmp_path / "cse.safetensors", tmp_path / "alone.safetensors"
    both, logs = start_two(forks, given.options(out, "--steps", 400, "--validate-every", 0, "--workers", 1, "--ema", 0.5), tmp_path)
    wait(both[0], logs[0], out.with_suffix(".training").exists)
    os.killpg(both[1].pid, signal.SIGINT)
    assert [wait(process, log) for process, log in zip(both, logs, strict=True)] == [130, 130], logs[0].read_text() + logs[1].read_text()
    assert not any("Traceback" in log.read_text() for log in logs)
    state = state_of(out)
    assert f"interrupted: {state['step']} steps are saved" in logs[0].read_text()
    assert SAVED <= state["step"] < 400 and len(state["losses"]) == state["step"] == read_cse(out)[1].steps
    run(given.options(alone, "--steps", state["step"], "--validate-every", 0, "--ema", 0.5))
    assert near(state, state_of(alone), start_weights)
    assert not equal(state["losses"], state_of(alone)["losses"])  # the sum of two halves, and no training by itself


@pytest.mark.parametrize(
    "more",
    [["--accumulation", 2], pytest.param(["--gradient-checkpointing"], marks=pytest.mark.thorough)],
    ids=["accumulation", "checkpointing"],
)
def test_to_need_less_memory_changes_nothing_but_rounding(given, half, start_weights, tmp_path, monkeypatch, more):
    from dmap_core import memory

    batches, recomputed = [], []
    batch_loss, checkpoint = trainer.batch_loss, memory.checkpoint
    monkeypatch.setattr(trainer, "batch_loss", lambda *given: batches.append(len(given[3]["image"])) or batch_loss(*given))
    monkeypatch.setattr(memory, "checkpoint", lambda *a, **kw: recomputed.append(a) or checkpoint(*a, **kw))
    out = tmp_path / "cse.safetensors"
    run(given.options(out, "--ema", 0.5, "--steps", HALF, "--validate-every", 0, *more))
    assert near(state_of(out), state_of(half), start_weights)
    assert batches == ([2] * HALF * 2 if "--accumulation" in more else [4] * HALF)
    assert bool(recomputed) == ("--gradient-checkpointing" in more)


def test_workers_change_nothing(given, half, tmp_path):
    out = tmp_path / "cse.safetensors"
    run(given.options(out, "--ema", 0.5, "--steps", HALF, "--workers", 2))
    assert not different(out, state_of(half))


@pytest.mark.thorough
def test_bf16_leaves_the_autoencoder_in_full_precision(given, half, tmp_path, monkeypatch):
    from dmap_core.backends.diffusers import DiffusersPrior

    seen, encode, decode = [], DiffusersPrior.encode, DiffusersPrior.decode

    def spy(original):
        def call(self, x):
            seen.append((self.unet.dtype, self.vae.dtype, torch.is_autocast_enabled("cpu")))
            return original(self, x)

        return call

    monkeypatch.setattr(DiffusersPrior, "encode", spy(encode))
    monkeypatch.setattr(DiffusersPrior, "decode", spy(decode))
    for ema in (0, 0.5):
        out = tmp_path / f"{ema}.safetensors"
        run(given.options(out, "--precision", "bf16", "--steps", 2, "--ema", ema))
        state = state_of(out)
        assert state["losses"] == pytest.approx(state_of(half)["losses"][:2], rel=0.02) and state["losses"] != state_of(half)["losses"][:2]
        assert state["validations"][0][0] == 2 and state["validations"][0][1] > 0
        assert {tensor.dtype for tensor in state["weights"].values()} == {torch.float32}
    assert set(seen) == {(torch.bfloat16, torch.float32, False)}


@pytest.mark.parametrize("name", ["seed", "operator", "pictures", "base", "ema"])
def test_another_training_beside_the_file(given, half, copy, tmp_path, capsys, name):
    more = {
        "seed": lambda: ["--seed", 1],
        "operator": lambda: ["--operator", '{"operator": "SuperResolution", "scale": 4}'],
        "pictures": lambda: ["--pictures", pictures(tmp_path / "others", 6, prefix="other")],
        "base": lambda: ["--checkpoint", tiny_checkpoint(tmp_path / "other.safetensors", seed=1)],
        "ema": lambda: ["--ema", 0.6],
    }[name]()
    message = refusal(given.options(copy, "--ema", 0.5, *more), capsys)
    assert "copy.training has other settings: " in message
    assert [difference.split()[0] for difference in message.split("settings: ")[1].split(". Choose")[0].split("; ")] == [name]
    assert copy.read_bytes() == half.read_bytes() and equal(state_of(copy), state_of(half))


def test_going_on_with_another_learning_rate(given, half, copy):
    run(given.options(copy, "--ema", 0.5, "--steps", HALF + 1, "--learning-rate", 1e-7, "--validate-every", 0))
    before, after = state_of(half)["weights"], state_of(copy)["weights"]
    assert 0 < max(float((after[name] - before[name]).abs().max()) for name in after) < 1e-6  # where 1e-3 goes 1000 times as far
    assert read_cse(copy)[1].learning_rate == 1e-7


def test_a_file_that_has_no_training_beside_it(given, tmp_path, capsys):
    out = tmp_path / "precious.safetensors"
    out.write_bytes(b"of somebody")
    message = refusal(given.options(out, "--checkpoint", "absent.safetensors"), capsys)
    assert "precious.safetensors exists" in message and "another name" in message
    assert out.read_bytes() == b"of somebody" and list(tmp_path.iterdir()) == [out]


def test_a_damaged_training(given, half, copy, capsys):
    copy.with_suffix(".training").write_bytes(half.with_suffix(".training").read_bytes()[:5000])
    assert "copy.training is not a training state that can be read" in refusal(given.options(copy, "--ema", 0.5), capsys)


def test_a_learning_rate_that_is_too_high(given, tmp_path, capsys):
    out = tmp_path / "cse.safetensors"
    argv = given.options(out, "--learning-rate", 0.9, "--steps", 200, "--save-every", 1, "--validate-every", 0)
    message = refusal(argv, capsys)
    step = state_of(out)["step"]
    assert "learning_rate 0.9 is too high" in message and re.search(
        rf"the loss or its gradient is (nan|-?inf) at step {step + 1}:", message
    )
    assert f"The weights of step {step} are in {out}" in message
    assert finite(out)


def test_a_gradient_that_is_not_finite_though_the_loss_is(given, tmp_path, capsys, monkeypatch):
    out, calls, original = tmp_path / "cse.safetensors", [], trainer.batch_loss

    def batch_loss(prior, controlnet, *rest):
        calls.append(original(prior, controlnet, *rest))
        weight = next(iter(controlnet.parameters()))
        return calls[-1] + ((weight - weight.detach()).sum().sqrt() if len(calls) == 3 else 0)  # the slope of a root at 0

    monkeypatch.setattr(trainer, "batch_loss", batch_loss)
    message = refusal(given.options(out, "--save-every", 1, "--validate-every", 0), capsys)
    assert all(map(torch.isfinite, calls)) and len(calls) == 3
    assert (
        "learning_rate 0.001" in message
        and re.search("gradient is (nan|inf) at step 3", message)
        and "The weights of step 2 are in" in message
    )
    assert state_of(out)["step"] == 2 and finite(out)


def test_weights_that_half_precision_cannot_hold(given, tmp_path, capsys):
    state = load_file(given.base)
    state["model.diffusion_model.middle_block.0.emb_layers.1.weight"][0, 0] = 1e5
    save_file(state, tmp_path / "base.safetensors")
    out = tmp_path / "cse.safetensors"
    argv = given.options(out, "--checkpoint", tmp_path / "base.safetensors", "--steps", 1, "--validate-every", 0)
    message = refusal(argv, capsys)
    assert "too large for the file" in message and "of the file: fp16" in message and "Nothing was saved" in message
    assert not out.exists() and not out.with_suffix(".training").exists()
    run([*argv, "--save-precision", "fp32"])
    assert finite(out)


@pytest.mark.parametrize("full", ["training", "safetensors"])
def test_a_full_disk(given, tmp_path, capsys, monkeypatch, full):
    import safetensors.torch

    out, calls = tmp_path / "cse.safetensors", []
    module, name = (torch, "save") if full == "training" else (safetensors.torch, "save_file")
    original = getattr(module, name)

    def write(content, path, *rest):
        calls.append(path)
        if len(calls) < 2:
            return original(content, path, *rest)
        Path(path).write_bytes(b"as much as there was place for")
        raise OSError(errno.ENOSPC, "No space left on device")

    argv = given.options(out, "--steps", 2, "--save-every", 1, "--validate-every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, write)
        message = refusal(argv, capsys)
    assert f"cse.{full} could not be written" in message and "No space left" in message and "last save is untouched" in message
    assert read_cse(out)[1].steps == 1 and state_of(out)["step"] == (1 if full == "training" else 2)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["cse.safetensors", "cse.training"]
    run(argv)
    assert read_cse(out)[1].steps == 2 and finite(out)


def unreadable(tmp_path, count=4):
    folder = pictures(tmp_path / "pictures", count)
    (folder / "broken.jpg").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def masks(tmp_path):
    """64 masks without any order, which do not pack."""
    mask = (torch.rand(64, 1, 320, 320, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    file = tmp_path / "masks.json"
    file.write_text(json.dumps(Inpainting(mask).spec()))
    return file


BAD = {
    "fewer pictures than a batch": (lambda d: ["--pictures", pictures(d / "few", 3)], "there are 3, fewer than batch_size 4"),
    "count below a batch": (lambda d: ["--count", 3], "there are 3, fewer than batch_size 4"),
    "count above all": (lambda d: ["--count", 7], "count is 7, but there are 6 pictures"),
    "unreadable picture": (lambda d: ["--pictures", unreadable(d)], "1 of 5 files in .* cannot be read: broken.jpg"),
    "empty folder": (lambda d: ["--pictures", empty(d)], "empty holds no pictures"),
    "no folder": (lambda d: ["--pictures", d / "nowhere"], "there is no folder .*nowhere"),
    "no validation folder": (lambda d: ["--validation", d / "nowhere"], "there is no folder .*nowhere"),
    "accumulation": (lambda d: ["--accumulation", 3], "accumulation is 3; it must divide batch_size, which is 4"),
    "unknown operator": (lambda d: ["--operator", '{"operator": "Rain"}'], "unknown operator 'Rain'; known are SuperResolution"),
    "operator without quotes": (lambda d: ["--operator", "{operator: Grayscale}"], "operator: '{operator: Grayscale}' is not JSON"),
    "operator that is a list": (lambda d: ["--operator", "[8]"], r"operator: '\[8\]' is no JSON object"),
    "operator file": (lambda d: ["--operator", d / "nowhere.json"], "operator: .*nowhere.json cannot be read"),
    "operator setting": (lambda d: ["--operator", '{"operator": "SuperResolution", "factor": 8}'], "SuperResolution: the settings"),
    "weights of an operator": (
        lambda d: ["--operator", '{"operator": "NonlinearBlur", "weights": "w.pth", "sha256": "", "seed": 0}'],
        "operator: it needs the weights file w.pth; name its folder with --weights",
    ),
    "crop that the operator cannot take": (
        lambda d: ["--size", 40, "--operator", '{"operator": "SuperResolution", "scale": 16}'],
        "40x40 .* cannot be reduced 16 times",
    ),
    "crop that the autoencoder cannot take": (
        lambda d: ["--size", 36, "--operator", '{"operator": "Grayscale"}'],
        "size is 36; .*multiple of 8",
    ),
    "name of the file": (lambda d: ["--out", d / "cse.pth"], r"--out: .*cse.pth must end in \.safetensors"),
    "fp16 on the CPU": (lambda d: ["--precision", "fp16"], "precision is 'fp16', which needs a GPU"),
    "adam_8bit": (lambda d: ["--adam-8bit"], "adam_8bit needs the package bitsandbytes"),
    "learning rate": (lambda d: ["--learning-rate", 2], "learning_rate is 2.0"),
    "size of nothing": (lambda d: ["--size", 0], "size is 0"),
    "ema": (lambda d: ["--ema", 1], "ema is 1.0; it must be at least 0"),
    "save_every": (lambda d: ["--save-every", 0], "--save-every must be at least 1"),
    "too many steps": (lambda d: ["--steps", 10**12], "steps is too large; it must be at most 1000000"),
    "name that is too long": (
        lambda d: ["--out", d / f"{'x' * 300}.safetensors"],
        r"--out: the name x+\.\.\. is 312 bytes long; 200 are the most",
    ),
    "operator that is nested": (lambda d: ["--operator", "[" * 100_000], r"operator: '\[+' is not JSON"),
    "operator that no file can describe": (
        lambda d: ["--operator", masks(d), "--size", 320, "--batch-size", 64],
        "the description of the CSE would be [0-9]+ characters long",
    ),
    "no number": (lambda d: ["--steps", "many"], "argument --steps: invalid int value: 'many'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_the_base_is_opened(given, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    more, message = BAD[name]
    argv = given.options(tmp_path / "cse.safetensors", "--checkpoint", tmp_path / "absent.safetensors", *more(tmp_path))
    found = refusal(argv, capsys)
    assert re.search(message, found), found
    assert "absent" not in found and not (tmp_path / "cse.safetensors").exists()


@pytest.mark.parametrize("name", ["checkpoint", "pictures", "operator", "out"])
def test_missing_options(given, tmp_path, capsys, name):
    argv = given.options(tmp_path / "cse.safetensors")
    place = argv.index(f"--{name}")
    assert f"error: --{name} is missing" in refusal(argv[:place] + argv[place + 2 :], capsys)


def test_a_batch_that_processes_cannot_share(given, tmp_path, capsys, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 4)
    message = refusal(given.options(tmp_path / "cse.safetensors", "--checkpoint", "absent.safetensors", "--accumulation", 2), capsys)
    assert "batch_size is 4; it must be divisible by accumulation times the number of processes, 2 x 4" in message


def test_unreadable_pictures_are_skipped_on_demand(given, tmp_path, caplog):
    out = tmp_path / "cse.safetensors"
    run(given.options(out, "--pictures", unreadable(tmp_path), "--unreadable", "skip", "--steps", 1, "--validate-every", 0))
    assert "1 files cannot be read and are left out: broken.jpg" in caplog.text
    trained_with = [name.split()[0] for name in state_of(out)["identity"]["pictures"]]
    assert read_cse(out)[1].pictures == 4 and trained_with == [f"{i}.png" for i in range(4)]


@pytest.mark.parametrize("kind", ["another model", "text", "absent", "empty folder"])
def test_checkpoints_that_are_no_base(given, tmp_path, capsys, kind):
    path = tmp_path / "odd.safetensors"
    if kind == "another model":
        save_file({"a.weight": torch.ones(2)}, path)
    elif kind == "text":
        path.write_text("<!DOCTYPE html>")
    elif kind == "empty folder":
        path.mkdir()
    out = tmp_path / "cse.safetensors"
    assert "odd.safetensors" in refusal(given.options(out, "--checkpoint", path), capsys)
    assert not out.exists()


def config(tmp_path, text):
    path = tmp_path / "training.yaml"
    path.write_text(text)
    return path


def test_config(given, tmp_path):
    path = config(
        tmp_path,
        f"""
        checkpoint: {given.base}
        pictures: {given.photos}
        operator: {{operator: Grayscale}}
        out: {tmp_path / "cse.safetensors"}
        size: 32
        steps: 2
        batch_size: 2
        seed: 5
        learning_rate: 2e-3
        resize: [1, 1.5]
        precision: bf16
        gradient_checkpointing: true
        adam_8bit: false
        count:
        validate_every: 0
        licence: MIT
        """,
    )
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    args = options.merged(vars(parser.parse_args(["--config", str(path), "--seed", "7", "--precision", "fp32"])))
    assert args["gradient_checkpointing"] is True and args["adam_8bit"] is False and args["count"] is None and args["save_every"] == 500
    assert (args["seed"], args["precision"], args["learning_rate"]) == (7, "fp32", 2e-3)
    run(["--config", str(path), "--seed", "7", "--precision", "fp32", "--workers", "0"])
    metadata = read_cse(tmp_path / "cse.safetensors")[1]
    assert metadata.operator == {"operator": "Grayscale"} and metadata.seed == 7 and metadata.licence == "MIT"
    assert (metadata.steps, metadata.batch_size, metadata.size, metadata.learning_rate) == (2, 2, 32, 2e-3)
    identity = state_of(tmp_path / "cse.safetensors")["identity"]
    assert identity["resize"] == (1.0, 1.5) and identity["precision"] == "fp32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", r"training.yaml must map option names to values; unknown: \['stepz'\]. Known: checkpoint, "),
        ("batch-size: 5", r"unknown: \['batch-size'\]"),
        ("config: other.yaml", r"unknown: \['config'\]"),
        ("1: 2\na: 3", r"unknown: \['1', 'a'\]"),
        ("steps: many", "--steps: invalid int value: 'many'"),
        ("steps: 2.5", r"--steps: invalid int value: '2\.5'"),
        ("steps: true", "steps is True; it must be one text or number"),
        ("steps: [1, 2]", r"steps is \[1, 2\]; it must be one text or number"),
        ("learning_rate: {a: 1}", "learning_rate is {'a': 1}; it must be one text or number"),
        ("pictures: [a, b]", r"pictures is \['a', 'b'\]; it must be one text or number"),
        ("operator: [Grayscale]", r"operator is \['Grayscale'\]; it must be"),
        ("gradient_checkpointing: 'no'", "gradient_checkpointing is 'no'; it must be true or false"),
        ("precision: fp8", "--precision: invalid choice: 'fp8'"),
        ("resize: 1.5", "resize is 1.5; it must be a list"),
        ("resize: [1.5]", "--resize: expected 2 arguments"),
        ("resize: [1, big]", "--resize: invalid float value: 'big'"),
        ("resize: [2, 1]", "resize is .*two rising numbers"),
        ("- steps", "training.yaml must map option names to values"),
        ("", "training.yaml must map option names to values"),
        ("steps: [", "training.yaml cannot be read"),
        ("steps: " + "[" * 3000 + "]" * 3000, "training.yaml cannot be read"),
        ("steps: " + "1" * 5000, "training.yaml cannot be read"),
    ],
)
def test_config_with_mistakes(given, tmp_path, capsys, text, message):
    argv = [
        a for a in given.options(tmp_path / "cse.safetensors", "--checkpoint", "absent.safetensors") if a not in ("--steps", str(STEPS))
    ]
    found = refusal([*argv, "--config", str(config(tmp_path, text))], capsys)
    assert re.search(message, found), found


def test_config_that_is_absent(tmp_path, capsys):
    assert "nowhere.yaml cannot be read" in refusal(["--config", str(tmp_path / "nowhere.yaml")], capsys)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    printed, parser = capsys.readouterr().out, argparse.ArgumentParser()
    options.add_arguments(parser)
    known = [option for action in parser._actions for option in action.option_strings]
    assert len(known) > 25 and all(option in printed for option in known)


def test_the_command_is_known_before_torch_is_there():
    code = "import dmap_core.cse.train, dmap_core.cse.generate, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "argparse" in imported and not imported & {"torch", "accelerate", "diffusers", "transformers", "numpy", "PIL", "yaml"}


@pytest.mark.parametrize("package", ["accelerate", "diffusers", "transformers", "tensorboard", "yaml"])
def test_without_a_package(given, tmp_path, monkeypatch, package):
    for module in ("diffusers", "diffusers_files"):  # both places of a module, so that both are what they were afterwards
        monkeypatch.delitem(sys.modules, f"dmap_core.backends.{module}", raising=False)
        monkeypatch.delattr(backends, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    argv = given.options(tmp_path / "cse.safetensors", "--config", config(tmp_path, "steps: 5"))
    with pytest.raises(SystemExit, match=f"this needs {package}, which is not installed: pip install"):
        cli.main(["train-cse", *argv])


# ---- one training, one file


def test_a_second_training_of_one_file_is_refused(given, half, copy, capsys):
    argv = given.options(copy, "--ema", 0.5, "--steps", HALF + 1, "--validate-every", 0)
    with training_files(copy):
        message = refusal(argv, capsys)
    assert re.search(rf"error: CSE: {copy} is being written by another training \(process {os.getpid()}\)", message)
    assert equal(state_of(copy), state_of(half))
    run(argv)
    assert state_of(copy)["step"] == HALF + 1


FOREIGN = {
    "weights of something": (lambda state: {"a": torch.ones(2)}, "is not a training state: it holds something else"),
    "a tensor": (lambda state: torch.ones(2), "is not a training state: it holds something else"),
    "an identity of nothing": (lambda state: {"identity": 3}, "is not a training state: it holds something else"),
    "an earlier version": (lambda state: {n: v for n, v in state.items() if n != "format"}, "was written by another version of this pack"),
    "a later version": (lambda state: state | {"format": FORMAT + 1}, "was written by another version of this pack"),
    "no weights": (lambda state: {n: v for n, v in state.items() if n != "weights"}, "does not fit this training .KeyError: 'weights'"),
    "other weights": (lambda state: state | {"weights": {"a": torch.ones(2)}}, "does not fit this training .RuntimeError"),
    "another optimiser": (lambda state: state | {"optimizer": {}}, "does not fit this training"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_of_something_else(given, half, tmp_path, capsys, kind):
    change, message = FOREIGN[kind]
    out = tmp_path / half.name
    for suffix in (".safetensors", ".training"):
        shutil.copy(half.with_suffix(suffix), out.with_suffix(suffix))
    changed = change(state_of(out))
    torch.save(changed, out.with_suffix(".training"))
    found = refusal(given.options(out, "--ema", 0.5, "--steps", HALF + 1), capsys)
    assert str(out.with_suffix(".training")) in found and re.search(message, found) and "remove it to start again" in found, found
