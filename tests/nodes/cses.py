"""Conditional score estimators for the tests: files with random weights, trainings of a few steps, and what a ControlNet is given.

Imported by fixtures, as families.py is: it needs ComfyUI.
"""

import contextlib
import copy
import importlib
from pathlib import Path

import comfy.utils
import folder_paths
import lab
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

PACK = "dmap_pack"
checkpoint = importlib.import_module(f"{PACK}.dmap_core.cse.checkpoint")
pictures_of_core = importlib.import_module(f"{PACK}.dmap_core.pictures")
keys = importlib.import_module(f"{PACK}.dmap_core.backends.keys")
metadata = importlib.import_module(f"{PACK}.dmap_core.cse.metadata")
network = importlib.import_module(f"{PACK}.dmap_core.cse.network")
session = importlib.import_module(f"{PACK}.dmap_core.cse.session")
settings = importlib.import_module(f"{PACK}.dmap_core.cse.settings")
trainer = importlib.import_module(f"{PACK}.dmap_core.cse.trainer")
validation = importlib.import_module(f"{PACK}.dmap_core.cse.validation")
controlnet = importlib.import_module(f"{PACK}.nodes.host.controlnet")
folders = importlib.import_module(f"{PACK}.nodes.host.folders")
prior = importlib.import_module(f"{PACK}.nodes.host.prior")
training = importlib.import_module(f"{PACK}.nodes.host.training")
nodes_training = importlib.import_module(f"{PACK}.nodes.training")

NO_FOLDER = nodes_training.NO_FOLDER
SR8 = {"operator": "SuperResolution", "scale": 8}


class Folders:
    """ComfyUI's folders for ControlNets, inputs and outputs, empty and for the time of a `with` block."""

    def __init__(self, root):
        self.root = Path(root)
        for name in ("controlnet", "diffusers", "input", "output", "temp"):
            setattr(self, name, self.root / name)
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        self._lists = {kind: folder_paths.folder_names_and_paths[kind] for kind in ("controlnet", "diffusers")}
        self._directories = [getattr(folder_paths, f"get_{name}_directory")() for name in ("input", "output", "temp")]
        for kind, (_, extensions) in self._lists.items():
            folder_paths.folder_names_and_paths[kind] = ([str(getattr(self, kind))], extensions)
        self._set([self.input, self.output, self.temp])
        return self

    def __exit__(self, *_):
        folder_paths.folder_names_and_paths.update(self._lists)
        self._set(self._directories)

    def _set(self, directories):
        for name, directory in zip(("input", "output", "temp"), directories, strict=True):
            getattr(folder_paths, f"set_{name}_directory")(str(directory))


# files


