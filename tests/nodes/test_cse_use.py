"""CSEControlNetLoader and ApplyCSE: files of every format, hints, and what a CSE does in a run.

The CSEs here are not trained: a copy of the demo prior's encoder with random numbers where an untrained ControlNet has zeros.
"""

import copy
import math
import re

import pytest
import torch
from torch.nn import functional as F

SIGMA = 2.0
CLOSE = 1e-3  # of the standard deviation: rounding of float32 in batches of another size


@pytest.fixture(scope="module")
def folders(cses, tmp_path_factory):
    with cses.Folders(tmp_path_factory.mktemp("models")) as folders:
        yield folders


@pytest.fixture(scope="module")
def weights(lab, cses):
    with torch.inference_mode():
        return cses.weights(lab.shared()[0])


DESCRIBED = {"base": "demo", "operator": {"operator": "SuperResolution", "scale": 8}, "steps": 7}


@pytest.fixture(scope="module")
def cse(cses, folders, weights):
    """A CONTROL_NET with the description of one for super-resolution x8."""
    with torch.inference_mode():
        cses.save(weights, folders.controlnet / "sr8.safetensors", **DESCRIBED)
        return cses.load("sr8.safetensors")[0]


@pytest.fixture(scope="module")
def other(lab, cses, folders):
    """One with other weights, that says nothing about itself."""
    with torch.inference_mode():
        cses.save(cses.weights(lab.shared()[0], seed=1), folders.controlnet / "other.safetensors")
        return cses.load("other.safetensors")[0]


@pytest.fixture
def sr8(lab):
    return lab.call("DMAP_OperatorSuperResolution", scale=8)


@pytest.fixture
def measurement(lab, sr8):
    return lab.call("DMAP_Degrade", image=lab.picture(), operator=sr8, noise_sigma=0.0, seed=0)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differs(a, b, share=0.02):
    return float((a - b).norm()) > share * float(b.norm())


def denoised(lab, positive, z=None, sigma=SIGMA, **more):
    """What ComfyUI's own guider says to z."""
    return lab.probe(lab.stock_guider(positive=positive, **more), SIGMA * noise(1, 4, 4, 4) if z is None else z, sigma)


# ---- files


def options(lab):
    return lab.NODES["DMAP_CSEControlNetLoader"].define_schema().inputs[0].options


def test_what_is_listed(lab, cses, tmp_path):
    with cses.Folders(tmp_path) as there:
        assert options(lab) == []
        names = ["a.safetensors", "b.pth", "deep/c.ckpt"]
        nested = ["one/diffusion_pytorch_model.safetensors", "two/controlnet/diffusion_pytorch_model.safetensors"]
        others = ["no.txt", "no.training", "no.safetensors.part", "no.pkl", "no.json"]
        for name in [*names, *others]:
            (there.controlnet / name).parent.mkdir(exist_ok=True)
            (there.controlnet / name).touch()
        for name in [*nested, "three/unet/diffusion_pytorch_model.safetensors", "four/model.safetensors"]:
            (there.diffusers / name).parent.mkdir(parents=True)
            (there.diffusers / name).touch()
        assert options(lab) == [*names, "diffusers/one", "diffusers/two/controlnet"]
    assert options(lab) != [*names, "diffusers/one", "diffusers/two/controlnet"]


def test_the_packs_own_folder_is_searched(lab):
    import folder_paths

    assert str(lab.ROOT / "models" / "controlnet") in folder_paths.get_folder_paths("controlnet")


@pytest.mark.parametrize("kind", ["original", "prefixed", "diffusers", "diffusers folder", "pickle", "described diffusers"])
def test_every_format_is_the_same_network(cses, folders, weights, cse, kind):
    """The demo prior has one level of one block, which ComfyUI's own reader of diffusers' names does not know."""
    named, path, name = weights, folders.controlnet / "format.safetensors", "format.safetensors"
    if kind == "prefixed":
        named = {f"control_model.{key}": tensor for key, tensor in weights.items()}
    elif "diffusers" in kind:
        named = cses.keys.to_diffusers(weights)
        assert "controlnet_cond_embedding.conv_in.weight" in named and not set(named) & set(weights)
    if kind == "diffusers folder":
        path, name = folders.diffusers / "mine" / "controlnet" / "diffusion_pytorch_model.safetensors", "diffusers/mine/controlnet"
    if kind == "pickle":
        path, name = folders.controlnet / "format.pth", "format.pth"
        torch.save(named, path)
    else:
        cses.save(named, path, **(DESCRIBED if "described" in kind else {}))
    control, _, summary = cses.load(name)
    path.unlink()
    expected = cses.outputs(cse)
    assert len(expected) > 2 and all(float(tensor.abs().max()) > 0 for tensor in expected)
    assert all(torch.equal(a, b) for a, b in zip(cses.outputs(control), expected, strict=True))
    assert name in summary and ("Super-Resolution" in summary) == ("described" in kind)


