"""Folders of flow transformers against the pipelines of diffusers that they belong to."""

import copy
import csv
import json
import shutil

import pytest
import torch
import yaml
from host import import_torchvision
from tiny_folders import DYNAMIC, scheduler, tiny_folder
from tiny_models import pictures, tiny_cse

from dmap_core.backends.families import FAMILIES
from dmap_core.backends.flow import Shift
from dmap_core.memory import checkpointed
from dmap_core.schedule import flow_sigma, flow_sigmas

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

NAMES = [family.name for family in FAMILIES]
SD3, FLUX, CHROMA, AURA, LUMINA, Z_IMAGE = NAMES
SIZE = (32, 48)
PROMPT = "a cat"
TIMES = [0.9, 0.6, 0.3, 0.1]  # before the shift
GUIDED = {FLUX: {"guidance_scale": 2.0}, LUMINA: {"guidance_scale": 1.0}, Z_IMAGE: {"guidance_scale": 0.0}}


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        import_torchvision()
        yield


@pytest.fixture(scope="module")
def folders(torchvision, tmp_path_factory):
    """The folder of a family, made once."""
    made, root = {}, tmp_path_factory.mktemp("folders")

    def folder(name):
        if name not in made:
            made[name] = tiny_folder(root / name.replace(" ", "-"), name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def opened(folders):
    from dmap_core.backends.diffusers_files import open_base

    made = {}

    def prior(name, prompt=PROMPT):
        if (name, prompt) not in made:
            made[name, prompt] = open_base(folders(name), prompt, guidance=2.0 if name == FLUX else None)
        return made[name, prompt]

    return prior


@pytest.fixture
def own(folders, tmp_path):
    """A copy of SD3's folder."""
    return shutil.copytree(folders(SD3), tmp_path / "copy")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generated(folder, name, prompt, latents, size=SIZE):
    """(latents before and after every step of the family's pipeline, its times, the picture in [0, 1]) for two pictures."""
    import diffusers

    pipe = getattr(diffusers, next(f.pipeline for f in FAMILIES if f.name == name)).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    height, width = size
    packed = name in (FLUX, CHROMA)
    pack = (lambda z: pipe._pack_latents(z, *z.shape)) if packed else (lambda z: z)
    unpack = (lambda z: pipe._unpack_latents(z, height, width, 8)) if packed else (lambda z: z)
    seen = [latents]
    given = {"height": height, "width": width, "sigmas": TIMES, "num_inference_steps": len(TIMES), "num_images_per_prompt": len(latents)}
    given |= GUIDED.get(name, {"guidance_scale": 1.0})  # without the difference of two prompts
    image = pipe(
        prompt,
        latents=pack(latents),
        output_type="pt",
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(unpack(kwargs["latents"])) or {},
        **given,
    ).images
    return seen, pipe.scheduler.sigmas.tolist(), image


@pytest.mark.parametrize("name", NAMES)
def test_it_denoises_and_decodes_as_the_familys_pipeline(folders, opened, name):
    """Every Euler step of the pipeline goes along its velocity v, and z0 = x - t v. Its times are those of the folder's own shift."""
    prompt = "a cat" + " photo" * 509 if name == CHROMA else PROMPT  # see the next test
    prior = opened(name, prompt).sized(SIZE)
    z = noise(2, *prior.latent_shape())
    seen, times, image = generated(folders(name), name, prompt, z)
    tokens = SIZE[0] * SIZE[1] // 16**2
    shift = prior.shift.of(tokens)
    assert times[:-1] == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in TIMES], rel=1e-5)
    for before, after, t, t_next in zip(seen, seen[1:], times, times[1:], strict=False):
        wanted = before - t * (after - before) / (t_next - t)
        with torch.no_grad():
            found = prior.denoise(before / (1 - t), flow_sigma(t))
        assert float((found - before).abs().max()) > 0.1 * t
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close((prior.decode(seen[-1]) / 2 + 0.5).clamp(0, 1), image, rtol=1e-4, atol=1e-5)
        assert float(image.std()) > 0.01


