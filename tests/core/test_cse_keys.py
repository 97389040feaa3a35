"""Names of tensors: there and back, against networks of diffusers and against its own converters."""

import pytest
import torch
from host import import_torchvision

import_torchvision()

from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint  # noqa: E402

from dmap_core.backends.keys import DIFFUSERS_MARK, LDM_MARK, resnets_per_level, to_diffusers, to_ldm  # noqa: E402

SD1 = {"attention_head_dim": 2}
SD2 = {"attention_head_dim": 2, "use_linear_projection": True}
SDXL = {**SD2, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
KINDS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def networks(attention, resnets=1, middle=True, kind="sd1"):
    """A UNet and its ControlNet without memory. attention: of every level, a letter: "a" with, "-" without."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32,) * len(attention),
            layers_per_block=resnets,
            down_block_types=["CrossAttnDownBlock2D" if a == "a" else "DownBlock2D" for a in attention],
            up_block_types=["CrossAttnUpBlock2D" if a == "a" else "UpBlock2D" for a in reversed(attention)],
            mid_block_type="UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
            cross_attention_dim=16,
            **KINDS[kind],
        )
        return unet, ControlNetModel.from_unet(unet, load_weights_from_unet=False)


LAYOUTS = [
    ("a", 1, True, "sd1"),
    ("-", 1, False, "sd1"),
    ("-", 2, True, "sd2"),
    ("aa", 1, True, "sd2"),
    ("-a", 2, False, "sd1"),
    ("a-", 1, True, "sdxl"),
    ("--", 2, True, "sd1"),
    ("-aa", 2, True, "sdxl"),
    ("a-a", 1, False, "sd2"),
    ("aa-", 1, True, "sd1"),
    ("---", 1, False, "sd2"),
    ("aaa-", 2, True, "sd1"),
    ("aaa-", 2, True, "sd2"),
    ("-a-a", 1, True, "sd1"),
    ("a--a", 2, False, "sdxl"),
    ("aaaa", 1, False, "sd1"),
]


def same(found, wanted):
    return found.keys() == wanted.keys() and all(found[name] is wanted[name] for name in wanted)


@pytest.mark.parametrize(("attention", "resnets", "middle", "kind"), LAYOUTS)
def test_there_and_back_and_diffusers_converters(attention, resnets, middle, kind):
    unet, controlnet = networks(attention, resnets, middle, kind)
    state = unet.state_dict()
    ldm = to_ldm(state)
    assert len(ldm) == len(state)
    assert not set(ldm) & set(state)
    assert same(to_diffusers(ldm), state)
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in ldm.items()}
    assert same(convert_ldm_unet_checkpoint(checkpoint, unet.config), state)

    control = controlnet.state_dict()
    control_ldm = to_ldm(control)
    assert len(control_ldm) == len(control)
    assert same(to_diffusers(control_ldm), control)
    known = {name: tensor for name, tensor in control.items() if not name.startswith("add_embedding.")}  # which their converter forgets
    assert same(convert_controlnet_checkpoint(control_ldm, controlnet.config), known)

    copied = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
    assert {n for n in control_ldm if n.startswith(copied)} == {n for n in ldm if n.startswith(copied)}
    assert ("label_emb.0.2.weight" in ldm) == (kind == "sdxl")
    for names in (state, ldm, control, control_ldm):
        assert resnets_per_level(names) == [resnets] * len(attention)


def test_names_of_stable_diffusion():
    """A few that everybody who has opened such a file knows, of SD 1.5."""
    unet, controlnet = networks("aaa-", 2)
    pairs = {
        "time_embed.2.bias": "time_embedding.linear_2.bias",
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.11.0.out_layers.3.bias": "down_blocks.3.resnets.1.conv2.bias",
        "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
        "middle_block.2.in_layers.0.weight": "mid_block.resnets.1.norm1.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        "output_blocks.11.0.skip_connection.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
        "output_blocks.11.1.proj_out.bias": "up_blocks.3.attentions.2.proj_out.bias",
        "out.2.weight": "conv_out.weight",
    }
    ldm = to_ldm({name: name for name in unet.state_dict()})
    assert {name: ldm.get(name) for name in pairs} == pairs
    pairs = {
        LDM_MARK: DIFFUSERS_MARK,
        "input_hint_block.2.weight": "controlnet_cond_embedding.blocks.0.weight",
        "input_hint_block.12.bias": "controlnet_cond_embedding.blocks.5.bias",
        "input_hint_block.14.weight": "controlnet_cond_embedding.conv_out.weight",
        "zero_convs.0.0.weight": "controlnet_down_blocks.0.weight",
        "zero_convs.11.0.bias": "controlnet_down_blocks.11.bias",
        "middle_block_out.0.weight": "controlnet_mid_block.weight",
    }
    ldm = to_ldm({name: name for name in controlnet.state_dict()})
    assert {name: ldm.get(name) for name in pairs} == pairs


def test_levels_may_differ_in_resnets():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32),
            layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
        )
    state = unet.state_dict()
    ldm = to_ldm(state)
    assert resnets_per_level(state) == resnets_per_level(ldm) == [1, 2]
    assert len(ldm) == len(state) and same(to_diffusers(ldm), state)
    assert "output_blocks.2.2.conv.weight" in ldm and "output_blocks.4.0.in_layers.0.weight" in ldm


UNKNOWN_LDM = [
    "first_stage_model.decoder.conv_in.weight",
    "input_blocks.1.0.something.weight",
    "output_blocks.99.0.in_layers.0.weight",
    "output_blocks.2.3.conv.weight",
    "middle_block.3.in_layers.0.weight",
    "alphas_cumprod",
]


@pytest.mark.parametrize("name", UNKNOWN_LDM)
def test_an_unknown_name_among_ldm_names(name):
    ldm = to_ldm(networks("aa")[0].state_dict())
    with pytest.raises(ValueError, match=rf"the tensor {name} "):
        to_diffusers({**ldm, name: torch.zeros(1)})


@pytest.mark.parametrize(
    "name", ["class_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm3.weight", "up_blocks.7.resnets.0.conv1.bias"]
)
def test_an_unknown_name_among_diffusers_names(name):
    state = networks("aa")[0].state_dict()
    with pytest.raises(ValueError, match=rf"the tensor {name} "):
        to_ldm({**state, name: torch.zeros(1)})


def test_names_of_the_other_kind_are_refused():
    state = networks("a")[0].state_dict()
    with pytest.raises(ValueError, match="the tensor "):
        to_diffusers(state)
    with pytest.raises(ValueError, match="the tensor "):
        to_ldm(to_ldm(state))
