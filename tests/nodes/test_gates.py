"""Pictures, masks and reports that other nodes might give: taken or refused by name, at every input, and by one piece of code."""

import importlib
import json

import pytest
import torch


@pytest.fixture(scope="module")
def pictures(lab):
    return importlib.import_module("dmap_pack.nodes.pictures")


@pytest.fixture(scope="module")
def reports(lab):
    return importlib.import_module("dmap_pack.nodes.reports")


ODD = {
    "text": ("letters", "expected a picture, got str"),
    "no batch": (torch.zeros(8, 8, 3), "expected a batch of pictures|a mask was given"),
    "no pixels": (torch.zeros(1, 0, 8, 3), r"got shape \(1, 0, 8, 3\)"),
    "alpha": (torch.zeros(1, 8, 8, 4), "alpha channel"),
    "five channels": (torch.zeros(1, 8, 8, 5), r"the picture has 5 channels; it needs 3 \(RGB\) or 1"),
    "NaN": (torch.full((1, 8, 8, 3), float("nan")), "192 values are NaN or infinite"),
    "bytes": (torch.full((1, 8, 8, 3), 200, dtype=torch.uint8), "values reach 200"),
    "16 bits": (torch.full((1, 8, 8, 3), 999, dtype=torch.uint16), "values reach 999"),
    "complex": (torch.zeros(1, 8, 8, 3, dtype=torch.complex64), "complex numbers"),
}


def inputs(lab):
    """A call for every input that takes pictures, and what its messages begin with."""
    sr8 = lab.call("DMAP_OperatorSuperResolution", scale=8)
    good = torch.rand(1, 8, 8, 3)
    metrics = {"perceptual": "none", "distribution": "none"}
    return {
        "Degrade: image": lambda x: lab.call("DMAP_Degrade", image=x, operator=sr8, noise_sigma=0.0, seed=0),
        "Operator: Kernel Blur: kernel": lambda x: lab.call("DMAP_OperatorKernelBlur", kernel=x),
        "DPSGuider: measurement": lambda x: lab.guider(measurement=x),
        "DMAP Comparison Sheet: image_1": lambda x: lab.call("DMAP_ComparisonSheet", image_1=x),
        "DMAP Comparison Sheet: damaged": lambda x: lab.call("DMAP_ComparisonSheet", measurement=x, image_1=good),
        "DMAP Comparison Sheet: original": lambda x: lab.call("DMAP_ComparisonSheet", original=x, image_1=good),
        "RestorationMetrics: restored": lambda x: lab.call("DMAP_RestorationMetrics", restored=x, reference=good, **metrics),
        "RestorationMetrics: reference": lambda x: lab.call("DMAP_RestorationMetrics", restored=good, reference=x, **metrics),
    }


@pytest.mark.parametrize("kind", ODD)
def test_every_input_refuses_what_is_no_picture(lab, kind):
    picture, words = ODD[kind]
    for name, call in inputs(lab).items():
        with pytest.raises(ValueError, match=rf"{name}.*({words})"):
            call(picture)


def test_pictures_of_truth_values_are_black_and_white(lab, pictures):
    black_and_white = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(pictures.check_picture(black_and_white, "x"), black_and_white.float())
    sr8 = lab.call("DMAP_OperatorSuperResolution", scale=8)
    common = {"operator": sr8, "noise_sigma": 0.0, "seed": 0}
    assert torch.equal(
        lab.call("DMAP_Degrade", image=black_and_white, **common), lab.call("DMAP_Degrade", image=black_and_white.float(), **common)
    )
    assert torch.equal(
        lab.call("DMAP_ComparisonSheet", image_1=black_and_white), lab.call("DMAP_ComparisonSheet", image_1=black_and_white.float())
    )


