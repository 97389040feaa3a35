"""The studies' pictures: what is drawn, that nothing is cut off or overlaps, and how they become files."""

import ast
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dmap_core import plots as drawing
from dmap_core.studies import plots
from dmap_core.studies.diversity import Diversity, diversity
from dmap_core.studies.score import UNCONDITIONAL, ScoreErrors, ScoreMean
from dmap_core.studies.toy import BIMODAL_Y, TRUE, toy_example

ZETAS = (0.05, 0.3, 1.0, 4.8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_errors(levels=12, samples=4):
    base = 20 + 10 * torch.rand(levels, samples, generator=rng(), dtype=torch.float64)
    dps = torch.stack([base * (1 + zeta) for zeta in ZETAS])
    return ScoreErrors(torch.linspace(14.6, 0.03, levels, dtype=torch.float64), ZETAS, base, dps, 100 + 0 * base)


def score_mean(offset, k=20):
    mean = ScoreMean()
    mean.update(offset + torch.randn(k, 4, 4, 4, generator=rng()))
    return mean


def some_diversity(spread):
    images = (0.5 + spread * torch.randn(5, 3, 16, 16, generator=rng())).clamp(0, 1)
    return diversity(images)


@pytest.fixture(scope="module")
def toy():
    return toy_example(samples=40, steps=10)


ROWS = [
    (name, group, 0.3 + 0.01 * i, 0.28 + 0.01 * i, 0.33 + 0.01 * i)
    for group in ("SR x8", "inpainting")
    for i, name in enumerate(("DPS", "DMAP", "DMAP + CSE"))
]
STEPS = {
    "PSNR (dB)": [("T=500, K=1", 25.0, 24.8, 25.3), ("T=250, K=2", 25.5, 25.2, 25.9)],
    "LPIPS": [("T=500, K=1", 0.4, 0.38, 0.42), ("T=250, K=2", 0.35, 0.33, 0.37), ("T=500, K=3", 0.3, 0.28, 0.31)],
}


def every_figure(toy):
    means = {UNCONDITIONAL: score_mean(0), 0.05: score_mean(0.1), 4.8: score_mean(6), "a ControlNet, 1000 pictures": score_mean(0)}
    return {
        "score error": plots.score_error_plot(some_errors(), range(12), title="Score error, SuperResolution(scale=8), picture $1.png"),
        "score mean": plots.score_mean_plot(means),
        "diversity of one": plots.diversity_plot([("DPS", some_diversity(0.1))], title="Spread"),
        "diversity of six": plots.diversity_plot([(f"a method of a long name, {i}", some_diversity(0.1)) for i in range(6)]),
        "toy": plots.toy_plot(toy),
        "metric": drawing.metric_plot(ROWS, "LPIPS", title="32 pictures"),
        "steps": drawing.steps_plot(STEPS, title="T and K"),
    }


def test_every_picture_is_whole_and_legible(toy):
    """What is cut off would touch the border, titles that are too long would run into each other, and 10 points are 14 of 900 pixels."""
    from matplotlib.text import Text

    for name, figure in every_figure(toy).items():
        picture = drawing.render(figure)
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, name
        assert picture.shape[1] <= 900 and picture.std() > 5, name
        for border in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert (border == 255).all(), name
        titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i]), name
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 10, name


def test_the_score_error_has_a_line_and_a_band_for_every_method():
    errors = some_errors()
    axes = plots.score_error_plot(errors, range(12), title="a title").axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == [
        "unconditional",
        *(rf"DPS, $\zeta$ = {z}" for z in ("0.05", "0.3", "1", "4.8")),
        "norm of the conditional score",
    ]
    assert [line.get_linestyle() for line in lines.values()] == ["--", "-", "-", "-", "-", ":"]
    assert len({line.get_color() for line in lines.values()}) == 6
    assert len(axes.collections) == 5
    assert axes.get_yscale() == "log" and axes.get_xscale() == "linear"
    line = lines[r"DPS, $\zeta$ = 4.8"]
    np.testing.assert_allclose(line.get_ydata(), errors.dps[3].mean(1).numpy())
    np.testing.assert_allclose(line.get_xdata(), range(12))
    band = axes.collections[4].get_paths()[0].vertices
    top = errors.dps[3, 5].mean() + errors.dps[3, 5].std() / 2
    assert float(band[band[:, 0] == 5][:, 1].max()) == pytest.approx(float(top))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert axes.figure.get_suptitle() == "a title"
    assert axes.get_xlabel() == "timestep $t$"