def test_the_stock_loader_reads_our_file(lab, cses, cse):
    control = lab.call("ControlNetLoader", control_net_name="sr8.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(cses.outputs(control), cses.outputs(cse), strict=True))


def test_what_the_file_says(lab, cses, folders, weights):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 4:30] = 1
    operators = {
        "DMAP_OperatorSuperResolution": {"scale": 4},
        "DMAP_OperatorInpainting": {"mask": mask},
        "DMAP_OperatorGaussianBlur": {"sigma": 1.3, "kernel_size": 9},
        "DMAP_OperatorMotionBlur": {"length": 5.0, "angle": 30.0},
        "DMAP_OperatorKernelBlur": {"kernel": torch.rand(1, 5, 5, 3, generator=torch.Generator().manual_seed(0))},
        "DMAP_OperatorJpeg": {"quality": 10, "subsampling": "4:2:0", "rounding": "cubic"},
    }
    made = [lab.call(node, **inputs) for node, inputs in operators.items()]
    made.append(lab.call("DMAP_OperatorCompose", first=made[2], second=lab.call("DMAP_OperatorGrayscale")))
    made.append(lab.call("DMAP_OperatorNoise", operator=made[0], sigma=0.05))
    picture = lab.picture()
    for operator in made:
        cses.save(weights, folders.controlnet / "one.safetensors", **{**DESCRIBED, "operator": operator.spec(), "licence": "CC0"})
        control, found, summary = cses.load("one.safetensors")
        assert found.spec() == operator.spec()
        y = [f(lab.as_core(picture)) for f in (found, operator)]
        assert torch.equal(*y)
        for words in ("one.safetensors", operator.title, "demo", "7 steps", "CC0"):
            assert words in summary
        assert cses.controlnet.check_controls([[None, {"control": control}]], lab.shared()[0], operator, "positive") == []


def test_a_file_that_says_nothing(lab, cses, other):
    """Its operator output stops the nodes behind it, and no others."""
    from comfy_execution.graph_utils import ExecutionBlocker

    control, operator, summary = cses.load("other.safetensors")
    assert isinstance(operator, ExecutionBlocker) and "other.safetensors" in operator.message and "Operator node" in operator.message
    assert "other.safetensors" in summary and "not known" in summary
    assert all(torch.equal(a, b) for a, b in zip(cses.outputs(control), cses.outputs(other), strict=True))


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"operator": "Sharpen"}, "Sharpen"),
        ({"operator": "SuperResolution", "scale": -3}, "scale"),
        ({"operator": "Segmentation", "weights": "../secret.pth", "sha256": ""}, "Segmentation|secret"),
    ],
)
def test_an_operator_that_cannot_be_made(cses, folders, weights, spec, word):
    """Nothing but its output is lost."""
    from comfy_execution.graph_utils import ExecutionBlocker

    cses.save(weights, folders.controlnet / "strange.safetensors", **{**DESCRIBED, "operator": spec})
    control, operator, summary = cses.load("strange.safetensors")
    assert isinstance(operator, ExecutionBlocker) and "strange.safetensors" in operator.message
    assert re.search(word, operator.message)
    assert cses.outputs(control) and "strange.safetensors" in summary


def test_a_file_that_was_trained_further_is_loaded_again(lab, cses, folders, weights):
    import os

    node = lab.NODES["DMAP_CSEControlNetLoader"]
    path = cses.save(weights, folders.controlnet / "further.safetensors", **DESCRIBED)
    first = node.fingerprint_inputs("further.safetensors")
    assert node.fingerprint_inputs("further.safetensors") == first
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert node.fingerprint_inputs("further.safetensors") != first


