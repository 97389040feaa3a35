"""Checkpoints, LoRAs and ControlNets with random weights that ComfyUI's stock loaders take for Stable Diffusion 1.5, 2.0, 2.1 and SDXL.

Imported by the fixtures of test_families.py. How ComfyUI 0.3.75 tells the families apart, and what is smaller here:
- comfy.supported_models compares context width, 320 model channels, linear or convolutional projections and the width of the pooled
  conditioning, for SDXL also the transformer depth of every input block. All of that is what it is in the real files. It is read from
  the shapes of the weights, never from a name.
- Channel multipliers, numbers of residual blocks and the depths of the middle and output blocks are read from the file, too, but not
  compared: here every level has 320 channels, and only a few blocks outside SDXL's input have a transformer.
- SD 2.1 (v-prediction) has the shapes of SD 2.0: ComfyUI takes a file for v-prediction if the bias of the first norm in
  output_blocks.11's transformer spreads by more than 0.09. So both have twelve output blocks here, as they have in reality.
- A ControlNet is recognised as its UNet is. Like the real ones it starts as a copy of the UNet's encoder.

The files are in half precision, as most real ones; on the CPU ComfyUI computes with them in single precision. The VAE is the demo
prior's, the text encoders are left out: conditioning is made of random tensors.
"""

import gc
import math
from dataclasses import dataclass
from pathlib import Path

import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import lab
import safetensors.torch
import torch

