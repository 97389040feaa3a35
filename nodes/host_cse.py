"""The part of the adapter to ComfyUI that is about ControlNets: load, attach and check one, and train one on ComfyUI's own networks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..dmap_core.cse.checkpoint import check_same, read_controlnet
from ..dmap_core.cse.data import to_picture
from ..dmap_core.cse.metadata import CSEMetadata
from ..dmap_core.cse.network import encoder_shapes, fingerprint, initial_controlnet
from ..dmap_core.files import check_name, write_whole
from ..dmap_core.memory import checkpointed
from ..dmap_core.operators import Operator
from ..dmap_core.operators.weights import SUFFIXES, check_tensors
from . import host, host_static

log = logging.getLogger(__name__)

FOLDER = "controlnet"  # below ComfyUI's models
DIFFUSERS_FOLDER = "diffusers"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
FROM_FILE = "from file"
TAG = "dmap_cse"  # attribute of a loaded network, which all copies of a CONTROL_NET share
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENT_INPUT = "input_blocks.0.0.weight"
LISTED = 10_000  # entries of a directory that are looked at to say what folders there are
SHOWN = 20  # of those folders
TRAINING_MEMORY = 4  # times the host's estimate for inference; only decides what else is moved off the GPU


def offer_demo_cse() -> None:
    """List the CSE of this pack among the ControlNets, so that the demo workflow runs right after installation."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(__file__).resolve().parent.parent / "models" / FOLDER))


def _diffusers_files() -> dict[str, Path]:
    """ControlNets in diffusers folders, by the name that a list shows."""
    found = {}
    for root in folder_paths.get_folder_paths(DIFFUSERS_FOLDER):
        for file in sorted(Path(root).glob(f"*/{DIFFUSERS_FILE}")) + sorted(Path(root).glob(f"*/controlnet/{DIFFUSERS_FILE}")):
            found.setdefault(f"{DIFFUSERS_FOLDER}/{file.parent.relative_to(root).as_posix()}", file)
    return found


