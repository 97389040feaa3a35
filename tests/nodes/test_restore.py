"""DMAP Restore: what it expands into, that this is what an expert would wire, and what it says to photos as people have them."""

import importlib

import numpy as np
import pytest
import torch

GREY = (0.299, 0.587, 0.114)


@pytest.fixture(scope="module")
def restore(lab):
    return importlib.import_module("dmap_pack.nodes.restore")


def settings(lab, image, **changes):
    model, vae = lab.shared()
    usual = {
        "damage": "too small",
        "enlarge": "auto",
        "softness": 0.0,
        "grain": 0.0,
        "jpeg_quality": 0,
        "colours": "keep",
        "quality": "look",
        "seed": 3,
        "versions": 1,
        "keep_known": True,
        "match": True,
    }
    return {"model": model, "vae": vae, "image": image, **usual, **changes}


def output(lab, image, **changes):
    """What the node returns: (results, expansion or None)."""
    found = lab.NODES["DMAP_Restore"].execute(**settings(lab, image, **changes))
    return found.result, found.expand


def run(lab, results, graph, done=None):
    """The results with the nodes of the expansion executed, as ComfyUI does it; those in `done` are not."""
    done = {} if done is None else done

    def value(of):
        if not (isinstance(of, list) and len(of) == 2 and isinstance(of[0], str)):
            return of
        if of[0] not in done:
            node = graph[of[0]]
            found = lab.call(node["class_type"], **{name: value(given) for name, given in node["inputs"].items()})
            done[of[0]] = found if isinstance(found, tuple) else (found,)
        return done[of[0]][of[1]]

    return [value(of) for of in results]


def kinds(graph):
    return [node["class_type"] for node in graph.values()]


def test_every_node_of_the_expansion_takes_what_it_is_given(lab):
    """Names and required inputs, for every way through it."""
    import nodes

    mask = torch.zeros(1, 32, 32)
    mask[:, 4:12, 4:12] = 1
    condition = lab.call("DMAP_DMAPUnconditional", model=lab.shared()[0])
    for changes in ({}, {"versions": 3}, {"mask": mask, "damage": "scratched"}, {"positive": condition, "negative": condition}):
        _, graph = output(lab, lab.picture(), **changes)
        for node in graph.values():
            ours = lab.NODES.get(node["class_type"])
            if ours:
                inputs = ours.GET_SCHEMA().inputs
                required, known = {i.id for i in inputs if not i.optional}, {i.id for i in inputs}
            elif node["class_type"] in nodes.NODE_CLASS_MAPPINGS:
                types = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
                required, known = set(types["required"]), set(types["required"]) | set(types.get("optional", {}))
            else:
                assert node["class_type"] in ("RandomNoise", "SamplerCustomAdvanced"), node
                continue
            # an executor calls nodes of its own kind with what is given and nothing else: what has a default in execute may be missing
            assert set(node["inputs"]) <= known, node["class_type"]
            assert required - set(node["inputs"]) == set(), node["class_type"]


