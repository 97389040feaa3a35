"""What the tests of this folder work with: ComfyUI, the pack as ComfyUI would import it, and a problem small enough for a slow CPU.

Imported through the fixture `lab`.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.sd
import comfy.utils
import dynamic
import folder_paths
import torch
from comfy_extras import nodes_custom_sampler, nodes_model_advanced

import nodes

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "dmap-demo-prior.safetensors"
SIZE = 32  # pixels; the VAE makes one latent of 8x8 of them
SEED = 7


if os.environ.get("DMAP_TESTS_DYNAMIC_VRAM"):  # all tests of this folder as on a machine with an NVIDIA card
    assert dynamic.AVAILABLE, "this ComfyUI has no dynamic VRAM (it came with 0.16)"
    dynamic.dynamic_vram().__enter__()


def import_pack():
    """The pack under a name of its own, its folder not on the path: ComfyUI does the same with the folders of custom_nodes."""
    spec = importlib.util.spec_from_file_location("dmap_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["dmap_pack"] = pack
    spec.loader.exec_module(pack)
    return pack


pack = import_pack()
core = SimpleNamespace(
    errors=importlib.import_module("dmap_pack.dmap_core.errors"),
    gradient=importlib.import_module("dmap_pack.dmap_core.gradient"),
    memory=importlib.import_module("dmap_pack.dmap_core.memory"),
    operators=importlib.import_module("dmap_pack.dmap_core.operators"),
    posterior=importlib.import_module("dmap_pack.dmap_core.posterior"),
)


async def list_nodes():
    return await (await pack.comfy_entrypoint()).get_node_list()


# In a thread of its own: where the browser's tests ran before, Playwright's loop runs in this one.
with ThreadPoolExecutor(1) as pool:
    NODES = {cls.GET_SCHEMA().node_id: cls for cls in pool.submit(asyncio.run, list_nodes()).result()}
folder_paths.add_model_folder_path("checkpoints", str(ROOT / "models" / "checkpoints"))
comfy.utils.set_progress_bar_enabled(False)  # bars of stock samplers would fill the output of tests that fail


def call(node_id, **inputs):
    """Run a node, the pack's or ComfyUI's, of either API: its output, or the tuple of its outputs if it has several."""
    found = [NODES.get(node_id), nodes.NODE_CLASS_MAPPINGS.get(node_id)]
    found += [getattr(module, node_id, None) for module in (nodes_custom_sampler, nodes_model_advanced)]
    cls = next(filter(None, found))
    output = cls.execute(**inputs).result if hasattr(cls, "define_schema") else getattr(cls(), cls.FUNCTION)(**inputs)
    return output[0] if len(output) == 1 else tuple(output)


def fresh(dtype=None):
    """(model, vae) from the file, as a loader node makes them: with weights that autograd may not save."""
    if dtype is None:
        model, _, vae = call("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    else:  # what the node "Load Diffusion Model" calls weight_dtype, for checkpoints
        path = folder_paths.get_full_path("checkpoints", CHECKPOINT)
        model, _, vae, _ = comfy.sd.load_checkpoint_guess_config(path, output_clip=False, model_options={"dtype": dtype})
    return model, vae


@lru_cache(maxsize=1)
def shared():
    """(model, vae) that many tests use, one after the other."""
    return fresh()


def separate_vae(dtype=None):
    """The checkpoint's VAE as a file of its own would be loaded."""
    weights = comfy.utils.load_torch_file(folder_paths.get_full_path("checkpoints", CHECKPOINT))
    prefix = "first_stage_model."
    return comfy.sd.VAE(sd={k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}, dtype=dtype)


def with_lora(model, strength=1.0):
    """A clone of the model with a random LoRA on the linear layers of its transformer blocks, with the names of kohya's trainer."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if name.endswith(".weight") and ".transformer_blocks." in name and weight.ndim == 2:
            key = "lora_unet_" + name[: -len(".weight")].replace(".", "_")
            lora[f"{key}.lora_up.weight"] = 0.1 * torch.randn(weight.shape[0], 2, generator=generator)
            lora[f"{key}.lora_down.weight"] = 0.1 * torch.randn(2, weight.shape[1], generator=generator)
            lora[f"{key}.alpha"] = torch.tensor(2.0)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    assert len(lora) >= 3 and len(patched.patches) == len(lora) // 3, "ComfyUI did not apply the LoRA"
    return patched


def picture(seed=0, height=SIZE, width=SIZE):
    """(1, H, W, 3) in 0..1: soft shapes in a few colours, about what the demo prior was trained on."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return smooth.clamp(0, 1).movedim(1, -1)


def problem(operator=None, measurement=None, model=None, vae=None, **changes):
    """The inputs of a DPSGuider: super-resolution x8 with the shared model, and what is given instead or besides."""
    model = shared()[0] if model is None else model
    vae = shared()[1] if vae is None else vae
    operator = call("DMAP_OperatorSuperResolution", scale=8) if operator is None else operator
    if measurement is None:
        measurement = call("DMAP_Degrade", image=picture(), operator=operator, noise_sigma=0.0, seed=0)
    inputs = {"model": model, "vae": vae, "operator": operator, "measurement": measurement, "zeta": 1.0}
    return {"positive": call("DMAP_DMAPUnconditional", model=model), **inputs, **changes}


