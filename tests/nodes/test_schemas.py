"""What ComfyUI and saved workflows know of the nodes."""

import pytest

# Workflows refer to nodes by these: an id that is published does not change.
NODES = {
    "DMAP_ApplyCSE": "ApplyCSE",
    "DMAP_CSEControlNetLoader": "CSEControlNetLoader",
    "DMAP_ComparisonSheet": "DMAP Comparison Sheet",
    "DMAP_DAPSSampler": "DAPSSampler",
    "DMAP_DMAPPreset": "DMAPPreset",
    "DMAP_MatchMeasurement": "Match Measurement",
    "DMAP_MismatchMap": "Mismatch Map (fidelity)",
    "DMAP_DMAPSampler": "DMAPSampler",
    "DMAP_DMAPScheduler": "DMAPScheduler",
    "DMAP_DMAPUnconditional": "DMAPUnconditional",
    "DMAP_DPSGuider": "DPSGuider (restore, enlarge photos)",
    "DMAP_DPSSampler": "DPSSampler",
    "DMAP_DSGSampler": "DSGSampler",
    "DMAP_Decode": "DMAP Decode (restored picture)",
    "DMAP_Degrade": "Degrade",
    "DMAP_DiversityStudy": "Diversity Study",
    "DMAP_EmptyMeasurementLatent": "Empty Measurement Latent",
    "DMAP_EstimateDegradation": "Estimate Degradation (what is wrong with a photo)",
    "DMAP_FlowDPSSampler": "FlowDPSSampler",
    "DMAP_FinishRestore": "Finish Restore (part of DMAP Restore)",
    "DMAP_FreeDoMSampler": "FreeDoMSampler",
    "DMAP_LATINOSampler": "LATINOSampler",
    "DMAP_LoadPhoto": "DMAP Load Photo (with mask and JPEG tables)",
    "DMAP_OperatorCompose": "Operator: Compose (old photo)",
    "DMAP_OperatorGaussianBlur": "Operator: Gaussian Blur (deblur)",
    "DMAP_OperatorGrayscale": "Operator: Grayscale (colorize)",
    "DMAP_OperatorInpainting": "Operator: Inpainting (holes, scratches)",
    "DMAP_OperatorJpeg": "Operator: JPEG (artifacts)",
    "DMAP_OperatorKernelBlur": "Operator: Kernel Blur (sharpen)",
    "DMAP_OperatorMotionBlur": "Operator: Motion Blur (deblur)",
    "DMAP_OperatorNoise": "Operator: Known Noise (denoise)",
    "DMAP_OperatorNonlinearBlur": "Operator: Nonlinear Blur (deblur)",
    "DMAP_OperatorSegmentation": "Operator: Segmentation",
    "DMAP_OperatorSuperResolution": "Operator: Super-Resolution (upscale)",
    "DMAP_PSLDSampler": "PSLDSampler",
    "DMAP_ReSampleSampler": "ReSampleSampler",
    "DMAP_ResidualCurve": "Residual Curve",
    "DMAP_RestorationMetrics": "RestorationMetrics",
    "DMAP_Restore": "DMAP Restore (repair, enlarge, sharpen a photo)",
    "DMAP_SamplePicture": "DMAP Sample Picture",
    "DMAP_SamplingReport": "DMAP Sampling Report",
    "DMAP_ScoreErrorStudy": "Score Error Study",
    "DMAP_ScoreMeanStudy": "Score Mean Study",
    "DMAP_SelfGenerateCSEDataset": "SelfGenerateCSEDataset",
    "DMAP_SolverStudy": "Solver Study",
    "DMAP_SpreadStudy": "Spread Study",
    "DMAP_StepsStudy": "Steps Study",
    "DMAP_ToyStudy": "Toy Study",
    "DMAP_TrainCSE": "TrainCSE",
    "DMAP_UncertaintyMap": "Uncertainty Map (invented here)",
}

