"""What ComfyUI, its options and other nodes do to a model, and what is left of it when gradients flow."""

import functools
import importlib

import pytest
import torch
from variants import some_at_once


def run(lab, sampler, steps=3, **changes):
    guider = lab.guider(**changes)
    return lab.sample(guider, sampler, steps=steps), guider


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---- nodes that reuse outputs


@pytest.mark.parametrize("name", some_at_once(["EasyCache", "LazyCache"], ["EasyCache"]))
def test_caches_are_left_out_and_named(lab, name):
    nodes_easycache = importlib.import_module("comfy_extras.nodes_easycache")
    settings = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    node = getattr(nodes_easycache, f"{name}Node")
    (model,) = node.execute(model=lab.shared()[0], **settings).result
    assert bool((lab.ksampler(model, steps=5) != lab.ksampler(lab.shared()[0], steps=5)).any()), "this cache changes nothing"
    for sampler in (lab.dps(), lab.dmap(), lab.stock("euler")):
        plain, _ = run(lab, sampler, steps=5)
        cached, guider = run(lab, sampler, steps=5, model=model)
        assert torch.equal(cached, plain)
        assert f"{name} is left out" in guider.report.text()
    assert bool((lab.ksampler(model, steps=5) != lab.ksampler(lab.shared()[0], steps=5)).any()), "the node's own model lost its cache"


# ---- patches


def patched(lab, kind):
    """The demo prior with a patch of its attention that depends on the block, as most nodes that patch attention do."""
    model = lab.shared()[0].clone()

    def factor(options):
        return {"input": 0.5, "middle": 2.0, "output": -1.0}[options["block"][0]]

    if kind == "attn1":
        model.set_model_attn1_patch(lambda q, k, v, options: (q * factor(options), k, v))
    elif kind == "attn2 output":
        model.set_model_attn2_output_patch(lambda n, options: n + factor(options) * n.mean(1, keepdim=True))
    else:  # as perturbed-attention guidance and IP-Adapter do
        for block in (("input", 1), ("middle", 0), ("output", 0), ("output", 1)):
            model.set_model_attn1_replace(lambda q, k, v, options: v * factor(options), *block)
    return model


@pytest.mark.parametrize("kind", ["attn1", "attn2 output", "replace"])
def test_attention_patches_under_every_plan(lab, kind):
    expected, _ = run(lab, lab.dps(zeta=5.0), model=patched(lab, kind), memory="fast")
    plain, _ = run(lab, lab.dps(zeta=5.0), memory="fast")
    assert relative(expected, plain) > 1e-3, "this patch changes nothing"
    for memory in ("lean", "checkpoint"):
        latents, _ = run(lab, lab.dps(zeta=5.0), model=patched(lab, kind), memory=memory)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_a_training_sees_the_models_patches(lab):
    import cses

    z = 2.0 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoised(model):
        vae, condition = lab.shared()[1], lab.call("DMAP_DMAPUnconditional", model=model)
        with cses.training.training(model, vae, condition, "fp32", 32, 1) as base:
            sigma = float(base.sigmas[(base.sigmas - 2.0).abs().argmin()])
            return base.denoise(z, sigma).clone(), sigma

    def wrapped(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda f, given: 1.5 * f(given["input"], given["timestep"], **given["c"]))
        return model

    plain = denoised(lab.shared()[0])[0]
    for model in (patched(lab, "attn1"), patched(lab, "replace"), wrapped(lab.shared()[0])):
        ours, sigma = denoised(model)
        theirs = lab.probe(lab.stock_guider(model=model), z, sigma)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.std()))
        assert relative(ours, plain) > 1e-3, "this patch changes nothing"


@pytest.mark.nightly
def test_a_compiled_model(lab):
    """torch.compile's front end, with the eager back end: the same operations, recorded and split into forward and backward."""
    helpers = importlib.import_module("comfy_api.torch_helpers")
    model = lab.shared()[0].clone()
    helpers.set_torch_compile_wrapper(model=model, backend="aot_eager")
    for memory in ("fast", "checkpoint"):
        expected, _ = run(lab, lab.dps(zeta=5.0), steps=2, memory=memory)
        compiled, _ = run(lab, lab.dps(zeta=5.0), steps=2, model=model, memory=memory)
        assert relative(compiled, expected) < 1e-5


