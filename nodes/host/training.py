"""What training a CSE needs of ComfyUI: its networks ready for that, pictures of its own model, progress."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from PIL import Image
from torch import Tensor, nn

from ...dmap_core.backends.fingerprint import fingerprint
from ...dmap_core.cse.identity import check_same, digest
from ...dmap_core.files import write_text, write_whole
from ...dmap_core.pictures import to_picture
from ...dmap_core.prior import DTYPES, levels_of
from .flow import to_host
from .folders import checked_name
from .gradients import (
    add_own_skip,
    check_quantised,
    check_whole,
    differentiable_attention,
    exact_layers,
    frozen,
    normal,
    pytorch_attention,
    without_caches,
)
from .prior import HostPrior, base_fingerprint, check_model, check_vae, latent_size, model_sigmas, prediction_of
from .static import static_patchers

log = logging.getLogger(__name__)
TRAINING_MEMORY = 4  # times the host's estimate for inference; only decides what else is moved off the GPU


class TrainingPrior(HostPrior):
    """dmap_core.prior.NetworkPrior on a loaded ComfyUI model and VAE: computes where and in what precision the model does."""

    def __init__(self, patcher, vae, autoencoder: nn.Module, cond: dict, size: int, contexts: ExitStack):
        super().__init__(patcher.model, vae, [autoencoder], [], (size, size))
        self._conds, self._contexts = cond["model_conds"], contexts
        self._options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(patcher, {}, self._options)  # the patches and wrappers that nodes put on the model
        self._sampling = patcher.get_model_object("model_sampling")
        self.device = patcher.load_device
        self._patcher, self.sigmas = patcher, model_sigmas(patcher).to(self.device)
        self.prediction = prediction_of(patcher)
        self._controlnet: nn.Module | None = None
        self._hint: Tensor | None = None

    @cached_property
    def fingerprint(self) -> str:
        """That of the loaded model, with its LoRAs."""
        return fingerprint(self.original_weights())

    def original_weights(self) -> dict[str, Tensor]:
        return self.base_model.diffusion_model.state_dict()

    def conditioning(self) -> list[Tensor]:
        return [self._conds[name].cond for name in ("c_crossattn", "y") if name in self._conds]

    def controlled(self, controlnet: nn.Module | None, hint: Tensor | None) -> TrainingPrior:
        found = copy.copy(self)
        found._controlnet, found._hint = controlnet, hint
        return found

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *([self._controlnet] if self._controlnet else [])]

    def encode(self, image: Tensor) -> Tensor:
        return super().encode(image).to(self.device)

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        z, sigma = to_host(self._patcher, z, levels_of(z, sigma))
        given = {name: c.process_cond(batch_size=len(z), device=self.device, area=None).cond for name, c in self._conds.items()}
        control = None
        if self._controlnet is not None:
            dtype = self.base_model.manual_cast_dtype or self.base_model.get_dtype()
            x = self._sampling.calculate_input(sigma, z).to(dtype)
            y = given["y"].to(self.device, dtype) if "y" in given else None
            context = given["c_crossattn"].to(self.device, dtype)
            timesteps = self._sampling.timestep(sigma).float()
            control = self._controlnet(x=x, hint=self._hint.to(dtype), timesteps=timesteps, context=context, y=y)
            control = {"input": [], "middle": control["middle"], "output": control["output"]}
        options = {**self._options["transformer_options"], "optimized_attention_override": pytorch_attention}
        options.update(cond_or_uncond=[0], sigmas=sigma)  # of one prompt, as patches may ask
        add_own_skip(options)
        given.update(control=control, transformer_options=options)
        wrapper = self._options.get("model_function_wrapper")
        if wrapper:
            return wrapper(self.base_model.apply_model, {"input": z, "timestep": sigma, "c": given, "cond_or_uncond": [0]})
        return self.base_model.apply_model(z, sigma, **given)

    def new_controlnet(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """ComfyUI's ControlNet for this base, trainable."""
        left_out = ("out_channels", "dtype", "device", "operations")
        config = {name: value for name, value in self.base_model.model_config.unet_config.items() if name not in left_out}
        operations = comfy.ops.manual_cast  # which casts weights to the precision of what they are applied to
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config, dtype=torch.float32, device=self.device, operations=operations)
        network.load_state_dict(weights)
        self._contexts.enter_context(differentiable_attention([network]))
        return network.requires_grad_(True)