# The same holds for the order of inputs, by which saved widget values are matched, and of outputs.
PLACES = range(1, 9)
INPUTS = {
    "DMAP_ApplyCSE": "conditioning cse measurement operator strength start_percent end_percent hint_range model",
    "DMAP_CSEControlNetLoader": "cse",
    "DMAP_ComparisonSheet": " ".join(
        ["measurement original", *(f"image_{i}" for i in PLACES), *(f"report_{i}" for i in PLACES), "width names"]
    ),
    "DMAP_DAPSSampler": "zeta iterations ode move momentum tau decay space eta step strength",
    "DMAP_DMAPPreset": "model operator solver quality steps start",
    "DMAP_DMAPSampler": "K zeta eta optimizer step strength jacobian every guide_start guide_end inner",
    "DMAP_DMAPScheduler": "model steps start end spacing",
    "DMAP_DMAPUnconditional": "model",
    "DMAP_DPSGuider": "model positive vae operator measurement zeta negative cfg memory max_megapixels step strength jacobian tile guidance_vae",
    "DMAP_DPSSampler": "zeta eta optimizer step strength jacobian every guide_start guide_end inner",
    "DMAP_DSGSampler": "zeta eta",
    "DMAP_Decode": "latent vae measurement operator keep_given",
    "DMAP_Degrade": "image operator noise_sigma seed",
    "DMAP_DiversityStudy": "images_1 images_2 images_3 images_4 names",
    "DMAP_EmptyMeasurementLatent": "measurement operator vae batch_size max_megapixels content",
    "DMAP_EstimateDegradation": "image jpeg",
    "DMAP_FlowDPSSampler": "zeta inner weight noise eta step strength",
    "DMAP_LATINOSampler": "delta eta",
    "DMAP_FreeDoMSampler": "zeta K first last travel eta step strength jacobian",
    "DMAP_MatchMeasurement": "image measurement operator noise feather careful",
    "DMAP_MismatchMap": "restored measurement operator",
    "DMAP_OperatorCompose": "first second third fourth",
    "DMAP_OperatorGaussianBlur": "sigma kernel_size",
    "DMAP_OperatorGrayscale": "",
    "DMAP_OperatorInpainting": "mask",
    "DMAP_OperatorJpeg": "quality subsampling rounding",
    "DMAP_OperatorKernelBlur": "kernel",
    "DMAP_OperatorMotionBlur": "length angle",
    "DMAP_OperatorNoise": "operator sigma",
    "DMAP_OperatorNonlinearBlur": "weights seed",
    "DMAP_OperatorSegmentation": "weights",
    "DMAP_OperatorSuperResolution": "scale",
    "DMAP_PSLDSampler": "zeta gamma transpose eta",
    "DMAP_ReSampleSampler": "zeta first last every iterations learning_rate factor space tweedie eta step strength jacobian",
    "DMAP_ResidualCurve": "guider latent",
    "DMAP_RestorationMetrics": "restored reference perceptual distribution operator measurement report",
    "DMAP_SamplePicture": "picture",
    "DMAP_SamplingReport": "guider latent",
    "DMAP_ScoreErrorStudy": "guider conditional picture sigmas zetas repeats noise_seed",
    "DMAP_ScoreMeanStudy": "guider sigmas zetas samples batch noise_seed conditional",
    "DMAP_SelfGenerateCSEDataset": "model positive vae count steps cfg width height seed save_name negative",
    "DMAP_SolverStudy": "guider_1 reference steps zeta noise_seed guider_2 names spacing",
    "DMAP_SpreadStudy": "problem solvers truths versions steps noise_seed",
    "DMAP_StepsStudy": "guider reference budget K zeta dsg_zeta spacing noise_seed",
    "DMAP_ToyStudy": "zeta K steps samples y0 noise_seed dsg_zeta dmap_zeta",
    "DMAP_TrainCSE": "model vae conditioning operator folder save_name steps batch_size accumulation learning_rate precision size seed save_every "
    "gradient_checkpointing pictures validation hint_range snr_gamma licence unreadable",
    "DMAP_UncertaintyMap": "images",
    "DMAP_FinishRestore": "image photo width height grey notes chosen report matched",
    "DMAP_LoadPhoto": "transparent image",
    "DMAP_Restore": "model vae image damage enlarge softness grain jpeg_quality colours quality seed versions keep_known match "
    "max_megapixels shake_angle mask positive negative operator cse",
}
OUTPUTS = {
    **{node_id: ["SAMPLER"] for node_id in NODES if node_id.endswith("Sampler")},
    "DMAP_ComparisonSheet": ["IMAGE"],
    "DMAP_DMAPPreset": ["SAMPLER", "SIGMAS", "STRING"],
    "DMAP_DMAPScheduler": ["SIGMAS"],
    "DMAP_DMAPUnconditional": ["CONDITIONING"],
    "DMAP_DPSGuider": ["GUIDER"],
    "DMAP_Decode": ["IMAGE"],
    "DMAP_Degrade": ["IMAGE"],
    "DMAP_EmptyMeasurementLatent": ["LATENT", "INT", "INT"],
    **{node_id: ["OPERATOR"] for node_id in NODES if node_id.startswith("DMAP_Operator")},
    "DMAP_ApplyCSE": ["CONDITIONING"],
    "DMAP_CSEControlNetLoader": ["CONTROL_NET", "OPERATOR", "STRING"],
    "DMAP_EstimateDegradation": ["OPERATOR", "IMAGE", "STRING"],
    "DMAP_MatchMeasurement": ["IMAGE", "STRING"],
    "DMAP_MismatchMap": ["IMAGE", "STRING"],
    "DMAP_ResidualCurve": ["IMAGE"],
    "DMAP_SamplePicture": ["IMAGE", "MASK"],
    "DMAP_SamplingReport": ["STRING", "STRING"],
    "DMAP_SelfGenerateCSEDataset": ["IMAGE", "STRING"],
    "DMAP_TrainCSE": ["CONTROL_NET", "IMAGE", "IMAGE", "STRING"],
    "DMAP_RestorationMetrics": ["STRING", "STRING", "IMAGE", "IMAGE"],
    "DMAP_ScoreErrorStudy": ["IMAGE", "STRING"],
    "DMAP_ScoreMeanStudy": ["IMAGE", "STRING"],
    "DMAP_DiversityStudy": ["IMAGE", "IMAGE", "IMAGE", "STRING"],
    "DMAP_ToyStudy": ["IMAGE", "STRING", "STRING"],
    "DMAP_SpreadStudy": ["IMAGE", "STRING", "STRING"],
    "DMAP_StepsStudy": ["IMAGE", "IMAGE", "STRING"],
    "DMAP_SolverStudy": ["IMAGE", "IMAGE", "STRING"],
    "DMAP_UncertaintyMap": ["IMAGE", "STRING"],
    "DMAP_FinishRestore": ["IMAGE", "IMAGE", "STRING"],
    "DMAP_LoadPhoto": ["IMAGE", "MASK", "MASK", "OPERATOR", "STRING"],
    "DMAP_Restore": ["IMAGE", "IMAGE", "IMAGE", "IMAGE", "MASK", "OPERATOR", "STRING"],
}
STEPPED = (
    "DMAP_DAPSSampler",
    "DMAP_DMAPSampler",
    "DMAP_DPSGuider",
    "DMAP_DPSSampler",
    "DMAP_FlowDPSSampler",
    "DMAP_FreeDoMSampler",
    "DMAP_ReSampleSampler",
)
# The words of combos are saved in workflows, too: they may get more of them, but keep these and their order.
OPTIONS = {
    "optimizer": "gradient adam",
    "transpose": "adjoint published",
    "travel": "forward published",
    "space": "both latent pixel",
    "move": "langevin gradient",
    "weight": "constant published falling rising",
    "noise": "published falling",
    "tweedie": "correct published",
    "spacing": "paper exponential karras",
    "memory": "auto fast lean checkpoint",
    "subsampling": "4:4:4 4:2:2 4:2:0",
    "rounding": "straight-through cubic",
    "solver": "DPS|PSLD|FreeDoM|ReSample|DSG|DMAP|DMAP full|auto",
    "hint_range": {"DMAP_ApplyCSE": ["from file", "0..1", "-1..1"], "DMAP_TrainCSE": ["0..1", "-1..1"]},
    "precision": "fp32 bf16 fp16",
    "problem": "plane averaging inpainting",
    "unreadable": "refuse skip",
    "folder": ["the pictures input"],  # before folders of the machine
    "picture": ["dmap-demo-00"],  # the pack's own pictures
    "content": "empty measurement",
    "quality": {"DMAP_DMAPPreset": ["look", "good", "best", "paper"], "DMAP_Restore": ["look", "good", "best"]},
    "damage": "auto|too small|soft|shaken|scratched|grainy|JPEG|old photo|custom",
    "enlarge": "auto 1 2 4 8",
    "colours": "keep colourise",
    "transparent": "auto|is missing|stays transparent",
    "image": [],  # of ComfyUI's input folder, and the pack's own
    "step": {node: ["auto", "zeta"] for node in STEPPED},
    "jacobian": "exact none",
    "tile": "auto whole 128 256 384 512 640 768 1024",
    "perceptual": "none|LPIPS alex|LPIPS vgg|EfficientNet-Lite0",
    "distribution": "none|FID and KID|EfficientNet-Lite0",
}
# Combos that list files.
FILES = {"weights", "cse", "image"}
# Everything else is a widget. A measurement is a picture, or masks of classes.
CONNECTIONS = {
    "model",
    "positive",
    "negative",
    "vae",
    "guidance_vae",
    "operator",
    "measurement",
    "image",
    "mask",
    "kernel",
    "guider",
    "latent",
    "original",
}
CONNECTIONS |= {"conditioning", "cse", "pictures", "validation", "images"}
CONNECTIONS |= {f"{name}_{i}" for name in ("image", "report") for i in PLACES}
CONNECTIONS |= {"restored", "reference", "report", "picture", "sigmas", "conditional", "guider_1", "guider_2"}
CONNECTIONS |= {"photo", "chosen", "matched"}
CONNECTIONS |= {f"images_{i}" for i in range(1, 5)}