def damaged(path, weights, cses, text):
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path, {cses.metadata.KEY: text})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ("is not there", "controlnet", "TrainCSE")),
        ("garbage", ("bad.safetensors", "safetensors file")),
        ("no ControlNet", ("bad.safetensors", "no ControlNet")),
        ("a UNet", ("bad.safetensors", "no ControlNet")),
        ("not JSON", ("bad.safetensors", "description", "not JSON")),
        ("wrong kind", ("bad.safetensors", "description", "steps")),
    ],
)
def test_a_file_that_cannot_be_used(lab, cses, folders, weights, kind, words):
    path = folders.controlnet / "bad.safetensors"
    if kind == "garbage":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0nonsense" * 9)
    elif kind == "no ControlNet":
        cses.save({"a.weight": torch.zeros(2)}, path)
    elif kind == "a UNet":
        cses.save({name: tensor for name, tensor in weights.items() if not name.startswith("input_hint_block.")}, path)
    elif kind != "missing":
        damaged(path, weights, cses, {"not JSON": "{", "wrong kind": '{"steps": "many"}'}[kind])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        cses.load("bad.safetensors")
    path.unlink(missing_ok=True)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def without(*starts):
    return lambda weights: {name: tensor for name, tensor in weights.items() if not name.startswith(starts)}


def changed(name, change):
    return lambda weights: {**weights, name: change(weights[name])}


