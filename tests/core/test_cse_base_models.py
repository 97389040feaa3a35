"""Base models from files and folders, and what is made with them, against diffusers' own networks."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from host import PRIOR, ROOT, import_torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

import_torchvision()

from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # noqa: E402
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from dmap_core import cli  # noqa: E402
from dmap_core.backends import diffusers_files  # noqa: E402
from dmap_core.backends.diffusers_files import open_base  # noqa: E402
from dmap_core.backends.fingerprint import fingerprint  # noqa: E402
from dmap_core.backends.flow import flow_times  # noqa: E402
from dmap_core.backends.keys import to_ldm  # noqa: E402
from dmap_core.cse import generate, validation  # noqa: E402
from dmap_core.cse.loss import batch_loss, make_hint  # noqa: E402
from dmap_core.cse.network import initial_controlnet  # noqa: E402
from dmap_core.cse.settings import TrainingSettings  # noqa: E402
from dmap_core.cse.validation import GAP, restore, sheet, validation_loss  # noqa: E402
from dmap_core.operators import Noisy, SuperResolution  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

UNET = "model.diffusion_model."
CONTEXT = 32
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = 32  # of pictures; the tiny autoencoder's latents are 4 x 4


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed, make):
    """A network whose parameters are all random numbers, the zeros and ones of its initialisation too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        with torch.no_grad():
            for p in network.parameters():
                if p.ndim == 1:
                    p += 0.1 * torch.randn_like(p)
        return network.requires_grad_(False).eval()


def small_unet(seed=0, widths=(32, 128), heads=(1, 2), context=CONTEXT, resnets=1, linear=True, **settings):
    """Heads are of 64 channels, as in all models but SD 1."""
    levels = len(widths)
    return seeded(
        seed,
        lambda: UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=resnets,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            cross_attention_dim=context,
            attention_head_dim=heads,
            use_linear_projection=linear,
            **settings,
        ),
    )


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def tiny():
    return seeded(5, AutoencoderTiny)


def taesd(tiny):
    """Its weights as they lie in a checkpoint, beside the numbers that make their scale the model's."""
    state = {}
    for name, tensor in tiny.state_dict().items():
        part, _, n, rest = name.split(".", 3)
        state[f"first_stage_model.taesd_{part}.{int(n) + (part == 'decoder')}.{rest}"] = tensor
    return state | {"first_stage_model.vae_scale": torch.tensor(0.18215), "first_stage_model.vae_shift": torch.tensor(0.0)}


