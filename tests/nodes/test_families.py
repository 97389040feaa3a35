"""The model families that the pack promises, from files through ComfyUI's stock loaders: see families.py for the files.

Stable Diffusion 1.5, 2.0, 2.1 (v-prediction) and SDXL, with negative prompt, LoRA and ControlNet, down to a whole run. What they compute
is checked against ComfyUI's own guider, and against formulas that are written out here.
"""

import math

import pytest
import torch
from variants import some_at_once


def families_of(*at_once):
    """All of them in .ci/run; those that are named, always."""
    return some_at_once(("SD1.5", "SD2.0", "SD2.1", "SDXL"), at_once)


FAMILIES = families_of("SD2.1")
SIGMA = 1.0
STEP = 0.05
TOLERANCE = 0.02  # of the gradient's norm: the decoder has kinks, and the residual is a number in single precision


@pytest.fixture(scope="module")
def families(lab):
    import families

    return families


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, families, tmp_path_factory):
    """One family at a time: the largest has 0.6 GB of weights."""
    with families.Files(tmp_path_factory.mktemp("models")) as files, torch.inference_mode():
        yield families.Loaded(request.param, files.folder)


pooled = pytest.mark.parametrize("loaded", families_of("SD2.1", "SDXL"), indirect=True)  # for what SDXL alone reads
small = pytest.mark.parametrize("loaded", ["SD1.5"], indirect=True)  # the smallest network, for what does not depend on the family


@pytest.fixture
def z(families):
    return SIGMA * families.noise(1, 4, 4, 4, seed=1)


def step_and_slope(families, z, sigma=SIGMA, memory="auto", **problem):
    """(denoised, gradient): the one by ComfyUI's own guider, the other by DPSGuider, and by the residual's differences the same."""
    denoised = families.denoised(z, sigma, **problem)
    gradient = denoised - families.guided(z, sigma, memory=memory, **problem)
    norm = float(gradient.norm())
    assert norm > 0.05, "a gradient this small hides in the rounding errors"
    along, across = (d / d.norm() for d in (gradient, families.noise(*z.shape, seed=2)))
    direction = (along + across) / (along + across).norm()
    slope = families.slope(z, sigma, direction, STEP, **problem)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0, abs=TOLERANCE * norm)
    return denoised, gradient


def differs(a, b, share=0.02):
    return float((a - b).norm()) > share * float(b.norm())


# what ComfyUI makes of the files


def test_the_stock_loader_recognises_the_family(lab, loaded):
    import comfy.model_base
    import comfy.supported_models

    model, family = loaded.model.model, loaded.family
    assert type(model.model_config) is getattr(comfy.supported_models, family.config)
    assert type(model) is getattr(comfy.model_base, family.base)
    assert model.model_type.name == family.prediction
    kind = {"EPS": lab.comfy.model_sampling.EPS, "V_PREDICTION": lab.comfy.model_sampling.V_PREDICTION}[family.prediction]
    assert type(model.model_sampling).__bases__ == (lab.comfy.model_sampling.ModelSamplingDiscrete, kind)
    assert model.get_dtype() == torch.float32 and model.manual_cast_dtype is None
    assert loaded.clip is None and loaded.vae.latent_channels == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_every_weight_of_the_files_is_used(families, loaded):
    """ComfyUI says nothing but a warning about weights that are missing or left over."""
    prefix = "model.diffusion_model."
    weights = families.load(loaded.folder / "checkpoint.safetensors")
    assert {k[len(prefix) :] for k in weights if k.startswith(prefix)} == set(loaded.model.model.diffusion_model.state_dict())
    weights = families.load(loaded.folder / "controlnet.safetensors")
    controlnet = loaded.controlnet().control_model
    assert set(weights) == set(controlnet.state_dict())
    assert (controlnet.num_classes is None) == (loaded.family.pooled is None)


# one guided step


