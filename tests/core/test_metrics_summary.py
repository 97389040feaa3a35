"""What is said of restored pictures, as text and as JSON."""

import json
import math
from types import SimpleNamespace

import torch
from host import import_torchvision

from dmap_core.metrics import PLUS_MINUS, frechet, mean_interval
from dmap_core.metrics.summary import Column, Summary, distances

PSNR = Column("psnr", "PSNR (dB)", [20.0, 22.0, 27.0], 2)
RESIDUAL = Column("residual", "residual", [123.4, 5.0, 7.0], None)


def test_the_only_meaning_of_plus_minus_is_said_with_the_figures():
    found = Summary((16, 32), [PSNR, RESIDUAL], [], [], None)
    i = mean_interval(PSNR.values)
    lines = found.text().splitlines()
    assert lines[0] == "3 pictures of 32x16"
    assert lines[1] == f"PSNR (dB): 23.00 +- {(i.high - i.low) / 2:.2f} (n 3)" == f"PSNR (dB): {i.text()} (n 3)"
    assert lines[2].startswith("residual: 45.1 +- ")  # the largest value has four digits
    assert lines[3] == f"+- is {PLUS_MINUS}" and "half" in PLUS_MINUS and "95 %" in PLUS_MINUS


def test_one_picture_has_a_mean_and_no_interval():
    found = Summary((8, 8), [Column("psnr", "PSNR", [math.inf], 2)], [], ["few"], None)
    assert found.text() == "1 picture of 8x8\nPSNR: inf (n 1)\nWarning: few"
    (mean,) = json.loads(found.json())["means"].values()
    assert mean == {"label": "PSNR", "mean": "inf", "low": None, "high": None, "n": 1}


def test_a_run_and_distances_are_told():
    run = {"solver": "DPS", "operator": "Grayscale", "seconds": 1.25, "denoiser_calls": 7, "memory": "fast", "peak_memory": 3 * 2**30}
    sets = [("fid", "FID", 12.345, math.nan, 1), ("kid", "KID", 0.5, 0.25, 2)]
    lines = Summary((8, 8), [PSNR], sets, [], run).footer()
    assert lines[1:3] == ["FID: 12.3 (n 3)", "KID: 0.50 (n 3, standard deviation over subsets 0.25)"]
    assert lines[3] == "DPS on Grayscale: 1.2 s, 7 denoiser calls, memory plan fast with a peak of 3.0 GiB"
    found = json.loads(Summary((8, 8), [PSNR], sets, [], run).json())
    assert found["sets"]["fid"] == {"label": "FID", "value": 12.345, "deviation": None, "n": 3} and found["run"] == run
    assert found["pictures"] == [{"psnr": 20.0}, {"psnr": 22.0}, {"psnr": 27.0}]


def test_distances_of_sets():
    import_torchvision()
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(8, 4, generator=generator) for _ in range(2))
    metric = SimpleNamespace(name="fid", label="FID", digits=2, distance="frechet")
    ((name, label, value, deviation, digits),), warnings = distances([metric], real, fake)
    assert (name, label, value, digits) == ("fid", "FID", frechet(real, fake), 2) and math.isnan(deviation) and len(warnings) == 1
