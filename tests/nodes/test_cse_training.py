"""TrainCSE and SelfGenerateCSEDataset on the demo prior, with crops of 32x32 pixels and a few steps.

The same training is run once without interruption; what was cut and went on must end with its weights, bit for bit.
"""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.hosts("one")

STEPS = 3
# Part of the way that the weights went. Adam divides gradients by their size, and so makes rounding errors of small ones large.
ROUNDING = 0.02


@pytest.fixture(scope="module", autouse=True)
def folders(cses, tmp_path_factory):
    """The folders of this module. The pictures for people are made with two steps instead of twenty."""
    with cses.Folders(tmp_path_factory.mktemp("models")) as folders, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cses.validation.restore.__wrapped__, "__defaults__", (2,))  # behind torch.no_grad
        patch.setattr(cses.validation, "LEVELS", 2)
        yield folders


@pytest.fixture(scope="module")
def start(lab, cses):
    """The weights before the first step."""
    with torch.inference_mode():
        return cses.network.initial_controlnet(lab.shared()[0].model.diffusion_model.state_dict(), 0)


@pytest.fixture(scope="module")
def whole(cses, folders):
    """(path, outputs, what the progress bar showed) of a training that nothing disturbed."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch, cses.watching(patch) as shown:
        made = cses.train(save_name="whole", licence="CC0")
    return folders.controlnet / "whole.safetensors", made, shown


@pytest.fixture
def copied(folders, whole):
    """A copy of that training under another name."""
    for suffix in (".safetensors", ".training"):
        shutil.copy(whole[0].with_suffix(suffix), folders.controlnet / f"copied{suffix}")
    return folders.controlnet / "copied.safetensors"


@pytest.fixture
def untouched(lab, cses):
    """Afterwards the model and the VAE are what they were before, and so is what the model makes."""
    model, vae = lab.shared()
    before, picture = cses.Snapshot(model, vae), lab.ksampler(model)
    yield
    assert torch.equal(lab.ksampler(model), picture)  # which loads it again, without a training's LoRA and precision
    assert before.changed() == []
    assert model.model.manual_cast_dtype is None
    assert all(p.grad is None for network in (model.model, vae.first_stage_model) for p in network.parameters())


def same_training(cses, ours, theirs):
    """Bit for bit, also what a continuation needs."""
    a, b = cses.state(ours), cses.state(theirs)
    assert list(a["weights"]) == list(b["weights"])
    different = [name for name in a["weights"] if not torch.equal(a["weights"][name], b["weights"][name])]
    moments, others = ([state["optimizer"][name]["exp_avg_sq"] for name in a["weights"]] for state in (a, b))
    assert different == [] and all(map(torch.equal, moments, others)) and len(moments) == len(others) > 10
    assert (a["step"], a["losses"]) == (b["step"], b["losses"])


def same_file(cses, ours, theirs):
    (a, described), (b, expected) = (cses.checkpoint.read_cse(path) for path in (ours, theirs))
    assert described == expected and set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- what comes out


@pytest.mark.hosts("all")
def test_the_file(lab, cses, whole):
    path, (control, _, _, summary), _ = whole
    weights, described = cses.checkpoint.read_cse(path)
    model = lab.shared()[0]
    assert described == cses.metadata.CSEMetadata(
        operator=cses.SR8,
        base="SD20",
        fingerprint=cses.prior.base_fingerprint(model),
        prediction="eps",
        hint_range="0..1",
        steps=STEPS,
        batch_size=2,
        learning_rate=1e-3,
        size=32,
        seed=0,
        pictures=3,
        source=described.source,
        licence="CC0",
    )
    assert described.source
    for words in ("whole.safetensors", "Super-Resolution (scale 8)", "3 steps of 2", "CC0"):
        assert words in summary
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    theirs = cses.network.encoder_shapes(model.model.diffusion_model.state_dict())
    assert cses.network.encoder_shapes(weights) == theirs
    loaded, operator, _ = cses.load("whole.safetensors")
    assert operator.spec() == cses.SR8
    assert all(torch.equal(a, b) for a, b in zip(cses.outputs(loaded), cses.outputs(control), strict=True))


def test_it_is_what_was_trained(cses, whole, start):
    """By about Adam's step size every weight moved but those that an empty prompt leaves without effect."""
    trained = cses.state(whole[0])["weights"]
    weights, _ = cses.checkpoint.read_cse(whole[0])
    assert all(torch.equal(weights[name], trained[name].half()) for name in trained) and set(weights) == set(trained)
    assert cses.distance(trained, start) > 1
    moved = {name: float((trained[name] - start[name]).abs().max()) for name in start}
    assert all(moved[name] > 0 for name in start if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.")))
    still = {name.split("transformer_blocks.0.")[-1] for name, value in moved.items() if value == 0}
    assert still == {*(f"attn2.to_{part}.weight" for part in ("q", "k", "v", "out.0")), "norm2.weight", "norm2.bias"}
    assert max(moved.values()) < 1.1e-3 * STEPS


def test_the_pictures(lab, cses, whole):
    _, (_, curve, validation, _), _ = whole
    assert curve.shape == (1, 360, 640, 3) and float(curve.std()) > 0
    gap = cses.validation.GAP
    assert validation.shape == (1, 32, 3 * 32 + 2 * gap, 3)
    assert float(validation.min()) >= 0 and float(validation.max()) <= 1
    small = cses.pictures_of_core.centred(cses.pictures_of_core.to_picture(lab.as_core(cses.pictures(1))[0]), 32)
    original = cses.pictures_of_core.to_tensor(small)[None]
    sr8 = lab.call("DMAP_OperatorSuperResolution", scale=8)
    columns = [lab.as_core(validation[:, :, i * (32 + gap) : i * (32 + gap) + 32]) for i in range(3)]
    torch.testing.assert_close(columns[0], sr8.hint(sr8(original)).clamp(-1, 1), rtol=0, atol=0.005)
    torch.testing.assert_close(columns[2], original, rtol=0, atol=0.005)
    assert float((columns[1] - columns[2]).abs().mean()) > 0.01


def test_the_progress_bar(whole):
    shown = whole[2]
    assert [value for value, _, _ in shown] == list(range(1, STEPS + 1))
    assert {total for _, total, _ in shown} == {STEPS}
    assert all(picture.size == (640, 360) for _, _, picture in shown)


def test_validation_pictures(lab, cses, folders):
    """Without any, the first training pictures are looked at; of many, four. The training does not depend on them."""
    _, _, own, _ = cses.train(save_name="own", steps=1, validation=None)
    _, _, many, _ = cses.train(save_name="many", steps=1, validation=cses.pictures(6))
    gap = cses.validation.GAP
    assert own.shape[1] == 3 * 32 + 2 * gap and many.shape[1] == 4 * 32 + 3 * gap
    assert torch.equal(own[:, : 3 * 32 + 2 * gap, : 32 + gap], many[:, : 3 * 32 + 2 * gap, : 32 + gap])  # of the same pictures
    ours, theirs = (cses.state(folders.controlnet / name) for name in ("own", "many"))
    assert cses.distance(ours["weights"], theirs["weights"]) == 0
    assert ours["validations"] != theirs["validations"] and [step for step, _ in ours["validations"]] == [1]


def test_what_it_is_for(lab, cses, whole):
    """The trained file in a run."""
    control, operator, _ = cses.load("whole.safetensors")
    measurement = lab.problem()["measurement"]
    positive = cses.apply(control, measurement, operator, model=lab.shared()[0])
    latents = lab.sample(lab.guider(operator=operator, measurement=measurement, positive=positive), lab.dmap(), steps=2)
    assert latents.isfinite().all()
    assert float((latents - lab.sample(lab.guider(), lab.dmap(), steps=2)).abs().max()) > 1e-3


# ---- the model is left alone


@pytest.mark.thorough
@pytest.mark.hosts("all")
def test_after_bf16_and_checkpointing(cses, folders, whole, start, untouched):
    """The arithmetic is another for the time of the training only."""
    cses.train(save_name="half", steps=1, precision="bf16", gradient_checkpointing=True)
    trained, (expected, *_) = cses.state(folders.controlnet / "half"), cses.state(whole[0])["losses"]
    assert trained["losses"] == [pytest.approx(expected, rel=0.05)] and trained["losses"] != [expected]
    assert {tensor.dtype for tensor in trained["weights"].values()} == {torch.float32}
    assert cses.distance(trained["weights"], start) > 0.1


def test_after_an_error(lab, cses, untouched):
    with lab.decoder(lab.shared()[1], 1, lambda image: 1 / 0), pytest.raises(ZeroDivisionError):
        cses.train(save_name="broken", steps=1)


@pytest.mark.hosts("all")
def test_a_lora(lab, cses, folders, whole):
    """It is part of what the CSE learns to work with. Without it the model is what it was."""
    model, vae = lab.shared()
    picture, before = lab.ksampler(model), cses.Snapshot(model, vae)
    cses.train(save_name="lora", steps=1, model=lab.with_lora(model))
    assert torch.equal(lab.ksampler(model), picture) and before.changed(flags=False) == []
    assert cses.state(folders.controlnet / "lora")["losses"][0] != cses.state(whole[0])["losses"][0]


# ---- the same result in other ways


@pytest.mark.thorough
@pytest.mark.hosts("all")
def test_to_need_less_memory_changes_nothing_but_rounding(cses, folders, whole, start):
    cses.train(save_name="lean", gradient_checkpointing=True, accumulation=2)
    ours, theirs = cses.state(folders.controlnet / "lean"), cses.state(whole[0])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert cses.distance(ours["weights"], theirs["weights"]) < ROUNDING * cses.distance(theirs["weights"], start)


def test_a_folder_is_a_batch_and_a_model_what_it_was_loaded_as(lab, cses, folders, whole):
    """The pictures of the batch as files, 8 bits of which both are trained on; and weights that were loaded under inference mode."""
    model, vae = lab.fresh()
    assert any(p.is_inference() for p in model.model.diffusion_model.parameters())
    cses.fill(folders.input / "photos", 3)
    cses.train(save_name="sub/from-folder", folder="input/photos", pictures=None, model=model, vae=vae)
    same_training(cses, folders.controlnet / "sub" / "from-folder", whole[0])
    _, described = cses.checkpoint.read_cse(folders.controlnet / "sub" / "from-folder.safetensors")
    assert described.source == "input/photos" and described.pictures == 3
    assert "sub/from-folder.safetensors" in cses.folders.cse_files()


# ---- going on


def test_interrupted(lab, cses, folders, whole, monkeypatch, untouched):
    """By the user's Cancel, behind step 2: both files are of step 2, and the same settings go on. The model is left as it was."""
    management = lab.comfy.model_management

    def cancel(step):
        if step == 2:
            management.interrupt_current_processing(True)

    with cses.watching(monkeypatch, cancel) as shown, pytest.raises(management.InterruptProcessingException):
        cses.train(save_name="cancelled")
    assert not management.processing_interrupted() and [value for value, _, _ in shown] == [1, 2]
    path = folders.controlnet / "cancelled.safetensors"
    weights, described = cses.checkpoint.read_cse(path)
    trained = cses.state(path)
    assert described.steps == trained["step"] == 2
    assert all(torch.equal(weights[name], tensor.half()) for name, tensor in trained["weights"].items())

    with cses.watching(monkeypatch) as shown:
        cses.train(save_name="cancelled", licence="CC0")
    assert [value for value, _, _ in shown] == [3]
    same_training(cses, path, whole[0])
    same_file(cses, path, whole[0])


def test_crashed(cses, folders, whole, monkeypatch):
    """Nothing could be saved at the end: it goes on from the last save."""
    session = cses.session.Session
    save = session.save

    def only_step_1(self):
        if self.trainer.step == 1:
            save(self)

    def crash(step):
        if step == 2:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch, cses.watching(monkeypatch, crash), pytest.raises(RuntimeError, match="power"):
        patch.setattr(session, "save", only_step_1)
        cses.train(save_name="crashed", save_every=1)
    assert cses.state(folders.controlnet / "crashed")["step"] == 1
    with cses.watching(monkeypatch) as shown:
        cses.train(save_name="crashed")
    assert [value for value, _, _ in shown] == [2, 3]
    same_training(cses, folders.controlnet / "crashed", whole[0])


def no_step(cses, patch):
    def fail(*_):
        raise AssertionError("a finished training computes no loss")

    patch.setattr(cses.trainer, "batch_loss", fail)


def test_finished(cses, copied, monkeypatch):
    """The same settings load what is there. Its fewer steps, too."""
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (copied, copied.with_suffix(".training"))}
    no_step(cses, monkeypatch)
    for steps in (STEPS, STEPS - 1):
        control, curve, validation, summary = cses.train(save_name="copied", steps=steps)
        assert "3 steps of 2" in summary and curve.shape == (1, 360, 640, 3) and validation.shape[1] == 32
        assert control.control_model is not None
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


