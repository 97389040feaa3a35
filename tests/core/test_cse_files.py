"""Files of a training: what is written and read back, what strangers may send, and a disk that fills up half way."""

import errno
import json
import os
import pickle
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmap_core import files
from dmap_core.backends.keys import LDM_MARK, to_diffusers
from dmap_core.cse import checkpoint
from dmap_core.cse.checkpoint import PREFIX, SaveError, read_cse, read_state, write_cse, write_state
from dmap_core.cse.identity import check_same, identity
from dmap_core.cse.metadata import KEY, LONGEST, CSEMetadata, read_metadata
from dmap_core.cse.settings import TrainingSettings
from dmap_core.operators import Inpainting, SuperResolution, centred_box, from_spec


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    name: normal(i, *shape)
    for i, (name, shape) in enumerate(
        {
            "time_embed.0.weight": (8, 4),
            "input_blocks.0.0.weight": (4, 4, 3, 3),
            "input_blocks.1.0.in_layers.2.weight": (4, 4, 3, 3),
            "input_blocks.2.0.op.weight": (4, 4, 3, 3),
            "input_blocks.3.0.in_layers.2.weight": (4, 4, 3, 3),
            "input_blocks.3.1.proj_in.weight": (4, 4),
            "middle_block.1.norm.weight": (4,),
            "middle_block_out.0.weight": (4, 4, 1, 1),
            "zero_convs.3.0.bias": (4,),
            "input_hint_block.0.weight": (16, 3, 3, 3),
            "input_hint_block.14.weight": (4, 16, 3, 3),
        }.items()
    )
}
DESCRIBED = CSEMetadata(
    operator=SuperResolution(8).spec(),
    base="512-base-ema.safetensors",
    fingerprint="0123456789abcdef",
    prediction="v",
    hint_range="-1..1",
    steps=5000,
    batch_size=64,
    learning_rate=5e-6,
    size=512,
    seed=2**63,
    pictures=100,
    source="self-generated \u00e4",
    licence="MIT",
)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- a CSE's file


def test_a_cse_comes_back(tmp_path):
    path = tmp_path / "new folder" / "cse.safetensors"
    write_cse(path, WEIGHTS, DESCRIBED, torch.float32)
    weights, metadata = read_cse(str(path))
    assert same(weights, WEIGHTS)
    assert metadata == DESCRIBED
    assert isinstance(from_spec(metadata.operator), SuperResolution)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cse_is_kept_in_half_precision(tmp_path):
    path = tmp_path / "cse.safetensors"
    transposed = {name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in WEIGHTS.items()}
    write_cse(path, {name: torch.nn.Parameter(tensor) for name, tensor in transposed.items()}, DESCRIBED)
    assert same(read_cse(path)[0], {name: tensor.half() for name, tensor in WEIGHTS.items()})


def test_tensors_that_share_memory(tmp_path):
    row = torch.arange(8.0)
    weights = WEIGHTS | {"zero_convs.0.0.bias": row[:4], "zero_convs.1.0.bias": row[4:], "zero_convs.2.0.bias": row[:4]}
    write_cse(tmp_path / "cse.safetensors", weights, DESCRIBED, torch.float32)
    assert same(read_cse(tmp_path / "cse.safetensors")[0], weights)


@pytest.mark.parametrize("kind", ["diffusers", "prefixed", "checkpoint", "prefixed checkpoint"])
def test_other_ways_to_write_a_controlnet(tmp_path, kind):
    state = to_diffusers(WEIGHTS) if kind == "diffusers" else WEIGHTS
    if "prefixed" in kind:
        state = {f"{PREFIX}{name}": tensor for name, tensor in state.items()}
    path = tmp_path / ("cse.pth" if "checkpoint" in kind else "cse.safetensors")
    if "checkpoint" in kind:
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path, {"format": "pt"})
    weights, metadata = read_cse(path)
    assert same(weights, WEIGHTS)
    assert metadata is None