def write_checkpoint(path, unet, vae, dtype=torch.float32, **more):
    state = {f"{UNET}{name}": tensor for name, tensor in to_ldm(unet.state_dict()).items()} | vae | more
    save_file({name: tensor.to(dtype).contiguous().clone() for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, unet, tiny):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small.safetensors", unet, taesd(tiny))


@pytest.fixture(scope="module")
def base(checkpoint):
    return open_base(checkpoint)


@pytest.fixture(scope="module")
def model_sigmas():
    abar = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
    return ((1 - abar) / abar).sqrt()


def denoised_by_hand(unet, z, timestep, context, sigma, prediction, **control):
    """In VP latents, x = alpha z0 + sigma_vp eps."""
    sigma = sigma.view(-1, 1, 1, 1)
    alpha, sigma_vp = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    x = alpha * z.double()
    out = unet(x.float(), timestep, encoder_hidden_states=context, **control).sample.double()
    return alpha * x - sigma_vp * out if prediction == "v" else (x - sigma_vp * out) / alpha


TIMESTEPS = torch.tensor([0, 400, 999])


def latents(base, seed=1, size=4):
    sigma = base.sigmas[TIMESTEPS].view(-1, 1, 1, 1)
    return (1 + sigma**2).sqrt() * normal(seed, 3, 4, size, size)


# ---- a single file


def test_a_checkpoint_file(base, unet, tiny, model_sigmas, checkpoint):
    assert base.name == "small.safetensors" and base.prediction == "eps"
    assert base.context.shape == (1, 1, CONTEXT) and not base.context.any()
    torch.testing.assert_close(base.sigmas.double(), model_sigmas, rtol=5e-5, atol=0)
    assert base.unet.state_dict().keys() == unet.state_dict().keys()
    assert not any(p.requires_grad for network in (base.unet, base.vae) for p in network.parameters())
    image = normal(2, 2, 3, SIZE, SIZE).clamp(-1, 1)
    z0 = base.encode(image)
    assert z0.shape == (2, 4, 4, 4)
    torch.testing.assert_close(z0, tiny.encode(image).latents)
    torch.testing.assert_close(base.decode(z0), tiny.decode(z0).sample)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_denoising_is_diffusers_unet(checkpoint, base, unet, model_sigmas, prediction):
    base = open_base(checkpoint, prediction=prediction)
    z = latents(base)
    found = base.denoise(z, base.sigmas[TIMESTEPS])
    assert found.dtype == torch.float32
    wanted = denoised_by_hand(unet, z, TIMESTEPS, torch.zeros(3, 1, CONTEXT), model_sigmas[TIMESTEPS], prediction)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_flow(tmp_path, checkpoint, unet, tiny):
    """x_t = (1 - t) z0 + t eps, whose network is told 1000 t and says eps - z0: by option, or by the file's own word."""
    state = load_file(checkpoint)
    said = tmp_path / "flow.safetensors"
    save_file(state, said, metadata={"modelspec.prediction_type": "flow"})
    base = open_base(checkpoint, prediction="flow")
    assert open_base(said).prediction == base.prediction == "flow" and open_base(said, prediction="eps").prediction == "eps"
    t = torch.tensor([0.1, 0.5, 0.9])
    x = normal(1, 3, 4, 4, 4)
    velocity = unet(x, 1000 * t, encoder_hidden_states=torch.zeros(3, 1, CONTEXT)).sample
    found = base.denoise(x / (1 - t).view(-1, 1, 1, 1), t / (1 - t))
    torch.testing.assert_close(found, x - t.view(-1, 1, 1, 1) * velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        base.denoise(x[:1] / 0.5, 1.0), x[:1] - 0.5 * unet(x[:1], 500.0, torch.zeros(1, 1, CONTEXT)).sample, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_times_of_a_flow_are_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)  # which rise to 1 then
    theirs = theirs[(theirs >= 0.02) & (theirs <= 0.995)]
    torch.testing.assert_close(flow_times(shift), theirs / (1 - theirs), rtol=1e-4, atol=0)


@torch.no_grad()
def teach(controlnet):
    """Random numbers for what begins at zero, large ones where the hint comes in."""
    for i, (name, p) in enumerate(controlnet.named_parameters()):
        if not p.any():
            p += (1.0 if "cond_embedding" in name else 0.05) * normal(i, *p.shape)


def test_denoising_with_a_controlnet(base, unet, model_sigmas):
    controlnet = base.new_controlnet(initial_controlnet(to_ldm(unet.state_dict()), 0))
    z, hint = latents(base), torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    plain = base.denoise(z, base.sigmas[TIMESTEPS])
    assert torch.equal(base.controlled(controlnet, hint).denoise(z, base.sigmas[TIMESTEPS]), plain)  # it begins at zero
    teach(controlnet)
    found = base.controlled(controlnet, hint).denoise(z, base.sigmas[TIMESTEPS])
    assert not torch.allclose(found, plain, atol=1e-2)
    assert not torch.allclose(base.controlled(controlnet, 1 - hint).denoise(z, base.sigmas[TIMESTEPS]), found, atol=1e-4)
    context, sigma = torch.zeros(3, 1, CONTEXT), model_sigmas[TIMESTEPS]
    x = (z.double() / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()).float()
    out = controlnet(x, TIMESTEPS, encoder_hidden_states=context, controlnet_cond=hint)
    control = {
        "down_block_additional_residuals": out.down_block_res_samples,
        "mid_block_additional_residual": out.mid_block_res_sample,
    }
    wanted = denoised_by_hand(unet, z, TIMESTEPS, context, sigma, "eps", **control)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_small_sd1(tmp_path, tiny):
    """A context of 768 is SD 1: eight heads on every level, and convolutions around the transformers."""
    unet = small_unet(1, heads=8, context=768, linear=False)
    base = open_base(write_checkpoint(tmp_path / "sd1.ckpt.safetensors", unet, taesd(tiny)))
    z = latents(base)
    wanted = unet(z / (1 + base.sigmas[TIMESTEPS].view(-1, 1, 1, 1) ** 2).sqrt(), TIMESTEPS, torch.zeros(3, 1, 768)).sample
    found = (z - base.denoise(z, base.sigmas[TIMESTEPS])) / base.sigmas[TIMESTEPS].view(-1, 1, 1, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)


def test_a_checkpoint_that_says_v(tmp_path, unet, tiny):
    path = write_checkpoint(tmp_path / "v.safetensors", unet, taesd(tiny), v_pred=torch.zeros(1))
    assert open_base(path).prediction == "v"
    assert open_base(path, prediction="eps").prediction == "eps"


def test_the_published_v_model_is_known_by_the_spread_of_a_bias(tmp_path, tiny):
    unet = small_unet(2, widths=(32,) * 4, heads=(1,) * 4, resnets=2)
    name = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    bias = normal(0, 32)
    for spread, prediction in ((0.11, "v"), (0.07, "eps")):
        more = {f"{UNET}{name}": bias / bias.std() * spread}
        assert open_base(write_checkpoint(tmp_path / "b.safetensors", unet, taesd(tiny), **more)).prediction == prediction


KL = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "scaling_factor": 0.18215,
}
KL_NAMES = [
    (r"^(en|de)coder\.mid_block\.attentions\.0\.group_norm", r"\1coder.mid.attn_1.norm"),
    (r"^(en|de)coder\.mid_block\.attentions\.0\.to_([qkv])", r"\1coder.mid.attn_1.\2"),
    (r"^(en|de)coder\.mid_block\.attentions\.0\.to_out\.0", r"\1coder.mid.attn_1.proj_out"),
    (r"^(en|de)coder\.mid_block\.resnets\.0", r"\1coder.mid.block_1"),
    (r"^(en|de)coder\.mid_block\.resnets\.1", r"\1coder.mid.block_2"),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"^decoder\.up_blocks\.0\.", "decoder.up.1."),
    (r"^decoder\.up_blocks\.1\.", "decoder.up.0."),
    (r"^(decoder\.up\.\d)\.resnets\.", r"\1.block."),
    (r"^(decoder\.up\.\d)\.upsamplers\.0", r"\1.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def test_a_checkpoint_with_the_large_kind_of_autoencoder(tmp_path, monkeypatch, unet):
    """Its architecture here in small; its names are those of the original code, where attention is convolutions."""
    vae = seeded(3, lambda: AutoencoderKL(**KL))
    state = {}
    for name, tensor in vae.state_dict().items():
        for pattern, ldm in KL_NAMES:
            name = re.sub(pattern, ldm, name)
        is_linear = "attn_1" in name and tensor.ndim == 2
        state[f"first_stage_model.{name}"] = tensor[..., None, None] if is_linear else tensor
    monkeypatch.setattr(diffusers_files, "KL_VAE", KL)
    base = open_base(write_checkpoint(tmp_path / "kl.safetensors", unet, state))
    image = normal(4, 2, 3, 16, 16).clamp(-1, 1)
    z0 = base.encode(image)
    torch.testing.assert_close(z0, 0.18215 * vae.encode(image).latent_dist.mean)
    torch.testing.assert_close(base.decode(z0), vae.decode(z0 / 0.18215).sample)


def test_the_demo_prior():
    path = ROOT / "models" / "checkpoints" / PRIOR
    base = open_base(path)
    state = load_file(path)
    assert base.prediction == "eps" and base.name == PRIOR and not base.context.any()
    ldm = {name.removeprefix(UNET): tensor for name, tensor in state.items() if name.startswith(UNET)}
    assert base.fingerprint == fingerprint(ldm)
    theirs = convert_ldm_unet_checkpoint({name: tensor.float() for name, tensor in state.items()}, base.unet.config)
    ours = base.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with Image.open(next((ROOT / "demo" / "held-out").glob("*.*"))) as picture:
        pixels = np.array(picture.convert("RGB").resize((64, 64)))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    z0 = base.encode(image)
    assert z0.shape == (1, 4, 8, 8)
    assert (base.decode(z0) - image).abs().mean() < 0.15  # a picture comes back as itself
    eps, t = normal(0, *z0.shape), torch.tensor([300])
    sigma = float(base.sigmas[t])
    found = base.denoise(z0 + sigma * eps, sigma)
    assert (found - z0).square().mean() < 0.5 * sigma**2  # and it is a denoiser


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if not n.startswith(UNET)}, "is no checkpoint of the Stable Diffusion family"),
        (lambda s: s | {f"{UNET}label_emb.0.0.weight": torch.ones(2, 2)}, "SDXL or unCLIP"),
        (lambda s: {n: t for n, t in s.items() if "attn2" not in n}, "no cross-attention"),
        (
            lambda s: {n: t for n, t in s.items() if n != f"{UNET}out.2.weight"} | {f"{UNET}out.2.weight": s[f"{UNET}out.2.weight"][:, :5]},
            "do not fit",
        ),
        (lambda s: {n: t for n, t in s.items() if n != f"{UNET}middle_block.0.in_layers.0.bias"}, "lacks 1 of"),
        (lambda s: s | {f"{UNET}something.weight": torch.ones(1)}, r"the tensor something\.weight"),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("first_stage_model.")}, "bad.safetensors"),
        (lambda s: {n: t for n, t in s.items() if n != "first_stage_model.vae_scale"}, "scaled by 0.18"),
        (lambda s: s | {"first_stage_model.vae_shift": torch.tensor(0.1)}, "has a shift"),
        (lambda s: s | {"first_stage_model.vae_scale": torch.tensor(0.0)}, "a vae_scale of 0; it must be above 0"),
        (lambda s: s | {"first_stage_model.vae_scale": torch.tensor(float("nan"))}, "a vae_scale of nan"),
        (lambda s: s | {"first_stage_model.vae_scale": torch.ones(2)}, r"its vae_scale has the shape \(2,\)"),
        (lambda s: s | {f"{UNET}out.2.weight": s[f"{UNET}out.2.weight"].flatten()}, r"too few dimensions .*: out\.2\.weight"),
        (
            lambda s: s | {f"{UNET}time_embed.0.weight": s[f"{UNET}time_embed.0.weight"].flatten()},
            "do not fit .*time_embed|bad.safetensors",
        ),
        (lambda s: {n: t.flatten() if n.startswith(UNET) else t for n, t in s.items()}, "too few dimensions .* and [0-9]+ more"),
        (
            lambda s: s | {f"{UNET}out.2.bias": torch.ones(4, dtype=torch.int32)},
            r"must be floats, .*: model\.diffusion_model\.out\.2\.bias",
        ),
        (lambda s: {n: t.to(torch.int8) for n, t in s.items()}, "must be floats, .* and [0-9]+ more"),
        (lambda s: {n: t for n, t in s.items() if n != f"{UNET}out.2.weight"}, r"incomplete: the tensor 'out\.2\.weight' is missing"),
        (
            lambda s: {n: t for n, t in s.items() if "out_layers.3" not in n},
            "incomplete: the tensor 'input_blocks.1.0.out_layers.3.weight'",
        ),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("first_stage_model.taesd_decoder.3.")}, "lacks .* AutoencoderTiny"),
    ],
)
def test_a_file_that_cannot_be_a_base(tmp_path, monkeypatch, checkpoint, change, message):
    monkeypatch.setattr(diffusers_files, "KL_VAE", KL)
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(checkpoint)).items()}, path)
    with pytest.raises(ValueError, match=message) as caught:
        open_base(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*missing\.safetensors"):
        open_base(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("encoder", ["cond_stage_model.transformer.text_model.x", "cond_stage_model.model.x", None])
def test_a_single_file_takes_no_prompt(tmp_path, unet, tiny, checkpoint, encoder):
    path = checkpoint
    if encoder:
        path = write_checkpoint(tmp_path / "with-encoder.safetensors", unet, taesd(tiny), **{encoder: torch.ones(1)})
    with pytest.raises(ValueError, match="prompt is 'a cat', but .*(no tokenizer|no text encoder).*Leave the prompt empty"):
        open_base(path, "a cat")


# ---- a diffusers folder

WORDS = ("<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b", "ab</w>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, unet):
    root = tmp_path_factory.mktemp("folder") / "small-diffusion"
    unet.save_pretrained(root / "unet")
    seeded(3, lambda: AutoencoderKL(**{**KL, "scaling_factor": 0.5})).save_pretrained(root / "vae")
    DDPMScheduler(**SCHEDULE).save_pretrained(root / "scheduler")
    (root / "words").mkdir()
    (root / "words" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (root / "words" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    tokenizer = CLIPTokenizer(str(root / "words" / "vocab.json"), str(root / "words" / "merges.txt"), model_max_length=6)
    tokenizer.save_pretrained(root / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=CONTEXT,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        bos_token_id=0,
        eos_token_id=1,
    )
    seeded(4, lambda: CLIPTextModel(config)).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture
def own_folder(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder(folder, unet, model_sigmas, base):
    found = open_base(folder)
    assert (found.name, found.prediction) == ("small-diffusion", "eps")
    torch.testing.assert_close(found.sigmas.double(), model_sigmas, rtol=5e-5, atol=0)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    for prompt, tokens in (("", [0, 1, 1, 1, 1, 1]), ("ab a b", [0, 6, 2, 3, 1, 1]), ("a " * 20, [0, 2, 2, 2, 2, 1])):
        with torch.no_grad():
            context = encoder(torch.tensor([tokens])).last_hidden_state
        torch.testing.assert_close(open_base(folder, prompt).context if prompt else found.context, context)
    z = latents(found)
    wanted = denoised_by_hand(unet, z, TIMESTEPS, found.context.expand(3, -1, -1), model_sigmas[TIMESTEPS], "eps")
    torch.testing.assert_close(found.denoise(z, found.sigmas[TIMESTEPS]).double(), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base.denoise(z, base.sigmas[TIMESTEPS]).double(), wanted, atol=1e-4)  # whose context is zero
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    image = normal(4, 2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(found.encode(image), 0.5 * vae.encode(image).latent_dist.mean)
        torch.testing.assert_close(found.decode(found.encode(image)), vae.decode(vae.encode(image).latent_dist.mean).sample)
    assert not any(p.requires_grad for network in (found.unet, found.vae) for p in network.parameters())
    assert not found.unet.training and not found.vae.training and not found.context.requires_grad


def test_what_a_folders_scheduler_predicts(own_folder, unet, model_sigmas):
    shutil.rmtree(own_folder / "scheduler")
    DDPMScheduler(**SCHEDULE, prediction_type="v_prediction").save_pretrained(own_folder / "scheduler")
    found = open_base(own_folder)
    assert found.prediction == "v" and open_base(own_folder, prediction="eps").prediction == "eps"
    z = latents(found)
    wanted = denoised_by_hand(unet, z, TIMESTEPS, found.context.expand(3, -1, -1), model_sigmas[TIMESTEPS], "v")
    torch.testing.assert_close(found.denoise(z, found.sigmas[TIMESTEPS]).double(), wanted, rtol=1e-4, atol=1e-4)
    DDPMScheduler(**SCHEDULE, prediction_type="sample").save_pretrained(own_folder / "scheduler")
    with pytest.raises(ValueError, match=r"copy: its scheduler predicts 'sample'"):
        open_base(own_folder)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_folder_that_lacks_a_part(own_folder, part):
    shutil.rmtree(own_folder / part)
    with pytest.raises(ValueError, match=rf"copy is no diffusers folder .*no {part}/"):
        open_base(own_folder)
    (own_folder / part).mkdir()
    with pytest.raises(ValueError, match=r"copy cannot be read"):
        open_base(own_folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_in_a_folder_are_not_read(own_folder, part):
    for file in (own_folder / part).glob("*.safetensors"):
        torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin" if part != "text_encoder" else "pytorch_model.bin"))
        file.unlink()
    with pytest.raises(ValueError, match=r"copy cannot be read"):
        open_base(own_folder)


def test_an_sdxl_folder(own_folder):
    shutil.rmtree(own_folder / "unet")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    small_unet(**added).save_pretrained(own_folder / "unet")
    with pytest.raises(ValueError, match="copy is an SDXL or unCLIP model"):
        open_base(own_folder)


def test_fingerprints_tell_unets_apart(tmp_path, base, folder, unet, tiny):
    half = open_base(write_checkpoint(tmp_path / "half.safetensors", unet, taesd(tiny), torch.float16))
    assert half.fingerprint == base.fingerprint == open_base(folder).fingerprint
    assert half.unet.conv_in.weight.dtype == torch.float32
    other = open_base(write_checkpoint(tmp_path / "other.safetensors", small_unet(9), taesd(tiny)))
    assert other.fingerprint != base.fingerprint


# ---- training, validation and generation with one


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_only_the_controlnet_is_trained(checkpoint, unet, prediction):
    base = open_base(checkpoint, prediction=prediction)
    controlnet = base.new_controlnet(initial_controlnet(to_ldm(unet.state_dict()), 0))
    batch = {"image": pictures(), "timestep": torch.tensor([10, 900]), "noise_seeds": [1, 2], "measurement_seeds": [3, 4]}
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = batch_loss(base, controlnet, SuperResolution(4), batch, settings())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is None for network in (base.unet, base.vae) for p in network.parameters())
    assert controlnet.controlnet_mid_block.weight.any() and controlnet.controlnet_cond_embedding.conv_out.weight.any()


def pictures(n=2):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6)) * 2 - 1


@pytest.fixture(scope="module")
def controlnet(base, unet):
    """One that has learnt something, be it nonsense."""
    controlnet = base.new_controlnet(initial_controlnet(to_ldm(unet.state_dict()), 0))
    teach(controlnet)
    return controlnet.requires_grad_(False)


def settings(**changed):
    return TrainingSettings(batch_size=2, size=SIZE, **changed)


def test_the_validation_loss(monkeypatch, base, unet, controlnet):
    monkeypatch.setattr(validation, "LEVELS", 3)
    operator = Noisy(SuperResolution(4), 0.05)
    value = validation_loss(base, controlnet, operator, pictures(), settings())
    torch.manual_seed(3)
    assert validation_loss(base, controlnet, operator, pictures(), settings()) == value > 0
    assert validation_loss(base, controlnet, operator, pictures(), settings(hint_range="-1..1")) != value
    zero = base.new_controlnet(initial_controlnet(to_ldm(unet.state_dict()), 0))
    without = validation_loss(base, None, operator, pictures(), settings())
    assert validation_loss(base, zero, operator, pictures(), settings()) == pytest.approx(without, rel=1e-6)
    assert value != pytest.approx(without, rel=1e-3)


class Oracle:
    """A base whose latents are the pictures and which knows what they were, with its tensors on any device."""

    prediction = "eps"
    sigmas = torch.linspace(0.05, 14, 1000)

    def __init__(self, z0, wrong=0.0):
        self.z0, self.wrong, self.timesteps = z0, wrong, []

    def encode(self, image):
        return image.to(self.z0)

    decode = encode

    def controlled(self, controlnet, hint):
        return self

    def denoise(self, z, sigma):
        assert z.device == self.z0.device
        self.timesteps.append(int((self.sigmas - torch.as_tensor(sigma).flatten()[0]).abs().argmin()))
        return (1 - self.wrong) * self.z0 + self.wrong * z


def test_the_validation_loss_of_a_perfect_network_and_of_none():
    image = pictures()
    assert validation_loss(Oracle(image), None, SuperResolution(4), image, settings()) == 0
    useless = Oracle(image, wrong=1.0)  # it gives the noisy picture back, as if there were no noise: the error is eps
    eps = torch.stack([normal(seed, *image.shape[1:]) for seed in range(len(image))])
    assert validation_loss(useless, None, SuperResolution(4), image, settings()) == pytest.approx(float(eps.square().mean()), rel=1e-4)
    clamped = validation_loss(useless, None, SuperResolution(4), image, settings(snr_gamma=1e-3))
    snr = useless.sigmas[useless.timesteps[:8]].double() ** -2
    assert clamped == pytest.approx(float((snr.clamp(max=1e-3) / snr).mean() * eps.square().mean()), rel=1e-4)
    assert useless.timesteps[:8] == [111, 222, 333, 444, 555, 666, 777, 888]


def test_restoring_with_a_perfect_network():
    image = pictures()
    oracle = Oracle(image)
    torch.testing.assert_close(restore(oracle, None, image, 7), image)
    assert oracle.timesteps[0] == 999 and oracle.timesteps[-1] == 0 and len(oracle.timesteps) == 7
    useless = Oracle(image, wrong=1.0)  # nothing changes along the way
    eps = torch.stack([normal(seed, *image.shape[1:]) for seed in range(len(image))])
    torch.testing.assert_close(restore(useless, None, image, 5), 14 * eps, rtol=1e-4, atol=1e-4)


def test_restoring_makes_its_noise_where_the_latents_are():
    """The meta device refuses to be mixed with the CPU, as a GPU does."""
    hint = torch.zeros(2, 3, 8, 8, device="meta")
    found = restore(Oracle(hint), None, hint, 3)
    assert found.shape == hint.shape and found.device.type == "meta"


def test_restoring_with_a_base_and_a_controlnet(base, controlnet):
    hint = make_hint(SuperResolution(4), pictures(), [0, 1], "0..1")
    found = restore(base, controlnet, hint, 3)
    assert found.shape == (2, 3, SIZE, SIZE) and found.isfinite().all()
    torch.manual_seed(8)
    assert torch.equal(restore(base, controlnet, hint, 3), found)
    torch.testing.assert_close(restore(base, controlnet, hint[:1], 3), found[:1], rtol=1e-3, atol=1e-3)
    assert (restore(base, controlnet, torch.zeros_like(hint), 3) - found).abs().max() > 1e-4


@pytest.mark.parametrize("hint_range", ["0..1", "-1..1"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_sheet(n, hint_range):
    image = pictures(n)
    oracle = Oracle(-image)
    found = np.array(sheet(oracle, None, SuperResolution(4), image, hint_range)).astype(int)
    assert found.shape == (n * (SIZE + GAP) - GAP, 3 * SIZE + 2 * GAP, 3)

    def pixels(picture):
        return ((picture.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)

    hint = SuperResolution(4).hint(SuperResolution(4)(image))
    for row in range(n):
        for column, wanted in enumerate((hint[row], -image[row], image[row])):
            y, x = row * (SIZE + GAP), column * (SIZE + GAP)
            assert np.abs(found[y : y + SIZE, x : x + SIZE] - pixels(wanted)).max() <= 1
            assert (found[y : y + SIZE, x + SIZE : x + SIZE + GAP] == 255).all()
        assert (found[row * (SIZE + GAP) + SIZE : (row + 1) * (SIZE + GAP)] == 255).all()


def test_the_sheet_is_the_same_every_time():
    torch.manual_seed(0)
    a, b = (sheet(Oracle(pictures(), wrong=0.5), None, Noisy(SuperResolution(4), 0.05), pictures(), "0..1") for _ in range(2))
    assert a.tobytes() == b.tobytes()


def test_generation_is_diffusers_euler_ancestral(base):
    """Four steps, whose timesteps are whole numbers for both."""
    scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    noise = torch.Generator().manual_seed(5)
    z = torch.randn(1, 4, 4, 4, generator=noise) * scheduler.sigmas[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = base.unet(scheduler.scale_model_input(z, t), t, encoder_hidden_states=base.context).sample
            z = scheduler.step(eps, t, z, generator=noise).prev_sample
        wanted = base.decode(z)
    found = generate.generate(base, (4, 4, 4), 5, 4)
    assert found.shape == (1, 3, SIZE, SIZE)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    torch.manual_seed(1)
    assert torch.equal(generate.generate(base, (4, 4, 4), 5, 4), found)
    assert not torch.allclose(generate.generate(base, (4, 4, 4), 6, 4), found, atol=1e-2)


def test_generation_goes_on_where_it_was_cut(tmp_path, checkpoint):
    out, again = tmp_path / "deep" / "out", tmp_path / "again"

    def make(out, count, seed=0):
        generate.generate_cse(checkpoint=checkpoint, size=SIZE, steps=2, out=out, count=count, seed=seed)

    make(out, 2)
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png"]
    second = (out / "000001.png").read_bytes()
    with Image.open(out / "000001.png") as picture:
        assert (picture.size, picture.mode) == ((SIZE, SIZE), "RGB")
        pixels = np.array(picture)
    (out / "000000.png").write_bytes(b"kept as it is")
    (out / "000001.png").unlink()
    make(out, 3)
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert (out / "000000.png").read_bytes() == b"kept as it is" and (out / "000001.png").read_bytes() == second
    make(again, 1, seed=1)
    with Image.open(again / "000000.png") as picture:
        assert np.array_equal(np.array(picture), pixels)


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--steps", "1"], ["--size", "30"], ["--size", "0"]])
def test_generation_refuses_numbers_that_make_no_sense(tmp_path, checkpoint, wrong):
    with pytest.raises(SystemExit, match="--size a multiple of 8"):
        cli.main(["generate-cse", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *wrong])
    assert not (tmp_path / "out").exists()


def test_generation_from_what_is_no_base(tmp_path):
    with pytest.raises(SystemExit, match=r"error: there is no .*missing\.safetensors"):
        cli.main(["generate-cse", "--checkpoint", str(tmp_path / "missing.safetensors"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
