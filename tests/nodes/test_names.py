"""Messages and texts speak of nodes by the names that users see."""

import ast
import re

import pytest
import torch

# Names that are no node of the pack: ComfyUI's, or words of the text itself.
HOSTS = {
    "MultiGPU CFG Split",
    "Split Image with Alpha",
    "Load Image",
    "VAE Decode",
    "SamplerCustomAdvanced",
    "RandomNoise",
    "Results",
    "Nothing was saved",
    "ImageFromBatch",
    "InvertMask",
}
WORDS = ["deblur", "upscale", "restore", "photo", "denoise", "scratch", "enlarge", "sharpen", "colorize", "inpaint"]
REACH = 30  # how far into a name the search of older interfaces looks


def shown(lab):
    """Display names without what is in brackets behind them."""
    return {cls.GET_SCHEMA().display_name.partition(" (")[0] for cls in lab.NODES.values()}


def classes(lab):
    """Names of node classes that are no display names: what users must not be told."""
    names = {cls.__name__ for cls in lab.NODES.values()} - shown(lab)
    return {name for name in names if sum(map(str.isupper, name)) > 1}  # "Decode" is a word of any text


def texts(path):
    """(line, text) of every string in a file that is not a docstring or a name in code; gaps of f-strings are {}."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def operators(lab):
    """Names of operator classes that are not what people are told."""
    return {name for name, kind in lab.core.operators.OPERATORS.items() if kind.title != name}


def speaking(lab, folder, unknown):
    """Lines of a folder's modules with a text that has one of the names in it, but for examples of specs."""
    return [
        f"{path.relative_to(lab.ROOT)}:{line}: {text}"
        for path in sorted((lab.ROOT / folder).rglob("*.py"))
        for line, text in texts(path)
        if " " in text and re.search(unknown, re.sub(r"operator\"?: \"?\w+", "", text))
    ]


def test_no_text_of_a_node_speaks_of_a_class(lab):
    assert speaking(lab, "nodes", rf"\b({'|'.join(sorted(classes(lab) | operators(lab)))})\b(?! *\()") == []


def test_no_text_below_the_nodes_speaks_of_one(lab):
    """An operator's class may stand before a colon: for a graph, messages.py puts its node there."""
    assert speaking(lab, "dmap_core", rf"\b({'|'.join(sorted(classes(lab)))})\b") == []
    assert speaking(lab, "dmap_core", rf"\b({'|'.join(sorted(operators(lab)))})\b(?!:)") == []


def made(lab):
    """An operator of every kind that needs no weights file, and one of random weights."""
    import importlib

    wizard = importlib.import_module("dmap_pack.dmap_core.operators.nonlinear_blur").random_kernel_wizard
    mask = torch.zeros(1, lab.SIZE, lab.SIZE)
    mask[:, 4:8, 4:8] = 1
    two = lab.call("DMAP_OperatorInpainting", mask=torch.cat([mask, mask.flip(1)]))
    scale = lab.call("DMAP_OperatorSuperResolution", scale=8)
    grey = lab.call("DMAP_OperatorGrayscale")
    return [
        scale,
        grey,
        two,
        lab.call("DMAP_OperatorGaussianBlur", sigma=3.0, kernel_size=61),
        lab.call("DMAP_OperatorMotionBlur", length=15.0, angle=45.0),
        lab.call("DMAP_OperatorKernelBlur", kernel=torch.ones(1, 9, 9, 3)),
        lab.call("DMAP_OperatorJpeg", quality=20, subsampling="4:2:0"),
        lab.core.operators.NonlinearBlur(wizard(seed=0), seed=0),
        lab.call("DMAP_OperatorNoise", operator=scale, sigma=0.1),
        lab.call("DMAP_OperatorNoise", operator=lab.call("DMAP_OperatorCompose", first=grey, second=scale), sigma=0.1),
    ]