def check_trainable(model: Any) -> None:
    """Raises ValueError for models of which no ControlNet can be made here."""
    check_model(model)
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            f"model: {type(model.model).__name__} is a transformer, and a CSE is a ControlNet of a UNet. Use Stable Diffusion 1.5, 2.0, 2.1 or SDXL"
        )


@contextmanager
def training(model: Any, vae: Any, conditioning: list, precision: str, size: int, batch: int) -> Iterator[TrainingPrior]:
    """Model and VAE loaded whole, their weights frozen, gradients possible, for training a ControlNet on crops of `size` pixels."""
    check_trainable(model)
    check_vae(vae, model)
    channels = model.get_model_object("latent_format").latent_channels
    if model.model.model_config.unet_config["in_channels"] != channels:
        raise ValueError("model: its network reads more than latents (a model for inpainting or editing); load the text-to-image model")
    if len(conditioning) != 1 or {"control", "area", "mask"} & set(conditioning[0][1]):
        raise ValueError(
            "conditioning: training takes one prompt without areas and without a ControlNet; connect CLIPTextEncode or DMAPUnconditional"
        )
    model, caches = without_caches(model)
    if caches:
        log.warning("TrainCSE: %s is left out: outputs that it reuses have no gradient", ", ".join(caches))
    with torch.inference_mode(False), torch.no_grad(), static_patchers() as static:
        patcher, vae_patcher = static(model).clone(), static(vae.patcher)
        patcher.set_model_compute_dtype(DTYPES[precision])
        latent = (batch, channels, *latent_size(vae, (size, size)))
        estimate = patcher.model.memory_required(latent) + vae.memory_used_encode((batch, 3, size, size), vae.vae_dtype)
        patchers = [patcher, vae_patcher]
        comfy.model_management.load_models_gpu(patchers, memory_required=TRAINING_MEMORY * estimate, force_full_load=True)
        check_whole(patchers)
        noise = torch.zeros(latent, device=patcher.load_device)
        conds = {"positive": comfy.sampler_helpers.convert_cond(normal(conditioning))}
        cond = comfy.samplers.process_conds(patcher.model, noise, conds, patcher.load_device)["positive"][0]
        with ExitStack() as stack:
            networks = [patcher.model.diffusion_model, vae_patcher.model]
            stack.enter_context(frozen(networks))
            stack.enter_context(exact_layers(networks))
            check_quantised(networks)
            yield TrainingPrior(patcher, vae, vae_patcher.model, cond, size, stack)


def self_generate(
    model, vae, positive, negative, name: str, count: int, steps: int, cfg: float, size: tuple[int, int], seed: int
) -> Iterator[Path]:
    """Pictures of the model itself in output/NAME, picture i with the seed `seed + i`. Those that are there already are kept, not made again."""
    folder = Path(folder_paths.get_output_directory()) / checked_name(name, "save_name")
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [prompt_digest(conditioning) for conditioning in (positive, negative)]
    with static_patchers() as static:
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
        write_text(record, json.dumps(settings, indent=1))
    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.zeros(1, channels, *latent_size(vae, size))
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


def prompt_digest(conditioning: list) -> str:
    """Tells prompts apart: by the text encoder's tokens and its pooled output."""
    tensors = [t for tokens, values in conditioning for t in (tokens, values.get("pooled_output")) if t is not None]
    return " ".join(map(digest, tensors))


class Progress:
    """ComfyUI's progress bar, with a picture beside it."""

    def __init__(self, total: int):
        self._bar, self._total = comfy.utils.ProgressBar(total), total

    def update(self, done: int, picture: Image.Image | None = None) -> None:
        self._bar.update_absolute(done, self._total, ("JPEG", picture, None) if picture else None)
