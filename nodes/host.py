"""The adapter to ComfyUI: its MODEL, CONDITIONING and VAE become a dmap_core Prior, its GUIDER and SAMPLER protocols drive a Posterior.

Everything this pack knows about ComfyUI's internals is in this file and, for ControlNets, in host_cse.py. Facts it works around:
- nodes run under torch.inference_mode(), where no graph is recorded, on weights that autograd may not save;
- VAE.decode clamps and may decode in tiles, so that the network behind it is called instead;
- some attention backends drop gradients; some offloading schemes overwrite weights that autograd still needs.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sampler_helpers
import comfy.samplers
import folder_paths
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm

from ..dmap_core.operators import Operator
from ..dmap_core.operators.weights import SUFFIXES
from ..dmap_core.posterior import Posterior
from ..dmap_core.schedule import check_sigmas, generators
from ..dmap_core.solvers import check_finite, guided_denoised
from .host_static import check_static, is_dynamic, static_patchers
from .messages import speaking_of_nodes

log = logging.getLogger(__name__)

# How much more a gradient keeps than the host's estimate for inference; only decides what else is moved off the GPU.
GRADIENT_MEMORY = 3


def _host_shifts_seed() -> bool:
    """Whether the host's ancestral samplers already draw from seed + 1 on the CPU, so that steps do not repeat the initial noise."""
    one = torch.zeros(4)
    return bool((default_noise_sampler(one, seed=0)(1, 0) != torch.randn(4, generator=torch.Generator().manual_seed(0))).any())


SEED_SHIFT = 0 if _host_shifts_seed() else 1