@pytest.mark.parametrize("kind", ["missing", "older"])
def test_finished_but_for_its_file(cses, folders, whole, copied, monkeypatch, kind):
    """The program ended between its two files, or the user removed one."""
    copied.unlink()
    if kind == "older":
        weights, described = cses.checkpoint.read_cse(whole[0])
        cses.save({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, copied, **{**vars(described), "steps": 1})
    no_step(cses, monkeypatch)
    *_, summary = cses.train(save_name="copied", licence="CC0")
    assert "3 steps of 2" in summary
    same_file(cses, copied, whole[0])


def test_more_steps(cses, folders, whole):
    """1 step and then 3 are 3."""
    for steps in (1, STEPS):
        cses.train(save_name="more", steps=steps)
        assert cses.checkpoint.read_cse(folders.controlnet / "more.safetensors")[1].steps == steps
    same_training(cses, folders.controlnet / "more", whole[0])


def test_other_settings(lab, cses, copied, monkeypatch):
    """What differs is named, and nothing is written."""
    model = lab.shared()[0]
    before = copied.read_bytes(), copied.with_suffix(".training").read_bytes()
    blur = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=9)
    v_model = lab.call("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
    prompt = [[torch.ones(1, 2, 1024), {}]]
    no_step(cses, monkeypatch)
    for changes, names in (
        ({"seed": 1}, ["seed was 0 and is 1"]),
        ({"batch_size": 3}, ["batch_size was 2 and is 3"]),
        ({"precision": "bf16"}, ["precision was fp32 and is bf16"]),
        ({"hint_range": "-1..1", "snr_gamma": 5.0}, ["hint_range was 0..1 and is -1..1", "snr_gamma was 0.0 and is 5.0"]),
        ({"operator": blur}, ["operator was Super-Resolution (scale 8) and is Gaussian Blur ("]),
        ({"pictures": cses.pictures(3, first=1)}, ["pictures was"]),
        ({"model": v_model}, ["prediction was eps and is v"]),
        ({"model": lab.with_lora(model)}, ["base was"]),
        ({"conditioning": prompt}, ["conditioning was"]),
    ):
        with pytest.raises(ValueError) as error:
            cses.train(save_name="copied", **changes)
        text = str(error.value)
        assert [name for name in [*names, "copied.training", "another name"] if name not in text] == [], text
        assert text.count(" was ") == len([name for name in names if " was" in name]), text
    assert before == (copied.read_bytes(), copied.with_suffix(".training").read_bytes())


def test_a_foreign_file_is_not_overwritten(cses, folders, whole):
    for name, content in (("foreign", whole[0].read_bytes()), ("no-cse", b"letters")):
        path = folders.controlnet / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors exists.*choose another name"):
            cses.train(save_name=name)
        assert path.read_bytes() == content and not path.with_suffix(".training").exists()


def test_a_damaged_training(cses, copied):
    copied.with_suffix(".training").write_bytes(b"letters")
    with pytest.raises(ValueError, match="copied.training.*remove it to start again"):
        cses.train(save_name="copied")


# ---- what goes wrong


def poisoned(cses, patch, at):
    """The loss of step `at` of this process is not a number."""
    calls, loss = [], cses.trainer.batch_loss

    def poison(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == at else 1)

    patch.setattr(cses.trainer, "batch_loss", poison)


def test_a_nan(lab, cses, folders, whole, monkeypatch):
    """It says what may help and keeps the last good file, from which the training can go on."""
    with monkeypatch.context() as patch:
        poisoned(cses, patch, 2)
        with pytest.raises(lab.core.errors.Diverged) as error:
            cses.train(save_name="nan", save_every=1, learning_rate=1e-3)
    path = folders.controlnet / "nan.safetensors"
    for words in ("nan at step 2", "learning_rate 0.001", f"weights of step 1 are in {path}"):
        assert words in str(error.value)
    weights, described = cses.checkpoint.read_cse(path)
    assert described.steps == 1 and all(tensor.isfinite().all() for tensor in weights.values())
    cses.train(save_name="nan")
    same_training(cses, path, whole[0])


def test_a_nan_before_the_first_save(lab, cses, folders, monkeypatch):
    poisoned(cses, monkeypatch, 2)
    with pytest.raises(lab.core.errors.Diverged, match="Nothing was saved"):
        cses.train(save_name="nothing")
    assert list(folders.controlnet.glob("nothing*")) == []


def test_weights_that_half_precision_cannot_hold(lab, cses, folders, copied, monkeypatch):
    """They never get into a file."""
    before = copied.read_bytes()
    run = cses.trainer.Trainer.run

    def growing(self):
        for loss in run(self):
            with torch.no_grad():
                self.weights[0][0].fill_(1e6)
            yield loss

    monkeypatch.setattr(cses.trainer.Trainer, "run", growing)
    with pytest.raises(lab.core.errors.Diverged, match="learning_rate.*step 3 are in"):
        cses.train(save_name="copied", steps=4)
    assert copied.read_bytes() == before


@pytest.mark.parametrize("place", ["state", "file"])
def test_a_full_disk(cses, folders, copied, monkeypatch, place):
    import safetensors.torch

    before = copied.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(_, path, *__):
        Path(path).write_bytes(b"half of it")
        raise full

    with monkeypatch.context() as patch:
        if place == "file":
            patch.setattr(safetensors.torch, "save_file", fail)
        else:
            patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="copied.*could not be written.*disk full.*No space left"):
            cses.train(save_name="copied", steps=4)
    assert copied.read_bytes() == before and list(folders.controlnet.glob("*.part")) == []
    *_, summary = cses.train(save_name="copied", steps=4)
    assert "4 steps of 2" in summary