def test_a_model_on_several_gpus_is_refused(lab):
    model = lab.shared()[0].clone()
    model.set_additional_models("multigpu", [lab.shared()[0].clone()])
    with pytest.raises(ValueError, match="MultiGPU CFG Split"):
        lab.guider(model=model)


def test_attention_is_asked_of_back_ends_with_gradients(lab, monkeypatch):
    """cuDNN's may come first in ComfyUI's own order; it is not among ours."""
    gradients = importlib.import_module("dmap_pack.nodes.host.gradients")
    kernel = importlib.import_module("torch.nn.attention")
    names = [backend.name for backend in gradients.ATTENTION]
    assert names == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append({backend.name for backend in kernel._cur_sdpa_kernel_backends()})
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    run(lab, lab.dps(), steps=1)
    assert seen and all("CUDNN_ATTENTION" not in backends for backends in seen)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_comfyuis(lab, shaped, masked):
    gradients = importlib.import_module("dmap_pack.nodes.host.gradients")
    theirs = importlib.import_module("comfy.ldm.modules.attention").attention_pytorch
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 5, 8) if shaped else (2, 5, 24)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    mask = torch.randn(2, 5, 5, generator=generator) if masked else None
    for output in (False, True):
        settings = {"mask": mask, "skip_reshape": shaped, "skip_output_reshape": output}
        torch.testing.assert_close(
            gradients.pytorch_attention(None, q, k, v, 3, **settings), theirs(q, k, v, 3, **settings), rtol=0, atol=1e-6
        )


# ---- precision


def posterior_gradient(lab, model, vae, z, sigma):
    """(gradient, denoised, residual) of the guided run itself. A difference of two denoised latents would show the rounding of both."""
    studies = importlib.import_module("dmap_pack.nodes.host.run")
    guider = lab.guider(model=model, vae=vae, memory="fast")
    return studies.with_posterior(guider, "a test", torch.tensor([sigma, 0.0]), 1, lambda posterior: posterior.gradient(z.clone(), sigma))


@pytest.fixture(scope="module")
def full_gradient(lab):
    """At a noise level: (z, gradient)."""

    @functools.cache
    def full_gradient(sigma):
        z = sigma * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        return z, posterior_gradient(lab, *lab.shared(), z, sigma)[0]

    return full_gradient


@pytest.fixture(scope="module", params=["fp16 and bf16", "fp16", "bf16"])
def halves(lab, request):
    """(model, VAE) as a GPU has them by default (fp16 and bf16), and both in either."""
    unet, vae = {"fp16": ("float16", "float16"), "bf16": ("bfloat16", "bfloat16")}.get(request.param, ("float16", "bfloat16"))
    with torch.inference_mode():
        return lab.fresh(getattr(torch, unet))[0], lab.separate_vae(getattr(torch, vae))


@pytest.mark.parametrize("sigma", some_at_once([14.6, 5.0, 1.0, 0.3, 0.05], [14.6, 0.3]))
def test_gradients_in_half_precision(lab, halves, full_gradient, sigma):
    z, full = full_gradient(sigma)
    half, *_ = posterior_gradient(lab, *halves, z, sigma)
    cosine = torch.nn.functional.cosine_similarity(full.flatten(), half.flatten(), 0)
    assert float(cosine) > 0.999
    assert relative(half, full) < 0.1


def test_products_of_8_bit_floats_are_left_out(lab, monkeypatch, caplog):
    """--fast fp8_matrix_mult: its layers clamp their input in place, have no gradient, and log that at every call."""
    import comfy.ops
    from comfy.cli_args import args

    monkeypatch.setattr(lab.comfy.model_management, "supports_fp8_compute", lambda *_, **__: True)
    expected, _ = run(lab, lab.dps(), model=lab.fresh(torch.float8_e4m3fn)[0])
    monkeypatch.setattr(args, "fast", {comfy.ops.PerformanceFeature.Fp8MatrixMultiplication})
    model = lab.fresh(torch.float8_e4m3fn)[0]
    layers = [m for m in model.model.diffusion_model.modules() if isinstance(m, comfy.ops.fp8_ops.Linear)]
    assert layers, "this option changes nothing"
    with caplog.at_level("INFO"):
        latents, _ = run(lab, lab.dps(), model=model)
    assert torch.equal(latents, expected)
    assert not [r for r in caplog.records if "fp8" in r.getMessage()]
    assert not any("forward_comfy_cast_weights" in vars(layer) for layer in layers)