def embedding(values, width):
    """(B,) numbers as sines and cosines of falling frequency, (B, width)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def denoised_by_formula(loaded, z, timestep, abar):
    """E[z0 | z] at a training timestep from the network's bare output, which is DDPM's noise, or the velocity of Salimans and Ho."""
    context, extra = loaded.condition(11)[0]
    y = None
    if loaded.name == "SDXL":
        sizes = torch.tensor([extra["height"], extra["width"], 0, 0, extra["height"], extra["width"]])
        y = torch.cat([extra["pooled_output"], embedding(sizes, 256).reshape(1, -1)], dim=1)
    x = z * math.sqrt(abar)  # the latent of the variance-preserving model
    output = loaded.model.model.diffusion_model(x, torch.tensor([float(timestep)]), context=context, y=y, transformer_options={})
    if loaded.family.prediction == "EPS":
        return (x - math.sqrt(1 - abar) * output) / math.sqrt(abar)
    return math.sqrt(abar) * x - math.sqrt(1 - abar) * output


@pooled
def test_denoised_is_what_the_formula_says(families, loaded):
    """Inside DPSGuider as well: two step sizes tell its denoised latent from its gradient."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for timestep in (700, 150):
        abar = float((1 - betas).cumprod(0)[timestep])
        sigma = math.sqrt((1 - abar) / abar)
        z = sigma * families.noise(1, 4, 4, 4, seed=1)
        expected = denoised_by_formula(loaded, z, timestep, abar)
        torch.testing.assert_close(families.denoised(z, sigma, **loaded.problem()), expected, rtol=0, atol=1e-3)
    once, twice = (families.guided(z, sigma, **loaded.problem(zeta=zeta)) for zeta in (1.0, 2.0))
    assert differs(once, expected)
    torch.testing.assert_close(2 * once - twice, expected, rtol=0, atol=1e-3)


def test_the_gradient(families, loaded, z):
    step_and_slope(families, z, **loaded.problem())


def test_negative_prompt_and_cfg(families, loaded, z):
    problem, negative = loaded.problem(), loaded.condition(12)
    conditional, plain = families.denoised(z, SIGMA, **problem), families.guided(z, SIGMA, **problem)
    unconditional = families.denoised(z, SIGMA, **loaded.problem(positive=negative))
    assert differs(unconditional, conditional), "this negative changes nothing"
    assert torch.equal(families.guided(z, SIGMA, **problem, negative=negative, cfg=1.0), plain)

    denoised, gradient = step_and_slope(families, z, **problem, negative=negative, cfg=3.0)
    torch.testing.assert_close(denoised, unconditional + 3 * (conditional - unconditional), rtol=0, atol=1e-4)
    assert differs(gradient, conditional - plain)


@pooled
def test_pooled_conditioning_of_sdxl(families, loaded, z):
    """Only SDXL reads it, and the sizes; the others do not mind them."""
    context, extra = loaded.condition(11)[0]
    denoised, plain = families.denoised(z, SIGMA, **loaded.problem()), families.guided(z, SIGMA, **loaded.problem())
    pooled, sizes = {"pooled_output": families.noise(1, 1280, seed=13)}, {"width": 512, "height": 512}
    if loaded.name != "SDXL":
        positive = [[context, extra | pooled | sizes]]
        assert torch.equal(families.guided(z, SIGMA, **loaded.problem(positive=positive)), plain)
        return
    changed, gradient = step_and_slope(families, z, **loaded.problem(positive=[[context, extra | pooled]]))
    assert differs(changed, denoised) and differs(gradient, denoised - plain)
    assert differs(families.denoised(z, SIGMA, **loaded.problem(positive=[[context, extra | sizes]])), denoised)


def test_unconditional(lab, families, loaded, z):
    positive = lab.call("DMAP_DMAPUnconditional", model=loaded.model)
    zeros = [[torch.zeros(1, 1, loaded.family.context), {"pooled_output": torch.zeros(1, 1280)}]]
    guided = families.guided(z, SIGMA, **loaded.problem(positive=positive))
    assert guided.isfinite().all() and torch.equal(guided, families.guided(z, SIGMA, **loaded.problem(positive=zeros)))


# LoRA


@pytest.mark.thorough
def test_a_lora(families, loaded, z):
    before = {k: v.clone() for k, v in loaded.model.model.state_dict().items()}
    denoised, plain = families.denoised(z, SIGMA, **loaded.problem()), families.guided(z, SIGMA, **loaded.problem())
    model = loaded.with_lora()
    assert len(model.patches) == len(families.ATTENTIONS) * len(loaded.family.lora), "ComfyUI did not apply all of the LoRA"
    changed, gradient = step_and_slope(families, z, **loaded.problem(model=model))
    assert differs(changed, denoised) and differs(gradient, denoised - plain)
    patched = [k for k, v in model.model.state_dict().items() if not torch.equal(v, before[k])]
    assert sorted(patched) == sorted(model.patches), "the LoRA should be on as long as its model is loaded"

    assert torch.equal(families.guided(z, SIGMA, **loaded.problem()), plain)
    after = loaded.model.model.state_dict()
    assert [k for k, v in before.items() if not torch.equal(v, after[k])] == []