UNET, VAE = "model.diffusion_model.", "first_stage_model."
V_STATISTIC = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
ATTENTIONS = [f"attn{i}_to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]


@dataclass(frozen=True)
class Family:
    context: int  # width of the text encoder's output
    res_blocks: tuple[int, ...]  # per level
    depths: tuple[int, ...]  # of the transformers in the input blocks
    last_outputs: tuple[int, ...]  # of the transformers in the last output blocks; those before have none
    lora: tuple[str, ...]  # transformer blocks in the names of kohya's trainer
    config: str  # class in comfy.supported_models
    base: str = "BaseModel"  # class in comfy.model_base
    prediction: str = "EPS"
    pooled: int | None = None  # width of the pooled conditioning
    linear: bool = True  # projections of the transformers
    spread: float = 0.02  # of the bias that tells SD 2.1 from SD 2.0

    def unet(self):
        """The arguments of ComfyUI's UNetModel."""
        outputs = sum(n + 1 for n in self.res_blocks)
        heads = {"num_heads": -1, "num_head_channels": 64} if self.linear else {"num_heads": 8, "num_head_channels": -1}
        pooled = {} if self.pooled is None else {"num_classes": "sequential", "adm_in_channels": self.pooled}
        return {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "channel_mult": [1] * len(self.res_blocks),
            "num_res_blocks": list(self.res_blocks),
            "transformer_depth": list(self.depths),
            "transformer_depth_middle": 1,
            "transformer_depth_output": list(self.last_outputs) + [0] * (outputs - len(self.last_outputs)),
            "context_dim": self.context,
            "use_linear_in_transformer": self.linear,
            "use_spatial_transformer": True,
            "legacy": False,
            **heads,
            **pooled,
        }


# SD 1.5 and 2.x get their LoRAs with diffusers' names of the blocks, SDXL with the original ones: that is what kohya's trainer writes.
SD2 = {
    "context": 1024,
    "res_blocks": (2, 2, 2, 2),
    "depths": (1, 0, 0, 0, 0, 0, 0, 0),
    "last_outputs": (1,),
    "lora": ("down_blocks_0_attentions_0", "mid_block_attentions_0", "up_blocks_3_attentions_2"),
    "config": "SD20",
}
FAMILIES = {
    "SD1.5": Family(
        context=768,
        res_blocks=(1, 1),
        depths=(1, 1),
        last_outputs=(1, 1),
        lora=("down_blocks_0_attentions_0", "down_blocks_1_attentions_0", "mid_block_attentions_0", "up_blocks_1_attentions_1"),
        config="SD15",
        linear=False,
    ),
    "SD2.0": Family(**SD2),
    "SD2.1": Family(**SD2, prediction="V_PREDICTION", spread=0.2),
    "SDXL": Family(
        context=2048,
        res_blocks=(2, 2, 2),
        depths=(0, 0, 2, 2, 10, 10),
        last_outputs=(0, 0, 0, 1),
        lora=("input_blocks_4_1", "input_blocks_8_1", "middle_block_1", "output_blocks_5_1"),
        config="SDXL",
        base="SDXL",
        pooled=2816,
    ),
}


def random_weights(network, seed):
    """A state dict for a network on the device meta, in half precision: variances stay about what they are from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            bound = math.sqrt(3 / tensor[0].numel())
            values = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith(".weight"):  # of a norm
            values = 1 + 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            values = 0.05 * torch.randn(tensor.shape, generator=generator)
        weights[name] = values.half()
    return weights


def demo_vae():
    weights = load(folder_paths.get_full_path("checkpoints", lab.CHECKPOINT))
    return {k: v.clone() for k, v in weights.items() if k.startswith(VAE)}


def save(weights, path):
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, path)


def load(path):
    return comfy.utils.load_torch_file(str(path))


def unet_weights(family, seed=0):
    network = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **family.unet(), dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init
    )
    weights = random_weights(network, seed)
    weights["out.2.weight"] *= 1.5  # so that about half of the denoised latent's slope is the network's
    if V_STATISTIC in weights:
        weights[V_STATISTIC] = (family.spread * torch.randn(320, generator=torch.Generator().manual_seed(seed))).half()
    return weights


def controlnet_weights(unet, seed=1):
    """The encoder of the UNet, the layers that read the hint, and the convolutions to the UNet's blocks: 0 before any training."""
    weights = {k: v for k, v in unet.items() if not k.startswith(("output_blocks.", "out."))}
    hint = torch.nn.Sequential()
    widths = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for i in range(8):
        hint.add_module(str(2 * i), torch.nn.Conv2d(widths[i], widths[i + 1], 3, device="meta"))
    blocks = 1 + max(int(k.split(".")[1]) for k in unet if k.startswith("input_blocks."))
    convolutions = torch.nn.Sequential(*(torch.nn.Conv2d(320, 320, 1, device="meta") for _ in range(blocks)))
    middle = torch.nn.Sequential(torch.nn.Conv2d(320, 320, 1, device="meta"))
    weights |= {f"input_hint_block.{k}": v for k, v in random_weights(hint, seed).items()}
    weights |= {f"zero_convs.{k.replace('.', '.0.')}": v for k, v in random_weights(convolutions, seed + 1).items()}
    weights |= {f"middle_block_out.{k}": v for k, v in random_weights(middle, seed + 2).items()}
    return weights


def lora_weights(family, rank=4, seed=5):
    """A LoRA for the attention and the feed-forward layers of some transformer blocks."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for block in family.lora:
        for layer in ATTENTIONS:
            key = f"lora_unet_{block}_transformer_blocks_0_{layer}"
            inputs = {"attn2_to_k": family.context, "attn2_to_v": family.context, "ff_net_2": 1280}.get(layer, 320)
            outputs = 2560 if layer == "ff_net_0_proj" else 320
            weights[f"{key}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            weights[f"{key}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator) / math.sqrt(rank)
            weights[f"{key}.alpha"] = torch.tensor(float(rank))
    return weights


def sd3_weights(seed=0):
    """A Stable Diffusion 3 of depth 1: its width is 64 times the depth, so that it is as small as it can be."""
    network = comfy.ldm.modules.diffusionmodules.mmdit.MMDiT(
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=1,
        adm_in_channels=2048,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}},
        num_patches=36,
        pos_embed_max_size=6,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    return random_weights(network, seed)


class Files:
    """A folder that the stock loaders search, with the files of one family. Afterwards nothing is left of it, in memory neither."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.before = {}

    def __enter__(self):
        for kind in ("checkpoints", "loras", "controlnet"):
            self.before[kind] = folder_paths.folder_names_and_paths[kind]
            paths, extensions = self.before[kind]
            folder_paths.folder_names_and_paths[kind] = ([*paths, str(self.folder)], extensions)
        return self

    def __exit__(self, *_):
        folder_paths.folder_names_and_paths.update(self.before)
        for path in self.folder.iterdir():
            path.unlink()
        comfy.model_management.unload_all_models()
        gc.collect()


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Loaded:
    """A family as a workflow has it: what the stock loader made of the files, and conditioning for it."""

    def __init__(self, name, folder):
        self.name, self.family, self.folder = name, FAMILIES[name], folder
        unet = unet_weights(self.family)
        save({UNET + k: v for k, v in unet.items()} | demo_vae(), folder / "checkpoint.safetensors")
        save(controlnet_weights(unet), folder / "controlnet.safetensors")
        save(lora_weights(self.family), folder / "lora.safetensors")
        del unet
        self.model, self.clip, self.vae = lab.call("CheckpointLoaderSimple", ckpt_name="checkpoint.safetensors")

    def condition(self, seed, **more):
        pooled = {} if self.family.pooled is None else {"pooled_output": noise(1, 1280, seed=seed), "width": 1024, "height": 768}
        return [[noise(1, 3, self.family.context, seed=seed), {**pooled, **more}]]

    def problem(self, **changes):
        """The inputs of DPSGuider."""
        return lab.problem(**{"model": self.model, "vae": self.vae, "positive": self.condition(11), **changes})

    def with_lora(self, strength=1.0):
        return lab.call("LoraLoaderModelOnly", model=self.model, lora_name="lora.safetensors", strength_model=strength)

    def controlled(self, strength=1.0, hint=0, controlnet=None, positive=None, negative=None):
        """Positive and negative conditioning with a ControlNet. The hint has another size than the picture."""
        return lab.call(
            "ControlNetApplyAdvanced",
            positive=positive or self.condition(11),
            negative=negative or self.condition(12),
            control_net=controlnet or self.controlnet(),
            image=lab.picture(seed=hint, height=48, width=48),
            strength=strength,
            start_percent=0.0,
            end_percent=1.0,
        )

    def controlnet(self):
        if not hasattr(self, "_controlnet"):
            self._controlnet = lab.call("ControlNetLoader", control_net_name="controlnet.safetensors")
        return self._controlnet


def denoised(z, sigma, cfg=1.0, **problem):
    """What ComfyUI's own guider says to z (B, 4, h, w)."""
    return lab.probe(lab.stock_guider(cfg=cfg, **problem), z, sigma)


def guided(z, sigma, **problem):
    """What DPSGuider says to z, for the last step of a stock sampler: denoised - zeta * gradient, with a zeta of 1."""
    return lab.probe(lab.guider(**problem), z, sigma)


def slope(z, sigma, direction, step, **problem):
    """Central difference of the residual along a unit direction, from ComfyUI's own guider and the VAE's network."""
    latent_format = problem["model"].get_model_object("latent_format")
    measured = {k: v for k, v in problem.items() if k != "cfg"}

    def residual(z):
        return lab.residual(latent_format.process_out(denoised(z, sigma, **problem)), **measured)

    return (residual(z + step * direction) - residual(z - step * direction)) / (2 * step)
