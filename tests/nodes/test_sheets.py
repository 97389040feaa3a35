"""DMAP Comparison Sheet."""

import json

import pytest
import torch

pytestmark = pytest.mark.hosts("one")


def flat(colour, height=16, width=16):
    return torch.tensor(colour, dtype=torch.float32).expand(1, height, width, 3).clone()


RED, GREEN, BLUE = flat((1.0, 0.0, 0.0)), flat((0.0, 1.0, 0.0)), flat((0.0, 0.0, 1.0))


def report(solver="DMAP (K 2, zeta 30)", residuals=((3.0,), (0.5,)), calls=28, seconds=7.25):
    return json.dumps({"solver": solver, "residuals": [list(r) for r in residuals], "denoiser_calls": calls, "seconds": seconds})


def test_pictures_stand_in_order_above_their_captions(lab):
    page = lab.call(
        "DMAP_ComparisonSheet",
        measurement=RED,
        original=BLUE,
        image_1=GREEN,
        image_3=RED,
        report_1=report(),
        report_3=report("DPS"),
        width=64,
    )
    assert page.shape[0] == 1 and page.shape[2] == 4 * 72 + 8 and page.shape[3] == 3
    for i, picture in enumerate((RED, GREEN, RED, BLUE)):
        tile = page[:, 8:72, 8 + 72 * i : 72 + 72 * i]
        assert torch.equal(tile, picture[:, :1, :1].expand_as(tile))
        below = page[:, 72:, 8 + 72 * i : 72 + 72 * i]
        assert below.min() < 0.5  # its name at least


def test_captions_say_what_the_reports_say(lab):
    def captions(**inputs):
        given = {"picture": GREEN, "original": None, "report": None, "name": "image_2"} | inputs
        return lab.NODES["DMAP_ComparisonSheet"]._captions(*(given[key] for key in ("name", "report", "picture", "original")))

    assert captions(report=report()) == ("DMAP", ["residual 0.5", "28 calls, 7.2 s"])
    assert captions(report=report(residuals=())) == ("DMAP", ["no residual", "28 calls, 7.2 s"])
    assert captions() == ("image_2", [])
    near = GREEN.clone()
    near[0, 0, 0, 0] = 0.5
    assert captions(original=near)[1] == [f"{-10 * torch.tensor(0.25 / GREEN.numel()).log10():.2f} dB"]
    assert captions(original=GREEN)[1] == ["inf dB"]


def test_more_than_five_pictures_take_two_rows(lab):
    one = lab.call("DMAP_ComparisonSheet", image_1=RED, width=64)
    assert one.shape[2] == 72 + 8
    many = lab.call("DMAP_ComparisonSheet", **{f"image_{i}": RED for i in range(1, 9)}, width=64)
    assert many.shape[2] == 4 * 72 + 8 and many.shape[1] == 2 * one.shape[1] - 8


def test_other_shapes_and_one_channel(lab):
    wide = lab.call("DMAP_ComparisonSheet", image_1=flat((1.0, 0.0, 0.0), 8, 32), width=64)
    assert torch.equal(wide[0, 8:24, 8:72], RED[0, :1, :1].expand(16, 64, 3))
    grey = lab.call("DMAP_ComparisonSheet", image_1=torch.full((1, 16, 16, 1), 0.2), width=64)
    assert torch.allclose(grey[0, 8:72, 8:72], torch.full((64, 64, 3), 0.2), atol=1 / 255)


def test_a_sheet_has_a_bounded_size(lab):
    """A picture of one column, which would be 300 times as tall as wide, is shown narrower; one of one line is not lost."""
    column = lab.call("DMAP_ComparisonSheet", image_1=flat((1.0, 0.0, 0.0), 300, 1), image_2=RED, width=512)
    assert column.shape[1] < 4 * 512 and torch.equal(column[0, 8 : 8 + 3 * 512, 8:13], RED[0, :1, :1].expand(1536, 5, 3))
    line = lab.call("DMAP_ComparisonSheet", image_1=flat((1.0, 0.0, 0.0), 1, 300), image_2=GREEN, width=64)
    assert torch.equal(line[0, 8, 8:72], RED[0, 0, :1].expand(64, 3)) and line.shape[2] == 2 * 72 + 8
    tall = lab.call("DMAP_ComparisonSheet", image_1=flat((1.0, 0.0, 0.0), 300, 100), width=64)
    assert torch.equal(tall[0, 8:200, 8:72], RED[0, :1, :1].expand(192, 64, 3))


def test_what_cannot_be_shown(lab):
    def refused(match, **inputs):
        with pytest.raises(ValueError, match=match):
            lab.call("DMAP_ComparisonSheet", **inputs)

    refused("nothing is connected", original=RED)
    refused("report_1 is no report.*json output", image_1=RED, report_1="28 steps in 7 seconds")
    refused("report_2 is no report", image_2=RED, report_2="[]")
    refused(r"image_1 has the shape \(16, 16, 3\) and original \(8, 8, 3\)", image_1=RED, original=flat((0.0, 0.0, 0.0), 8, 8))
    refused("image_1.*alpha", image_1=torch.ones(1, 4, 4, 4))


def test_names_of_ones_own(lab, monkeypatch):
    import importlib

    sheets = importlib.import_module("dmap_pack.nodes.sheets")
    shown = []
    monkeypatch.setattr(sheets, "sheet", lambda tiles, width: shown.extend(name for name, _, _ in tiles) or RED)
    lab.call(
        "DMAP_ComparisonSheet", measurement=RED, original=BLUE, image_1=GREEN, image_3=RED, report_1=report(), names="alone,  with it "
    )
    assert shown == ["damaged", "alone", "with it", "original"]
    with pytest.raises(ValueError, match="names holds 3 names for 1 pictures"):
        lab.call("DMAP_ComparisonSheet", image_1=GREEN, names="a,b,c")