def test_what_is_no_controlnet(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_down.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match=rf"lora\.safetensors is no ControlNet .*{LDM_MARK}"):
        read_cse(path)
    save_file({name: t for name, t in WEIGHTS.items() if name != LDM_MARK}, path)
    with pytest.raises(ValueError, match=r"lora\.safetensors is no ControlNet"):
        read_cse(path)
    save_file({**to_diffusers(WEIGHTS), "transformer.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"lora\.safetensors: the tensor transformer\.weight "):
        read_cse(path)
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(ValueError, match=r"lora\.safetensors"):
        read_cse(path)
    with pytest.raises(ValueError, match=r"there is no .*missing\.safetensors"):
        read_cse(tmp_path / "missing.safetensors")


def test_a_bad_description_names_the_file(tmp_path):
    path = tmp_path / "strange.safetensors"
    save_file(WEIGHTS, path, {KEY: "{"})
    with pytest.raises(ValueError, match=r"strange\.safetensors: its description .*not JSON"):
        read_cse(path)


# ---- metadata


def test_metadata_of_an_inpainting_cse():
    described = replace(DESCRIBED, operator=Inpainting(centred_box((512, 512), (100, 200))).spec())
    written = described.write()
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in written.items())
    assert len(written[KEY]) < LONGEST
    assert read_metadata(written) == described


def test_foreign_and_missing_metadata():
    assert read_metadata(None) is None
    assert read_metadata({}) is None
    assert read_metadata({"format": "pt", "modelspec.title": "another"}) is None
    assert read_metadata({KEY: "{}"}) == CSEMetadata()
    found = read_metadata({KEY: json.dumps({"base": "x", "steps": 3, "learning_rate": 1, "not known": [1, 2]})})
    assert found == CSEMetadata(base="x", steps=3, learning_rate=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{'base': 1}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"steps": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"base": 3}', "base of the wrong kind: '3'"),
        ('{"base": null}', "base of the wrong kind"),
        ('{"licence": ["a"]}', "licence of the wrong kind"),
        ('{"steps": "5"}', "steps of the wrong kind"),
        ('{"steps": 5.0}', "steps of the wrong kind"),
        ('{"steps": true}', "steps of the wrong kind: 'True'"),
        ('{"size": ' + "9" * 400 + "}", "size of the wrong kind"),
        ('{"learning_rate": false}', "learning_rate of the wrong kind"),
        ('{"learning_rate": "1e-5"}', "learning_rate of the wrong kind"),
        ('{"learning_rate": ' + "9" * 400 + "}", "learning_rate of the wrong kind"),
        ('{"operator": "SuperResolution"}', "operator of the wrong kind"),
        ('{"operator": true}', "operator of the wrong kind"),
        ('{"hint_range": "0..255"}', "unknown hint range or prediction: '0..255'"),
        ('{"prediction": "sample"}', "unknown hint range or prediction: .*'sample'"),
        (json.dumps({"base": "x" * LONGEST}), f"{LONGEST + 12} characters long"),
    ],
    ids=lambda value: value[:25],
)
def test_metadata_from_strangers(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_metadata({KEY: text})
    assert KEY in str(caught.value) and len(str(caught.value)) < 250


def test_the_summary_tells_what_is_known():
    text = DESCRIBED.summary()
    for part in (
        "Super-Resolution",
        "512-base-ema",
        "v-prediction",
        "100 pictures",
        "self-generated",
        "5000 steps of 64",
        "512x512",
        "5e-06",
        "-1..1",
        "MIT",
    ):
        assert part in text
    text = CSEMetadata().summary()
    assert "unknown" in text and "not stated" in text
    assert read_metadata({KEY: '{"operator": {}, "learning_rate": NaN}'}).summary().count("unknown") == 2


# ---- written whole or not at all


def half_written(error):
    """A writer that stops in the middle of its file."""

    def write(state, path, *_):
        Path(path).write_bytes(b"half of")
        raise error

    return write


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file"),
    SafetensorError("I/O error"),
]
CSE = ("cse.safetensors", lambda path: write_cse(path, WEIGHTS, DESCRIBED), (safetensors.torch, "save_file"))
STATE = ("cse.training", lambda path: write_state(path, {"step": 1}), (torch, "save"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("name", "write", "place"), [CSE, STATE], ids=["cse", "state"])
def test_a_save_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, name, write, place, error):
    path = tmp_path / name
    monkeypatch.setattr(*place, half_written(error))
    with pytest.raises(SaveError, match=rf"{name} could not be written") as caught:
        write(path)
    assert "untouched" not in str(caught.value) and str(error) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write(path)
    before = path.read_bytes()
    monkeypatch.setattr(*place, half_written(error))
    with pytest.raises(SaveError, match=rf"{name} could not be written.*untouched"):
        write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, function):
    path = tmp_path / "cse.training"
    write_state(path, {"step": 1})

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(SaveError, match=r"cse\.training could not be written"):
        write_state(path, {"step": 2})
    monkeypatch.undo()
    assert read_state(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "cse.safetensors", tmp_path / "file" / "deeper" / "cse.safetensors"):
        with pytest.raises(SaveError, match=r"cse\.safetensors could not be written"):
            write_cse(path, WEIGHTS, DESCRIBED)
    assert (tmp_path / "file").read_text() == "in the way"
    assert issubclass(SaveError, OSError)


