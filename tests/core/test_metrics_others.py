"""Labels, intervals, the catalogue, and what an import of the metrics brings along."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from host import import_torchvision
from scipy import stats

import dmap_core.metrics
from dmap_core.metrics import PICTURE_METRICS, SET_METRICS, MissingPackage, check_names, distribution, miou, psnr, ssim
from dmap_core.metrics.interval import Interval, mean_interval


@pytest.fixture(autouse=True, scope="module")
def torchvision():
    import_torchvision()


def brute_force(labels, reference, classes):
    scores = []
    for c in range(classes):
        union = ((labels == c) | (reference == c)).sum()
        if union:
            scores.append(((labels == c) & (reference == c)).sum() / union)
    return np.mean(scores)


@pytest.mark.parametrize("classes", [2, 5])
def test_miou_is_the_mean_over_the_classes_that_are_there(classes, rng):
    reference = torch.randint(0, classes, (6, 7, 9), generator=rng)
    labels = torch.where(torch.rand(6, 7, 9, generator=rng) < 0.6, reference, torch.randint(0, classes, (6, 7, 9), generator=rng))
    labels[0], reference[0] = 0, 1  # nothing right
    labels[1] = reference[1] = 1  # all right, all other classes absent
    labels[2] = labels[2].clamp(max=1)  # the last classes are in the reference alone
    reference[3] = reference[3].clamp(max=1)  # or in the labels alone
    expected = [brute_force(a, b, classes) for a, b in zip(labels.numpy(), reference.numpy(), strict=True)]
    found = miou(labels, reference, classes)
    assert found.shape == (6,)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert found[0] == 0 and found[1] == 1
    assert torch.equal(miou(labels[:, None].float(), reference.to(torch.uint8), classes), found)


def test_miou_refuses_what_are_no_labels():
    labels = torch.zeros(2, 1, 4, 4)
    for given, message in (
        ((labels, labels + 5), "reference must hold whole numbers from 0 to 4"),
        ((labels - 1, labels), "labels must hold whole numbers from 0 to 4"),
        ((labels + 0.5, labels), "labels must hold whole numbers"),
        ((labels * torch.nan, labels), "labels must hold whole numbers"),
        ((labels.expand(2, 3, 4, 4), labels), r"labels has shape \(2, 3, 4, 4\)"),
        ((labels, labels[..., :3]), r"shapes \(2, 1, 4, 4\) and \(2, 1, 4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            miou(*given)


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(24.5, 2.0, size=9)
    for level in (0.9, 0.95):
        found = mean_interval(torch.from_numpy(values), level)
        low, high = stats.t.interval(level, df=8, loc=values.mean(), scale=stats.sem(values))
        assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)
        assert found.error == pytest.approx(stats.sem(values), rel=1e-12) and found.n == 9


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(3.0, 1.0, size=(1500, 4))
    intervals = [mean_interval(row, level=0.8) for row in samples]
    assert np.mean([i.low <= 3 <= i.high for i in intervals]) == pytest.approx(0.8, abs=0.04)  # four standard errors


def test_what_an_interval_cannot_know_is_nan():
    one = mean_interval([24.5])
    assert (one.mean, one.n) == (24.5, 1) and all(map(math.isnan, (one.low, one.high, one.error)))
    equal = mean_interval([30.0, math.inf])
    assert (equal.mean, equal.n) == (math.inf, 2) and all(map(math.isnan, (equal.low, equal.high, equal.error)))
    for values, message in (([], "no values"), ([1.0, math.nan], "1 of 2 values are NaN")):
        with pytest.raises(ValueError, match=message):
            mean_interval(values)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level is"):
            mean_interval([1.0, 2.0], level)


def test_the_interval_in_words():
    assert str(Interval(24.5, 23.87, 25.13, 0.312, 32)) == "24.50 +- 0.63 (n 32)"
    assert Interval(0.12346, 0.1, 0.2, 0.01, 8).text(4) == "0.1235 +- 0.0500"
    assert Interval(0.5, 0.4, 0.6, 0.05, 8).text(1, "+") == "+0.5 +- 0.1"
    assert str(mean_interval([24.5])) == "24.50 (n 1)"
    assert str(mean_interval([30.0, math.inf])) == "inf (n 2)"


def test_the_catalogue_names():
    assert list(PICTURE_METRICS) == ["psnr", "ssim", "lpips-alex", "lpips-vgg", "features"]
    assert list(SET_METRICS) == ["fid", "kid", "fd-efficientnet", "kd-efficientnet"]
    every = PICTURE_METRICS | SET_METRICS
    assert all(name == metric.name for name, metric in every.items())
    assert {name for name, metric in every.items() if metric.better == "higher"} == {"psnr", "ssim"}
    assert {metric.better for metric in every.values()} == {"higher", "lower"}
    assert len({metric.label for metric in every.values()}) == len(every)
    check_names(every)
    with pytest.raises(ValueError, match=re.escape("unknown metric 'lpips', 'is'; the metrics are psnr, ssim, lpips-alex")):
        check_names(["psnr", "lpips", "is"])


def test_opened_metrics_measure(tmp_path):
    image, reference = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, function in (("psnr", psnr), ("ssim", ssim)):
        assert torch.equal(PICTURE_METRICS[name].open(tmp_path).to("cpu")(image, reference), function(image, reference))
    assert (PICTURE_METRICS["features"].open(None).to("cpu")(image, reference) > 0).all()


def test_metrics_that_share_features_extract_them_alike(tmp_path):
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("fd-efficientnet", "kd-efficientnet"):
        metric = SET_METRICS[name]
        assert callable(getattr(distribution, metric.distance))
        found[metric.distance, metric.features] = metric.open(tmp_path).to("cpu")(image)
    assert torch.equal(found["frechet", "efficientnet"], found["kernel", "efficientnet"])
    assert {(m.distance, m.features) for m in SET_METRICS.values()} == {
        (d, f) for d in ("frechet", "kernel") for f in ("inception", "efficientnet")
    }


@pytest.mark.parametrize("name", ["psnr", "ssim", "fid", "kid", "fd-efficientnet", "kd-efficientnet"])
def test_a_metric_without_torchmetrics_is_refused_when_it_is_opened(name, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingPackage, match="'torchmetrics'.*pip install torchmetrics$"):
        (PICTURE_METRICS | SET_METRICS)[name].open(tmp_path)


@pytest.mark.thorough  # test_imports.py imports them among others
def test_importing_the_metrics_needs_torch_alone():
    program = """
import importlib, pkgutil, sys
import dmap_core.metrics
for module in pkgutil.iter_modules(dmap_core.metrics.__path__, "dmap_core.metrics."):
    importlib.import_module(module.name)
print(*{name.partition(".")[0] for name in sys.modules}, sum(name.startswith("dmap_core.metrics.") for name in sys.modules))
"""
    package = Path(dmap_core.metrics.__file__).parent
    run = subprocess.run([sys.executable, "-c", program], cwd=package.parents[1], capture_output=True, text=True, check=True)
    *names, count = run.stdout.split()
    assert int(count) == len(list(package.glob("*.py"))) - 1
    unwanted = {"PIL", "torchvision", "scipy", "diffusers", "torchmetrics", "lpips", "torch_fidelity", "efficientnet_lite_pytorch"}
    assert "torch" in names and not unwanted & set(names)
