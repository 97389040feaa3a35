"""Flow models as small as ComfyUI's own classes allow, with random weights: what its loaders make of the large files, built from the same configurations.

Imported by the fixtures of test_flows.py. Only SD3's width follows from its depth, so that a whole file of it is small: families.sd3_weights.
"""

from dataclasses import dataclass, field

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import families
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams


@dataclass(frozen=True)
class Flow:
    """config: class in comfy.supported_models. network: what model detection reads of a file, with other numbers. width: of the text encoder's output."""

    config: str
    network: dict
    width: int
    multiplier: float  # of the times that its network is told
    cond: dict = field(default_factory=dict)
    channels: int = 16


def known(params, **newer):
    """What newer versions of ComfyUI detect besides."""
    return {name: value for name, value in newer.items() if name in params.__dataclass_fields__}


STREAMS = {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": 24,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 8, 8],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
LUMINA = {  # Z-Image tells its times to layers of 256 channels
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 48,
    "cap_feat_dim": 24,
    "n_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
}
FLOWS = {
    "Flux": Flow(
        "Flux",
        {**STREAMS, "image_model": "flux", "vec_in_dim": 20, "guidance_embed": True} | known(FluxParams, txt_ids_dims=[]),
        24,
        1.0,
        {"pooled_output": torch.full((1, 20), 0.3), "guidance": 3.5},
    ),
    "Chroma": Flow(
        "Chroma",
        {
            **STREAMS,
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 48,
            "hidden_dim": 32,
            "n_layers": 1,
        }
        | known(ChromaParams, txt_ids_dims=[], vec_in_dim=None),
        24,
        1.0,
        {"pooled_output": torch.full((1, 20), 0.3)},  # which its text encoder gives, and it does not read
    ),
    "AuraFlow": Flow(
        "AuraFlow",
        {"max_seq": 64, "cond_seq_dim": 24, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2, "global_conddim": 32},
        24,
        1.0,
        channels=4,
    ),
    "Lumina 2": Flow("Lumina2", LUMINA, 24, 1.0),
    "Z-Image": Flow("ZImage", {**LUMINA, "dim": 256, "axes_dims": [48, 40, 40], "z_image_modulation": True, "time_scale": 1000.0}, 24, 1.0),
    "SD3": Flow(
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "depth": 1,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 64}},
            "num_patches": 36,
            "pos_embed_max_size": 6,
            "pos_embed_scaling_factor": None,
        },
        24,
        1000.0,
        {"pooled_output": torch.full((1, 2048), 0.1)},
    ),
}


def tiny_vae(channels):
    """A TAESD of so many channels with random weights, as Load VAE opens its file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = comfy.taesd.taesd.TAESD(latent_channels=channels)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
        for module in network.modules():
            if type(module).__name__ == "Block":
                torch.nn.init.zeros_(module.conv[-1].weight)
        state = network.state_dict()
    return comfy.sd.VAE(sd={name: tensor.clone() for name, tensor in state.items()})


class Loaded:
    """model, vae and conditioning of a family, as loaders and a text encoder give them."""

    def __init__(self, name):
        self.flow = FLOWS[name]
        config = getattr(comfy.supported_models, self.flow.config)(dict(self.flow.network))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        weights = families.random_weights(model.diffusion_model, seed=0)
        model.diffusion_model.load_state_dict({name: w.float() for name, w in weights.items()})
        device = comfy.model_management.get_torch_device()
        self.model = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
        self.vae = tiny_vae(self.flow.channels)
        self.positive = [[families.noise(1, 3, self.flow.width, seed=11), dict(self.flow.cond)]]

    def velocity(self, x, t):
        """What its network says to x_t (1, C, h, w), called as ComfyUI's model calls it."""
        given = {name: c.process_cond(batch_size=1, device=x.device, area=None).cond for name, c in self.conds(x).items()}
        context = given.pop("c_crossattn")
        times = torch.full((1,), t * self.flow.multiplier)
        with torch.no_grad():
            return self.model.model.diffusion_model(x, times, context=context, control=None, transformer_options={}, **given).float()

    def conds(self, x):
        tokens, values = self.positive[0]
        return self.model.model.extra_conds(cross_attn=tokens, noise=x, device=x.device, **values)