def refusals(lab):
    """What nodes say of operators, pictures and settings that do not go together."""
    model, vae = lab.shared()
    positive = lab.call("DMAP_DMAPUnconditional", model=model)
    found = made(lab)
    calls = []
    for operator in found:
        calls += [("DMAP_OperatorNoise", {"operator": operator, "sigma": sigma}) for sigma in (0.1, -1.0)]
        calls += [("DMAP_OperatorCompose", {"first": operator, "second": found[1]})]
        calls += [("DMAP_DMAPPreset", {"operator": operator, "model": model, "solver": s, "quality": "paper"}) for s in ("PSLD", "no such")]
        for y in (
            torch.rand(1, 1, 1, 3),
            torch.rand(1, 33, 31, 3),
            torch.rand(3, 32, 32, 1),
            torch.rand(5, 16, 16),
            torch.rand(2, 8, 40, 3),
        ):
            seen = {"measurement": y, "operator": operator}
            calls += [
                ("DMAP_Degrade", {"image": y, "operator": operator, "noise_sigma": 0.1, "seed": 0}),
                ("DMAP_EmptyMeasurementLatent", {**seen, "vae": vae, "batch_size": 2}),
                ("DMAP_DPSGuider", {**seen, "vae": vae, "model": model, "positive": positive}),
                ("DMAP_Decode", {**seen, "latent": lab.empty(), "vae": vae, "keep_given": True}),
                ("DMAP_RestorationMetrics", {**seen, "restored": y, "reference": y, "perceptual": "none", "distribution": "none"}),
            ]
    wrong = {
        "SuperResolution": [{"scale": 1}],
        "GaussianBlur": [{"sigma": 0.0, "kernel_size": 61}, {"sigma": 3.0, "kernel_size": 4}],
        "MotionBlur": [{"length": 0.0, "angle": 0.0}, {"length": 9.0, "angle": 1e9}],
        "KernelBlur": [{"kernel": torch.ones(1, 4, 4, 3)}, {"kernel": torch.zeros(1, 3, 3, 3)}],
        "Inpainting": [{"mask": torch.zeros(1, 8, 8)}, {"mask": torch.ones(1, 8, 8)}],
        "Jpeg": [{"quality": 0, "subsampling": "4:2:0"}, {"quality": 10, "subsampling": "no such"}],
    }
    calls += [(f"DMAP_Operator{name}", settings) for name, each in wrong.items() for settings in each]
    for name, inputs in calls:
        try:
            lab.call(name, **inputs)
        except ValueError as error:
            yield str(error)


def test_no_refusal_of_a_node_speaks_of_a_class(lab):
    said = list(refusals(lab))
    unknown = re.compile(rf"\b({'|'.join(sorted(classes(lab) | operators(lab) | {'PosteriorGuider', 'SolverSampler'}))})\b")
    assert [text for text in said if unknown.search(text)] == []
    named = {name for name in shown(lab) if any(name in text for text in said)}
    assert len(said) > 150 and {f"Operator: {kind.title}" for kind in map(type, made(lab))} - named <= {
        "Operator: Grayscale",
        "Operator: Nonlinear Blur",
    }, named


def test_reports_have_the_names_of_nodes(lab):
    noisy = lab.call("DMAP_OperatorNoise", operator=lab.call("DMAP_OperatorSuperResolution", scale=8), sigma=0.1)
    guider = lab.guider(operator=noisy)
    latents = lab.sample(guider, lab.dps(), steps=2)
    text, values = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    for said in (text, values):
        assert "Known Noise (Super-Resolution (scale 8), sigma 0.1)" in said and not re.search("Noisy|SuperResolution", said)


def test_guiders_are_called_by_their_nodes(lab):
    model, positive = lab.shared()[0], lab.call("DMAP_DMAPUnconditional", model=lab.shared()[0])
    for node, guider in {
        "BasicGuider": lab.call("BasicGuider", model=model, conditioning=positive),
        "CFGGuider": lab.stock_guider(),
    }.items():
        with pytest.raises(ValueError, match=f"it was given a {node}, which"):
            lab.sample(guider, lab.dps())
        with pytest.raises(ValueError, match=f"it is a {node}, which"):
            lab.call(
                "DMAP_StepsStudy",
                guider=guider,
                reference=lab.picture(),
                budget=4,
                K="1",
                zeta=1.0,
                dsg_zeta=0.1,
                spacing="paper",
                noise_seed=0,
            )