LAST = "zero_convs.0.0.weight"
INCOMPLETE = {
    "no time embedding": (
        without("time_embed."),
        r"it lacks 4 tensors of a ControlNet: time_embed\.0\.weight; time_embed\.0\.bias; .*1 more",
    ),
    "hint layers but the first": (
        lambda weights: {n: t for n, t in weights.items() if not n.startswith("input_hint_block.") or n.startswith("input_hint_block.0.")},
        r"it lacks 14 tensors of a ControlNet: input_hint_block\.2\.weight",
    ),
    "no first layer": (without("input_hint_block.0.weight"), "there is no input_hint_block.0.weight"),
    "no first block": (without("input_blocks.0."), r"lacks 2 tensors .*: input_blocks\.0\.0\.weight; input_blocks\.0\.0\.bias"),
    "no blocks": (without("input_blocks."), "lacks [0-9]+ tensors"),
    "no zero convolutions": (without("zero_convs."), r"lacks [0-9]+ tensors .*: zero_convs\.0\.0\.weight"),
    "one tensor": (without("middle_block_out.0.bias"), r"lacks 1 tensors .*: middle_block_out\.0\.bias\. Is the file complete"),
    "one of the attention": (
        without("input_blocks.1.1.norm.bias"),
        r"lacks 1 of the [0-9]+ tensors of its ControlNet: input_blocks\.1\.1\.norm\.bias",
    ),
    "another shape": (changed(LAST, lambda t: t[:-1]), r"zero_convs\.0\.0\.weight"),
    "another kernel": (changed("input_hint_block.4.weight", lambda t: t[..., :1, :1]), r"input_hint_block\.4\.weight"),
    "flat": (changed("input_blocks.0.0.weight", torch.flatten), r"input_blocks\.0\.0\.weight has 1 dimensions instead of 4"),
    "no size": (changed("time_embed.0.weight", lambda t: t[:0]), r"time_embed\.0\.weight is empty"),
    "whole numbers": (changed(LAST, lambda t: t.to(torch.int32)), r"zero_convs\.0\.0\.weight holds int32"),
    "all flat": (lambda weights: {n: t.flatten() for n, t in weights.items()}, r"dimensions instead of 2; .* more"),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_a_file_that_lacks_something(cses, folders, weights, kind):
    """ComfyUI itself would leave what is missing uninitialised, and tell the log alone."""
    change, words = INCOMPLETE[kind]
    cses.save(change(weights), folders.controlnet / "bad.safetensors")
    with pytest.raises(ValueError, match=rf"bad\.safetensors.*{words}"):
        cses.load("bad.safetensors")


def test_marks_of_other_architectures_in_a_file(cses, folders, weights, cse):
    """They would send ComfyUI to readers of other files."""
    marks = {"lora_controlnet": torch.zeros(1), "after_proj_list.18.bias": torch.zeros(1), "controlnet_blocks.0.weight": torch.zeros(1)}
    cses.save({**weights, **marks}, folders.controlnet / "marked.safetensors", **DESCRIBED)
    loaded = cses.load("marked.safetensors")[0]
    assert all(torch.equal(a, b) for a, b in zip(cses.outputs(loaded), cses.outputs(cse), strict=True))


@pytest.mark.parametrize("name", ["../outside.safetensors", "deep/../../outside.safetensors", "{}/outside.safetensors"])
def test_a_name_that_leads_out_of_the_folder(cses, folders, weights, name):
    cses.save(weights, folders.root / "outside.safetensors")
    name = name.format(folders.root)
    with pytest.raises(FileNotFoundError) as error:
        cses.load(name)
    assert repr(name) in str(error.value)


# ---- the hint


def test_a_hint_in_the_range_of_the_file(lab, cses, folders, weights, sr8, measurement):
    """y is in -1..1 there, and its bicubic enlargement the hint."""
    expected = F.interpolate(lab.as_core(measurement), scale_factor=8, mode="bicubic", align_corners=False)
    picture = ((expected + 1) / 2).movedim(1, -1)
    seen = {}
    for hint_range in ("0..1", "-1..1", None):
        described = {} if hint_range is None else {**DESCRIBED, "hint_range": hint_range}
        cses.save(weights, folders.controlnet / "ranged.safetensors", **described)
        control, _, _ = cses.load("ranged.safetensors")
        positive = cses.apply(control, measurement, sr8)
        stock, _ = lab.call(
            "ControlNetApplyAdvanced",
            positive=lab.problem()["positive"],
            negative=lab.problem()["positive"],
            control_net=control,
            image=picture,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        answers = []
        for condition in (positive, stock):
            with cses.spying(control) as calls:
                answers.append(denoised(lab, condition))
            (call,) = calls
            torch.testing.assert_close(call["hint"], expected if hint_range == "-1..1" else (expected + 1) / 2, rtol=0, atol=1e-5)
            seen[hint_range] = call["hint"]
        assert torch.equal(*answers)
    assert torch.equal(seen["0..1"], seen[None]) and differs(seen["0..1"], seen["-1..1"])


@pytest.mark.parametrize("of_file", ["0..1", "-1..1"])
@pytest.mark.parametrize("asked", ["0..1", "-1..1"])
def test_the_range_that_is_asked_for_wins(lab, cses, folders, weights, sr8, measurement, of_file, asked):
    cses.save(weights, folders.controlnet / "ranged.safetensors", **{**DESCRIBED, "hint_range": of_file})
    control, _, _ = cses.load("ranged.safetensors")
    y = sr8.hint(lab.as_core(measurement))
    positive = cses.apply(control, measurement, sr8, hint_range=asked)
    with cses.spying(control) as calls:
        denoised(lab, positive)
        denoised(lab, cses.apply(control, measurement, sr8))  # asking changes nothing in what was loaded
    wanted = {"0..1": (y + 1) / 2, "-1..1": y}
    torch.testing.assert_close(calls[0]["hint"], wanted[asked], rtol=0, atol=1e-5)
    torch.testing.assert_close(calls[1]["hint"], wanted[of_file], rtol=0, atol=1e-5)


def test_the_hint_of_a_hole(lab, cses, cse):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:16, 8:24] = 1
    operator = lab.call("DMAP_OperatorInpainting", mask=mask)
    measurement = lab.call("DMAP_Degrade", image=lab.picture(), operator=operator, noise_sigma=0.0, seed=0)
    with cses.spying(cse) as calls:
        denoised(lab, cses.apply(cse, measurement, operator))
    hint = calls[0]["hint"]
    inside = mask.bool().expand(3, -1, -1)[None]
    assert torch.equal(hint[inside], torch.full_like(hint[inside], 0.5))
    torch.testing.assert_close(hint[~inside], lab.picture().movedim(-1, 1)[~inside], rtol=0, atol=1e-6)


def test_the_hint_of_a_grey_picture_of_any_size(lab, cses, cse):
    """Its size is no multiple of the latents': its edges are repeated, and nothing of it is moved or scaled."""
    height, width = 28, 36
    operator = lab.call("DMAP_OperatorGrayscale")
    picture = lab.picture(height=height, width=width)
    measurement = lab.call("DMAP_Degrade", image=picture, operator=operator, noise_sigma=0.0, seed=0)
    with cses.spying(cse) as calls:
        denoised(lab, cses.apply(cse, measurement, operator), SIGMA * noise(1, 4, 4, 5), operator=operator, measurement=measurement)
    hint = calls[0]["hint"]
    luma = (picture * torch.tensor([0.299, 0.587, 0.114])).sum(-1)[0]
    assert hint.shape == (1, 3, 32, 40)
    for channel in hint[0]:
        torch.testing.assert_close(channel[:height, :width], luma, rtol=0, atol=1e-5)
        assert torch.equal(channel[height:, :width], channel[height - 1, :width].expand(4, -1))
        assert torch.equal(channel[:, width:], channel[:, width - 1 : width].expand(-1, 4))


# ---- runs


@pytest.mark.parametrize("solver", ["alone", "ddpm", "dps", "dmap", "dsg"])
def test_it_changes_the_picture(lab, cses, cse, sr8, measurement, solver):
    positive = cses.apply(cse, measurement, sr8)
    sampler = {
        "alone": lambda: lab.stock("euler"),
        "ddpm": lambda: lab.stock("ddpm"),
        "dps": lab.dps,
        "dmap": lab.dmap,
        "dsg": lambda: lab.call("DMAP_DSGSampler", zeta=0.1),
    }[solver]()
    make = lab.stock_guider if solver == "alone" else lab.guider
    with cses.spying(cse) as calls:
        first, again = (lab.sample(make(positive=positive), sampler, steps=2) for _ in range(2))
    assert len(calls) >= 4 and len({float(call["timesteps"]) for call in calls}) >= 2
    plain = lab.sample(make(), sampler, steps=2)
    assert first.isfinite().all() and torch.equal(first, again)
    assert differs(first, plain)


def test_the_stock_ksampler(lab, cses, cse, sr8, measurement):
    model = lab.shared()[0]
    inputs = {
        "seed": 1,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "latent_image": lab.empty(),
    }
    plain = lab.call("DMAP_DMAPUnconditional", model=model)
    runs = [
        lab.call("KSampler", model=model, positive=p, negative=plain, **inputs)["samples"]
        for p in (plain, cses.apply(cse, measurement, sr8))
    ]
    assert differs(runs[1], runs[0]) and runs[1].isfinite().all()


@pytest.mark.parametrize("node", ["ours", "stock"])
def test_strength_0_is_no_cse(lab, cses, cse, sr8, measurement, node):
    def applied(strength):
        if node == "ours":
            return cses.apply(cse, measurement, sr8, strength=strength)
        plain = lab.problem()["positive"]
        image = lab.picture()
        inputs = {"control_net": cse, "image": image, "strength": strength, "start_percent": 0.0, "end_percent": 1.0}
        return lab.call("ControlNetApplyAdvanced", positive=plain, negative=plain, **inputs)[0]

    for make, sampler in ((lab.stock_guider, lab.stock("euler")), (lab.guider, lab.dps())):
        none, full, plain = (
            lab.sample(make(**given), sampler, steps=2) for given in ({"positive": applied(0.0)}, {"positive": applied(1.0)}, {})
        )
        assert torch.equal(none, plain) and differs(full, plain)


def test_a_higher_strength_does_more(lab, cses, cse, sr8, measurement):
    plain = denoised(lab, lab.problem()["positive"])
    half, full = (denoised(lab, cses.apply(cse, measurement, sr8, strength=strength)) for strength in (0.25, 1.0))
    assert 0 < float((half - plain).norm()) < float((full - plain).norm())


def test_outside_its_window_it_does_not_act(lab, cses, cse, sr8, measurement):
    """A run from sigma 14 to 0.5 and 0: percents are those of the training timesteps, of which 1 is the last."""
    schedule = torch.tensor([14.0, 4.0, 0.5, 0.0])
    sampling = lab.shared()[0].get_model_object("model_sampling")

    def run(**window):
        with cses.spying(cse) as calls:
            latents = lab.sample(lab.guider(positive=cses.apply(cse, measurement, sr8, **window)), lab.dps(), schedule=schedule)
        return latents, [float(call["timesteps"]) for call in calls]

    plain = lab.sample(lab.guider(), lab.dps(), schedule=schedule)
    levels = [float(sampling.timestep(sigma)) for sigma in schedule[:-1]]
    never, calls = run(start_percent=0.99)
    assert calls == []
    torch.testing.assert_close(never, plain, rtol=0, atol=1e-5 * float(plain.std()))
    late, calls = run(start_percent=0.5)
    assert differs(late, plain, 1e-3) and calls == pytest.approx([t for t in levels if t < 500]) and len(calls) in (1, 2)
    early, calls = run(end_percent=0.5)
    assert differs(early, plain, 1e-3) and calls == pytest.approx([t for t in levels if t > 500]) and len(calls) in (1, 2)
    assert differs(early, late, 1e-3)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.8, 0.2)])
