"""The same restoration in ComfyUI and on diffusers: same file, measurement and noise, each with its own networks and samplers."""

import importlib

import pytest
import torch
from variants import some_at_once

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.hosts("one"),
]

CLOSE = 1e-4  # see `apart`; an 8-bit picture has steps of 4e-3
STEPS = 4


def apart(a, b):
    """Mean absolute difference of pictures in [0, 1].

    The greatest one proves nothing: the demo decoder's ReLUs make its gradient jump, so that a difference of 1e-7 in the noise moves single spots by 3e-3
    (4 steps from pure noise, 136 x 204, six seeds), and the mean by 1e-5.
    """
    return float((a - b).abs().mean())


@pytest.fixture(scope="module")
def core(lab):
    names = ("backends.diffusers_files", "cse.use", "restore", "solvers", "schedule", "presets", "operators")
    return {name.split(".")[-1]: importlib.import_module(f"dmap_pack.dmap_core.{name}") for name in names}


@pytest.fixture(scope="module")
def base(lab, core):
    with torch.inference_mode(False):
        return (
            core["diffusers_files"].open_base(lab.ROOT / "models" / "checkpoints" / lab.CHECKPOINT).to(torch.device("cpu"), torch.float32)
        )


def on_diffusers(
    lab, core, base, operator, solver, settings, cse=None, start=1.0, seed=11, decoder=None, picture=None, tile=None, steps=STEPS
):
    """(picture (1, H, W, 3) in [0, 1], denoiser calls)."""
    with torch.inference_mode(False), torch.no_grad():
        y = operator.measure(lab.as_core((lab.picture() if picture is None else picture).clone()))
        prior = base.sized(operator.image_size(y)).tiled(tile)
        if cse:
            controlnet, metadata = core["use"].open_cse(cse, base)
            prior = prior.controlled(controlnet, core["use"].hint_for(operator.hint(y), metadata))
        sigmas = core["schedule"].exponential_sigmas(base.sigmas, steps, start)
        latent = core["restore"].warm_latent(prior, operator, y) if start < 1 else None
        solve = core["solvers"].SOLVERS[solver](**settings)
        guidance = decoder and prior.decoded_by(decoder)
        done = core["restore"].restore(prior, operator, y, prior.latent_shape(), sigmas, solve, [seed], latent=latent, guidance=guidance)
        return ((done.image + 1) / 2).movedim(1, -1).clamp(0, 1), done.denoiser_calls