def cse_files() -> list[str]:
    """Names of what CSEControlNetLoader can be asked for: files of models/controlnet, and ControlNets in diffusers folders."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(SUFFIXES)] + list(_diffusers_files())


def cse_path(name: str) -> Path:
    """Raises FileNotFoundError that says where files belong."""
    path = folder_paths.get_full_path(FOLDER, name) or _diffusers_files().get(name)
    if path is None:
        raise FileNotFoundError(
            f"cse: {name!r} is not there. Put the file into {folder_paths.get_folder_paths(FOLDER)[0]} and reload the page, or train one with TrainCSE"
        )
    return Path(path)


def _signed(hint: Tensor) -> Tensor:
    return hint * 2 - 1


def _unchanged(hint: Tensor) -> Tensor:
    return hint


def load_cse(path: Path) -> tuple[Any, CSEMetadata | None]:
    """(CONTROL_NET, what the file says about itself or None). Every ControlNet node is to give it a hint in [0, 1], whatever it was trained with.

    Raises ValueError, naming the file, for one that lacks tensors or has some of another shape: ComfyUI itself would leave those uninitialised.
    """
    weights, metadata = read_controlnet(path)
    try:
        control = comfy.controlnet.load_controlnet_state_dict(dict(weights))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"cse: {path.name} is no ControlNet that ComfyUI can build: tensors are missing or do not fit together ({reason})"
        ) from error
    if control is None:
        raise ValueError(f"cse: {path.name} is no ControlNet that ComfyUI knows")
    check_tensors(control.control_model.state_dict(), weights, "its ControlNet", path)
    if metadata and metadata.hint_range == "-1..1":
        control.preprocess_image = _signed
    setattr(control.control_model, TAG, (path.name, metadata))
    return control, metadata


def description(control: Any) -> tuple[str, CSEMetadata | None]:
    """(file name, metadata) of a CONTROL_NET; ("", None) for one that another node loaded."""
    return getattr(getattr(control, "control_model", None), TAG, ("", None))


def blocked(message: str) -> ExecutionBlocker:
    """An output that stops the nodes behind it, and only those, with a message."""
    return ExecutionBlocker(message)


def attach(conditioning: list, control: Any, hint: Tensor, strength: float, start: float, end: float, hint_range: str = FROM_FILE) -> list:
    """The conditioning with the CSE added, for the negative one too. hint: (B, 3, H, W) in [0, 1]; its edges are repeated up to whole latents."""
    h, w = (-n % control.compression_ratio for n in hint.shape[-2:])
    hint = F.pad(hint, (0, w, 0, h), mode="replicate")
    out = []
    for tensor, values in conditioning:
        own = control.copy().set_cond_hint(hint, strength, (start, end))
        own.set_previous_controlnet(values.get("control"))
        if hint_range != FROM_FILE:
            own.preprocess_image = _signed if hint_range == "-1..1" else _unchanged
        out.append([tensor, {**values, "control": own, "control_apply_to_uncond": True}])
    return out


def prediction_of(model: Any) -> str:
    """What the network of a MODEL predicts: "eps" or "v"."""
    return "v" if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION) else "eps"


def check_base(control: Any, model: Any, name: str) -> None:
    """Raises ValueError for a ControlNet made for another kind of base model. Adapters of other architectures are not looked at."""
    network = getattr(control, "control_model", None)
    if not isinstance(network, comfy.cldm.cldm.ControlNet):
        return
    file, metadata = description(control)
    which = f"the ControlNet {file}".rstrip()
    theirs, ours = encoder_shapes(network.state_dict()), encoder_shapes(model.model.diffusion_model.state_dict())
    # models for inpainting and editing read more channels; ControlNets are given the latents alone
    theirs, ours = ({**shapes, LATENT_INPUT: shapes.get(LATENT_INPUT, ())[:1]} for shapes in (theirs, ours))
    different = next((key for key in theirs if ours.get(key) != theirs[key]), None) or next(
        (key for key in ours if key not in theirs), None
    )
    if different:
        raise ValueError(
            f"{name}: {which} was made for another base model: {different} is {theirs.get(different, 'absent')} in it and "
            f"{ours.get(different, 'absent')} in the model. Load the one for {type(model.model).__name__} models, or the checkpoint that it was trained on"
            f"{f' ({metadata.base})' if metadata else ''}"
        )
    kind = prediction_of(model)
    if metadata and metadata.prediction != kind:
        raise ValueError(
            f"{name}: {which} was trained on a {metadata.prediction}-prediction model ({metadata.base}), and this model predicts {kind}. "
            "Load the checkpoint that it was trained on, or one of its relatives"
        )


def check_controls(conditioning: list, model: Any, operator: Operator, name: str) -> list[str]:
    """Warnings about the CSEs in a conditioning: those trained for another operator. Raises ValueError for those of another base model."""
    warnings = []
    for _, values in conditioning:
        control = values.get("control")
        while control is not None:
            check_base(control, model, name)
            file, metadata = description(control)
            warning = metadata.other_operator(operator, file) if metadata else ""
            if warning and warning not in warnings:
                log.warning("%s: %s", name, warning)
                warnings.append(warning)
            control = control.previous_controlnet
    return warnings


class HostBase:
    """dmap_core.cse.loss.Base on a loaded ComfyUI model and VAE: computes where and in what precision the model does."""

    def __init__(self, patcher, vae, autoencoder: nn.Module, cond: dict, size: int, contexts: ExitStack, recompute: bool):
        self.model, self._cond, self._contexts, self._recompute = patcher.model, cond, contexts, recompute
        self._options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(patcher, {}, self._options)  # the patches and wrappers that nodes put on the model
        sampling = patcher.get_model_object("model_sampling")
        self._sampling = sampling
        self.device = patcher.load_device
        self.sigmas = sampling.sigmas.float().to(self.device)
        self.prediction = prediction_of(patcher)
        self._autoencoder = host.HostPrior(self.model, vae, autoencoder, [], (size, size))
        self.unet = self.model.diffusion_model

    @property
    def fingerprint(self) -> str:
        """That of the loaded model, with its LoRAs."""
        return base_fingerprint(self)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        return self._autoencoder.encode(image).to(self.device)

    @torch.no_grad()
    def decode(self, z0: Tensor) -> Tensor:
        return self._autoencoder.decode(z0)

    def denoise(self, controlnet: nn.Module | None, z: Tensor, timestep: Tensor, hint: Tensor | None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = self.sigmas[timestep]
        given = {k: c.process_cond(batch_size=len(z), device=self.device, area=None).cond for k, c in self._cond["model_conds"].items()}
        control = None
        if controlnet is not None:
            dtype = self.model.manual_cast_dtype or self.model.get_dtype()
            x = self._sampling.calculate_input(sigma, z).to(dtype)
            y = given["y"].to(self.device, dtype) if "y" in given else None
            context = given["c_crossattn"].to(self.device, dtype)
            control = controlnet(x=x, hint=hint.to(dtype), timesteps=self._sampling.timestep(sigma).float(), context=context, y=y)
            control = {"input": [], "middle": control["middle"], "output": control["output"]}
        options = {**self._options["transformer_options"], "optimized_attention_override": host.pytorch_attention}
        options.update(cond_or_uncond=[0], sigmas=sigma)  # of one prompt, as patches may ask
        host.add_own_skip(options)
        given.update(control=control, transformer_options=options)
        wrapper = self._options.get("model_function_wrapper")
        if wrapper:
            return wrapper(self.model.apply_model, {"input": z, "timestep": sigma, "c": given, "cond_or_uncond": [0]})
        return self.model.apply_model(z, sigma, **given)

    def new_controlnet(self, seed: int) -> nn.Module:
        """ComfyUI's ControlNet for this base, with trainable float32 weights that leave it as it is (see core's `initial_controlnet`)."""
        config = {
            k: v for k, v in self.model.model_config.unet_config.items() if k not in ("out_channels", "dtype", "device", "operations")
        }
        operations = comfy.ops.manual_cast  # which casts weights to the precision of what they are applied to
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config, dtype=torch.float32, device=self.device, operations=operations)
        network.load_state_dict(initial_controlnet(self.unet.state_dict(), seed))
        self._contexts.enter_context(host.differentiable_attention([network]))
        if self._recompute:
            self._contexts.enter_context(checkpointed([self.unet, network]))
        return network.requires_grad_(True)


@contextmanager
def training(model: Any, vae: Any, conditioning: list, precision: str, size: int, batch: int, recompute: bool) -> Iterator[HostBase]:
    """Model and VAE loaded whole, their weights frozen, gradients possible, for training a ControlNet on crops of `size` pixels.

    recompute: blocks keep only their inputs and recompute the rest in the backward pass, while the context lasts.
    """
    host.check_model(model)
    host.check_vae(vae, model)
    channels = model.get_model_object("latent_format").latent_channels
    if model.model.model_config.unet_config["in_channels"] != channels:
        raise ValueError("model: its network reads more than latents (a model for inpainting or editing); load the text-to-image model")
    if len(conditioning) != 1 or {"control", "area", "mask"} & set(conditioning[0][1]):
        raise ValueError(
            "conditioning: training takes one prompt without areas and without a ControlNet; connect CLIPTextEncode or DMAPUnconditional"
        )
    model, caches = host.without_caches(model)
    if caches:
        log.warning("TrainCSE: %s is left out: outputs that it reuses have no gradient", ", ".join(caches))
    with torch.inference_mode(False), torch.no_grad(), host_static.static_patchers() as static:
        patcher, vae_patcher = static(model).clone(), static(vae.patcher)
        patcher.set_model_compute_dtype(DTYPES[precision])
        latent = (batch, channels, *host.latent_size(vae, (size, size)))
        estimate = patcher.model.memory_required(latent) + vae.memory_used_encode((batch, 3, size, size), vae.vae_dtype)
        patchers = [patcher, vae_patcher]
        comfy.model_management.load_models_gpu(patchers, memory_required=TRAINING_MEMORY * estimate, force_full_load=True)
        host.check_whole(patchers)
        noise = torch.zeros(latent, device=patcher.load_device)
        conds = {"positive": comfy.sampler_helpers.convert_cond(host.normal(conditioning))}
        cond = comfy.samplers.process_conds(patcher.model, noise, conds, patcher.load_device)["positive"][0]
        with ExitStack() as stack:
            networks = [patcher.model.diffusion_model, vae_patcher.model]
            stack.enter_context(host.frozen(networks))
            stack.enter_context(host.exact_layers(networks))
            host.check_quantised(networks)
            yield HostBase(patcher, vae, vae_patcher.model, cond, size, stack, recompute)


NAME = re.compile(r"[\w][\w .()+-]*(/[\w][\w .()+-]*)*")


def checked_name(name: str, what: str) -> str:
    """A file or folder name relative to ComfyUI's folders. Raises ValueError for one that leads out of them."""
    name = name.strip().replace("\\", "/")
    if not NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{what}: {name[:80]!r} is no name for a file; use letters, digits, spaces and - _ . ( ), and / for a folder")
    for part in name.split("/"):
        check_name(part, what)
    return name