# ControlNet


def test_a_controlnet(families, loaded, z):
    denoised, plain = families.denoised(z, SIGMA, **loaded.problem()), families.guided(z, SIGMA, **loaded.problem())
    positive, _ = loaded.controlled(strength=3.0)
    changed, gradient = step_and_slope(families, z, **loaded.problem(positive=positive), memory="fast")
    assert differs(changed, denoised) and differs(gradient, denoised - plain)
    other, _ = loaded.controlled(strength=3.0, hint=1)
    assert differs(families.denoised(z, SIGMA, **loaded.problem(positive=other)), changed, share=1e-3), "the hint is not read"


def test_a_controlnet_without_effect(families, loaded, z):
    """Of strength 0, and as it is before any training: with convolutions of zeros to the UNet."""
    plain = families.guided(z, SIGMA, **loaded.problem())
    positive, _ = loaded.controlled(strength=0.0)
    assert torch.equal(families.guided(z, SIGMA, **loaded.problem(positive=positive)), plain)

    network = loaded.controlnet().control_model
    weights = [p for part in (network.zero_convs, network.middle_block_out) for p in part.parameters()]
    before = [p.clone() for p in weights]
    positive, _ = loaded.controlled()
    try:
        for p in weights:
            p.data.zero_()
        changed = families.guided(z, SIGMA, **loaded.problem(positive=positive))
    finally:
        for p, value in zip(weights, before, strict=True):
            p.data.copy_(value)
    torch.testing.assert_close(changed, plain, rtol=0, atol=1e-4)


def control_lora(families, loaded, dtype):
    """A control LoRA: the ControlNet's own layers, and small changes to the UNet's encoder, which it shares."""
    own = ("input_hint_block.", "zero_convs.", "middle_block_out.")
    weights = families.load(loaded.folder / "controlnet.safetensors")
    weights = {k: v for k, v in weights.items() if k.startswith(own)} | {"lora_controlnet": torch.zeros(1)}
    for i, part in enumerate(("to_q", "to_k")):
        layer = f"input_blocks.1.1.transformer_blocks.0.attn1.{part}"
        weights |= {f"{layer}.up": families.noise(320, 4, seed=20 + i), f"{layer}.down": families.noise(4, 320, seed=30 + i) / 18}
    return {k: v.to(dtype) for k, v in weights.items()}


def t2i_adapter(families):
    """The adapter of Stable Diffusion 1.x. Its features fit the blocks of real width; here only those of the first level do."""
    from comfy.t2i_adapter.adapter import Adapter

    with torch.device("meta"):
        adapter = Adapter(cin=192, channels=[320, 640, 1280, 1280], nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False)
    return families.random_weights(adapter, seed=3)


@pytest.mark.parametrize("kind", some_at_once(["float16", "float32", "adapter"], ["float32"]))
@pytest.mark.parametrize("loaded", ["SD2.0"], indirect=True)
def test_other_kinds_of_control(lab, families, loaded, kind):
    """Control LoRAs make their network when a run begins, from weights of any precision; T2I adapters know nothing of the latent."""
    weights = t2i_adapter(families) if kind == "adapter" else control_lora(families, loaded, getattr(torch, kind))
    families.save(weights, loaded.folder / f"{kind}.safetensors")
    controlnet = lab.call("ControlNetLoader", control_net_name=f"{kind}.safetensors")
    positive, _ = loaded.controlled(strength=2.0, controlnet=controlnet)
    z = families.noise(1, 4, 8, 8, seed=1)
    measurement = lab.picture(height=8, width=8)
    plain = families.denoised(z, SIGMA, **loaded.problem(measurement=measurement))
    denoised, _ = step_and_slope(families, z, **loaded.problem(positive=positive, measurement=measurement))
    assert differs(denoised, plain)