def quantised(lab, format_):
    """The demo prior with the weights of its transformer blocks quantised, as ComfyUI reads such files."""
    import json

    import comfy.quant_ops
    from safetensors.torch import load_file

    layout = comfy.quant_ops.QUANT_ALGOS[format_]["comfy_tensor_layout"]
    state = {}
    for name, weight in load_file(lab.folder_paths.get_full_path("checkpoints", lab.CHECKPOINT)).items():
        if ".transformer_blocks." in name and name.endswith(".weight") and weight.ndim == 2:
            state.update(comfy.quant_ops.QuantizedTensor.from_float(weight.float(), layout).state_dict(name))
            state[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(
                list(json.dumps({"format": format_}).encode()), dtype=torch.uint8
            )
        else:
            state[name] = weight
    return lab.comfy.sd.load_state_dict_guess_config(state, output_vae=False, output_clip=False, model_options={})[0]


def formats(lab):
    """Those of the ComfyUI under test that its CPU kernels know; none before it could quantise."""
    quant_ops = importlib.util.find_spec("comfy.quant_ops") and importlib.import_module("comfy.quant_ops")
    known = getattr(quant_ops, "QUANT_ALGOS", {}) if hasattr(getattr(quant_ops, "QuantizedTensor", None), "state_dict") else {}
    return [name for name in ("float8_e4m3fn", "int8_tensorwise", "mxfp8") if name in known]


@pytest.mark.parametrize("memory", ["auto", "checkpoint"])
def test_quantised_models(lab, memory):
    """They differ from the model that was not as plain sampling does: by a few per cent. memory auto has to count their bytes."""
    for format_ in formats(lab):
        model = quantised(lab, format_)
        expected, _ = run(lab, lab.dmap(), memory=memory)
        latents, _ = run(lab, lab.dmap(), model=model, memory=memory)
        assert relative(latents, expected) < 0.05, format_


def test_quantised_models_under_dynamic_vram(lab):
    import dynamic

    for format_ in formats(lab):
        expected, _ = run(lab, lab.dps(), model=quantised(lab, format_))
        with dynamic.dynamic_vram():
            latents, _ = run(lab, lab.dps(), model=quantised(lab, format_))
        torch.testing.assert_close(latents, expected, rtol=0, atol=0)


def test_a_format_without_gradient_is_refused_by_name(lab):
    """Such a layer would stop the gradient of its path alone, and the rest would look like one."""
    gradients = importlib.import_module("dmap_pack.nodes.host.gradients")

    class Opaque(torch.Tensor):
        _layout_cls = "OneWayLayout"

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @classmethod
        def __tensor_unflatten__(cls, inner, meta, size, stride):
            return cls(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return cls(args[0].inner)

        def dequantize(self):
            return self.inner

    class OneWay(torch.nn.Module):
        def __init__(self, stops):
            super().__init__()
            self.weight, self.stops = torch.nn.Parameter(Opaque(torch.eye(4)), requires_grad=False), stops

        def forward(self, x):
            return (x.detach() if self.stops else x) * 1.0 @ self.weight.inner.T + 0.5 * x * self.stops

    with torch.inference_mode(False):
        gradients.check_quantised([OneWay(False)])
        with pytest.raises(ValueError, match="OneWayLayout.*off by 50 %.*Load an fp16"):
            gradients.check_quantised([OneWay(True)])


# ---- what is checked before, and what is said after


@pytest.mark.parametrize("width", [768, 2048])
def test_the_prompt_of_another_model(lab, width):
    foreign = [[torch.zeros(1, 77, width), {}]]
    for name in ("positive", "negative"):
        changes = {"negative": foreign, "cfg": 2.0} if name == "negative" else {"positive": foreign}
        with pytest.raises(ValueError, match=f"DPSGuider: {name}: its width is {width}.* read 1024.*CLIP of the same checkpoint"):
            lab.guider(**changes)


def test_another_models_vae(lab, caplog):
    vae = lab.separate_vae()
    for weight in vae.first_stage_model.taesd_decoder.parameters():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / weight[0].numel() ** 0.5)
    with caplog.at_level("WARNING"):
        guider = lab.call("DMAP_DPSGuider", **lab.problem(vae=vae))
        latents = lab.sample(guider, lab.dps(), steps=1)
    assert [r for r in caplog.records if "DPSGuider: vae: the VAE gives the measurement back with" in r.getMessage()]
    text, _ = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    assert "belongs to the model?" in text
    guider = lab.call("DMAP_DPSGuider", **lab.problem())
    lab.sample(guider, lab.dps(), steps=1)
    assert guider.warnings == []


@pytest.mark.parametrize("node", ["DPSGuider", "Empty Measurement Latent"])
def test_a_result_that_is_too_large(lab, node):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    y = torch.zeros(1, 768, 768, 3)
    problem = lab.problem(operator=operator, measurement=y)
    if node == "DPSGuider":
        make = lambda **limit: lab.call("DMAP_DPSGuider", **problem, **limit)  # noqa: E731
    else:
        given = {name: problem[name] for name in ("measurement", "operator", "vae")}
        make = lambda **limit: lab.call("DMAP_EmptyMeasurementLatent", **given, batch_size=1, **limit)  # noqa: E731
    with pytest.raises(ValueError) as error:
        make()
    words = (f"{node}: ", "768x768", "6144x6144", "37.7 megapixels", "380 times", "at most 250x250", "max_megapixels (now 4)")
    assert [word for word in words if word not in str(error.value)] == []
    assert "or a scale of 2." in str(error.value)
    make(max_megapixels=40.0)
    problem["measurement"] = given = torch.zeros(1, 220, 300, 3)
    if node == "DPSGuider":
        with pytest.raises(ValueError, match="a scale of 7"):
            make()


def test_a_wrong_result_is_no_success(lab):
    """A step size far too large gives an unrelated picture without any error; the report says so in grey levels."""
    for sampler in (lab.dps(zeta=300.0), lab.dmap(zeta=900.0)):
        latents, guider = run(lab, sampler, steps=4)
        report = guider.report
        assert report.mismatch[0] > 16 and report.mismatch_worst[0] > report.mismatch[0]
        assert any("misses the measurement" in warning for warning in report.warnings)
        text, values = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
        assert f"mismatch {report.mismatch[0]:.1f} of 255 grey levels (RMS), {report.mismatch_worst[0]:.1f} at worst" in text
        assert "Warning: the result misses" in text and '"mismatch"' in values


def test_the_mismatch_is_that_of_the_picture(lab):
    """Computed here from the picture that VAEDecode makes."""
    blur = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=9)
    y = lab.call("DMAP_Degrade", image=lab.picture(), operator=blur, noise_sigma=0.0, seed=0)
    latents, guider = run(lab, lab.dps(zeta=3.0), steps=6, operator=blur, measurement=y)
    image = lab.shared()[1].decode(latents).clamp(0, 1)
    difference = 255 * (lab.call("DMAP_Degrade", image=image, operator=blur, noise_sigma=0.0, seed=0) - y)
    assert guider.report.mismatch == pytest.approx([float(difference.square().mean().sqrt())], abs=0.05)
    assert guider.report.mismatch_worst == pytest.approx([float(difference.abs().max())], abs=0.2)