def test_a_window_of_nothing(cses, cse, sr8, measurement, start, end):
    with pytest.raises(ValueError, match=rf"start_percent is {start} and end_percent {end}"):
        cses.apply(cse, measurement, sr8, start_percent=start, end_percent=end)


def test_a_measurement_that_is_none(lab, cses, cse, sr8):
    with pytest.raises(ValueError, match="ApplyCSE: measurement: .*alpha channel"):
        cses.apply(cse, torch.ones(1, 4, 4, 4), sr8)


def test_a_batch_is_two_single_ones(lab, cses, cse, sr8):
    pictures = torch.cat([lab.picture(0), lab.picture(1)])
    both = lab.call("DMAP_Degrade", image=pictures, operator=sr8, noise_sigma=0.0, seed=0)
    z = SIGMA * noise(2, 4, 4, 4)
    for make in (lab.stock_guider, lab.guider):
        together = lab.probe(make(positive=cses.apply(cse, both, sr8), measurement=both), z, SIGMA)
        for i in range(2):
            y = both[i : i + 1]
            alone = lab.probe(make(positive=cses.apply(cse, y, sr8), measurement=y), z[i : i + 1], SIGMA)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=CLOSE * float(alone.std()))
        swapped = lab.probe(make(positive=cses.apply(cse, both.flip(0), sr8), measurement=both), z, SIGMA)
        assert differs(swapped, together, 1e-3), "every latent should have its own hint"