def normal(value: Any) -> Any:
    """The same nested lists, tuples and dicts with every inference tensor replaced by a copy that autograd may save."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {k: normal(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(normal(v) for v in value)
    return value


@contextmanager
def frozen(networks: list[nn.Module]) -> Iterator[None]:
    """Weights of the networks can stand in a graph but get no gradient themselves; values and flags are afterwards what they were."""
    flagged = []
    for network in networks:
        for module in network.modules():
            for name, p in module._parameters.items():
                if p is not None and p.is_inference():
                    host_notes = vars(p)  # the precision that the host reserves memory for, for one
                    p = module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
                    vars(p).update(host_notes)
                if p is not None and p.requires_grad:
                    p.requires_grad_(False)
                    flagged.append(p)
            for name, b in module._buffers.items():
                if b is not None and b.is_inference():
                    module._buffers[name] = b.clone()
    try:
        yield
    finally:
        for p in flagged:
            p.requires_grad_(True)


def offer_demo_prior() -> None:
    """List the small prior among the checkpoints, so that the demo workflows run right after installation."""
    folder_paths.add_model_folder_path("checkpoints", str(Path(__file__).resolve().parent.parent / "models" / "checkpoints"))


WEIGHTS_FOLDER = "dmap"  # below ComfyUI's models
NO_WEIGHTS = "no file yet: see the help of this node"


def offer_weights_folder() -> None:
    """Make models/dmap known to ComfyUI, the place of the weights of learned operators."""
    folder_paths.add_model_folder_path(WEIGHTS_FOLDER, str(Path(folder_paths.models_dir) / WEIGHTS_FOLDER))


def weights_files() -> list[str]:
    return [name for name in folder_paths.get_filename_list(WEIGHTS_FOLDER) if name.lower().endswith(SUFFIXES)]


def find_weights(name: str, example: str = "it") -> Path:
    """The file of that name in models/dmap, nowhere else. Raises FileNotFoundError that says where to put it."""
    path = folder_paths.get_full_path(WEIGHTS_FOLDER, name)
    if path is None:
        folder = folder_paths.get_folder_paths(WEIGHTS_FOLDER)[0]
        wanted = example if name == NO_WEIGHTS else f"{name!r}"
        raise FileNotFoundError(
            f"weights: {wanted} is not there. Put {example} into {folder}, reload the page and choose it; the help page of the node says where to get it"
        )
    return Path(path)


def measure(operator: Operator, image: Tensor) -> Tensor:
    """The noiseless measurement of an image, computed where ComfyUI computes."""
    device = comfy.model_management.get_torch_device()
    try:
        return operator.to(device).measure(image.to(device)).to(image.device)
    finally:
        operator.to("cpu")


# By name: the host may prefer cuDNN's, and other back ends may be registered that have no backward pass.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def pytorch_attention(
    func: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask=None,
    attn_precision=None,
    skip_reshape=False,
    skip_output_reshape=False,
    **kwargs,
) -> Tensor:
    """ComfyUI's attention, called as its overrides are, on back ends of PyTorch through which gradients flow.

    q, k, v: (B, tokens, heads * width), or (B, heads, tokens, width) with skip_reshape; the result likewise with skip_output_reshape.
    """
    if not skip_reshape:
        q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    extra = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    with sdpa_kernel(ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@contextmanager
def differentiable_attention(networks: list[nn.Module]) -> Iterator[None]:
    """Attention with gradients in networks that the host gives no options, as it does ControlNets."""

    def with_override(module: nn.Module, args: tuple) -> tuple:
        x, context, options = (*args, None, None)[:3]
        return x, context, {**(options or {}), "optimized_attention_override": pytorch_attention}

    blocks = [m for network in networks for m in network.modules() if isinstance(m, SpatialTransformer)]
    hooks = [block.register_forward_pre_hook(with_override) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def controls_of(conds: dict[str, list[dict]]) -> Iterator[Any]:
    """The ControlNets, T2I adapters and control LoRAs of the conditioning, with those chained before them."""
    for cond in itertools.chain(*conds.values()):
        control = cond.get("control")
        while control is not None:
            yield control
            control = control.previous_controlnet


def static_controls(conds: dict[str, list[dict]], static: Callable) -> dict[str, list[dict]]:
    """The conditioning with copies of those ControlNets, T2I adapters and control LoRAs whose weights move while they run."""
    twins: dict[int, Any] = {}

    def twin(control: Any) -> Any:
        if control is None or id(control) in twins:
            return control and twins[id(control)]
        previous = twin(control.previous_controlnet)
        moving = {name: value for name, value in vars(control).items() if is_dynamic(value)}
        own = control
        if moving or previous is not control.previous_controlnet:
            own = control.copy()
            own.set_previous_controlnet(previous)
            for name, patcher in moving.items():
                plain = static(patcher)
                changed = {other: plain.model for other, value in vars(own).items() if value is patcher.model}
                vars(own).update({**changed, name: plain})
        twins[id(control)] = own
        return own

    return {
        name: [{**cond, "control": twin(cond["control"])} if cond.get("control") else cond for cond in listed]
        for name, listed in conds.items()
    }


# Keys of the wrappers by which nodes of ComfyUI reuse outputs of earlier steps, and the names of those nodes.
CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}


def without_caches(model) -> tuple[Any, list[str]]:
    """(the model without nodes that reuse outputs, the names of those nodes). Raises ValueError for a model that is spread over several GPUs."""
    multigpu = getattr(model, "get_additional_models_with_key", None)
    if multigpu and multigpu("multigpu"):
        raise ValueError("model: it is spread over several GPUs, where no gradients are computed; leave out the node 'MultiGPU CFG Split'")
    found = [key for key in CACHES if any(key in by_key for by_key in model.wrappers.values())]
    if found:
        model = model.clone()
        for key in found:
            for by_key in model.wrappers.values():
                by_key.pop(key, None)
    return model, [CACHES[key] for key in found]


@contextmanager
def exact_layers(networks: list[nn.Module]) -> Iterator[None]:
    """Layers for matrix products of 8-bit floats (--fast fp8_matrix_mult), which have no gradient, compute as they do without that option."""
    fast = [m for network in networks for m in network.modules() if isinstance(m, comfy.ops.fp8_ops.Linear)]
    for layer in fast:
        layer.forward_comfy_cast_weights = functools.partial(comfy.ops.manual_cast.Linear.forward_comfy_cast_weights, layer)
    try:
        yield
    finally:
        for layer in fast:
            del layer.forward_comfy_cast_weights


QUANTISED_GRADIENT = 0.2  # relative error of a quantised layer's gradient above which it is not one: rounding makes a few per cent


def check_quantised(networks: list[nn.Module]) -> None:
    """Raises ValueError, naming the format, for quantised layers without a gradient: such a layer may stop it without a sign."""
    kinds = {}
    for module in (m for network in networks for m in network.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and is_traceable_wrapper_subclass(weight):
            kinds.setdefault(getattr(weight, "_layout_cls", type(weight).__name__), module)
    for format_, layer in kinds.items():
        weight = layer.weight
        x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
        try:
            with torch.enable_grad():
                out = layer(x.requires_grad_())
                (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
            exact = weight.dequantize().to(x.dtype).sum(0)
            error = torch.linalg.vector_norm((gradient - exact).float()) / torch.linalg.vector_norm(exact.expand_as(gradient).float())
            reason = f"its gradient is off by {100 * float(error):.0f} %" if not error < QUANTISED_GRADIENT else None
        except (RuntimeError, NotImplementedError, TypeError) as failure:
            reason = str(failure)
        if reason:
            raise ValueError(
                f"model: its weights are quantised as {format_}, through which no gradients flow here ({reason}). "
                "Load an fp16, bf16 or fp8 file of the model"
            )


def own_skip(h: Tensor, options: dict) -> Tensor:
    """The next block works on a copy: ControlNets add to skip connections in place, which autograd still needs as that block's input."""
    return h.clone() if h.requires_grad else h


