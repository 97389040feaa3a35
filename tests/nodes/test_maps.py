"""Mismatch, uncertainty and residuals as pictures: their numbers are computed here a second time, and their colours read back."""

import importlib
import re

import numpy as np
import pytest
import torch

HEIGHT, WIDTH = 24, 40


def module(lab, name):
    return importlib.import_module(f"dmap_pack.{name}")


def levels_in(lab, page, top, height=HEIGHT, width=WIDTH):
    """The values that the colours of a map (H, W, 3) mean, in its left upper corner: (height, width)."""
    table = np.linspace(0, 1, 1001)
    colours = module(lab, "nodes.heat").heat(table[None])[0].astype(float)
    pixels = (page[:height, :width].numpy() * 255).reshape(-1, 1, 3)
    return top * table[np.abs(pixels - colours).sum(axis=2).argmin(axis=1)].reshape(height, width)


def inpainting(lab, hole=(0, 0)):
    """Pixels as they are, but for a hole, which has to be somewhere."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, hole[0], hole[1]] = 1
    return lab.call("DMAP_OperatorInpainting", mask=mask)


def written(lab, monkeypatch):
    """Every text that is drawn from here on."""
    found = []
    drawing = module(lab, "nodes.heat").ImageDraw.ImageDraw
    text = drawing.text
    monkeypatch.setattr(drawing, "text", lambda self, place, words, **more: found.append(words) or text(self, place, words, **more))
    return found


@pytest.fixture
def pair():
    """(measurement, restored), far from black and white, with differences of 0 to 30 levels that rise to the right."""
    generator = torch.Generator().manual_seed(0)
    measurement = 0.3 + 0.4 * torch.rand(1, HEIGHT, WIDTH, 3, generator=generator)
    ramp = torch.linspace(0, 30 / 255, WIDTH).view(1, 1, WIDTH, 1)
    return measurement, measurement + ramp * torch.tensor([1.0, -1.0, 0.5])


def test_a_mismatch_is_where_it_is_and_as_large(lab, pair):
    measurement, restored = pair
    page, text = lab.call("DMAP_MismatchMap", restored=restored, measurement=measurement, operator=inpainting(lab))
    wanted = 255 * (restored - measurement)[0].square().mean(-1).sqrt().numpy()
    assert page.shape[0] == 1 and page.shape[1] > HEIGHT and page.shape[2] > WIDTH
    assert (
        np.abs(levels_in(lab, page[0], top=32) - wanted)[1:].max() < 32 / 200
    )  # of 8 bits: the colours change by less than a level in 1/255 of the bar
    rms, worst = (float(n) for n in re.match(r"mismatch ([\d.]+) of 255 grey levels \(RMS\), ([\d.]+) at worst at x 39,", text).groups())
    known = wanted.size - 1  # but the pixel of the hole, which differs by nothing
    assert rms == pytest.approx(float(np.sqrt((wanted**2).sum() / known)), abs=0.051)
    assert worst == pytest.approx(30, abs=0.051)
    assert "close to your picture" in text and "Match Measurement" in text


def test_a_hole_is_not_measured(lab, pair, monkeypatch):
    measurement, restored = pair
    hole = slice(5, 9), slice(30, 40)
    restored = restored.clone()
    restored[:, hole[0], hole[1]] = 0
    words = written(lab, monkeypatch)
    page, text = lab.call("DMAP_MismatchMap", restored=restored, measurement=measurement, operator=inpainting(lab, hole))
    grey = torch.full((3,), 128 / 255)
    assert torch.allclose(page[0, 5:9, 30:40], grey.expand(4, 10, 3), atol=1e-6)
    assert not torch.isclose(page[0, 4, 30:40], grey, atol=1e-3).all(-1).any()
    assert "30.0 at worst at x 39" in text
    assert any("not measured" in word for word in words)


def test_a_measurement_of_another_size_is_enlarged_by_a_whole_number(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    restored = lab.picture(0, HEIGHT, WIDTH)
    measurement = lab.call("DMAP_Degrade", image=restored, operator=operator, noise_sigma=0.0, seed=0)
    measurement[0, 1, 3] += 20 / 255
    page, text = lab.call("DMAP_MismatchMap", restored=restored, measurement=measurement, operator=operator)
    found = levels_in(lab, page[0], top=32)
    wanted = np.zeros((3, 5))
    wanted[1, 3] = 20
    assert np.abs(found - wanted.repeat(8, 0).repeat(8, 1)).max() < 32 / 200
    assert "20.0 at worst at x 3, y 1 of the measurement" in text


@pytest.mark.parametrize("size, drawn", [((12, 20), (12, 20)), ((4, 5), (4, 5)), ((13, 20), (4, 5)), ((12, 21), (4, 5)), ((2, 5), (4, 5))])
def test_only_whole_multiples_are_enlarged(lab, size, drawn):
    values = np.full((1, 4, 5), 255.0)
    page = module(lab, "nodes.maps").in_colours(values, size, "nothing")
    bright = torch.tensor(module(lab, "nodes.heat").HEAT[-1]) / 255
    found = torch.isclose(page[0], bright, atol=1e-6).all(-1)
    height, width = drawn
    assert found[:height, :width].all() and not found[height, :width].any() and not found[:height, width].any()


def test_a_scale_ends_where_nearly_all_values_do(lab, monkeypatch):
    """A single spot makes no other difference black, and a map without differences shows no rounding."""
    maps = module(lab, "nodes.maps")
    values = np.full((2, 100, 100), 10.0)
    values[0, 0, 0] = 200
    words = written(lab, monkeypatch)
    page = maps.in_colours(values, (100, 100), "difference")
    assert words[:6] == ["0", "4", "8", "12", "16+", "difference"]
    assert np.abs(levels_in(lab, page[1], 16, 100, 100) - 10).max() < 0.1
    words.clear()
    maps.in_colours(np.full((1, 100, 100), 0.29), (100, 100), "difference")
    assert words == ["0", "1", "2", "3", "4", "difference"]


def test_a_batch_has_one_scale_and_a_line_for_each(lab, pair):
    measurement, restored = pair
    both = torch.cat([restored, measurement])
    page, text = lab.call("DMAP_MismatchMap", restored=both, measurement=measurement, operator=inpainting(lab))
    assert len(page) == 2 and torch.equal(page[0, :, WIDTH:], page[1, :, WIDTH:])
    assert levels_in(lab, page[1], 32)[1:].max() == 0
    first, second = text.splitlines()
    assert first.startswith("picture 1: mismatch 1") and second.startswith("picture 2: mismatch 0.0 of 255")


def test_noise_that_is_known_is_no_fault(lab, pair):
    measurement, restored = pair
    noisy = lab.call("DMAP_OperatorNoise", operator=inpainting(lab), sigma=20.0)
    _, text = lab.call("DMAP_MismatchMap", restored=restored, measurement=measurement, operator=noisy)
    assert "explains your picture" in text


def test_labels_have_no_grey_levels(lab, monkeypatch):
    maps = module(lab, "nodes.maps")

    class Labels:
        def describe(self):
            return "Segmentation"

    monkeypatch.setattr(maps, "Segmentation", Labels)
    monkeypatch.setattr(maps, "parts", lambda operator: [operator])
    monkeypatch.setattr(maps, "measurement_of", lambda x, measurement, operator, name: measurement.movedim(-1, 1))
    image = lab.picture()
    page, text = maps.MismatchMap.execute(image, image, Labels()).result
    assert "mIoU" in text
    assert torch.equal(page[:, :32, :32], torch.full((1, 32, 32, 3), 128 / 255))


def test_what_does_not_go_together(lab, pair):
    measurement, restored = pair
    with pytest.raises(ValueError, match=r"Mismatch Map: measurement and .* 40x24, but restored is 40x23"):
        lab.call("DMAP_MismatchMap", restored=restored[:, 1:], measurement=measurement, operator=inpainting(lab))
    with pytest.raises(ValueError, match="holds 2 for 1 restored"):
        lab.call("DMAP_MismatchMap", restored=restored, measurement=measurement.repeat(2, 1, 1, 1), operator=inpainting(lab))


@pytest.mark.parametrize("channels", [3, 1])
def test_uncertainty_is_the_standard_deviation_of_the_versions(lab, channels):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, HEIGHT, WIDTH, channels, generator=generator) * torch.linspace(0, 0.2, WIDTH).view(1, 1, WIDTH, 1)
    page, text = lab.call("DMAP_UncertaintyMap", images=images)
    wanted = 255 * np.sqrt((images.numpy().std(axis=0, ddof=1) ** 2).mean(-1))
    assert page.shape[0] == 1
    shown = levels_in(lab, page[0], top=32)
    assert np.abs(shown - wanted.clip(0, 32)).max() < 32 / 200
    mean, share = (float(n) for n in re.match(r"4 versions differ by ([\d.]+) .*; in (\d+) % of", text).groups())
    assert mean == pytest.approx(np.sqrt((wanted**2).mean()), abs=0.051) and share == pytest.approx(100 * (wanted > 8).mean(), abs=0.51)


def test_one_version_shows_nothing_and_says_so(lab):
    page, text = lab.call("DMAP_UncertaintyMap", images=lab.picture(0, HEIGHT, WIDTH))
    assert text.startswith("One version") and "batch_size" in text
    assert torch.equal(page[:, :HEIGHT, :WIDTH], torch.full((1, HEIGHT, WIDTH, 3), 128 / 255))


@pytest.mark.parametrize("height, width", [(1, 1), (3, 300), (300, 3)])
def test_pictures_of_extreme_shapes(lab, height, width):
    page, _ = lab.call("DMAP_UncertaintyMap", images=torch.stack([torch.zeros(height, width, 3), torch.ones(height, width, 3)]))
    assert np.isclose(levels_in(lab, page[0], 255, height, width), 255 / np.sqrt(2), atol=1).all()


# the residual's curve


@pytest.mark.parametrize("sampler", ["dmap", "ddpm"])
def test_levels_of_a_run_are_its_residuals_in_other_units(lab, sampler):
    guider = lab.guider()
    latents = lab.sample(guider, lab.dmap() if sampler == "dmap" else lab.stock(sampler))
    report = guider.report
    values = (lab.SIZE // 8) ** 2 * 3
    assert np.allclose(report.levels, np.array(report.residuals) / np.sqrt(values) * 127.5, rtol=1e-5)
    curve = lab.call("DMAP_ResidualCurve", guider=guider, latent={"samples": latents})
    assert curve.ndim == 4 and curve.shape[0] == 1 and curve.shape[3] == 3 and curve.min() < 0.5


def test_the_residual_of_known_noise_is_counted_from_the_noise(lab):
    """||f(x) - y|| is that of the noise where the residual is 0."""
    consistency, operators = module(lab, "dmap_core.consistency"), lab.core.operators
    y_hat, y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 16, 16)
    noisy = operators.Noisy(operators.GaussianBlur(9, 1.0), 0.1)
    found = consistency.residual_levels(noisy, noisy.distance(y_hat, y), y)
    assert torch.allclose(found, 127.5 * y_hat.flatten(1).square().mean(1).sqrt(), rtol=1e-4)
    assert consistency.residual_levels(noisy, torch.zeros(1), y).tolist() == [pytest.approx(0.2 * 127.5)]


def test_only_known_pixels_count(lab):
    consistency = module(lab, "dmap_core.consistency")
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :6] = 1
    hole = lab.core.operators.Inpainting(mask)
    y = torch.zeros(1, 3, 8, 8)
    assert consistency.residual_levels(hole, torch.tensor([2.0]), y).tolist() == [pytest.approx(127.5 * 2 / np.sqrt(48))]


def test_a_falling_residual_is_a_falling_line(lab):
    charts = module(lab, "nodes.charts")
    steps = [[100 * 0.8**i] for i in range(20)]
    page = np.asarray(charts.residual_curve(steps, [1.0], "residual")).astype(int)
    blue = np.abs(page - np.array([70, 130, 180])).sum(-1) < 8
    columns = np.flatnonzero(blue.any(axis=0))
    middle = np.array([np.flatnonzero(blue[:, c]).mean() for c in columns])
    assert len(columns) > 500 and (np.diff(middle[::20]) > 0).all()  # downwards
    orange = np.argwhere(np.abs(page - np.array([255, 140, 0])).sum(-1) < 8)
    assert len(orange) > 20 and orange[:, 1].min() > 610 and orange[:, 0].min() > middle.max() - 40


def test_residuals_without_grey_levels(lab, monkeypatch):
    """A cross-entropy of labels is shown in its own unit."""
    maps, report = module(lab, "nodes.maps"), module(lab, "nodes.host.report").Report("DMAP", "Segmentation", residuals=[[1.5], [0.5]])
    samples = torch.zeros(1, 4, 4, 4)
    setattr(samples, module(lab, "nodes.host.report").REPORT, report)
    seen = []
    monkeypatch.setattr(maps, "residual_curve", lambda *given: seen.append(given) or module(lab, "nodes.charts").residual_curve(*given))
    lab.call("DMAP_ResidualCurve", guider=None, latent={"samples": samples})
    assert seen[0][0] == [[1.5], [0.5]] and "grey levels" not in seen[0][2]


def test_a_curve_needs_a_run(lab):
    with pytest.raises(ValueError, match="Residual Curve: guider has no finished run"):
        lab.call("DMAP_ResidualCurve", guider=lab.guider(), latent=lab.empty())