def test_words_of_chroma_that_are_not_there_are_masked(folders, opened):
    """Of a short prompt: the network with all 512 tokens and a mask. The pipeline hands the mask on as numbers to be added, which masks nothing."""
    import diffusers

    prior = opened(CHROMA).sized(SIZE)
    pipe = diffusers.ChromaPipeline.from_pretrained(folders(CHROMA), transformer=None, vae=None, local_files_only=True)
    tokens, words, mask, *_ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    assert (
        tokens.shape[1] == 512 and int(mask.sum()) == prior.conditioned["encoder_hidden_states"].shape[1] == 4
    )  # a, cat, the end, one more
    x, t = noise(1, *prior.latent_shape()), torch.tensor([0.7])
    places = pipe._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32)
    seen = torch.cat([mask, torch.ones(1, 6)], 1).bool()
    packed = pipe._pack_latents(x, *x.shape)
    with torch.no_grad():
        out = prior.transformer(packed, tokens, t, img_ids=places, txt_ids=words, attention_mask=seen, return_dict=False)[0]
        velocity = pipe._unpack_latents(out, *SIZE, 8)
        torch.testing.assert_close(prior.denoise(x / 0.3, float(flow_sigma(t))), x - 0.7 * velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(opened, name):
    """Against differences in float64, also where blocks run again; rotary embeddings are in float32 within. Of the velocity alone, beside which x counts much."""
    prior = copy.copy(opened(name))
    prior.transformer = copy.deepcopy(prior.transformer)
    prior = prior.to(torch.device("cpu"), torch.float64)
    shape = (2, prior.vae.config.latent_channels, 4, 6)
    z, direction, weights = (noise(*shape, seed=i, dtype=torch.float64) for i in range(3))
    sigma = torch.tensor([1.5, 0.8], dtype=torch.float64)

    def velocity(z):
        t = (sigma / (1 + sigma)).view(-1, 1, 1, 1)
        return ((1 - t) * z - prior.denoise(z, sigma)) / t

    grads = []
    for blocks in ([], prior.blocks()):
        with checkpointed(blocks):
            at = z.clone().requires_grad_()
            grads.append(torch.autograd.grad((weights * velocity(at)).sum(), at)[0])
    assert len([b for b in prior.blocks() if type(b).__name__.endswith("TransformerBlock")]) >= 2
    with torch.no_grad():
        step = 1e-3
        slope = float((weights * (velocity(z + step * direction) - velocity(z - step * direction))).sum()) / (2 * step)
    assert abs(slope) > 0.1
    assert float((grads[0] * direction).sum()) == pytest.approx(slope, rel=2e-3)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)
    assert not any(p.requires_grad for p in prior.transformer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_levels_of_their_own_odd_pictures_and_tiles(opened, name):
    prior = opened(name).sized((30, 37))
    assert prior.latent_shape() == (4 if name == AURA else 16, 4, 5)
    z, sigmas = 3 * noise(2, *prior.latent_shape()), torch.tensor([3.0, 0.4])
    with torch.no_grad():
        together = prior.denoise(z, sigmas)
        for i in range(2):
            torch.testing.assert_close(together[i : i + 1], prior.denoise(z[i : i + 1], float(sigmas[i])), rtol=1e-4, atol=1e-4)
        # patches that stick out begin again at the other edge
        wrapped = torch.cat([z, z[..., :1]], -1)
        torch.testing.assert_close(together, prior.denoise(wrapped, sigmas)[..., :5], rtol=1e-4, atol=1e-4)
        assert prior.decode(z).shape == (2, 3, 30, 37) and prior.encode(noise(2, 3, 30, 37)).shape == z.shape
        assert torch.equal(prior.tiled(8).denoise(z, sigmas), together)
        large = noise(1, prior.latent_shape()[0], 8, 6)
        tiles = prior.tiled(6).denoise(large, 1.0)
        torch.testing.assert_close(tiles[:, :, :2], prior.denoise(large[:, :, :6], 1.0)[:, :, :2], rtol=1e-4, atol=1e-4)


def test_latents_are_scaled_and_shifted(opened):
    prior = opened(FLUX).sized(SIZE)
    vae, image = prior.vae, noise(1, 3, *SIZE).clamp(-1, 1)
    with torch.no_grad():
        z0 = prior.encode(image)
        torch.testing.assert_close(z0, (vae.encode(image).latent_dist.mean - 0.3) * 0.7)
        torch.testing.assert_close(prior.decode(z0), vae.decode(vae.encode(image).latent_dist.mean).sample, rtol=1e-4, atol=1e-5)


def test_noise_levels_go_by_the_size_where_the_scheduler_says_so(opened, own):
    from dmap_core.backends.diffusers_files import open_base

    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    static = opened(SD3)
    torch.testing.assert_close(static.sigmas, flow_sigmas(3 * t / (1 + 2 * t)))
    assert 150 < float(static.sigmas[-1]) <= 199.01 and static.sized((512, 512)).sigmas.tolist() == static.sigmas.tolist()
    dynamic = opened(FLUX)
    for size, tokens in (((32, 48), 6), ((33, 48), 9), ((128, 128), 64)):
        shift = torch.tensor(0.5 + (1.15 - 0.5) * (tokens - 4) / 60, dtype=torch.float64).exp()
        torch.testing.assert_close(dynamic.sized(size).sigmas, flow_sigmas(shift * t / (1 + (shift - 1) * t)))
    with pytest.raises(ValueError, match="pictures of no size yet"):
        dynamic.sigmas  # noqa: B018
    scheduler(**DYNAMIC, time_shift_type="linear").save_pretrained(own / "scheduler")
    assert open_base(own).shift == Shift(line=((4, 0.5), (64, 1.15)), exponential=False)
    assert open_base(own).shift.of(64) == pytest.approx(1.15)


def test_distilled_guidance(folders, opened):
    from dmap_core.backends.diffusers_files import open_base

    usual, z = open_base(folders(FLUX), PROMPT), noise(1, 16, 4, 6)
    assert usual.conditioned["guidance"].tolist() == [3.5]
    with torch.no_grad():
        assert not torch.allclose(usual.denoise(z, 1.0), opened(FLUX).denoise(z, 1.0), atol=1e-4)  # 2.0
    for name in (SD3, CHROMA):
        with pytest.raises(ValueError, match=rf"distilled_guidance is 3.5, and .* \({name}\) does not read one; leave it out"):
            open_base(folders(name), guidance=3.5)
    for value in (0.0, -1.0, 101.0, float("nan")):
        with pytest.raises(ValueError, match=r"distilled_guidance is .*; it must be a number above 0 and at most 100"):
            open_base(folders(FLUX), guidance=value)


def test_half_precision_files_are_read_as_they_are(own):
    """A large model then takes no more memory than its files, until a precision is asked for."""
    import diffusers

    from dmap_core.backends.diffusers_files import open_base

    network = diffusers.SD3Transformer2DModel.from_pretrained(own / "transformer")
    shutil.rmtree(own / "transformer")
    network.to(torch.float16).save_pretrained(own / "transformer")
    prior = open_base(own)
    assert prior.transformer.dtype == torch.float16 and prior.vae.dtype == torch.float32
    with torch.no_grad():
        half = prior.denoise(noise(1, 16, 4, 4), 1.0)
    assert {c.dtype for c in prior.conditioning()} == {torch.float32}  # as it was encoded
    full = prior.to(torch.device("cpu"), torch.float32)
    assert {p.dtype for p in full.transformer.parameters()} == {torch.float32} == {c.dtype for c in full.conditioning()}
    with torch.no_grad():
        exact = full.denoise(noise(1, 16, 4, 4), 1.0)
    assert half.dtype == exact.dtype == torch.float32 and 0 < float((half - exact).norm() / exact.norm()) < 0.05


def test_text_encoders_are_released_and_nothing_asks_for_gradients(opened):
    prior = opened(SD3)
    assert prior.networks() == [prior.transformer, prior.vae] and not prior.transformer.training and not prior.vae.training
    assert not any(c.requires_grad for c in prior.conditioning())
    assert not any(p.is_meta for network in prior.networks() for p in network.parameters())


@pytest.mark.parametrize("part", ["vae", "scheduler", "text_encoder_2", "tokenizer_3"])
def test_a_folder_that_lacks_a_part(own, part):
    from dmap_core.backends.diffusers_files import open_base

    shutil.rmtree(own / part)
    with pytest.raises(ValueError, match=rf"copy is no whole diffusers folder of Stable Diffusion 3: it has no {part}/ in it"):
        open_base(own)


def test_stable_diffusion_3_without_its_largest_text_encoder(own):
    """Zeros then stand for what it would say, and the others read ten tokens of this folder."""
    import diffusers

    from dmap_core.backends.diffusers_files import open_base

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(own, text_encoder_3=None, tokenizer_3=None)
    shutil.rmtree(own)
    pipe.save_pretrained(own)
    found = open_base(own, PROMPT).conditioned["encoder_hidden_states"]
    assert found.shape == (1, 266, 32) and not found[:, 10:].any() and found[:, :10, :16].any()
    with pytest.raises(ValueError, match="prompt has 82 tokens, and .* reads 77; shorten it"):
        open_base(own, "a " * 80)


def test_prompts(folders, opened):
    from dmap_core.backends.diffusers_files import open_base

    assert not torch.equal(opened(SD3).conditioning()[0], open_base(folders(SD3)).conditioning()[0])
    for name, most in ((SD3, 256), (AURA, 256), (LUMINA, 256), (Z_IMAGE, 512), (FLUX, 512), (CHROMA, 512)):
        with pytest.raises(ValueError, match=rf"prompt has \d+ tokens, and .* \({name}\) reads {most}; shorten it"):
            open_base(folders(name), "a " * (most + 1))


def _config(folder, part, **changes):
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_refused(own):
    import diffusers

    from dmap_core.backends.diffusers_files import open_base

    def fails(match, **given):
        with pytest.raises(ValueError, match=match):
            open_base(own, **given)

    fails("copy: prediction is 'eps', and Stable Diffusion 3 predicts velocities; leave the prediction at auto", prediction="eps")
    assert open_base(own, prediction="flow").prediction == "flow"
    config = (own / "transformer" / "config.json").read_text()
    for kind, why in (
        ("WanTransformer3DModel", "it makes videos"),
        ("LTXVideoTransformer3DModel", "it makes videos"),
        ("Flux2Transformer2DModel", "packed and normalised by statistics"),
        ("SanaTransformer2DModel", "one latent of 32x32 pixels"),
        ("PixArtTransformer2DModel", "it predicts noise"),
        ("QwenImageTransformer2DModel", "one of videos"),
        ("StableAudioDiTModel", "."),
        ("OmniGenTransformer2DModel", "there is no adapter for it"),
    ):
        _config(own, "transformer/config.json", _class_name=kind)
        fails(rf"copy holds a {kind}, which is not read: .*{why}.* takes {', '.join(NAMES)}")
    for changes, why in (
        ({"quantization_config": {}}, "its transformer are quantised"),
        ({"patch_size": 4}, "patch_size of its transformer is 4, and that of Stable Diffusion 3 is 2"),
        ({"in_channels": 33}, "reads more than latents"),
        ({"in_channels": 4, "out_channels": 4}, "makes latents of 16 channels, and its transformer reads 4"),
    ):
        (own / "transformer" / "config.json").write_text(config)
        _config(own, "transformer/config.json", **changes)
        fails(why)
    (own / "transformer" / "config.json").write_text("{")
    fails(r"config.json cannot be read")
    (own / "transformer" / "config.json").write_text(config)
    diffusers.DDPMScheduler().save_pretrained(own / "scheduler")
    fails("its scheduler is DDPMScheduler, and its transformer is a flow, whose scheduler must be a FlowMatch one")
    scheduler(invert_sigmas=True).save_pretrained(own / "scheduler")
    fails("turns times round")
    scheduler().save_pretrained(own / "scheduler")
    from tiny_folders import autoencoder

    shutil.rmtree(own / "vae")
    autoencoder(levels=2, latent_channels=16).save_pretrained(own / "vae")
    fails("makes one latent of 2x2 pixels, and only 8x8 are read")
    for file in (own / "transformer").glob("*.safetensors"):
        file.unlink()
    fails("holds no .safetensors|one latent of 2x2")


def test_pictures_beyond_the_table_of_positions(opened):
    for name, most in ((SD3, 128), (AURA, 128), (LUMINA, 256), (Z_IMAGE, 256)):
        prior = opened(name).sized((most + 8, 32))
        with pytest.raises(ValueError, match=rf"the picture has 32x{most + 8} pixels, and .* has places for {most} a side; take .* a tile"):
            prior.denoise(noise(1, *prior.latent_shape()), 1.0)


def test_no_cse_goes_with_a_transformer(opened, tmp_path):
    from tiny_models import tiny_checkpoint

    from dmap_core.cse.use import open_cse

    prior = opened(SD3)
    with pytest.raises(ValueError, match="a CSE is a ControlNet of a UNet, and cannot be made for a transformer"):
        open_cse(tiny_cse(tmp_path / "cse.safetensors", tiny_checkpoint(tmp_path / "base.safetensors")), prior)
    for call in (prior.original_weights, lambda: prior.controlled(torch.nn.Identity(), None)):
        with pytest.raises(ValueError, match="cannot be made for a transformer"):
            call()
    assert prior.controlled(None, None).networks() == prior.networks()


def test_small_decoders_of_other_latents_are_refused(opened):
    from diffusers import AutoencoderTiny

    with pytest.raises(ValueError, match="guidance: the decoder takes latents of 4 channels, and the model's have 16"):
        opened(SD3).decoded_by(AutoencoderTiny(scaling_factor=1.0))
    assert opened(AURA).sized(SIZE).decoded_by(AutoencoderTiny(scaling_factor=1.0))(noise(1, 4, 4, 6)).shape == (1, 3, *SIZE)


def tiny_decoder(path, channels):
    """A random TAESD of so many channels, as ComfyUI's files name its tensors; returns it, too."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(channels)
        vae = AutoencoderTiny(latent_channels=channels, scaling_factor=1.0)
    state = {}
    for name, tensor in vae.decoder.state_dict().items():
        n, rest = name.removeprefix("layers.").split(".", 1)
        state[f"taesd_decoder.{int(n) + 1}.{rest}"] = tensor
    save_file(state, path)
    return vae


def test_small_decoders_of_sixteen_channels(folders, opened, tmp_path):
    """TAESD3's and TAEF1's shape: what the file's own autoencoder decodes, and a run whose gradients go through it."""
    from dmap_core import cli
    from dmap_core.backends.diffusers_files import open_decoder

    vae = tiny_decoder(tmp_path / "taef1.safetensors", 16)
    prior, z0 = opened(FLUX).sized(SIZE), noise(1, 16, 4, 6)
    decode = prior.decoded_by(open_decoder(tmp_path / "taef1.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(decode(z0), vae.decode(z0).sample[..., : SIZE[0], : SIZE[1]])
    with pytest.raises(ValueError, match="the decoder takes latents of 16 channels, and the model's have 4"):
        opened(AURA).decoded_by(open_decoder(tmp_path / "taef1.safetensors"))
    tiny_decoder(tmp_path / "other.safetensors", 12)
    with pytest.raises(ValueError, match="it takes latents of 12 channels; those of 4 and 16 are known"):
        open_decoder(tmp_path / "other.safetensors")
    row = {"operator": "sr4", "solver": "DPS", "settings": {"jacobian": "none"}, "steps": 2, "spacing": "exponential"}
    rows = [row | {"name": "own"}, row | {"name": "small", "guidance": str(tmp_path / "taef1.safetensors")}]
    table = {"operators": {"sr4": {"operator": "SuperResolution", "scale": 4}}, "rows": rows}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    photos = pictures(tmp_path / "photos", 1)
    cli.main(
        ["evaluate", "--config", str(tmp_path / "table.yaml"), "--images", str(photos), "--checkpoint", str(folders(FLUX))]
        + ["--out", str(tmp_path / "out"), "--size", "64"]
    )
    own, small = csv.DictReader((tmp_path / "out" / "table.csv").open())
    assert float(own["psnr"]) != float(small["psnr"]) and 0 < float(small["psnr"]) < 60


def test_tables_on_the_command_line(folders, tmp_path):
    """DMAP with the exact Jacobian and with none, whole and on tiles, two pictures at once."""
    from dmap_core import cli

    photos = pictures(tmp_path / "photos", 2)
    solvers = [
        {"operator": "sr4", "name": jacobian, "solver": "DMAP", "settings": {"K": 1, "jacobian": jacobian}, "steps": 2}
        | {"spacing": "exponential"}
        for jacobian in ("exact", "none")
    ]
    table = {"operators": {"sr4": {"operator": "SuperResolution", "scale": 4}}, "rows": solvers, "metrics": ["psnr"], "prompt": PROMPT}
    restored = {}
    for tile in (None, 128):
        file = tmp_path / f"table-{tile}.yaml"
        file.write_text(yaml.safe_dump(table | ({"tile": tile} if tile else {})))
        out = tmp_path / f"out-{tile}"
        size = "160" if tile else "64"
        cli.main(
            ["evaluate", "--config", str(file), "--images", str(photos), "--checkpoint", str(folders(SD3))]
            + ["--out", str(out), "--size", size, "--batch", "2"]
        )
        restored[tile] = list(csv.DictReader((out / "table.csv").open()))
        assert [row["row"] for row in restored[tile]] == ["exact", "none"], restored[tile]
        assert all(0 < float(row["psnr"]) < 60 for row in restored[tile])


def test_other_commands(folders, tmp_path):
    """A CSE is refused before anything is trained; pictures are generated with the noise levels of their size."""
    from dmap_core import cli

    photos = pictures(tmp_path / "photos", 1, size=(64, 64))
    train = [
        "train-cse",
        "--checkpoint",
        str(folders(FLUX)),
        "--pictures",
        str(photos),
        "--operator",
        '{"operator": "Grayscale"}',
        "--size",
        "64",
    ]
    with pytest.raises(SystemExit, match=r"Flux.1 is Flux.1: a CSE is a ControlNet of a UNet, and cannot be made for a transformer"):
        cli.main([*train, "--steps", "1", "--batch-size", "1", "--out", str(tmp_path / "cse.safetensors")])
    made = tmp_path / "made"
    generate = ["generate-cse", "--checkpoint", str(folders(FLUX)), "--count", "1", "--steps", "2", "--size", "32", "--out"]
    cli.main([*generate, str(made)])
    cli.main([*generate, str(tmp_path / "guided"), "--distilled-guidance", "9"])
    assert [file.name for file in made.iterdir()] == ["000000.png"]
    assert (made / "000000.png").read_bytes() != (tmp_path / "guided" / "000000.png").read_bytes()


def test_the_score_of_a_guided_model(folders, tmp_path):
    """Observation II on Flux.1 dev, with a distilled guidance and its usual one."""
    from dmap_core import cli

    photo = next(pictures(tmp_path / "photos", 1, size=(64, 64)).glob("*.png"))
    found = []
    for name, more in (("usual", []), ("given", ["--distilled-guidance", "9"]), ("same", ["--distilled-guidance", "3.5"])):
        cli.main(
            ["score-mean", "--checkpoint", str(folders(FLUX)), "--picture", str(photo), "--operator", '{"operator": "Grayscale"}']
            + ["--samples", "2", "--steps", "2", "--zeta", "1", "--out", str(tmp_path / name), *more]
        )
        found.append((tmp_path / name / "score-mean.csv").read_bytes())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("value", [0, -1.0, "much", True, 1e6])
def test_distilled_guidance_must_be_a_number(value):
    from dmap_core.evaluate.config import ConfigError, make_config

    table = {"operators": {"grey": {"operator": "Grayscale"}}, "rows": [{"operator": "grey", "solver": "DPS"}]}
    with pytest.raises(ConfigError, match=r"distilled_guidance is .*; it must be a number above 0 and at most 100"):
        make_config(table | {"distilled_guidance": value})
    assert make_config(table | {"distilled_guidance": 2}).distilled_guidance == 2.0