def test_holes_do_not_count_as_a_mismatch(lab):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    hole = lab.call("DMAP_OperatorInpainting", mask=mask)
    found = []
    for colour in (0.0, 1.0):
        y = lab.picture()
        y[:, 8:24, 8:24] = colour
        latents, guider = run(lab, lab.dps(), operator=hole, measurement=y)
        found.append((latents, guider.report.mismatch, guider.report.mismatch_worst))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_a_rising_residual_is_a_warning(lab):
    Report = importlib.import_module("dmap_pack.nodes.host.report").Report
    report = Report("DPS", "f", residuals=[[5.0, 5.0], [4.0, 7.0]])
    assert [w for w in report.misfits() if "rose from 5 to 7" in w]
    assert Report("DPS", "f", residuals=[[5.0], [4.0]], mismatch=[15.9]).misfits() == []
    assert Report("DPS", "f", residuals=[[5.0], [4.0]], mismatch=[20.0]).misfits(noise=5.0) == []


def test_a_report_outlives_its_guider(lab):
    """ComfyUI may drop a guider from its cache and keep the latents; the guider is then made anew and has no run."""
    latents, guider = run(lab, lab.dps(), steps=2)
    told = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    assert lab.call("DMAP_SamplingReport", guider=lab.guider(), latent={"samples": latents}) == told
    other, _ = lab.sample(guider, lab.dmap(), steps=2), guider
    assert lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents}) == told
    assert lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": other}) != told
