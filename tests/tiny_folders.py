"""diffusers folders of flow transformers as small as their classes allow, with random weights: what the families' own pipelines save."""

import json
import tempfile
from pathlib import Path

import torch

WORDS = ("a", "cat", "old", "photo")
# Of every family's network: small numbers. Rotary embeddings divide a head's width into three axes.
ROPE = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
SD3 = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),  # as of 3.5
}
FLUX = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, "pooled_projection_dim": 16, **ROPE}
CHROMA = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 32,
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
    **ROPE,
}
AURA = {
    "sample_size": 8,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 64,
}
LUMINA = {
    "hidden_size": 24,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "axes_dim_rope": (4, 4, 4),
    "axes_lens": (300, 16, 16),
    "cap_feat_dim": 32,
}
Z_IMAGE = {
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [4, 6, 6],
    "axes_lens": [1024, 16, 16],
}
FLUX_LATENTS = {"latent_channels": 16, "scaling_factor": 0.7, "shift_factor": 0.3, "use_quant_conv": False, "use_post_quant_conv": False}


def words(kind, end, chat=None, **more):
    """A tokenizer of a transformers class that knows single characters and a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", end, "<unk>", "<s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    found = kind(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=end, unk_token="<unk>", bos_token="<s>", **more)
    found.chat_template = chat
    return found


def clip_words():
    """CLIP's, which reads ten tokens."""
    from transformers import CLIPTokenizer

    vocabulary = {
        "<|startoftext|>": 3,
        "<|endoftext|>": 1,
        "<pad>": 0,
        "a": 4,
        "a</w>": 5,
        "c": 6,
        "t": 7,
        "t</w>": 8,
        "ca": 9,
        "cat</w>": 10,
    }
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary))
        merges.write_text("#version: 0.2\nc a\nca t</w>\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=10, pad_token="<pad>")


def clip(kind):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=16 if kind.__name__ == "CLIPTextModel" else 8,
        projection_dim=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
    )
    return kind(config).eval()


def t5(kind="T5"):
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=16, d_model=32, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def decoder_only(kind):
    """Gemma 2's or Qwen 3's, of which hidden states are read."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


def autoencoder(levels=4, **more):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    more |= blocks | {"block_out_channels": (4,) * levels}
    return AutoencoderKL(layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False, **more).eval()


def scheduler(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4, "max_image_seq_len": 64}


def stronger(network, factor=6.0):
    """A network whose answers are as large as latents, where random weights make them small."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim > 1 and ("proj_out" in name or "norm_out.linear_2" in name or "final_layer" in name and ".linear." in name):
                p.mul_(factor)
    return network.eval()


def parts(family, **network):
    """(pipeline class, its parts) by the family's name. network: other numbers of its transformer."""
    import diffusers
    import transformers

    t5_words, clip_ = lambda: words(transformers.T5TokenizerFast, "</s>"), transformers.CLIPTextModelWithProjection
    made = {
        "Stable Diffusion 3": lambda: {
            "transformer": diffusers.SD3Transformer2DModel(**SD3 | network),
            "scheduler": scheduler(shift=3.0),
            "text_encoder": clip(clip_),
            "text_encoder_2": clip(clip_),
            "text_encoder_3": t5(),
            "tokenizer": clip_words(),
            "tokenizer_2": clip_words(),
            "tokenizer_3": t5_words(),
        },
        "Flux.1": lambda: {
            "transformer": diffusers.FluxTransformer2DModel(**FLUX | {"guidance_embeds": True} | network),
            "scheduler": scheduler(**DYNAMIC),
            "text_encoder": clip(transformers.CLIPTextModel),
            "text_encoder_2": t5(),
            "tokenizer": clip_words(),
            "tokenizer_2": t5_words(),
        },
        "Chroma": lambda: {
            "transformer": diffusers.ChromaTransformer2DModel(**CHROMA | network),
            "scheduler": scheduler(shift=1.0),
            "text_encoder": t5(),
            "tokenizer": t5_words(),
        },
        "AuraFlow": lambda: {
            "transformer": diffusers.AuraFlowTransformer2DModel(**AURA | network),
            "scheduler": scheduler(shift=1.73),
            "text_encoder": t5("UMT5"),
            "tokenizer": words(transformers.LlamaTokenizerFast, "</s>", padding_side="right"),
        },
        "Lumina 2": lambda: {
            "transformer": diffusers.Lumina2Transformer2DModel(**LUMINA | network),
            "scheduler": scheduler(shift=6.0),
            "text_encoder": decoder_only("Gemma2"),
            "tokenizer": words(transformers.GemmaTokenizerFast, "<eos>"),
        },
        "Z-Image": lambda: {
            "transformer": diffusers.ZImageTransformer2DModel(**Z_IMAGE | network),
            "scheduler": scheduler(shift=3.0),
            "text_encoder": decoder_only("Qwen3"),
            "tokenizer": words(transformers.Qwen2TokenizerFast, "<|im_end|>", chat="a {{ messages[0]['content'] }} photo"),
        },
    }
    from dmap_core.backends.families import FAMILIES

    pipeline = next(f.pipeline for f in FAMILIES if f.name == family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = made[family]() | {"vae": autoencoder(**({"scaling_factor": 0.5} if family == "AuraFlow" else FLUX_LATENTS))}
    stronger(found["transformer"])
    return getattr(diffusers, pipeline), found


def tiny_folder(path, family, **network):
    """A folder as the family's pipeline saves it."""
    kind, found = parts(family, **network)
    kind(**found).save_pretrained(path)
    return path
