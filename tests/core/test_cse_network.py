"""The ControlNet that a training starts from, against diffusers' own way of making one."""

import pytest
import torch
from host import import_torchvision

import_torchvision()

from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: E402

from dmap_core.backends.fingerprint import fingerprint  # noqa: E402
from dmap_core.backends.keys import to_diffusers, to_ldm  # noqa: E402
from dmap_core.cse.network import HINT_CHANNELS, encoder_shapes, initial_controlnet  # noqa: E402

CONTEXT = 16
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 4}


def small_unet(seed=0, widths=(32, 64), **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=CONTEXT,
            attention_head_dim=2,
            **settings,
        )


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def ldm(unet):
    return to_ldm(unet.state_dict())


def inputs():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([7, 801]),
        torch.randn(2, 5, CONTEXT, generator=generator),
        torch.rand(2, 3, 64, 64, generator=generator),
    )


def built(unet, weights):
    controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    controlnet.load_state_dict(to_diffusers(weights), strict=True)
    return controlnet


def test_it_is_diffusers_initialisation(unet, ldm):
    """Equal to ControlNetModel.from_unet in everything but the random numbers of the hint encoder."""
    ours, theirs = built(unet, initial_controlnet(ldm, 0)).state_dict(), ControlNetModel.from_unet(unet).state_dict()
    assert ours.keys() == theirs.keys()
    random = [n for n in ours if n.startswith("controlnet_cond_embedding.") and ".conv_out." not in n]
    assert len(random) == 2 * len(HINT_CHANNELS)
    for name in ours:
        if name not in random:
            assert torch.equal(ours[name], theirs[name]), name


def test_the_hint_encoder_is_distributed_like_torch(ldm):
    state = initial_controlnet(ldm, 0)
    inside = 3
    for i, out in enumerate(HINT_CHANNELS):
        bound = (inside * 9) ** -0.5
        for kind in ("weight", "bias"):
            values = state[f"input_hint_block.{2 * i}.{kind}"]
            assert values.shape == ((out, inside, 3, 3) if kind == "weight" else (out,))
            assert values.abs().max() <= bound
        weight = state[f"input_hint_block.{2 * i}.weight"]
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(float(weight.mean())) < 0.15 * bound
        inside = out


def test_its_residuals_are_zero_until_it_is_trained(unet, ldm):
    controlnet = built(unet, initial_controlnet(ldm, 0))
    x, timestep, context, hint = inputs()
    down, middle = controlnet(x, timestep, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
    assert [tuple(d.shape) for d in (*down, middle)] == [(2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4), (2, 64, 4, 4)]
    assert all(not d.any() for d in (*down, middle))
    sum(d.sum() for d in (*down, middle)).backward()
    gradients = {name: p.grad for name, p in controlnet.named_parameters()}
    ends = [n for n in gradients if n.startswith(("controlnet_down_blocks.", "controlnet_mid_block."))]
    assert len(ends) == 2 * (len(down) + 1)
    assert all(gradients[name].any() for name in ends)  # so that training can begin


def test_an_sdxl_like_unet(ldm):
    unet = small_unet(use_linear_projection=True, **SDXL)
    state = to_ldm(unet.state_dict())
    weights = initial_controlnet(state, 0)
    assert torch.equal(weights["label_emb.0.0.weight"], state["label_emb.0.0.weight"])
    controlnet = built(unet, weights)
    x, timestep, context, hint = inputs()
    added = {"text_embeds": torch.ones(2, 4), "time_ids": torch.ones(2, 6)}
    down, middle = controlnet(x, timestep, encoder_hidden_states=context, controlnet_cond=hint, added_cond_kwargs=added, return_dict=False)
    assert all(not d.any() for d in (*down, middle))


def test_the_seed_alone_decides(ldm):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = initial_controlnet(ldm, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    b = initial_controlnet(ldm, 1)
    other = initial_controlnet(ldm, 2**64 - 1)
    assert a.keys() == b.keys() == other.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    differ = {name for name in a if not torch.equal(a[name], other[name])}
    assert differ == {f"input_hint_block.{2 * i}.{kind}" for i in range(len(HINT_CHANNELS)) for kind in ("weight", "bias")}


def test_the_unet_is_not_touched_by_what_happens_to_the_copy(ldm):
    before = {name: tensor.clone() for name, tensor in ldm.items()}
    weights = initial_controlnet(ldm, 0)
    for tensor in weights.values():
        tensor += 1
    assert all(torch.equal(ldm[name], before[name]) for name in ldm)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in weights.values()]
    assert len(set(pointers)) == len(pointers)


def test_weights_are_float32_without_a_graph(ldm):
    half = {name: torch.nn.Parameter(tensor.half()) for name, tensor in ldm.items()}
    weights = initial_controlnet(half, 0)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in weights.values())
    assert torch.equal(weights["input_blocks.0.0.weight"], ldm["input_blocks.0.0.weight"].half().float())
    assert not any(name.startswith(("output_blocks.", "out.")) for name in weights)


def test_encoder_shapes_tell_bases_apart(ldm):
    shapes = encoder_shapes(ldm)
    assert shapes["input_blocks.3.0.in_layers.2.weight"] == (64, 32, 3, 3)
    assert encoder_shapes(initial_controlnet(ldm, 0)) == shapes
    assert encoder_shapes(to_ldm(small_unet(seed=1).state_dict())) == shapes
    wider = to_ldm(small_unet(widths=(32, 96)).state_dict())
    assert encoder_shapes(wider).keys() == shapes.keys() and encoder_shapes(wider) != shapes
    assert encoder_shapes(to_ldm(small_unet(use_linear_projection=True).state_dict())) != shapes


def test_the_fingerprint_is_of_the_numbers_not_of_their_storage(ldm):
    found = fingerprint(ldm)
    assert len(found) == 16 and set(found) <= set("0123456789abcdef")
    assert fingerprint({name: tensor.half() for name, tensor in reversed(ldm.items())}) == found
    assert fingerprint(to_ldm(small_unet(seed=1).state_dict())) != found
    changed = dict(ldm) | {"out.2.bias": ldm["out.2.bias"] + 0.01}
    assert fingerprint(changed) != found