@pytest.mark.thorough
@small
def test_memory_plans_with_a_controlnet(families, loaded, z):
    """It adds to the UNet's skip connections in place, where autograd and checkpoints still need them."""
    positive, negative = loaded.controlled(strength=3.0)
    problem = loaded.problem(positive=positive, negative=negative, cfg=3.0, model=loaded.with_lora())
    denoised, gradient = step_and_slope(families, z, **problem, memory="fast")
    for memory in ("lean", "checkpoint", "auto"):
        torch.testing.assert_close(families.guided(z, SIGMA, **problem, memory=memory), denoised - gradient, rtol=0, atol=1e-5)


@small
def test_a_chain_of_controlnets(families, loaded, z):
    """Of two hints; a patch of the user's at the same place of the UNet is called, too."""
    positive, negative = loaded.controlled(strength=2.0)
    positive, _ = loaded.controlled(strength=2.0, hint=1, positive=positive, negative=negative)
    model, calls = loaded.model.clone(), []
    model.set_model_patch(lambda h, options: calls.append(options["block"]) or 0.9 * h, "input_block_patch_after_skip")
    step_and_slope(families, z, **loaded.problem(positive=positive, model=model))
    assert len(set(calls)) == 4, "one call per input block"
    assert len(model.model_options["transformer_options"]["patches"]["input_block_patch_after_skip"]) == 1


# whole runs


@pytest.mark.parametrize("sampler", ["dmap", "dps"])
def test_a_run(lab, loaded, sampler):
    """The same seed gives the same picture. DPS gets all at once: LoRA, ControlNet, negative prompt and cfg."""
    problem = loaded.problem()
    if sampler == "dps":
        positive, negative = loaded.controlled()
        problem = loaded.problem(positive=positive, negative=negative, cfg=2.0, model=loaded.with_lora())
    schedule = lab.call("DMAP_DMAPScheduler", model=loaded.model, steps=2, start=0.5)
    guider, sampler = lab.guider(**problem), getattr(lab, sampler)()
    first, again = (lab.sample(guider, sampler, schedule=schedule) for _ in range(2))
    assert first.isfinite().all() and float(first.std()) > 0 and torch.equal(first, again)
    picture = lab.call("VAEDecode", vae=loaded.vae, samples={"samples": first})
    assert picture.shape == (1, lab.SIZE, lab.SIZE, 3) and picture.isfinite().all()


# other ways to sample a model


SAMPLINGS = {
    "eps": ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}),
    "v": ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}),
    "v, zero terminal SNR": ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
    "x0": ("ModelSamplingDiscrete", {"sampling": "x0", "zsnr": False}),
    "lcm": ("ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False}),
    "continuous eps": ("ModelSamplingContinuousEDM", {"sampling": "eps", "sigma_max": 14.6, "sigma_min": 0.03}),
    "continuous v": ("ModelSamplingContinuousV", {"sampling": "v_prediction", "sigma_max": 500.0, "sigma_min": 0.03}),
    "edm": ("ModelSamplingContinuousEDM", {"sampling": "edm", "sigma_max": 80.0, "sigma_min": 0.002}),
    "playground": ("ModelSamplingContinuousEDM", {"sampling": "edm_playground_v2.5", "sigma_max": 80.0, "sigma_min": 0.002}),
}
USUAL = ("eps", "v, zero terminal SNR", "edm")


@small
@pytest.mark.parametrize("kind", some_at_once(SAMPLINGS, USUAL))
def test_sampling_nodes(lab, families, loaded, z, kind):
    """Whatever the network's output is taken for, and whatever the latents are scaled by: denoised and gradient belong together."""
    node, settings = SAMPLINGS[kind]
    model = lab.call(node, model=loaded.model, **settings)
    step_and_slope(families, z, **loaded.problem(model=model))
    schedule = lab.call("DMAP_DMAPScheduler", model=model, steps=3)
    low, high = (float(getattr(model.get_model_object("model_sampling"), name)) for name in ("sigma_min", "sigma_max"))
    assert schedule[0] == pytest.approx(high) and schedule[-2] == pytest.approx(low) and schedule[-1] == 0
    latents = lab.sample(lab.guider(**loaded.problem(model=model)), lab.dps(), schedule=schedule)
    assert latents.isfinite().all()


# models that are refused


def refused(lab, model, vae, positive):
    """The reasons of the nodes that take a model."""
    reasons = []
    for node, inputs in (
        ("DMAP_DPSGuider", lab.problem(positive=positive, vae=vae) | {"model": model}),
        ("DMAP_DMAPScheduler", {"model": model, "steps": 3}),
    ):
        with pytest.raises(ValueError) as error:
            lab.call(node, **inputs)
        reasons.append(str(error.value))
    return reasons