def weights(model, seed=0):
    """A ControlNet for the model as it might be after training: what was zero is random, in numbers that half precision holds."""
    state = network.initial_controlnet(model.model.diffusion_model.state_dict(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.14.")):
            state[name] = 0.05 * torch.randn(tensor.shape, generator=generator)
        elif name.startswith("input_hint_block.") and name.endswith(".weight"):
            state[name] = tensor * 6**0.5  # keeps the variance behind the activations: what the hint shows arrives
    return {name: tensor.half() for name, tensor in state.items()}


def save(state, path, **described):
    """Our file of the weights. Without a description it is one that says nothing about itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if described:
        checkpoint.write_cse(path, state, metadata.CSEMetadata(**described))
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def load(name):
    """(CONTROL_NET, OPERATOR, summary)"""
    return lab.call("DMAP_CSEControlNetLoader", cse=name)


def shapes(control):
    return {name: tuple(tensor.shape) for name, tensor in control.control_model.state_dict().items()}


def outputs(control, hint=None):
    """What a loaded network puts out for a fixed input."""
    generator = torch.Generator().manual_seed(5)
    model = control.control_model
    x, hint = torch.randn(1, 4, 4, 4, generator=generator), torch.rand(1, 3, 32, 32, generator=generator) if hint is None else hint
    width = next(tensor.shape[1] for name, tensor in model.state_dict().items() if name.endswith("attn2.to_k.weight"))
    context = torch.randn(1, 3, width, generator=generator)
    put_out = model(x=x, hint=hint, timesteps=torch.tensor([300.0]), context=context)
    return [*put_out["middle"], *put_out["output"]]


# use


def apply(control, measurement, operator, positive=None, strength=1.0, start_percent=0.0, end_percent=1.0, **more):
    if positive is None:
        positive = lab.call("DMAP_DMAPUnconditional", model=lab.shared()[0])
    inputs = {"strength": strength, "start_percent": start_percent, "end_percent": end_percent, **more}
    return lab.call("DMAP_ApplyCSE", conditioning=positive, cse=control, measurement=measurement, operator=operator, **inputs)


@contextlib.contextmanager
def spying(control, change=None):
    """A list of the arguments of every call of a ControlNet's network, whose output `change` may change."""
    seen, model = [], control.control_model
    forward = model.forward

    def spy(*args, **kwargs):
        assert not args
        seen.append({name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()})
        put_out = forward(**kwargs)
        return put_out if change is None else change(put_out)

    model.forward = spy
    try:
        yield seen
    finally:
        del model.forward


def in_double(module):
    """A copy of a network in float64 that autograd may save."""
    with torch.inference_mode(False):
        return copy.deepcopy(module).double().requires_grad_(False)


# training


def pictures(count, first=0, size=40):
    return torch.cat([lab.picture(first + i, size, size) for i in range(count)])


def fill(folder, count, first=0):
    """Write pictures into a folder, as 8-bit numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures(count, first)):
        Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def train(**changes):
    """TrainCSE with small settings: (CONTROL_NET, loss curve, validation, summary)."""
    inputs = {
        "model": lab.shared()[0],
        "vae": lab.shared()[1],
        "operator": lab.call("DMAP_OperatorSuperResolution", scale=8),
        "folder": NO_FOLDER,
        "save_name": "cse",
        "steps": 3,
        "batch_size": 2,
        "accumulation": 1,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "size": lab.SIZE,
        "seed": 0,
        "save_every": 100,
        "gradient_checkpointing": False,
        "hint_range": "0..1",
        "snr_gamma": 0.0,
        **changes,
    }
    if inputs["folder"] == NO_FOLDER and "pictures" not in inputs:
        inputs["pictures"] = pictures(3)
    if "validation" not in inputs:
        inputs["validation"] = pictures(1)
    if "conditioning" not in inputs:
        inputs["conditioning"] = lab.call("DMAP_DMAPUnconditional", model=inputs["model"])
    return lab.call("DMAP_TrainCSE", **inputs)


def state(path):
    """The training beside a file."""
    return checkpoint.read_state(Path(path).with_suffix(checkpoint.STATE_SUFFIX))


def distance(ours, theirs):
    """How far two sets of weights lie apart, in the norm of all of them together."""
    assert set(ours) == set(theirs)
    return sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours) ** 0.5


@contextlib.contextmanager
def watching(monkeypatch, on_step=None):
    """A list of what the progress bar shows: (done, total, picture or None)."""
    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, None if preview is None else preview[1]))
        if on_step:
            on_step(value)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
        yield seen


class Snapshot:
    """What a node must leave as it was: values, flags and precision of a model's and a VAE's weights."""

    def __init__(self, model, vae):
        self.networks = {"model": model.model, "vae": vae.first_stage_model}
        self.model = model
        self.before = self._now()

    def _now(self):
        found = {
            f"{which}.{name}": (p.requires_grad, p.dtype, p.detach().clone())
            for which, network in self.networks.items()
            for name, p in [*network.named_parameters(), *network.named_buffers()]
        }
        return found

    def changed(self, flags=True):
        """Names of what is different now. ComfyUI itself changes flags where it takes a LoRA off."""
        now = self._now()
        assert list(now) == list(self.before)
        return [
            name
            for name, (flag, dtype, value) in now.items()
            if (flags and flag != self.before[name][0]) or dtype != self.before[name][1] or not torch.equal(value, self.before[name][2])
        ]