def test_nodes_in_quotes_are_there(lab):
    names = shown(lab) | HOSTS
    found = [
        f"{path.name}:{line}: {quoted}"
        for path in sorted((lab.ROOT / "nodes").rglob("*.py"))
        for line, text in texts(path)
        for quoted in re.findall(r"(?<!\w)'([A-Z][A-Za-z:\- ]{3,})'", text)
        if quoted not in names
    ]
    assert found == []


def test_an_operators_error_names_its_node(lab):
    noisy = lab.call("DMAP_OperatorNoise", operator=lab.call("DMAP_OperatorSuperResolution", scale=2), sigma=0.1)
    with pytest.raises(ValueError, match=r"^Operator: Known Noise: .* is noisy already"):
        lab.call("DMAP_OperatorNoise", operator=noisy, sigma=0.1)
    with pytest.raises(ValueError, match=r"^Operator: Gaussian Blur: kernel_size is 4; it must be odd"):
        lab.call("DMAP_OperatorGaussianBlur", sigma=3.0, kernel_size=4)


@pytest.mark.parametrize("word", WORDS)
def test_what_people_look_for_is_in_names_and_aliases(lab, word):
    """Older interfaces search the beginning of names only, newer ones the aliases as well."""
    from comfy_api.latest import io

    schemas = [cls.GET_SCHEMA() for cls in lab.NODES.values()]
    assert any(-1 < schema.display_name.lower().find(word) < REACH for schema in schemas)
    if "search_aliases" in io.Schema.__dataclass_fields__:
        assert any(word in schema.search_aliases for schema in schemas)


def test_fields_that_a_host_lacks_are_left_out(lab, monkeypatch):
    import dataclasses
    import importlib

    from comfy_api.latest import io

    module = importlib.import_module("dmap_pack.nodes.schema")
    known = {field.name for field in dataclasses.fields(io.Schema)}
    given = {"node_id": "DMAP_X", "search_aliases": ["x"]}
    assert hasattr(module.schema(**given), "search_aliases") == ("search_aliases" in known)
    with pytest.raises(TypeError):  # nothing but what is known to be newer
        module.schema(**given, misspelt=1)


def test_the_zeta_of_the_guider_says_whose_it_is(lab):
    import json

    zeta = next(i for i in lab.NODES["DMAP_DPSGuider"].GET_SCHEMA().inputs if i.id == "zeta")
    locale = json.loads((lab.ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert zeta.display_name == locale["DMAP_DPSGuider"]["inputs"]["zeta"]["name"] == "zeta (stock samplers only)"  # for older interfaces
    assert zeta.optional and zeta.as_dict()["advanced"] is True


def test_prompts_with_and_without_the_guiders_zeta_are_taken(lab):
    """Old prompts give it, and old workflows hold it as the first of three widget values."""
    inputs = lab.problem()
    assert lab.call("DMAP_DPSGuider", **inputs).dps.zeta == 1.0
    del inputs["zeta"]
    assert lab.call("DMAP_DPSGuider", **inputs).dps.zeta == 4.8
    info = lab.NODES["DMAP_DPSGuider"].GET_NODE_INFO_V1()["input"]
    widgets = [name for group in ("required", "optional") for name, spec in info[group].items() if spec[0] in ("FLOAT", "COMBO")]
    assert widgets[:3] == ["zeta", "cfg", "memory"]


def test_every_operator_has_a_node_in_messages(lab):
    import importlib

    messages = importlib.import_module("dmap_pack.nodes.messages")
    assert set(messages.NODES) == set(lab.core.operators.OPERATORS)
    assert set(messages.NODES.values()) <= shown(lab)


def test_what_is_wrong_with_a_picture_names_the_node(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    with pytest.raises(ValueError, match=r"^Degrade: image: Operator: Super-Resolution: a picture of 33x32 .* crop it to 32x32"):
        lab.call("DMAP_Degrade", image=lab.picture(width=33), operator=operator, noise_sigma=0.0, seed=0)


def test_help_pages_have_the_names_of_their_nodes(lab):
    pages = {page.stem: page.read_text(encoding="utf-8").partition("\n")[0] for page in (lab.ROOT / "web" / "docs").glob("*.md")}
    titles = {node_id: title.removeprefix("# ").partition(" (")[0] for node_id, title in pages.items()}
    assert titles == {node_id: cls.GET_SCHEMA().display_name.partition(" (")[0] for node_id, cls in lab.NODES.items()}