def test_stable_diffusion_3(lab, families, tmp_path):
    """The smallest file that the stock loader takes for it, which brings no VAE of its own."""
    import comfy.model_base
    import flows

    with families.Files(tmp_path):
        weights = {f"model.diffusion_model.{k}": v for k, v in families.sd3_weights().items()}
        families.save(weights | families.demo_vae(), tmp_path / "sd3.safetensors")
        model, _, vae = lab.call("CheckpointLoaderSimple", ckpt_name="sd3.safetensors")
        assert type(model.model) is comfy.model_base.SD3 and model.model.model_type.name == "FLOW"
        positive = [[torch.zeros(1, 3, 4096), {"pooled_output": torch.zeros(1, 2048)}]]
        with pytest.raises(ValueError, match="vae: it has 4 latent channels and the model 16"):
            lab.guider(**lab.problem(model=model, vae=vae, positive=positive))
        vae = flows.tiny_vae(16)
        latent = {"samples": torch.zeros(1, 16, 4, 4)}
        schedule = lab.call("DMAP_DMAPScheduler", model=model, steps=2)
        latents = lab.sample(lab.guider(model=model, vae=vae, positive=positive), lab.dmap(step="auto"), latent=latent, schedule=schedule)
        assert torch.isfinite(latents).all()


@small
def test_a_node_that_makes_a_flow_of_a_model(lab, loaded):
    """It is believed, and said to be strange."""
    model = lab.call("ModelSamplingSD3", model=loaded.model, shift=3.0)
    guider = lab.guider(**loaded.problem(model=model))
    lab.sample(guider, lab.dmap(step="auto"), steps=2, schedule=lab.call("DMAP_DMAPScheduler", model=model, steps=2))
    assert any("is a SD15 by its file, and a ModelSampling node makes a flow of it" in w for w in guider.report.warnings)


@small
def test_many_steps_of_a_distilled_model(lab, loaded):
    model = lab.call("ModelSamplingDiscrete", model=loaded.model, sampling="lcm", zsnr=False)
    guider = lab.guider(**loaded.problem(model=model))
    schedule = torch.linspace(14, 0, 53)
    lab.sample(guider, lab.dps(step="auto", guide_start=0.98, jacobian="none"), schedule=schedule)
    assert any("52 steps of a model that was distilled for 50 and fewer" in w for w in guider.report.warnings)


KINDS = {
    "EPS": True,
    "V_PREDICTION": True,
    "V_PREDICTION_EDM": True,
    "V_PREDICTION_CONTINUOUS": True,
    "EDM": True,
    "FLOW": True,  # SD3, AuraFlow
    "FLUX": True,
    "FLOW_COSMOS": False,
    "STABLE_CASCADE": False,
    "IMG_TO_IMG": False,
}


@small
def test_every_kind_of_model_that_comfyui_knows(lab, loaded):
    """By ComfyUI's own table of kinds: whoever adds one there is asked what the pack should do with it."""
    from comfy.model_base import ModelType, model_sampling

    kinds = {kind.name: kind for kind in ModelType}
    for name, accepted in KINDS.items():
        model = loaded.model.clone()
        model.add_object_patch("model_sampling", model_sampling(loaded.model.model.model_config, kinds[name]))
        if accepted:
            lab.guider(**loaded.problem(model=model))
            assert lab.call("DMAP_DMAPScheduler", model=model, steps=3).shape == (4,)
        else:
            for reason in refused(lab, model, loaded.vae, loaded.condition(11)):
                assert (
                    "is a cascade, an image-to-image or another model" in reason
                    and "Use Stable Diffusion 1.5, 2.0, 2.1, SDXL or 3.5" in reason
                )


@small
@pytest.mark.parametrize(
    ("node", "settings"),
    [
        ("ModelSamplingContinuousEDM", {"sampling": "cosmos_rflow", "sigma_max": 80.0, "sigma_min": 0.002}),
        ("ModelSamplingDiscrete", {"sampling": "img_to_img", "zsnr": False}),
    ],
)
def test_nodes_that_make_another_kind_of_a_model(lab, loaded, node, settings):
    model = lab.call(node, model=loaded.model, **settings)
    for reason in refused(lab, model, loaded.vae, loaded.condition(11)):
        assert "is a cascade, an image-to-image or another model" in reason