def test_without_timesteps_the_score_error_is_over_sigma():
    axes = plots.score_error_plot(some_errors()).axes[0]
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), some_errors().sigmas.numpy())


def test_a_single_sample_has_lines_without_bands():
    figure = plots.score_error_plot(some_errors(samples=1))
    assert len(figure.axes[0].get_lines()) == 6
    assert drawing.render(figure).std() > 5


def test_a_score_mean_has_two_bars_and_a_mark():
    means = {UNCONDITIONAL: score_mean(0), 4.8: score_mean(6), "CSE": score_mean(0.1)}
    axes = plots.score_mean_plot(means).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [value for mean in means.values() for value in (mean.true_mean, mean.published)]
    marks = [float(lines.get_segments()[0][0, 1]) for lines in axes.collections]
    assert marks == pytest.approx([mean.floor for mean in means.values()])
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < min(heights) and axes.get_ylim()[1] > max(heights)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unconditional", "DPS\n$\\zeta$ = 4.8", "CSE"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["|mean over 20 samples|", "what mean 0 would show", "|mean over channels|, as published"]


def test_maps_of_deviations_share_a_scale_with_a_bar():
    entries = [("DPS", some_diversity(0.02)), ("CSE", some_diversity(0.1))]
    figure = plots.diversity_plot(entries)
    *grid, bar = figure.axes
    pictures = [axes.images[0] for axes in grid]
    assert [p.get_array().shape for p in pictures] == [(16, 16, 3)] * 2 + [(16, 16)] * 2
    assert pictures[2].get_clim() == pictures[3].get_clim()
    assert pictures[2].get_clim()[1] == pytest.approx(np.quantile(entries[1][1].std.numpy(), 0.995))
    assert "standard deviation" in bar.get_ylabel()
    for axes, (label, d) in zip(grid, entries, strict=False):
        assert axes.get_title() == f"{label}" + "\n" + f"{d.mean_std:.4f} (s.e. {d.error:.4f})"
    np.testing.assert_allclose(pictures[0].get_array(), entries[0][1].mean.permute(1, 2, 0).numpy())


def test_more_methods_than_a_row_has_go_into_the_next():
    figure = plots.diversity_plot([(str(i), some_diversity(0.1)) for i in range(6)])
    *grid, _ = figure.axes
    assert len(grid) == 16
    assert sum(len(axes.images) for axes in grid) == 12


def test_a_spread_without_error_or_without_spread_is_drawn():
    flat = Diversity(torch.full((3, 8, 8), 0.5), torch.zeros(8, 8), 0.0, math.nan, 2)
    figure = plots.diversity_plot([("DPS", flat)])
    assert figure.axes[0].get_title() == "DPS\n0.0000"
    assert drawing.render(figure).std() > 5


def test_the_toy_has_a_panel_for_every_method(toy):
    figure = plots.toy_plot(toy, title="A.4")
    assert len(figure.axes) == 4
    for axes, name in zip(figure.axes, [TRUE, "DPS", "DSG", "DMAP"], strict=True):
        samples, centres = axes.collections
        np.testing.assert_allclose(samples.get_offsets(), toy.samples[name].numpy())
        np.testing.assert_allclose(centres.get_offsets(), [[-1, -1], [1, 1]])
        assert list(axes.get_lines()[0].get_xdata()) == [0.5, 0.5]
        assert axes.get_title().startswith(f"{name}\nupper ")
    # the closed form's weights, not those of 40 samples
    assert figure.axes[0].get_title() == "true posterior\nupper 100.0 %\nlower 1.5e-03 %"
    upper = toy.summaries["DPS"].upper
    assert figure.axes[1].get_title() == f"DPS\nupper {100 * upper:.1f} %\nlower {100 - 100 * upper:.1f} %"


def test_several_toys_are_rows(toy):
    figure = plots.toy_plot(toy, toy_example(samples=10, steps=5, y=BIMODAL_Y))
    assert len(figure.axes) == 8
    assert [figure.axes[i].get_ylabel().partition("\n")[0] for i in (0, 4)] == ["y = (0.5, 0)", "y = (0, 0)"]
    assert figure.axes[4].get_title() == "true posterior\nupper 50.0 %\nlower 50.0 %"