def test_node_ids_and_names(lab):
    assert {node_id: cls.GET_SCHEMA().display_name for node_id, cls in lab.NODES.items()} == NODES


@pytest.mark.parametrize("node_id", NODES)
def test_schema(lab, node_id):
    """The schema, what is made of it, and the help page."""
    cls = lab.NODES[node_id]
    schema = cls.GET_SCHEMA()
    assert schema.category.split("/")[0] == "DMAP"
    assert schema.description
    assert [i.id for i in schema.inputs] == INPUTS[node_id].split()
    assert [i.id for i in schema.inputs if not i.tooltip] == []
    assert [o.io_type for o in schema.outputs] == OUTPUTS[node_id]
    for i in schema.inputs:
        check_words(node_id, i)
        check_default(i)

    # GET_NODE_INFO_V1 is the answer to /object_info, INPUT_TYPES what the executor checks prompts with.
    info, types = cls.GET_NODE_INFO_V1(), cls.INPUT_TYPES()
    names = [name for group in ("required", "optional") for name in info["input"].get(group, {})]
    assert names == INPUTS[node_id].split() == [name for group in ("required", "optional") for name in types.get(group, {})]
    assert info["name"] == node_id and info["display_name"] == NODES[node_id]
    assert info["output"] == OUTPUTS[node_id]

    page = (lab.ROOT / lab.pack.WEB_DIRECTORY / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {NODES[node_id]}\n")
    assert len(page.split()) > 15


def check_words(node_id, i):
    if i.io_type != "COMBO" or i.id in FILES:
        return
    words = OPTIONS[i.id]
    if isinstance(words, dict):
        words = words[node_id]
    if isinstance(words, str):
        words = words.split("|" if "|" in words else None)
    assert i.options[: len(words)] == words


def check_default(i):
    """Every widget has a default within its limits, and the node takes the defaults of its optional inputs itself, as from the API.

    Only a list of files has none: its first is taken, or what stands there if there is no file.
    """
    default = getattr(i, "default", None)
    if i.id in FILES and i.io_type == "COMBO":
        assert default is None and (i.options or i.id == "cse")  # weights say what is missing
        return
    if (i.id in CONNECTIONS and i.io_type != "COMBO") or i.io_type == "OPERATOR":
        assert default is None
        return
    assert default is not None, i.id
    for limit in ("min", "max"):
        assert getattr(i, limit, None) is None or {"min": default >= i.min, "max": default <= i.max}[limit], i.id
    assert getattr(i, "options", None) is None or default in i.options


@pytest.mark.parametrize("node_id", ["DMAP_DPSGuider", "DMAP_EmptyMeasurementLatent"])
def test_a_measurement_is_a_picture_or_masks(lab, node_id):
    kinds = {i.id: i.get_io_type() for i in lab.NODES[node_id].GET_SCHEMA().inputs}
    assert kinds["measurement"] == lab.NODES[node_id].GET_NODE_INFO_V1()["input"]["required"]["measurement"][0] == "IMAGE,MASK"
    assert lab.NODES[node_id].INPUT_TYPES()["required"]["measurement"][0] == "IMAGE,MASK"


def test_there_is_no_help_page_of_a_node_that_is_gone(lab):
    assert sorted(path.stem for path in (lab.ROOT / lab.pack.WEB_DIRECTORY / "docs").glob("*.md")) == sorted(NODES)


@pytest.mark.parametrize(
    "node_id",
    [
        "DMAP_MismatchMap",
        "DMAP_ResidualCurve",
        "DMAP_RestorationMetrics",
        "DMAP_SamplingReport",
        "DMAP_SelfGenerateCSEDataset",
        "DMAP_TrainCSE",
        "DMAP_UncertaintyMap",
    ],
)
def test_it_runs_without_a_node_after_it(lab, node_id):
    assert lab.NODES[node_id].GET_SCHEMA().is_output_node