PICTURES = {
    "none": ({"pictures": None}, "TrainCSE: pictures: connect a batch of pictures, or choose a folder"),
    "both": ({"folder": "input/three", "pictures": torch.zeros(3, 40, 40, 3)}, "TrainCSE: pictures: .*not both"),
    "fewer than a batch": ({"batch_size": 4}, "pictures: there are 3, fewer than batch_size 4"),
    "fewer in a folder": ({"batch_size": 4, "folder": "input/three", "pictures": None}, "there are 3, fewer than batch_size 4"),
    "an empty folder": ({"folder": "input/empty", "pictures": None}, "empty holds no pictures"),
    "a missing folder": ({"folder": "input/missing", "pictures": None}, "folder.*missing"),
    "a folder elsewhere": ({"folder": "../controlnet", "pictures": None}, "folder: '../controlnet' must be input/NAME"),
    "a folder above": ({"folder": "input/../controlnet", "pictures": None}, "folder: 'input/../controlnet' must be input/NAME"),
    "an absolute folder": ({"folder": "/etc", "pictures": None}, "folder: '/etc' must be input/NAME"),
    "alpha": ({"pictures": torch.ones(3, 40, 40, 4)}, "TrainCSE: pictures: .*alpha"),
    "a name that is too long": ({"save_name": "x" * 300}, r"save_name: the name x+\.\.\. is 300 bytes long; 200 are the most"),
    "a name above": ({"save_name": "../x"}, r"save_name: '\.\./x' is no name"),
    "an absolute name": ({"save_name": "/tmp/dmap-nowhere/x"}, "save_name: '/tmp/dmap-nowhere/x' is no name"),
    "a name above, hidden": ({"save_name": "sub/../../x"}, "save_name: 'sub/../../x' is no name"),
    "a Windows name": ({"save_name": "..\\x"}, "save_name: .* is no name"),
    "no name": ({"save_name": " "}, "save_name: .* is no name"),
    "a size that no latent has": ({"size": 36}, "size is 36"),
    "parts of nothing": ({"accumulation": 3}, "accumulation is 3; it must divide batch_size"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_refused(lab, cses, folders, monkeypatch, kind):
    """Before anything is loaded, computed or written."""
    changes, message = PICTURES[kind]
    cses.fill(folders.input / "three", 3)
    (folders.input / "empty").mkdir(exist_ok=True)
    cses.fill(folders.controlnet, 2)

    def fail(*_, **__):
        raise AssertionError("models are loaded")

    with monkeypatch.context() as patch:
        patch.setattr(cses.nodes_training, "training", fail)
        with pytest.raises(ValueError, match=message):
            cses.train(**{"save_name": "refused", **changes})
    written = [path for path in folders.root.rglob("*") if path.stem in ("refused", "x") and path.suffix != ".png"]
    assert written == [] and not Path("/tmp/x.safetensors").exists()


def test_a_crop_that_the_operator_cannot_take(lab, cses, folders):
    mask = torch.zeros(1, 64, 64)
    mask[:, :8] = 1
    for operator, words in (
        (lab.call("DMAP_OperatorInpainting", mask=mask), "mask is 64x64 and the picture 32x32"),
        (lab.call("DMAP_OperatorSuperResolution", scale=3), "32x32"),
        (lab.call("DMAP_OperatorGaussianBlur", sigma=20.0, kernel_size=151), "32x32"),
    ):
        with pytest.raises(ValueError, match=words):
            cses.train(save_name="crop", operator=operator)


def test_prompts_that_cannot_be_trained_with(lab, cses, whole):
    plain = lab.call("DMAP_DMAPUnconditional", model=lab.shared()[0])
    control, operator, _ = cses.load("whole.safetensors")
    masked = [[plain[0][0], {**plain[0][1], "mask": torch.ones(1, 8, 8)}]]
    for conditioning in (plain * 2, masked, cses.apply(control, lab.problem()["measurement"], operator)):
        with pytest.raises(ValueError, match="conditioning: training takes one prompt"):
            cses.train(save_name="prompts", conditioning=conditioning)


def test_models_for_inpainting_are_refused(lab, cses, monkeypatch):
    monkeypatch.setitem(lab.shared()[0].model.model_config.unet_config, "in_channels", 9)
    with pytest.raises(ValueError, match="model: its network reads more than latents"):
        cses.train(save_name="inpainting")


def test_unreadable_files(cses, folders, caplog):
    folder = cses.fill(folders.input / "mixed", 3)
    (folder / "bad.png").write_bytes(b"letters")
    with pytest.raises(ValueError, match=r"1 of 4 files in .*mixed cannot be read: bad\.png"):
        cses.train(save_name="mixed", folder="input/mixed", pictures=None)
    with caplog.at_level("WARNING"):
        *_, summary = cses.train(save_name="mixed", steps=1, folder="input/mixed", pictures=None, unreadable="skip")
    assert "3 pictures (input/mixed)" in summary
    assert [r for r in caplog.records if "bad.png" in r.getMessage() and "left out" in r.getMessage()] != []
    (folder / "moving.gif").touch()
    with caplog.at_level("INFO"):
        cses.train(save_name="mixed", steps=1, folder="input/mixed", pictures=None, unreadable="skip")
    assert f"TrainCSE: 1 file of {folder} ignored" in caplog.text and "moving.gif" in caplog.text


@pytest.mark.thorough
def test_what_makes_it_run_again(lab, cses, folders, monkeypatch):
    """New pictures, and a trained file that is not there any more. Not the training itself: its file is there afterwards, and was not before."""
    node = lab.NODES["DMAP_TrainCSE"]
    folder = cses.fill(folders.input / "again", 2)

    def fingerprint(folder="input/again", save_name="again"):
        return node.fingerprint_inputs(folder=folder, save_name=save_name, steps=1)

    first = fingerprint()
    cses.train(save_name="again", steps=1, folder="input/again", pictures=None)
    assert (folders.controlnet / "again.safetensors").exists() and fingerprint() == first == fingerprint()
    (folders.controlnet / "again.safetensors").unlink()
    removed = fingerprint()
    assert removed != first and fingerprint() == removed
    cses.train(save_name="again", steps=1, folder="input/again", pictures=None)
    assert fingerprint() == removed
    (folder / "settings.json").touch()  # no picture
    assert fingerprint() == removed
    cses.fill(folder, 3)
    assert fingerprint() != removed
    assert fingerprint(folder=None, save_name=None) == fingerprint(folder="", save_name="x") == fingerprint(cses.NO_FOLDER, "x")


def loops(folders):
    """Links with which a walk through the folders would not end."""
    links = {folders.input / "link": "/", folders.output / "a": ".", folders.output / "b": "."}
    for link, target in links.items():
        link.symlink_to(target)
    return list(links)


def test_nothing_is_walked_to_describe_the_node(lab, cses, folders, monkeypatch):
    """A list of all folders would be made whenever ComfyUI starts or a page is loaded; with these links it had no end."""
    links = loops(folders)
    seen = []
    for name in ("scandir", "listdir", "walk"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path=".", *given, real=real, **more: seen.append(str(path)) or real(path, *given, **more))
    schema = lab.NODES["DMAP_TrainCSE"].define_schema()
    lab.NODES["DMAP_TrainCSE"].GET_NODE_INFO_V1()
    assert [path for path in seen if path.startswith((str(folders.input), str(folders.output)))] == []
    (chosen,) = [i for i in schema.inputs if i.id == "folder"]
    assert chosen.get_io_type() == "STRING" and chosen.default == cses.NO_FOLDER

    # what is chosen is looked at alone
    cses.fill(folders.input / "photos-of-mine", 2)
    seen.clear()
    assert cses.folders.picture_folder("input/photos-of-mine") == folders.input / "photos-of-mine"
    assert cses.folders.picture_folder("output/a/b/a") == folders.output / "a/b/a" and seen == []
    with pytest.raises(ValueError, match=r"folder: there is no input/photo\. There are .*input/photos-of-mine"):
        cses.folders.picture_folder("input/photo")
    assert sorted(seen) == sorted(map(str, (folders.input, folders.output)))
    for link in links:
        link.unlink()


def test_a_folder_that_is_linked(cses, folders, tmp_path):
    """As those are who keep their pictures on another disk."""
    (folders.input / "linked").symlink_to(cses.fill(tmp_path / "disk", 3))
    cses.train(save_name="linked", steps=1, folder="input/linked", pictures=None)
    for name in (" input/linked/ ", "input\\linked"):
        assert cses.folders.picture_folder(name) == folders.input / "linked"


@pytest.mark.parametrize(
    "name", ["input", "input/", "/input/x", "input//x", "input/./x", "input/x/..", "input/.hidden", "temp/x", "", "input/a\0b", "x"]
)
def test_names_of_no_folder(cses, folders, name):
    with pytest.raises(ValueError, match="must be input/NAME or output/NAME"):
        cses.folders.picture_folder(name)


def test_many_folders_are_not_all_named(cses, folders):
    with cses.Folders(folders.root / "few") as few:
        with pytest.raises(ValueError, match="There are no folders in ComfyUI's input and output directories yet"):
            cses.folders.picture_folder("input/x")
        for i in range(30):
            (few.input / f"{i:02d}").mkdir()
        with pytest.raises(ValueError, match="input/00, .*input/19 and 10 more"):
            cses.folders.picture_folder("input/" + "x" * 300)


def test_a_second_training_of_one_file(lab, cses, folders, monkeypatch):
    """By the command line or another ComfyUI on the same models folder."""
    with cses.checkpoint.training_files(folders.controlnet / "busy.safetensors"), monkeypatch.context() as patch:
        patch.setattr(cses.nodes_training, "training", None)
        with pytest.raises(ValueError, match=r"busy\.safetensors is being written by another training \(process [0-9]+\); wait for it"):
            cses.train(save_name="busy")
    cses.train(save_name="busy", steps=1)
    assert not list(folders.controlnet.glob("*.lock"))


def test_an_operator_that_no_file_can_describe(lab, cses, folders, monkeypatch):
    """64 masks without any order: known before the training and not after it."""
    mask = (torch.rand(64, 320, 320, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    operator = lab.call("DMAP_OperatorInpainting", mask=mask)
    monkeypatch.setattr(cses.nodes_training, "training", None)
    with pytest.raises(ValueError, match="description of the CSE would be [0-9]+ characters long.*single mask"):
        cses.train(save_name="masks", operator=operator, size=320, batch_size=64, pictures=torch.zeros(64, 40, 40, 3))
    assert not (folders.controlnet / "masks.safetensors").exists()


# ---- other families


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["SD1.5", pytest.param("SDXL", marks=pytest.mark.nightly)])
def test_other_families(lab, cses, folders, tmp_path, monkeypatch, name):
    """One step, and the file is a ControlNet for that family. SDXL reads pooled conditioning and sizes as well."""
    import families

    monkeypatch.setattr(cses.session, "write_state", lambda *_: None)  # 1 GB for SDXL
    with families.Files(tmp_path), cses.Folders(folders.root / name):
        loaded = families.Loaded(name, tmp_path)
        before = cses.Snapshot(loaded.model, loaded.vae)
        inputs = {"model": loaded.model, "vae": loaded.vae, "conditioning": loaded.condition(11)}
        control, _, _, summary = cses.train(save_name="family", steps=1, gradient_checkpointing=True, **inputs)
        assert before.changed() == []
        assert loaded.family.config in summary
        assert (control.control_model.num_classes is None) == (name != "SDXL")
        cses.controlnet.check_base(control, loaded.model, "cse")
        network = control.control_model
        assert all(float(conv[0].weight.abs().max()) > 0 for conv in network.zero_convs)
        measurement = lab.problem()["measurement"]
        sr8 = lab.call("DMAP_OperatorSuperResolution", scale=8)
        positive = cses.apply(control, measurement, sr8, positive=loaded.condition(11), strength=10.0)
        z = families.noise(1, 4, 4, 4, seed=1)
        plain, changed = (families.denoised(z, 1.0, **loaded.problem(positive=p)) for p in (loaded.condition(11), positive))
        assert float((changed - plain).abs().max()) > 1e-4


@pytest.mark.hosts("all")
def test_a_v_model(lab, cses, folders, whole):
    """Its loss is of its own target, which is the other one's but for a factor that every noise level has."""
    model = lab.call("ModelSamplingDiscrete", model=lab.shared()[0], sampling="v_prediction", zsnr=False)
    control, _, _, summary = cses.train(save_name="v", steps=1, model=model)
    assert "(v-prediction)" in summary
    assert cses.state(folders.controlnet / "v")["losses"][0] != cses.state(whole[0])["losses"][0]
    cses.controlnet.check_base(control, model, "cse")
    with pytest.raises(ValueError, match="v-prediction"):
        cses.controlnet.check_base(control, lab.shared()[0], "cse")


# ---- pictures of the model itself


def generate(lab, count=2, **changes):
    model, vae = lab.shared()
    inputs = {"model": model, "vae": vae, "positive": lab.call("DMAP_DMAPUnconditional", model=model), "steps": 2, "cfg": 1.0}
    inputs |= {"width": 40, "height": 32, "seed": 5, "save_name": "own", **changes}
    return lab.call("DMAP_SelfGenerateCSEDataset", count=count, **inputs)


def files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("*.png"))}


def test_generated_pictures(lab, cses, folders, monkeypatch):
    with cses.watching(monkeypatch) as shown:
        pictures, folder = generate(lab)
    assert folder == "output/own" and pictures.shape == (2, 32, 40, 3) and pictures.dtype == torch.float32
    there = files(folders.output / "own")
    assert list(there) == ["000000.png", "000001.png"]
    for name, picture in zip(there, pictures, strict=True):
        saved = cses.pictures_of_core.to_tensor(cses.pictures_of_core.open_rgb(folders.output / "own" / name))
        torch.testing.assert_close(lab.as_core(picture[None])[0], saved, rtol=0, atol=1e-6)
    assert float((pictures[0] - pictures[1]).abs().mean()) > 0.01 and float(pictures.std()) > 0.01
    assert [(value, total) for value, total, picture in shown if picture is not None] == [(1, 2), (2, 2)]

    # more of them: the first ones are kept
    more, _ = generate(lab, 3)
    after = files(folders.output / "own")
    assert {name: after[name] for name in there} == there and len(after) == 3
    assert torch.equal(more[:2], pictures)
    # fewer: they are there already
    fewer, _ = generate(lab, 1)
    assert torch.equal(fewer, pictures[:1]) and files(folders.output / "own") == after
    # anew: the same
    fresh, folder = generate(lab, 3, save_name="deep/fresh")
    assert torch.equal(fresh, more) and folder == "output/deep/fresh"
    # every picture depends on its own seed alone
    later, _ = generate(lab, 1, seed=6, save_name="later")
    assert torch.equal(later, more[1:2])


def test_generated_pictures_are_those_of_the_stock_sampler(lab, cses):
    """Euler-ancestral steps, as the paper's authors made theirs."""
    model, vae = lab.shared()
    plain = lab.call("DMAP_DMAPUnconditional", model=model)
    inputs = {"sampler_name": "euler_ancestral", "scheduler": "normal", "positive": plain, "negative": plain, "denoise": 1.0}
    latents = lab.call("KSampler", model=model, seed=5, steps=2, cfg=1.0, latent_image=lab.empty(), **inputs)
    expected = lab.call("VAEDecode", vae=vae, samples=latents)
    pictures, _ = generate(lab, 1, width=32, save_name="stock")
    torch.testing.assert_close(pictures, expected.clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_a_training_takes_the_folder(lab, cses, folders):
    _, folder = generate(lab, 2, save_name="sub/train")
    assert folder == "output/sub/train"
    *_, summary = cses.train(save_name="self", steps=1, folder=folder, pictures=None)
    assert f"2 pictures ({folder})" in summary


def test_other_settings_in_the_same_folder(lab, cses, folders):
    negative = [[torch.ones(1, 2, 1024), {}]]
    generate(lab, 1, save_name="mixing")
    before = files(folders.output / "mixing")
    model = lab.shared()[0]
    for changes, words in (
        ({"steps": 3}, "steps was 2 and is 3"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"width": 32}, "size was"),
        ({"cfg": 2.0, "negative": negative}, "cfg was 1.0 and is 2.0"),
        ({"positive": negative}, "prompts was"),
        ({"model": lab.with_lora(model)}, "base was"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            generate(lab, 2, save_name="mixing", **changes)
    assert files(folders.output / "mixing") == before


def test_generation_is_interrupted(lab, cses, folders, monkeypatch):
    management = lab.comfy.model_management

    def cancel(value):
        if value == 2:
            management.interrupt_current_processing(True)

    with cses.watching(monkeypatch, cancel), pytest.raises(management.InterruptProcessingException):
        generate(lab, 3, save_name="cut")
    assert not management.processing_interrupted()
    before = files(folders.output / "cut")
    assert list(before) == ["000000.png", "000001.png"] and list((folders.output / "cut").glob("*.part")) == []
    pictures, _ = generate(lab, 3, save_name="cut")
    after = files(folders.output / "cut")
    assert {name: after[name] for name in before} == before and len(pictures) == 3


def test_generation_is_interrupted_within_a_picture(lab, cses, folders):
    management = lab.comfy.model_management
    calls = []

    def cancel(apply_model, arguments):
        calls.append(arguments["timestep"])
        management.interrupt_current_processing(True)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = lab.shared()[0].clone()
    model.set_model_unet_function_wrapper(cancel)
    with pytest.raises(management.InterruptProcessingException):
        generate(lab, 2, save_name="within", model=model, steps=4)
    assert len(calls) == 1 and not management.processing_interrupted()
    assert [path.name for path in (folders.output / "within").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("name", ["../x", "/tmp/dmap-nowhere/x", "a/../../x", "", "..\\x"])
def test_generated_pictures_stay_in_the_output_folder(lab, folders, name):
    with pytest.raises(ValueError, match="save_name: .* is no name"):
        generate(lab, 1, save_name=name)
    assert not (folders.root / "x").exists() and not Path("/tmp/dmap-nowhere/x").is_dir()


def test_a_folder_with_other_files(lab, folders):
    (folders.output / "mine").mkdir()
    (folders.output / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="mine holds other files"):
        generate(lab, 1, save_name="mine")
    assert [path.name for path in (folders.output / "mine").iterdir()] == ["letter.txt"]


def test_cfg_without_a_negative(lab, folders):
    with pytest.raises(ValueError, match="cfg is 2.0 but negative is not connected"):
        generate(lab, 1, cfg=2.0, save_name="cfg")
    assert not (folders.output / "cfg").exists()