def test_one_hint_serves_a_batch_of_latents(lab, cses, cse, sr8, measurement):
    z = SIGMA * noise(2, 4, 4, 4)
    positive = cses.apply(cse, measurement, sr8)
    together = lab.probe(lab.guider(positive=positive), z, SIGMA)
    for i in range(2):
        alone = lab.probe(lab.guider(positive=positive), z[i : i + 1], SIGMA)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=CLOSE * float(alone.std()))


def test_two_in_a_chain(lab, cses, cse, other, sr8, measurement):
    """The same as two of ComfyUI's nodes; the order does not matter."""
    first = cses.apply(cse, measurement, sr8, strength=0.7)
    chain = cses.apply(other, measurement, sr8, positive=first, strength=0.4)
    reverse = cses.apply(cse, measurement, sr8, positive=cses.apply(other, measurement, sr8, strength=0.4), strength=0.7)
    picture = ((sr8.hint(lab.as_core(measurement)) + 1) / 2).movedim(1, -1)
    stock = lab.problem()["positive"]
    for control, strength in ((cse, 0.7), (other, 0.4)):
        inputs = {"control_net": control, "image": picture, "strength": strength, "start_percent": 0.0, "end_percent": 1.0}
        stock, _ = lab.call("ControlNetApplyAdvanced", positive=stock, negative=stock, **inputs)
    answers = [denoised(lab, condition) for condition in (chain, reverse, stock, first, lab.problem()["positive"])]
    assert torch.equal(answers[0], answers[2])
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=CLOSE * float(answers[0].std()))
    assert differs(answers[0], answers[3]) and differs(answers[3], answers[4])
    assert first[0][1]["control"].previous_controlnet is None


def test_a_negative_prompt(lab, cses, cse, sr8, measurement):
    """With cfg 2 the CSE acts on both prompts, also if it was applied to the positive one alone."""
    bare = [[3 * noise(1, 3, 1024, seed=4), {}]]
    positive, negative = cses.apply(cse, measurement, sr8), cses.apply(cse, measurement, sr8, positive=bare)
    conditional, unconditional = denoised(lab, positive), denoised(lab, negative)
    assert differs(conditional, unconditional), "this negative changes nothing"
    expected = unconditional + 2 * (conditional - unconditional)
    for given in (negative, bare):
        with cses.spying(cse) as calls:
            answer = denoised(lab, positive, negative=given, cfg=2.0)
        assert sum(len(call["x"]) for call in calls) == 2
        torch.testing.assert_close(answer, expected, rtol=0, atol=CLOSE * float(expected.std()))
    guided = lab.sample(lab.guider(positive=positive, negative=negative, cfg=2.0), lab.dmap(), steps=2)
    assert guided.isfinite().all() and differs(guided, lab.sample(lab.guider(positive=positive), lab.dmap(), steps=2))


# ---- gradients


def gradient(lab, positive, z, **more):
    return denoised(lab, positive, z) - lab.probe(lab.guider(zeta=1.0, positive=positive, **more), z, SIGMA)