def guider(**changes):
    """A DPSGuider that has tried its VAE, so that the calls of a run are those of its solver."""
    made = call("DMAP_DPSGuider", **problem(**changes))
    made.vae_tried = True
    return made


def stock_guider(cfg=1.0, **changes):
    """ComfyUI's own guider: the same model and conditioning, no measurement."""
    inputs = problem(**changes)
    positive = inputs["positive"]
    return call("CFGGuider", model=inputs["model"], positive=positive, negative=inputs.get("negative", positive), cfg=cfg)


def as_core(image):
    """ComfyUI's picture (B, H, W, C) in 0..1 as (B, C, H, W) in -1..1."""
    return image.movedim(-1, 1) * 2 - 1


def residual(latents, **changes):
    """||f(D(z0)) - y|| of the only sample of what a sampler node puts out, from the network behind the VAE."""
    inputs = problem(**changes)
    y, operator, vae = as_core(inputs["measurement"]), inputs["operator"], inputs["vae"]
    height, width = operator.image_size(y)
    image = vae.first_stage_model.decode(latents.to(vae.vae_dtype)).float()
    (distance,) = operator.distance(operator(image[..., :height, :width]), y).tolist()
    return distance


def latent_size(problem_changes=None):
    """(h, w) of the latents of a problem's picture."""
    inputs = problem(**(problem_changes or {}))
    latent, _, _ = call("DMAP_EmptyMeasurementLatent", **{k: inputs[k] for k in ("measurement", "operator", "vae")}, batch_size=1)
    return tuple(latent["samples"].shape[-2:])


def dps(zeta=1.0, **settings):
    return call("DMAP_DPSSampler", zeta=zeta, **settings)


def dmap(zeta=1.0, K=2, **settings):
    return call("DMAP_DMAPSampler", zeta=zeta, K=K, **settings)


def stock(name):
    return call("KSamplerSelect", sampler_name=name)


def sigmas(steps=3, **settings):
    return call("DMAP_DMAPScheduler", model=shared()[0], steps=steps, **settings)


def empty(batch=1, height=SIZE // 8, width=SIZE // 8):
    return {"samples": torch.zeros(batch, 4, height, width)}


def sample(guider, sampler, steps=3, seed=SEED, latent=None, schedule=None):
    """The latents that SamplerCustomAdvanced makes, (B, 4, h, w)."""
    output, _ = call(
        "SamplerCustomAdvanced",
        noise=call("RandomNoise", noise_seed=seed),
        guider=guider,
        sampler=sampler,
        sigmas=sigmas(steps) if schedule is None else schedule,
        latent_image=empty() if latent is None else latent,
    )
    return output["samples"]


def watch(guider, sampler, callback, steps=3, schedule=None, latent=None):
    """The latents of a run that calls back after every step, as SamplerCustomAdvanced makes it call back for the preview."""
    latent = empty() if latent is None else latent
    noise = call("RandomNoise", noise_seed=SEED).generate_noise(latent)
    schedule = sigmas(steps) if schedule is None else schedule
    mask = latent.get("noise_mask")
    return guider.sample(noise, latent["samples"], sampler, schedule, denoise_mask=mask, callback=callback, seed=SEED)


def ksampler(model, seed=SEED, steps=2):
    """What the stock KSampler makes of the model."""
    condition = call("DMAP_DMAPUnconditional", model=model)
    inputs = {
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": condition,
        "negative": condition,
        "latent_image": empty(),
        "denoise": 1.0,
    }
    return call("KSampler", model=model, seed=seed, steps=steps, cfg=1.0, **inputs)["samples"]


def counting(model):
    """(a clone of the model, a list that gets the noise level of each call of its network)."""
    calls = []

    def count(apply_model, arguments):
        calls.append(float(arguments["timestep"].flatten()[0]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(count)
    return clone, calls


def probe(guider, z, sigma):
    """What the guider returns to a sampler that asks for the denoised latent of z (B, 4, h, w) at noise level sigma, the last before 0."""
    answers = []

    def ask(model, x, sigmas, extra_args=None, callback=None, disable=None):
        answers.append(model(z.clone(), torch.full((len(z),), sigma), **extra_args).clone())
        return answers[0]

    guider.sample(torch.zeros_like(z), torch.zeros_like(z), comfy.samplers.KSAMPLER(ask), torch.tensor([sigma, 0.0]), seed=0)
    return answers[0]


@contextlib.contextmanager
def decoder(vae, at, change):
    """The VAE's decoder returns change(picture) from its call number `at` in the context."""
    network = vae.first_stage_model
    decode, calls = network.decode, []

    def changed(z):
        calls.append(z)
        return change(decode(z)) if len(calls) == at else decode(z)

    network.decode = changed
    try:
        yield
    finally:
        del network.decode


def diverging(vae, at):
    return decoder(vae, at, lambda image: image * float("nan"))


def interrupting(vae, at):
    """As if the user pressed Cancel while the picture is decoded."""

    def cancel(image):
        comfy.model_management.interrupt_current_processing(True)
        return image

    return decoder(vae, at, cancel)