def test_masks(lab, pictures):
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:4] = True
    made = [lab.call("DMAP_OperatorInpainting", mask=m) for m in (mask, mask.float(), mask[0], mask.to(torch.uint8))]
    assert len({json.dumps(operator.spec()) for operator in made}) == 1
    for bad, words in (
        ("paint", "expected a mask, got str"),
        (torch.zeros(0, 8, 8), r"expected a mask \(N, H, W\), got shape \(0, 8, 8\)"),
        (torch.zeros(1, 0, 8), r"got shape \(1, 0, 8\)"),
        (torch.zeros(1, 8, 8, 3), r"got shape \(1, 8, 8, 3\)"),
        (mask * float("inf"), "NaN or infinite"),
        (mask.int() * 255, "values reach 255"),
    ):
        with pytest.raises(ValueError, match=f"Operator: Inpainting: mask: .*{words}"):
            lab.call("DMAP_OperatorInpainting", mask=bad)
    # a mask where a picture is measured
    for bad in (mask, mask.float()):
        with pytest.raises(ValueError, match="DPSGuider: measurement: Super-Resolution.* a mask was given"):
            lab.guider(operator=lab.call("DMAP_OperatorSuperResolution", scale=8), measurement=bad)


REPORT = {
    "solver": "DPS (zeta 1)",
    "operator": "Grayscale()",
    "memory": "fast",
    "seconds": 1.5,
    "denoiser_calls": 9,
    "residuals": [[3.0], [1.0]],
}
WRONG = {
    "solver": (5, None, ["DPS"], {}),
    "seconds": ("1.5", None, True, float("nan"), float("inf"), -1, []),
    "denoiser_calls": ("9", None, [9]),
    "residuals": (3, None, [3.0], [[]], [["3"]], [[None]], {"a": 1}),
    "operator": (5, None),
    "memory": (5, None),
}


@pytest.mark.parametrize("field", WRONG)
def test_reports_of_another_kind(lab, reports, field):
    """A number for a solver, a text for seconds: not a report, whatever node reads it."""
    assert reports.read_report(json.dumps(REPORT), list(REPORT), "x") == REPORT
    picture = torch.rand(1, 8, 8, 3)
    for value in WRONG[field]:
        told = json.dumps(REPORT | {field: value})
        with pytest.raises(ValueError, match="a node: report is no report; connect the json output of DMAP Sampling Report"):
            reports.read_report(told, list(REPORT), "a node: report")
        if field in ("solver", "seconds", "denoiser_calls", "residuals"):
            with pytest.raises(ValueError, match="DMAP Comparison Sheet: report_1 is no report"):
                lab.call("DMAP_ComparisonSheet", image_1=picture, report_1=told)
        if field != "residuals":
            with pytest.raises(ValueError, match="RestorationMetrics: report is no report"):
                lab.call(
                    "DMAP_RestorationMetrics", restored=picture, reference=picture, perceptual="none", distribution="none", report=told
                )


def test_a_loss_that_is_not_finite_is_left_out_of_the_curve(lab):
    """A training does not end because of its chart."""
    charts = importlib.import_module("dmap_pack.nodes.charts")
    nan, inf = float("nan"), float("inf")
    plain = charts.loss_curve([1.0, 0.5], [[2, 0.25]])
    for losses, validations in (([1.0, 0.5], [[1, nan], [2, 0.25]]), ([1.0, 0.5], [[1, inf], [2, 0.25]])):
        assert charts.loss_curve(losses, validations).tobytes() == plain.tobytes()
    for losses in ([inf, 1.0], [1.0, nan], [nan], [inf], [0.0, 1.0]):
        assert charts.loss_curve(losses).size == plain.size


def test_texts_that_are_no_report(reports):
    for text in ("", "28 steps", "[]", "null", "[" * 100_000, "1" * 5000):
        with pytest.raises(ValueError, match="x is no report"):
            reports.read_report(text, ["solver"], "x")
    assert reports.read_report(json.dumps({"solver": "a", "peak_memory": 7}), ["solver"], "x") == {"solver": "a", "peak_memory": 7}
    assert reports.read_report(json.dumps({"solver": "a", "peak_memory": None}), ["solver"], "x") == {"solver": "a"}