def detached(put_out):
    return {name: [tensor.detach() for tensor in tensors] for name, tensors in put_out.items()}


def test_the_gradient_flows_through_it(lab, cses, cse, sr8, measurement):
    z = SIGMA * noise(1, 4, 4, 4)
    positive = cses.apply(cse, measurement, sr8)
    full = gradient(lab, positive, z)
    with cses.spying(cse, detached):
        cut = gradient(lab, positive, z)
    assert float(full.norm()) > 1e-3 and differs(full, cut, 0.05)


def test_the_gradient_is_the_slope_in_double_precision(lab, cses, cse, sr8, measurement):
    """||f(D(z0(z))) - y|| written out on copies of the networks in float64, and its central differences."""
    from comfy.ldm.modules.attention import attention_pytorch

    model, vae = lab.shared()
    positive = cses.apply(cse, measurement, sr8)
    z = SIGMA * noise(1, 4, 4, 4)
    grad = gradient(lab, positive, z).double()
    unet, control, autoencoder = (cses.in_double(n) for n in (model.model.diffusion_model, cse.control_model, vae.first_stage_model))
    timestep = model.get_model_object("model_sampling").timestep(torch.tensor([SIGMA])).double()
    context = positive[0][0].double()
    y = lab.as_core(measurement).double()
    hint = (sr8.hint(y) + 1) / 2
    options = {"optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)}

    def residual(z):
        x = z / math.sqrt(1 + SIGMA**2)
        put_out = control(x=x, hint=hint, timesteps=timestep, context=context, transformer_options=options)
        put_out = {"input": [], **{name: list(tensors) for name, tensors in put_out.items()}}
        eps = unet(x, timestep, context=context, control=put_out, transformer_options=options)
        image = autoencoder.decode(model.model.process_latent_out(z - SIGMA * eps))
        assert eps.dtype == image.dtype == torch.float64
        return float((sr8(image) - y).norm())

    step = 1e-4
    z = z.double()
    for direction in (grad, noise(*z.shape, seed=2).double(), noise(*z.shape, seed=3).double()):
        direction = direction / direction.norm()
        slope = (residual(z + step * direction) - residual(z - step * direction)) / (2 * step)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=0, abs=1e-3 * float(grad.norm()))


@pytest.mark.parametrize("solver", ["dps", "dmap"])
def test_memory_plans_agree(lab, cses, cse, sr8, measurement, solver):
    positive = cses.apply(cse, measurement, sr8)
    sampler = {"dps": lab.dps, "dmap": lab.dmap}[solver](zeta=5.0)
    latents = {}
    for plan in lab.core.gradient.STRATEGIES:
        guider = lab.guider(positive=positive, memory=plan)
        latents[plan] = lab.sample(guider, sampler, steps=2)
        assert guider.report.memory == plan
    for plan in ("lean", "checkpoint"):
        torch.testing.assert_close(latents[plan], latents["fast"], rtol=0, atol=1e-4 * float(latents["fast"].std()))


def test_no_weight_of_it_gets_a_gradient(lab, cses, cse, sr8, measurement):
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in cse.control_model.named_parameters()}
    lab.sample(lab.guider(positive=cses.apply(cse, measurement, sr8)), lab.dmap(), steps=2)
    for name, p in cse.control_model.named_parameters():
        assert p.grad is None and p.requires_grad == before[name][0] and torch.equal(p, before[name][1]), name


# ---- warnings and refusals


def test_another_operator_is_a_warning(lab, cses, cse, caplog):
    blur = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=9)
    measurement = lab.call("DMAP_Degrade", image=lab.picture(), operator=blur, noise_sigma=0.0, seed=0)
    positive = cses.apply(cse, measurement, blur)
    with caplog.at_level("WARNING"):
        guider = lab.guider(positive=positive, operator=blur, measurement=measurement)
    words = ("sr8.safetensors", "Super-Resolution (scale 8)", blur.describe())
    (record,) = [r for r in caplog.records if "sr8.safetensors" in r.getMessage()]
    assert record.levelname == "WARNING" and all(word in record.getMessage() for word in (*words, "DPSGuider"))
    latents = lab.sample(guider, lab.dps(), steps=1)
    text, _ = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    assert all(word in text for word in ("Warning", *words))