def new_cse_path(name: str) -> Path:
    """Where a trained CSE of that name is written: the first folder of models/controlnet."""
    name = checked_name(name, "save_name").removesuffix(".safetensors")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"


def _picture_roots() -> dict[str, Path]:
    return {"input": Path(folder_paths.get_input_directory()), "output": Path(folder_paths.get_output_directory())}


def folder_name(folder: Path) -> str:
    """How TrainCSE names a folder of the output directory."""
    return f"output/{folder.relative_to(folder_paths.get_output_directory()).as_posix()}"


def picture_folder(name: str) -> Path:
    """The folder `input/NAME` or `output/NAME`, NAME being one or more folders below ComfyUI's input or output directory; links to folders are followed.

    Nothing but that folder is looked at. Raises ValueError for a name that leads elsewhere, and for a folder that is not there.
    """
    label, *parts = name.strip().replace("\\", "/").rstrip("/").split("/")
    root = _picture_roots().get(label)
    folder = root.joinpath(*parts) if root else None
    # a drive's letter in the name would replace the root
    if (
        folder is None
        or not parts
        or any(part.startswith(".") or not part or "\0" in part for part in parts)
        or not folder.is_relative_to(root)
    ):
        raise ValueError(f"folder: {name!r} must be input/NAME or output/NAME, a folder in ComfyUI's input or output directory")
    try:
        found = folder.is_dir()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        raise ValueError(f"folder: there is no {name}. {_existing_folders()}")
    return folder