def in_comfyui(lab, operator, solver, settings, cse=None, start=1.0, seed=11, picture=None, steps=STEPS, schedule=None, **changes):
    if picture is not None:
        changes["measurement"] = lab.call("DMAP_Degrade", image=picture, operator=operator, noise_sigma=0.0, seed=0)
    problem = lab.problem(operator=operator, **changes)
    if cse:
        control, _, _ = lab.call("DMAP_CSEControlNetLoader", cse=cse.name)
        problem["positive"] = lab.call(
            "DMAP_ApplyCSE",
            conditioning=problem["positive"],
            cse=control,
            measurement=problem["measurement"],
            operator=operator,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
    guider = lab.call("DMAP_DPSGuider", **problem)
    given = {"step": "auto", "zeta": 1.0, "strength": 0.7} if settings.get("zeta", 0) is None else {}
    sampler = lab.call(f"DMAP_{solver}Sampler", **settings | given)
    given = {"measurement": problem["measurement"], "operator": operator, "vae": problem["vae"]}
    latent = lab.call("DMAP_EmptyMeasurementLatent", **given, batch_size=1, content="measurement" if start < 1 else "empty")[0]
    schedule = lab.sigmas(steps, spacing="exponential", start=start) if schedule is None else schedule
    latents = lab.sample(guider, sampler, seed=seed, schedule=schedule, latent=latent)
    if picture is None:
        image = lab.call("VAEDecode", samples={"samples": latents}, vae=problem["vae"])
    else:  # which may be no multiple of a latent, and larger than a decoder is given at once
        image = guider_image(lab, guider, latents)
    return image.clamp(0, 1), guider.report.denoiser_calls


def guider_image(lab, guider, latents):
    """The picture as the guider's tiles decode it: other decoders would see more of it."""
    host = importlib.import_module("dmap_pack.nodes.host.prior")
    model, vae = lab.shared()
    with torch.no_grad():
        prior = host.HostPrior(model.model, vae, [vae.first_stage_model], [], guider.size, guider.tile)
        return (prior.decode(model.model.process_latent_in(latents)).movedim(1, -1) + 1) / 2


CASES = {
    "DPS": ("SuperResolution", {"scale": 8}, "DPS", {"zeta": 4.0}, False),
    "DMAP": ("SuperResolution", {"scale": 4}, "DMAP", {"zeta": 8.0, "K": 2}, False),
    "DSG": ("GaussianBlur", {"kernel_size": 31, "sigma": 2.0}, "DSG", {"zeta": 0.5}, False),
    "PSLD": ("SuperResolution", {"scale": 4}, "PSLD", {"zeta": 2.0, "gamma": 0.1}, False),
    "DMAP from the measurement": ("SuperResolution", {"scale": 4}, "DMAP", {"zeta": None, "jacobian": "none"}, False, 0.4),
    "DMAP with a CSE": ("SuperResolution", {"scale": 4}, "DMAP", {"zeta": 8.0, "K": 2}, True),
}


@pytest.mark.parametrize("case", some_at_once(CASES, ["DPS", "DMAP from the measurement", "DMAP with a CSE"]))
def test_both_backends_make_the_same_picture(lab, core, base, case):
    name, settings, solver, how, with_cse, *start = CASES[case]
    operator = getattr(core["operators"], name)(**settings)
    cse = lab.ROOT / "models" / "controlnet" / "dmap-demo-cse-sr4.safetensors" if with_cse else None
    theirs, their_calls = on_diffusers(lab, core, base, operator, solver, how, cse, *start)
    ours, our_calls = in_comfyui(lab, operator, solver, how, cse, *start)
    assert ours.shape == theirs.shape and our_calls == their_calls
    assert float(ours.std()) > 0.02, "a picture of one colour would prove nothing"
    assert apart(ours, theirs) <= CLOSE


@pytest.mark.parametrize("with_cse", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_both_cut_the_same_tiles(lab, core, base, with_cse):
    """16 x 26 latents are two tiles, a CSE's hint with them."""
    operator = core["operators"].SuperResolution(4)
    cse = lab.ROOT / "models" / "controlnet" / "dmap-demo-cse-sr4.safetensors" if with_cse else None
    how, picture = {"zeta": 4.0, "jacobian": "none"}, lab.picture(2, 128, 204)
    few = {"picture": picture, "steps": 2}
    theirs, their_calls = on_diffusers(lab, core, base, operator, "DPS", how, cse, tile=16, **few)
    ours, our_calls = in_comfyui(lab, operator, "DPS", how, cse, tile="128", **few)
    assert ours.shape == theirs.shape == (1, 128, 204, 3) and our_calls == their_calls
    assert apart(ours, theirs) <= CLOSE
    whole, _ = on_diffusers(lab, core, base, operator, "DPS", how, cse, **few)
    assert apart(whole, theirs) > 50 * CLOSE


def test_another_seed_makes_another_picture(lab, core, base):
    """The comparison above would notice noise that differs."""
    name, settings, solver, how, _ = CASES["DMAP"]
    operator = getattr(core["operators"], name)(**settings)
    theirs, _ = on_diffusers(lab, core, base, operator, solver, how, seed=12)
    ours, _ = in_comfyui(lab, operator, solver, how)
    assert apart(ours, theirs) > 50 * CLOSE


def test_both_guide_by_the_same_small_decoder(lab, core, base, tmp_path):
    """A file as Load VAE knows it: a TAESD, here the demo prior's own with other weights."""
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    weights = {name: tensor.clone().contiguous() for name, tensor in lab.shared()[1].first_stage_model.state_dict().items()}
    for name, tensor in weights.items():
        if name.startswith("taesd_decoder.") and tensor.ndim == 4:
            tensor *= 1 + 0.05 * torch.randn(tensor.shape, generator=rng)
    save_file(weights, tmp_path / "taesd.safetensors")
    operator = core["operators"].SuperResolution(4)
    how = {"zeta": None, "jacobian": "none", "inner": 2}
    with torch.inference_mode(False):
        decoder = core["diffusers_files"].open_decoder(tmp_path / "taesd.safetensors")
    theirs, their_calls = on_diffusers(lab, core, base, operator, "DMAP", how, decoder=decoder)
    ours, our_calls = in_comfyui(
        lab,
        operator,
        "DMAP",
        how,
        guidance_vae=importlib.import_module("dmap_pack.nodes.host.prior").load_vae(tmp_path / "taesd.safetensors"),
    )
    assert our_calls == their_calls and apart(ours, theirs) <= CLOSE
    plain, _ = on_diffusers(lab, core, base, operator, "DMAP", how)
    assert apart(plain, theirs) > 10 * CLOSE


def test_a_flow_is_the_same_in_both(lab, core):
    """The demo prior's flow: by its file's word on diffusers, by ModelSamplingSD3 in ComfyUI."""
    file = lab.ROOT / "models" / "checkpoints" / "dmap-demo-flow-prior.safetensors"
    with torch.inference_mode(False):
        base = core["diffusers_files"].open_base(file).to(torch.device("cpu"), torch.float32)
    assert base.prediction == "flow"
    model, _, vae = lab.call("CheckpointLoaderSimple", ckpt_name=file.name)
    model = lab.call("ModelSamplingSD3", model=model, shift=1.0)
    operator, how = core["operators"].SuperResolution(4), {"zeta": None, "K": 2}
    theirs, their_calls = on_diffusers(lab, core, base, operator, "DMAP", how)
    schedule = lab.call("DMAP_DMAPScheduler", model=model, steps=STEPS, spacing="exponential")
    ours, our_calls = in_comfyui(lab, operator, "DMAP", how, model=model, vae=vae, schedule=schedule)
    assert our_calls == their_calls and float(ours.std()) > 0.02
    assert apart(ours, theirs) <= CLOSE