@pytest.mark.parametrize(("name", "write", "place"), [CSE, STATE], ids=["cse", "state"])
def test_everybody_may_read_what_is_written(tmp_path, name, write, place):
    path = tmp_path / name
    mask = os.umask(0o077)
    try:
        write(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_later_save_takes_the_place_of_the_first(tmp_path):
    path = tmp_path / "cse.safetensors"
    write_cse(path, WEIGHTS, DESCRIBED)
    for left in ("cse.safetensors.part", "cse.safetensors.77.part", "cse.training.78.part"):
        (tmp_path / left).write_bytes(b"left behind by a crash")
    doubled = {name: 2 * tensor for name, tensor in WEIGHTS.items()}
    with checkpoint.training_files(path):
        write_cse(path, doubled, replace(DESCRIBED, steps=6000), torch.float32)
    assert same(load_file(path), doubled) and read_cse(path)[1].steps == 6000
    assert list(tmp_path.iterdir()) == [path]


# ---- states


def test_a_state_comes_back(tmp_path):
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    settings = TrainingSettings()
    state = {
        "identity": settings.identity() | {"operator": SuperResolution(4).spec()},
        "weights": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": [0.5, 0.25],
        "scaler": None,
    }
    write_state(tmp_path / "a.training", state)
    found = read_state(tmp_path / "a.training")
    assert found.keys() == state.keys()
    assert same(found["weights"], network.state_dict())
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert found["losses"] == [0.5, 0.25] and found["scaler"] is None
    check_same(found["identity"], state["identity"], tmp_path / "a.training")


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [False, True], ids=["in a state", "a plain pickle"])
def test_code_in_a_state_does_not_run(tmp_path, plain):
    path, crater = tmp_path / "evil.training", tmp_path / "crater"
    if plain:
        path.write_bytes(pickle.dumps(Bomb(crater), protocol=2))
    else:
        torch.save({"identity": {}, "step": Bomb(crater)}, path)
    with pytest.raises(ValueError, match=r"evil\.training is not a training state .*remove it"):
        read_state(path)
    assert not crater.exists()
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert crater.exists()  # the bomb was a live one


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text " + b, lambda b: b[:20] + b"\xff" * 40 + b[60:]]
)
def test_a_damaged_state(tmp_path, damage):
    path = tmp_path / "a.training"
    write_state(path, {"weights": WEIGHTS})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.training is not a training state"):
        read_state(path)


def test_what_differs_between_two_trainings_is_named():
    wanted = {"seed": 0, "size": 512, "operator": {"operator": "SuperResolution", "scale": 8}, "pictures": ["a.png"] * 50}
    path = Path("cse.training")
    check_same(dict(wanted), wanted, path)
    check_same(wanted | {"more": 1}, wanted, path)
    found = wanted | {"size": 256, "pictures": ["b.png"] * 50}
    with pytest.raises(ValueError, match=r"cse\.training .*size was 256 and is 512; pictures was \['b") as caught:
        check_same(found, wanted, path)
    assert "seed" not in str(caught.value) and "operator" not in str(caught.value) and len(str(caught.value)) < 400
    del found["seed"]
    with pytest.raises(ValueError, match="seed was None and is 0"):
        check_same(found, wanted, path)


def described(*conditioning):
    prior = SimpleNamespace(fingerprint="0123", prediction="eps", conditioning=lambda: conditioning)
    return identity(prior, TrainingSettings(), SuperResolution(4), ["a.png 100"])