def test_the_right_operator_is_none(lab, cses, cse, other, sr8, measurement, caplog):
    positive = cses.apply(other, measurement, sr8, positive=cses.apply(cse, measurement, sr8))
    with caplog.at_level("WARNING"):
        guider = lab.guider(positive=positive)
    assert caplog.records == []
    latents = lab.sample(guider, lab.dps(), steps=1)
    assert "was trained for" not in lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})[0]


@pytest.fixture(scope="module")
def foreign(cses, folders):
    """ControlNets of Stable Diffusion 1.5's shape: (one that says what it is for, one that does not)."""
    import families

    with torch.inference_mode():
        weights = families.controlnet_weights(families.unet_weights(families.FAMILIES["SD1.5"]))
        cses.save(weights, folders.controlnet / "sd15.safetensors")
        cses.save(weights, folders.controlnet / "sd15-sr8.safetensors", **{**DESCRIBED, "base": "SD15"})
        return cses.load("sd15-sr8.safetensors")[0], cses.load("sd15.safetensors")[0]


def both_refuse(lab, cses, control, model, words, sr8, measurement):
    """At DPSGuider, for either prompt and anywhere in a chain, and at ApplyCSE where the model is connected."""
    positive = cses.apply(control, measurement, sr8)
    plain = lab.problem()["positive"]
    for node, act in (
        ("ApplyCSE", lambda: cses.apply(control, measurement, sr8, model=model)),
        ("DPSGuider", lambda: lab.guider(model=model, positive=positive)),
        ("DPSGuider", lambda: lab.guider(model=model, positive=plain, negative=positive, cfg=2.0)),
    ):
        with pytest.raises(ValueError) as error:
            act()
        assert [word for word in (node, *words) if word not in str(error.value)] == [], str(error.value)


def test_another_base_model(lab, cses, foreign, cse, sr8, measurement):
    described, unknown = foreign
    model = lab.shared()[0]
    both_refuse(lab, cses, described, model, ("sd15-sr8.safetensors", "another base model", "SD15"), sr8, measurement)
    both_refuse(lab, cses, unknown, model, ("sd15.safetensors", "another base model"), sr8, measurement)
    chained = cses.apply(cse, measurement, sr8, positive=cses.apply(unknown, measurement, sr8))
    with pytest.raises(ValueError, match="sd15.safetensors"):
        lab.guider(positive=chained)


def test_a_foreign_controlnet_of_the_stock_loader(lab, foreign, sr8, measurement):
    control = lab.call("ControlNetLoader", control_net_name="sd15.safetensors")
    inputs = {"control_net": control, "image": lab.picture(), "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    plain = lab.problem()["positive"]
    positive, _ = lab.call("ControlNetApplyAdvanced", positive=plain, negative=plain, **inputs)
    with pytest.raises(ValueError, match="DPSGuider: positive: the ControlNet was made for another base model"):
        lab.guider(positive=positive)


def test_another_prediction(lab, cses, folders, weights, cse, sr8, measurement):
    model = lab.shared()[0]
    v_model = lab.call("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
    both_refuse(lab, cses, cse, v_model, ("sr8.safetensors", "eps-prediction", "demo", "predicts v"), sr8, measurement)
    cses.save(weights, folders.controlnet / "v.safetensors", **{**DESCRIBED, "prediction": "v"})
    control, _, _ = cses.load("v.safetensors")
    both_refuse(lab, cses, control, model, ("v.safetensors", "v-prediction", "predicts eps"), sr8, measurement)
    lab.guider(model=v_model, positive=cses.apply(control, measurement, sr8, model=v_model))


def test_the_right_base_model(lab, cses, cse, other, sr8, measurement):
    """With a LoRA, too, and where the model is not connected to ApplyCSE."""
    for model in (lab.shared()[0], lab.with_lora(lab.shared()[0])):
        for control in (cse, other):
            lab.guider(model=model, positive=cses.apply(control, measurement, sr8, model=model))


def test_a_base_for_inpainting(lab, cses, cse, sr8, measurement):
    """Its UNet has more channels to read than the ControlNet, which ComfyUI gives the latents alone."""
    model = lab.shared()[0].clone()
    network = copy.deepcopy(model.model.diffusion_model)
    weight = network.input_blocks[0][0].weight
    network.input_blocks[0][0].weight = torch.nn.Parameter(torch.cat([weight, weight[:, :1].expand(-1, 5, -1, -1)], 1), requires_grad=False)
    model.model = copy.copy(model.model)
    model.model._modules = {**model.model._modules, "diffusion_model": network}
    cses.controlnet.check_base(cse, model, "positive")