def test_a_metric_has_a_line_for_every_row_under_its_group():
    axes = drawing.metric_plot(ROWS, "LPIPS").axes[0]
    names = [(t.get_text(), t.get_fontweight()) for t in axes.get_yticklabels()]
    methods = [("DPS", "normal"), ("DMAP", "normal"), ("DMAP + CSE", "normal")]
    assert names == [("SR x8", "bold"), *methods, ("inpainting", "bold"), *methods]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [row[2] for row in ROWS]
    assert [line.get_ydata()[0] for line in axes.get_lines()] == [1, 2, 3, 5, 6, 7]
    intervals = [tuple(lines.get_segments()[0][:, 0]) for lines in axes.collections]
    assert intervals == [row[3:] for row in ROWS]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    assert axes.get_xlabel() == "LPIPS"


def test_rows_of_a_group_come_together_and_an_empty_group_has_no_heading():
    mixed = [ROWS[0], ROWS[3], ROWS[1]]
    axes = drawing.metric_plot(mixed, "LPIPS").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["SR x8", "DPS", "DMAP", "inpainting", "DPS"]
    plain = drawing.metric_plot([("DPS", "", 1.0, math.nan, math.nan)], "PSNR")
    assert [t.get_text() for t in plain.axes[0].get_yticklabels()] == ["DPS"]
    assert drawing.render(plain).std() > 1


def test_steps_have_a_panel_for_every_metric_with_common_labels():
    figure = drawing.steps_plot(STEPS)
    assert [axes.get_xlabel() for axes in figure.axes] == list(STEPS)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["T=500, K=1", "T=250, K=2", "T=500, K=3"]
    points = [[(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()] for axes in figure.axes]
    assert points == [[(25.0, 0), (25.5, 1)], [(0.4, 0), (0.35, 1), (0.3, 2)]]


def test_a_method_has_one_colour_everywhere():
    assert drawing.colour("DPS") == drawing.colour("DPS + CSE") == drawing.colour("DPS, zeta 4.8") != drawing.colour("DMAP")
    assert drawing.colour("my method") == drawing.colour("my method") in drawing.OTHERS
    solvers = ["DPS", "DMAP", "DSG", "PSLD", "FreeDoM", "ReSample", TRUE, UNCONDITIONAL]
    assert len({drawing.colour(name) for name in solvers}) == len(solvers)
    assert plots.zeta_colour(0.01) == plots.zeta_colour(0.05) != plots.zeta_colour(0.3)
    assert plots.zeta_colour(4.8) == plots.zeta_colour(10)


def test_a_dollar_in_a_name_is_no_formula():
    figure = drawing.metric_plot([("$x_", "a $ sign$", 1.0, 0.9, 1.1)], "$")
    assert drawing.render(figure).std() > 1


def test_other_peoples_settings_neither_matter_nor_change(toy):
    import matplotlib

    expected = drawing.render(drawing.metric_plot(ROWS, "LPIPS"))
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.color": "red"}):
        before = dict(matplotlib.rcParams)
        figure = drawing.metric_plot(ROWS, "LPIPS")
        assert dict(matplotlib.rcParams) == before
    np.testing.assert_array_equal(drawing.render(figure), expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.score_mean_plot({}),
        lambda: plots.diversity_plot([]),
        plots.toy_plot,
        lambda: drawing.metric_plot([], "LPIPS"),
        lambda: drawing.steps_plot({"LPIPS": []}),
    ],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(ValueError, match="empty|at least one"):
        draw()


def test_a_saved_picture_is_the_rendered_one_and_no_part_is_left(tmp_path):
    from PIL import Image

    figure = drawing.metric_plot(ROWS, "LPIPS")
    drawing.save(figure, tmp_path / "metric.png")
    with Image.open(tmp_path / "metric.png") as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), drawing.render(figure))
    assert os.listdir(tmp_path) == ["metric.png"]


def test_a_failure_leaves_the_old_picture_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metric.png"
    path.write_bytes(b"the old one")
    figure = drawing.metric_plot(ROWS, "LPIPS")

    def half(part, **options):
        assert path.read_bytes() == b"the old one"
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        drawing.save(figure, path)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["metric.png"]


def test_without_matplotlib_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plots need matplotlib, which is not installed: pip install matplotlib"):
        drawing.metric_plot(ROWS, "LPIPS")


def test_pyplot_is_never_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails now
    assert drawing.render(drawing.metric_plot(ROWS, "LPIPS")).std() > 1


def test_matplotlib_is_imported_only_when_something_is_drawn():
    for module in (plots, drawing):
        tree = ast.parse(Path(module.__file__).read_text(encoding="ascii"))
        at_the_top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("matplotlib" in ast.unparse(node) for node in at_the_top)