def test_a_prompt_is_the_same_but_for_rounding(tmp_path):
    """Text encoders round differently, more so in half precision; other prompts, and those of other lengths, are others."""
    prompt, pooled = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(1, 77, 768), (1, 1280)]))
    path = tmp_path / "cse.training"
    write_state(path, {"identity": described(prompt, pooled)})
    found = read_state(path)["identity"]
    for same in (prompt, prompt.half(), prompt.bfloat16(), prompt * 1.001):
        check_same(found, described(same, pooled), path)
    check_same(described(torch.zeros(1, 1, 16)), described(torch.zeros(1, 1, 16)), path)
    other = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(9))
    later = prompt.clone()
    later[:, 40:] = other[:, 40:]  # the prompts part somewhere
    for wanted in ((other, pooled), (later, pooled), (prompt, pooled.flip(1)), (prompt[:, :76], pooled), (prompt,), (0 * prompt, pooled)):
        with pytest.raises(
            ValueError, match=r"other settings: conditioning was [0-9a-f]{16} [0-9a-f]{16} and is [0-9a-f]{16}[^;]*\. Choose"
        ):
            check_same(found, described(*wanted), path)


# ---- settings


def test_the_defaults_are_the_papers():
    settings = TrainingSettings()
    assert (settings.steps, settings.batch_size, settings.learning_rate, settings.size) == (5000, 64, 5e-6, 512)
    assert (settings.resize, settings.flip, settings.snr_gamma, settings.precision) == ((0.8, 2.0), 0.5, 0.0, "fp32")


def test_what_makes_a_training_another_one():
    settings = TrainingSettings()
    assert replace(settings, steps=9, accumulation=4, learning_rate=1e-4).identity() == settings.identity()
    others = {"batch_size": 32, "precision": "bf16", "seed": 1, "size": 256, "resize": (1, 2), "flip": 0.1}
    others |= {"jitter": 0.2, "hint_range": "-1..1", "max_grad_norm": 2.0, "snr_gamma": 5.0, "ema": 0.9, "adam_8bit": True}
    for name, value in others.items():
        other = replace(settings, **{name: value}).identity()
        assert {key for key in other if other[key] != settings.identity()[key]} == {name}
    assert {"steps", "accumulation", "learning_rate", *others} == set(TrainingSettings.names())


NAN, INF = float("nan"), float("inf")
BAD = {
    "steps": [0, -1, 2.0, "5", True, None],
    "batch_size": [0, 1.5, False],
    "accumulation": [0, 3, 128, "2"],
    "learning_rate": [0, -1e-5, 1, NAN, INF, "5e-6", None, [1e-5], True],
    "precision": ["fp64", "", None, 16],
    "seed": [-1, 2**64, 0.5, "1", None, True],
    "size": [0, -512, 512.0, [512], 500],
    "resize": [(0.8,), (2.0, 0.8), (0.05, 1), (1, 11), (1, 2, 3), (NAN, 1), (1, NAN), 1.0, None, ("a", "b"), ()],
    "flip": [-0.1, 1.1, NAN, "0.5", None],
    "jitter": [-0.1, 0.6, NAN, "0.1", None],
    "hint_range": ["0..255", "", None, 1],
    "max_grad_norm": [0, -1, NAN, "1", None],
    "snr_gamma": [-1, NAN, INF, "5", None],
    "ema": [-0.1, 1, NAN, "0.9", None, True],
    "adam_8bit": ["yes", 1, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is "):
        TrainingSettings(**{name: value})


def test_every_setting_is_checked():
    assert set(BAD) == set(TrainingSettings.names())


def test_settings_at_their_limits():
    settings = TrainingSettings(
        steps=1,
        batch_size=6,
        accumulation=6,
        seed=2**64 - 1,
        size=8,
        resize=[1, 1],
        flip=1,
        jitter=0.5,
        max_grad_norm=INF,
        learning_rate=0.5,
    )
    assert settings.resize == (1.0, 1.0)
    TrainingSettings(flip=0, jitter=0, seed=0, resize=(0.1, 10))


def test_a_description_is_not_written_that_would_not_be_read():
    """Its length is known before a training and not after it."""
    described = CSEMetadata(operator={"operator": "Inpainting", "mask": ""})
    longest = replace(described, operator={"operator": "Inpainting", "mask": "x" * (LONGEST - len(described.write()[KEY]))})
    assert read_metadata(longest.write()) == longest
    with pytest.raises(ValueError, match=rf"would be {LONGEST + 1} characters long, and {LONGEST} are the most.*single mask"):
        replace(longest, licence="x").write()