def _existing_folders() -> str:
    """A sentence about what could be chosen: the folders right below both directories, nothing deeper."""
    found = []
    for label, root in _picture_roots().items():
        if root.is_dir():
            with os.scandir(root) as entries:
                found += [f"{label}/{entry.name}" for entry in islice(entries, LISTED) if not entry.name.startswith(".") and entry.is_dir()]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"There are {', '.join(sorted(found)[:SHOWN])}{more}"
        if found
        else "There are no folders in ComfyUI's input and output directories yet"
    )


def self_generate(
    model, vae, positive, negative, name: str, count: int, steps: int, cfg: float, size: tuple[int, int], seed: int
) -> Iterator[Path]:
    """Pictures of the model itself in output/NAME, picture i with the seed `seed + i`. Those that are there already are kept, not made again."""
    folder = Path(folder_paths.get_output_directory()) / checked_name(name, "save_name")
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [prompt_digest(conditioning) for conditioning in (positive, negative)]
    with host_static.static_patchers() as static:
        whole = static(model)
        comfy.model_management.load_models_gpu([whole])  # with its LoRAs, which are part of what the fingerprint tells apart
        base = base_fingerprint(whole)
    settings = {
        "prompts": prompts,
        "steps": steps,
        "cfg": cfg,
        "size": list(size),
        "seed": seed,
        "model": type(model.model).__name__,
        "base": base,
    }
    record = folder / "settings.json"
    if record.exists():
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"save_name: {record} is damaged ({error}); choose another name or remove that folder") from error
        if not isinstance(before, dict):
            raise ValueError(f"save_name: {record} holds something else than settings; choose another name or remove that folder")
        check_same(before, settings, folder)
    elif any(folder.iterdir()):
        raise ValueError(f"save_name: {folder} holds other files; choose another name")
    else:
        write_whole(record, lambda part: part.write_text(json.dumps(settings, indent=1), encoding="utf-8"))
    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.zeros(1, channels, *host.latent_size(vae, size))
    for i in range(count):
        file = folder / f"{i:06d}.png"
        if not file.exists():
            noise = comfy.sample.prepare_noise(latent, seed + i)
            samples = comfy.sample.sample(
                model,
                noise,
                steps,
                cfg,
                "euler_ancestral",
                "normal",
                positive,
                negative,
                latent,
                callback=stop_if_interrupted,
                disable_pbar=True,
                seed=seed + i,
            )
            stop_if_interrupted()
            image = vae.decode(samples)[0].movedim(-1, 0) * 2 - 1
            picture = to_picture(image[:, : size[0], : size[1]])
            write_whole(file, lambda part, picture=picture: picture.save(part, format="PNG"))
        yield file


def stop_if_interrupted(*_: object) -> None:
    """Ends the run if the user cancelled it. Not every ComfyUI asks between the steps of a sampler that a node calls itself."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def base_fingerprint(model: Any) -> str:
    """Tells checkpoints apart, whatever precision they are loaded in."""
    return fingerprint(model.model.diffusion_model.state_dict())


def prompt_digest(conditioning: list) -> str:
    """Tells prompts apart: by the text encoder's tokens and its pooled output."""
    tensors = [t for tokens, values in conditioning for t in (tokens, values.get("pooled_output")) if t is not None]
    return " ".join(map(digest, tensors))


def digest(tensor: Tensor) -> str:
    """Tells tensors apart: 16 hexadecimal digits."""
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).contiguous().numpy()).hexdigest()[:16]


class Progress:
    """ComfyUI's progress bar, with a picture beside it."""

    def __init__(self, total: int):
        self._bar, self._total = comfy.utils.ProgressBar(total), total

    def update(self, done: int, picture: Image.Image | None = None) -> None:
        self._bar.update_absolute(done, self._total, ("JPEG", picture, None) if picture else None)


def base_name(model: Any) -> str:
    """The kind of model, such as SD20: what ComfyUI knows of where a MODEL came from."""
    return type(model.model.model_config).__name__