def add_own_skip(transformer_options: dict) -> None:
    """Puts `own_skip` before what other nodes do with skip connections."""
    name = "input_block_patch_after_skip"
    patches = transformer_options.get("patches", {})
    transformer_options["patches"] = {**patches, name: [own_skip, *patches.get(name, [])]}


def check_whole(patchers) -> None:
    """Raises RuntimeError for models of which a part had to stay out of the GPU, or whose weights move while they run."""
    check_static(patchers)
    for patcher in patchers:
        if getattr(patcher.model, "model_lowvram", False):
            raise RuntimeError(
                f"{type(patcher.model).__name__} does not fit into the GPU's memory as a whole, which gradients need. "
                "Use a smaller picture or model, half precision weights, or unload other models first"
            )


def check_model(model) -> None:
    """Raises ValueError for models outside the VE convention of the paper's algorithms."""
    sampling = model.get_model_object("model_sampling")
    name = type(model.model).__name__
    kinds = comfy.model_sampling
    others = (kinds.CONST, kinds.IMG_TO_IMG, kinds.StableCascadeSampling)  # the last two are subclasses of EPS
    if not isinstance(sampling, kinds.EPS) or isinstance(sampling, others):
        raise ValueError(
            f"model: {name} does not follow the noise convention of the paper (z = z0 + sigma * noise): it is a flow, cascade or "
            "image-to-image model. Use an eps- or v-prediction model such as Stable Diffusion 1.5, 2.0, 2.1 or SDXL"
        )
    video = getattr(model.get_model_object("latent_format"), "latent_dimensions", 2) != 2
    if video or model.model.model_config.unet_config.get("use_temporal_resblock"):
        raise ValueError(f"model: {name} makes video; this pack restores still pictures. Use Stable Diffusion 1.5, 2.0, 2.1 or SDXL")


def check_vae(vae, model) -> None:
    """Raises ValueError for a VAE that is not one of pictures, or not of this model's latents."""
    wanted = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"vae: it has {vae.latent_channels} latent channels and the model {wanted}; load the VAE that belongs to the model"
        )
    probe = vae.process_output(torch.tensor([-1.0, 0.0, 1.0]))
    if not isinstance(vae.downscale_ratio, int) or not torch.allclose(probe, torch.tensor([0.0, 0.5, 1.0])):
        raise ValueError("vae: it does not decode to still pictures in [-1, 1]; load the VAE that belongs to the model")


def check_conditioning(conditioning: list, model, name: str) -> None:
    """Raises ValueError for the prompt of another model's text encoder, by its width."""
    wanted = model.model.model_config.unet_config.get("context_dim")
    for tokens, _ in conditioning:
        if isinstance(wanted, int) and tokens.shape[-1] != wanted:
            raise ValueError(
                f"{name}: its width is {tokens.shape[-1]}, and {type(model.model.model_config).__name__} models read {wanted}: it comes from another "
                "model's text encoder. Encode the prompt with the CLIP of the same checkpoint, or connect DMAPUnconditional"
            )