def test_it_is_what_an_expert_wires(lab):
    """To the bit: the same nodes by hand, without anything that Restore chose itself."""
    operator = lab.call("DMAP_OperatorSuperResolution", scale=2)
    image = lab.call("DMAP_Degrade", image=lab.picture(height=64, width=64), operator=operator, noise_sigma=0.0, seed=0).clamp(0, 1)
    results, graph = output(lab, image, enlarge="2")
    restored, before_after, mismatch, uncertainty, mask, found, text = run(lab, results, graph)
    assert found == operator

    model, vae = lab.shared()
    problem = {"operator": operator, "measurement": image}
    sampler, sigmas, _ = lab.call("DMAP_DMAPPreset", model=model, operator=operator, solver="auto", quality="look")
    condition = lab.call("DMAP_DMAPUnconditional", model=model)
    guider = lab.call("DMAP_DPSGuider", model=model, positive=condition, vae=vae, tile="auto", **problem)
    latent, width, height = lab.call("DMAP_EmptyMeasurementLatent", vae=vae, batch_size=1, **problem)
    noise = lab.call("RandomNoise", noise_seed=3)
    samples, _ = lab.call("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
    picture = lab.call("DMAP_Decode", latent=samples, vae=vae, keep_given=True, **problem)
    matched, told = lab.call("DMAP_MatchMeasurement", image=picture, **problem)
    assert torch.equal(restored, matched)
    assert tuple(restored.shape) == (1, 64, 64, 3) == (1, height, width, 3)
    assert told in text and "explains your picture to within 1 level" in text and " on Super-Resolution (scale 2)" in text
    assert before_after.shape[2] > 2 * 64 and mismatch.ndim == uncertainty.ndim == 4
    assert not mask.any()


def test_a_photo_whose_damage_is_a_little_off_is_not_spoilt_by_matching(lab):
    """Shaken by 21 pixels, and said to be 18 in another direction: the model's picture is left, and the reason is said."""
    from PIL import Image

    file = lab.ROOT / "demo" / "held-out" / "dmap-demo-58.png"
    original = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float()[None] / 255
    true = lab.call("DMAP_OperatorMotionBlur", length=21.0, angle=30.0)
    photo = lab.call("DMAP_Degrade", image=original, operator=true, noise_sigma=0.0, seed=0)
    results, graph = output(lab, photo, damage="shaken", softness=18.0, shake_angle=35.0)
    restored, *_, operator, text = run(lab, results, graph)
    assert "Not matched: the picture misses the measurement by" in text
    matched, told = lab.call("DMAP_MatchMeasurement", image=restored, measurement=photo, operator=operator)
    assert "matching moves it by" in told
    errors = [float((image - original).square().mean().sqrt()) * 255 for image in (restored, matched)]
    assert errors[0] < 25 < errors[1]


def test_versions_have_seeds_that_follow(lab):
    image = lab.picture(height=16, width=16)
    results, graph = output(lab, image, enlarge="2", versions=2, seed=5)
    both = run(lab, results, graph)[0]
    single = [run(lab, *output(lab, image, enlarge="2", seed=seed))[0] for seed in (5, 6)]
    assert torch.equal(both, torch.cat(single)) and not torch.equal(single[0], single[1])


def test_known_pixels_come_back_to_the_bit(lab):
    image, mask = lab.picture(), torch.zeros(1, 32, 32)
    mask[:, 8:20, 8:24] = 1
    results, graph = output(lab, image, damage="scratched", mask=mask)
    restored, *_, used, operator, _ = run(lab, results, graph)
    known = mask[0] == 0
    assert torch.equal(restored[0][known], image[0][known]) and not torch.equal(restored, image)
    assert torch.equal(used, mask) and operator.name == "Inpainting"


def test_a_grey_photo_comes_back_grey(lab):
    image = (lab.picture() * torch.tensor(GREY)).sum(-1, keepdim=True).expand(-1, -1, -1, 3)
    results, graph = output(lab, image, damage="soft", softness=1.0)
    restored, *_, operator, _ = run(lab, results, graph)
    assert torch.equal(restored, restored[..., :1].expand_as(restored))
    assert operator.channels() == 3
    results, graph = output(lab, image, damage="soft", softness=1.0, colours="colourise")
    assert results[5].channels() == 1


def test_alpha_is_put_back(lab):
    alpha = torch.linspace(0, 1, 32).expand(1, 32, 32)[..., None]
    image = torch.cat([lab.picture(), alpha], dim=-1)
    results, graph = output(lab, image, damage="soft", softness=1.0)
    finish = next(node for node in graph.values() if node["class_type"] == "DMAP_FinishRestore")
    restored, both, text = lab.call(
        "DMAP_FinishRestore", **finish["inputs"] | {"image": lab.picture(1), "chosen": "", "report": "", "matched": ""}
    )
    assert restored.shape[-1] == 4 and torch.equal(restored[..., 3:], alpha)
    assert both.shape[-1] == 3


def test_nothing_to_repair_leaves_the_photo_alone(lab, monkeypatch):
    damage = importlib.import_module("dmap_pack.dmap_core.damage")
    estimates = importlib.import_module("dmap_pack.dmap_core.estimate")
    clean = estimates.Estimate(size=(128, 128), grey=False, enlarged=1.0, blur=0.0, grain=0.0, jpeg=None, notes=())
    monkeypatch.setattr(damage, "estimate", lambda photo, jpeg=None: clean)
    image = lab.picture(height=128, width=128)
    results, graph = output(lab, image, damage="auto")
    assert graph is None and torch.equal(results[0], image) and "nothing to repair" in results[-1]


def test_a_mask_of_another_size_and_an_inverted_one(lab, restore):
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:32, 8:40] = 1
    found, notes = restore.used_mask(mask, (32, 32))
    assert found.shape == (32, 32) and found[8:16, 4:20].all() and found.sum() == 8 * 16
    assert notes == ["the mask was 64x64 and is resized to 32x32"]
    _, notes = restore.used_mask(1 - mask, (64, 64))
    assert "is the mask inverted?" in notes[0]
    # what stock Load Image gives for a picture without alpha
    assert restore.used_mask(torch.zeros(64, 64), (500, 300)) == (None, [])
    with pytest.raises(ValueError, match="everything is painted"):
        restore.used_mask(torch.ones(1, 64, 64), (64, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(1, 1, 1, 3)}, "DMAP Restore: image: the result would be"),
        ({"image": torch.zeros(2, 32, 32, 3)}, "2 pictures were given"),
        ({"image": torch.zeros(1, 4000, 5000, 3)}, "megapixels"),
        ({"image": torch.full((1, 32, 32, 3), 200.0)}, "divide by 255"),
        ({"image": torch.full((1, 32, 32, 3), float("nan"))}, "NaN"),
        ({"damage": "scratched"}, "nothing is painted"),
        ({"damage": "custom"}, "no operator is connected"),
        ({"positive": [[torch.zeros(1, 77, 2048), {}]]}, "DMAP Restore: positive: its width is 2048"),
    ],
)
def test_what_cannot_be_restored_is_refused_at_once(lab, changes, message):
    with pytest.raises(ValueError, match=message):
        output(lab, **{"image": lab.picture(), **changes})


def test_another_models_vae_is_refused(lab):
    import comfy.sd

    vae = lab.shared()[1]
    other = object.__new__(comfy.sd.VAE)
    other.__dict__ |= vae.__dict__ | {"latent_channels": 16}
    with pytest.raises(ValueError, match="DMAP Restore: vae: it has 16 latent channels and the model 4"):
        output(lab, lab.picture(), vae=other)


def test_what_quiet_nodes_show_is_on_no_page(lab):
    """As the executor resolves it: an id that led to itself would be looked up for ever."""
    from comfy_execution.graph import DynamicPrompt

    _, graph = output(lab, lab.picture())
    prompt = DynamicPrompt({"7": {}})
    for name, node in graph.items():
        prompt.add_ephemeral_node(name, node, "7", node.get("override_display_id", "7"))
    shown = {
        node["class_type"]: prompt.get_display_node_id(name) for name, node in graph.items() if node.get("override_display_id") != name
    }
    quiet = {kind for kind, at in shown.items() if at != "7"}
    assert quiet == {"DMAP_SamplingReport", "DMAP_MismatchMap", "DMAP_UncertaintyMap"} and len(shown) == len(graph)