def latent_size(vae, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the latents of a picture of `size` (H, W): divided by the VAE's factor, rounded up."""
    return tuple(math.ceil(n / vae.downscale_ratio) for n in size)


def model_sigmas(model) -> Tensor:
    """(N,) rising VE sigmas of the model's training timesteps."""
    check_model(model)
    return model.get_model_object("model_sampling").sigmas.float().cpu()


def null_conditioning(model):
    """Conditioning of all-zero context, for checkpoints without a text encoder."""
    config = model.model.model_config.unet_config
    width = config.get("context_dim")
    if not width:
        raise ValueError(f"model: {type(model.model).__name__} has no cross-attention context; it needs no DMAPUnconditional")
    pooled = torch.zeros(1, 1280)  # read by SDXL only
    return [[torch.zeros(1, 1, width), {"pooled_output": pooled}]]


MISFIT = 16  # grey levels (RMS) above which a result shows something else than the measurement
REPORT = "dmap_report"  # attribute of the latents of a run, which outlive its guider in ComfyUI's cache


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


@dataclass
class Report:
    """What one sampling run cost and reached.

    residuals[step][sample]. peak_memory: bytes on the GPU, None where there is none. mismatch[sample], mismatch_worst[sample]: what f of the
    finished picture and the measurement differ by, in grey levels (0..255), as a root mean square and at most; empty where they cannot be compared.
    """

    solver: str
    operator: str
    memory: str = ""
    seconds: float = 0.0
    denoiser_calls: int = 0
    decoder_calls: int = 0
    peak_memory: int | None = None
    residuals: list[list[float]] = field(default_factory=list)
    mismatch: list[float] = field(default_factory=list)
    mismatch_worst: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def misfits(self, noise: float = 0.0) -> list[str]:
        """Warnings about a result that does not reproduce its measurement. noise: its known standard deviation, in grey levels."""
        found = []
        if self.residuals and any(last > first for first, last in zip(self.residuals[0], self.residuals[-1], strict=True)):
            first, last = max(zip(self.residuals[0], self.residuals[-1], strict=True), key=lambda pair: pair[1] - pair[0])
            found.append(f"the residual rose from {first:.4g} to {last:.4g}, so the result moved away from the measurement; lower zeta")
        if any(levels > MISFIT + noise for levels in self.mismatch):
            found.append(
                f"the result misses the measurement by {max(self.mismatch):.0f} of 255 grey levels, so it shows something else; "
                "check the operator, then change zeta or take more steps"
            )
        return found

    def text(self) -> str:
        last = ", ".join(f"{r:.4g}" for r in self.residuals[-1]) if self.residuals else "none"
        peak = f" with a peak of {self.peak_memory / 2**30:.1f} GiB" if self.peak_memory else ""
        return (
            f"{self.solver} on {self.operator}: {len(self.residuals)} steps, {self.denoiser_calls} denoiser calls, {self.decoder_calls} decoder calls, "
            f"{self.seconds:.1f} s, memory plan {self.memory}{peak}, final residual ||f(x) - y|| = {last}"
            + (
                f", mismatch {_listed(self.mismatch)} of 255 grey levels (RMS), {_listed(self.mismatch_worst)} at worst"
                if self.mismatch
                else ""
            )
            + "".join(f". Warning: {warning}" for warning in self.warnings)
        )


def report_of(samples: Tensor) -> Report | None:
    """The report of the run that made these latents, if they are as it returned them."""
    return getattr(samples, REPORT, None)


class HostPrior:
    """dmap_core.prior.Prior of a loaded ComfyUI model and VAE. `size` (H, W) is the picture's; a wider decoded picture is cropped to it."""

    def __init__(self, base_model, vae, autoencoder: nn.Module, controls: list[nn.Module], size: tuple[int, int]):
        self.base_model, self.vae, self.autoencoder, self.size = base_model, vae, autoencoder, size
        self._networks = [base_model.diffusion_model, autoencoder, *controls]
        self.denoiser: Callable[[Tensor, Tensor], Tensor] | None = None  # (z, sigma (B,)) -> denoised, set for every run

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.denoiser(z, z.new_full((len(z),), sigma)).float()

    def decode(self, z0: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latent = self.base_model.process_latent_out(z0).to(self.vae.device, self.vae.vae_dtype)
        image = self.autoencoder.decode(latent).to(z0.device, torch.float32)
        return image[..., : self.size[0], : self.size[1]]

    def encode(self, image: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        h, w = (-n % self.vae.downscale_ratio for n in image.shape[-2:])  # what `decode` cropped
        image = F.pad(image, (0, w, 0, h), mode="replicate")
        latent = self.autoencoder.encode(image.to(self.vae.device, self.vae.vae_dtype))
        return self.base_model.process_latent_in(latent.to(image.device, torch.float32))

    def networks(self) -> list[nn.Module]:
        return self._networks

    def free_memory(self) -> float:
        return comfy.model_management.get_free_memory(self.vae.device)


ROUND_TRIP_SIZE = 256  # pixels of the middle of a measurement that are tried
ROUND_TRIP_PSNR = 20.0  # dB below which a VAE is not one for such pictures


def round_trip(prior: HostPrior, image: Tensor) -> list[str]:
    """A warning if the VAE does not give back a picture (1, 3, H, W) in [-1, 1] that goes through it."""
    height, width = (min(n, ROUND_TRIP_SIZE) for n in image.shape[-2:])
    top, left = ((n - m) // 2 for n, m in zip(image.shape[-2:], (height, width), strict=True))
    image = image[..., top : top + height, left : left + width].clamp(-1, 1)
    back = prior.decode(prior.encode(image))[..., :height, :width].clamp(-1, 1)
    psnr = -10 * math.log10(max(float(((back - image) / 2).square().mean()), 1e-12))
    if psnr >= ROUND_TRIP_PSNR:
        return []
    return [f"the VAE gives the measurement back with {psnr:.1f} dB only; is it the one that belongs to the model?"]


class HostPosterior(Posterior):
    """A Posterior that the host can interrupt in optimisations of the picture, too, which call no network of the prior."""

    def distance(self, image: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return super().distance(image)


class PosteriorGuider(comfy.samplers.CFGGuider):
    """GUIDER that owns the problem: model, conditioning, VAE, operator and measurement y (B, c, h, w) in [-1, 1].

    A stock sampler is given the denoised latent of DPS's conditional score (Prop. 1) with this guider's zeta; a SolverSampler is given
    the Posterior.
    """

    def __init__(self, model, vae, operator: Operator, y: Tensor, zeta: float, memory: str):
        check_model(model)
        check_vae(vae, model)
        model, caches = without_caches(model)
        super().__init__(model)
        self.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
        self.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = pytorch_attention
        self.vae, self.operator, self.y, self.zeta, self.memory = vae, operator, y, zeta, memory
        self.size = operator.image_size(y)
        self.warnings: list[str] = [f"{name} is left out: outputs that it reuses have no gradient" for name in caches]
        self.report: Report | None = None
        self._posterior: Posterior | None = None
        self._static = None  # set for every run
        self.vae_tried = False
        self._solving = False

    def inner_set_conds(self, conds):
        # the host's own would load the model once more here, for conditioning with hooks under dynamic VRAM
        for name, conditioning in conds.items():
            self.original_conds[name] = comfy.sampler_helpers.convert_cond(conditioning)

    def sample(self, noise, latent_image, sampler, sigmas, *args, seed=None, **kwargs):
        if sigmas.shape[-1] == 0:  # denoise 0: nothing to do, as in any ComfyUI guider
            return latent_image
        ours = isinstance(sampler, SolverSampler)
        self._check_run(noise, sigmas, ours)
        if ours and sampler.check:
            sampler.check(self.operator, len(sigmas) - 1)
        name = sampler.name if ours else f"DPSGuider (zeta {self.zeta:g}) with a stock sampler"
        self.report = Report(name, self.operator.describe())
        original_conds, model = self.original_conds, self.model_patcher
        device = comfy.model_management.get_torch_device()
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad(), static_patchers() as self._static:
                self.model_patcher = self._static(model)
                self.original_conds = static_controls(normal(original_conds), self._static)
                noise, latent_image, sigmas, args, kwargs = normal((noise, latent_image, sigmas, args, kwargs))
                seed = ((seed or 0) + SEED_SHIFT) % 2**64
                samples = super().sample(noise, latent_image, sampler, sigmas, *args, seed=seed, **kwargs)
                samples = samples.to(
                    comfy.model_management.intermediate_device()
                )  # where sampler nodes move it: they pass on this very tensor
                setattr(samples, REPORT, self.report)
                return samples
        finally:
            self.original_conds, self.model_patcher, self._static = original_conds, model, None
            self.report.peak_memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
            self._finish_report(time.perf_counter() - started)
            self._posterior = None

    def _check_run(self, noise: Tensor, sigmas: Tensor, ours: bool) -> None:
        check_sigmas(sigmas, to_zero=ours)
        channels = self.model_patcher.get_model_object("latent_format").latent_channels
        if noise.ndim != 4 or noise.shape[1] != channels:
            raise ValueError(
                f"latent_image: it has shape {tuple(noise.shape)}, but the model's latents are (batch, {channels} channels, height, width); "
                "encode it with the model's own VAE"
            )
        wanted, given = latent_size(self.vae, self.size), tuple(noise.shape[-2:])
        if wanted != given:
            factor = self.vae.downscale_ratio
            raise ValueError(
                f"latent_image: {given[1]}x{given[0]} latents make a {given[1] * factor}x{given[0] * factor} picture, but the measurement "
                f"of {self.y.shape[-1]}x{self.y.shape[-2]} and {self.operator.describe()} make one of {self.size[1]}x{self.size[0]} "
                f"({wanted[1]}x{wanted[0]} latents). Connect 'Empty Measurement Latent', or mend the operator's settings"
            )
        if len(self.y) not in (1, len(noise)):
            raise ValueError(
                f"latent_image: a batch of {len(noise)} latents for {len(self.y)} measurements; give one measurement, or one per latent"
            )
        with speaking_of_nodes():
            self.operator.check(self.size, len(noise))

    def _try_vae(self, prior: HostPrior, y: Tensor) -> None:
        if not self.vae_tried:
            warnings = round_trip(prior, self.operator.hint(y))
            for warning in warnings:
                log.warning("DPSGuider: vae: %s", warning)
            self.warnings += warnings
        self.vae_tried = True

    def _report_mismatch(self, z0: Tensor) -> None:
        """What the picture and the measurement differ by in the end, where they can be compared."""
        y_hat = self.operator(self._posterior.prior.decode(z0).clamp(-1, 1))
        try:
            difference, elements = self.operator.difference(y_hat, self._posterior.y), self.operator.elements(self._posterior.y)
        except NotImplementedError:  # scores of classes against classes
            return
        levels = (difference.float() * 127.5).flatten(1)
        self.report.mismatch = (torch.linalg.vector_norm(levels, dim=1) / elements.to(levels).sqrt()).tolist()
        self.report.mismatch_worst = levels.abs().amax(dim=1).tolist()

    def _finish_report(self, seconds: float) -> None:
        self.report.seconds = seconds
        if self._posterior:
            p = self._posterior
            self.report.memory, self.report.denoiser_calls, self.report.decoder_calls = p.plan, p.denoiser_calls, p.decoder_calls
        self.report.warnings = [*self.warnings, *self.report.misfits(127.5 * self.operator.noise)]
        log.info("%s", self.report.text())

    def inner_sample(self, noise, latent_image, device, *args, **kwargs):
        """The models are loaded here, and the solver has not started: the moment to ready them for gradients."""
        vae = self._static(self.vae.patcher)
        patchers = [self.model_patcher, *self.loaded_models, vae]
        estimate = self.inner_model.memory_required(noise.shape) + self.vae.memory_used_decode(noise.shape, self.vae.vae_dtype)
        comfy.model_management.load_models_gpu(patchers, memory_required=GRADIENT_MEMORY * estimate, force_full_load=True)
        check_whole(patchers)
        controls = list(controls_of(self.conds))
        if controls:
            add_own_skip(self.model_options["transformer_options"])  # of this run: the host works on a copy
        for control in controls:
            if hasattr(control, "control_weights"):  # of a control LoRA, whose network is made of them later
                control.control_weights = normal(control.control_weights)
        latent_format = vars(self.inner_model.latent_format)
        latent_format.update(normal(latent_format))  # some have a mean and a deviation per channel
        networks = [p.model for p in self.loaded_models]
        networks += [m for control in controls for m in vars(control).values() if isinstance(m, nn.Module) and m not in networks]
        prior = HostPrior(self.inner_model, self.vae, vae.model, networks, self.size)
        y = normal(self.y).to(device).expand(len(noise), -1, -1, -1)
        try:
            self._posterior = HostPosterior(prior, self.operator.to(device), y, self.memory)
            with frozen(prior.networks()), differentiable_attention(networks), exact_layers(prior.networks()):
                check_quantised(prior.networks())
                self._try_vae(prior, y[:1])
                samples = super().inner_sample(noise, latent_image, device, *args, **kwargs)
                if self.report.residuals:  # a study's run restores nothing
                    self._report_mismatch(self.inner_model.process_latent_in(samples))
                return samples
        finally:
            self.operator.to("cpu")

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        def plain(z, sigma):
            return super(PosteriorGuider, self).predict_noise(z, sigma, model_options or {}, seed)

        if self._solving:
            return plain(x, timestep)
        self._posterior.prior.denoiser = plain
        sigma = float(timestep.flatten()[0])
        levels = [float(s) for s in model_options["transformer_options"]["sample_sigmas"]]
        sigma_next = max((s for s in levels if s < sigma * (1 - 1e-6)), default=0.0)
        grad, denoised, residual = self._posterior.gradient(x, sigma)
        check_finite(len(self.report.residuals), len(levels) - 1, self.zeta, grad, residual)
        self.report.residuals.append(residual.tolist())
        return guided_denoised(denoised, grad, self.zeta, sigma, sigma_next)

    def solve(self, sampler: SolverSampler, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar) -> Tensor:
        """Run a solver of dmap_core on the posterior, from the noise and the latent that the host prepared."""
        inpaint = comfy.samplers.KSamplerX0Inpaint(self, sigmas)  # keeps the unmasked part of a latent with a noise mask
        inpaint.latent_image, inpaint.noise = latent_image, noise
        self._posterior.prior.denoiser = lambda z, sigma: inpaint(z, sigma, denoise_mask=denoise_mask, **extra_args)
        z = self.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, sampler.max_denoise(self, sigmas))
        steps = len(sigmas) - 1

        def report(step: int, denoised: Tensor, z: Tensor, residual: Tensor) -> None:
            self.report.residuals.append(residual.tolist())
            bar.update()
            if callback:
                callback(step, denoised, z, steps)

        self._solving = True
        try:
            # on a host that shifts the seed itself, the shift has not happened yet: only its own samplers do it
            noise_seed = extra_args["seed"] + 1 - SEED_SHIFT
            with tqdm(total=steps, disable=disable_pbar) as bar:  # the line that stock samplers write
                z = sampler.solver(
                    self._posterior, z, sigmas, **sampler.settings, generator=generators(noise_seed, len(z)), callback=report
                )
        finally:
            self._solving = False
        if denoise_mask is not None:
            z = z * denoise_mask + latent_image * (1 - denoise_mask)
        return z


class SolverSampler(comfy.samplers.Sampler):
    """SAMPLER that owns the algorithm: a solver of dmap_core and its settings.

    check(operator, steps) raises ValueError for runs that the solver cannot do; it is called before models are loaded.
    """

    def __init__(self, name: str, solver: Callable[..., Tensor], check: Callable[[Operator, int], None] | None = None, **settings):
        self.name, self.solver, self.check, self.settings = name, solver, check, settings

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        if not isinstance(model_wrap, PosteriorGuider):
            raise ValueError(
                f"{self.name}: it was given a {type(model_wrap).__name__}, which knows neither measurement nor operator. "
                "Connect the node 'DPSGuider' to the guider input of SamplerCustomAdvanced"
            )
        return model_wrap.solve(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
