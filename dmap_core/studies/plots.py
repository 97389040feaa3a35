"""Pictures of the studies' results, as matplotlib Figures that belong to no window and no global state.

Every function takes what `score`, `diversity`, `toy` or a table gives and returns a Figure, 9 inches and 900 pixels wide (less for one
or two pictures); `render` and `save` make it pixels. A method has the same colour in every picture, one that colour-blind people can tell
from the others: most are those of Okabe and Ito (2008). Raises ValueError if matplotlib is missing.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..files import write_whole
from .diversity import Diversity
from .score import UNCONDITIONAL, ScoreErrors, ScoreMean, mean_and_error
from .toy import CENTRES, TRUE, Toy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
DPI = 100
FONT = 12.0  # points: 17 pixels of 900
COLOURS = {
    UNCONDITIONAL: "#4d4d4d",
    TRUE: "#000000",
    "DPS": "#0072b2",
    "DMAP": "#d55e00",
    "DSG": "#e69f00",
    "PSLD": "#cc79a7",
    "FreeDoM": "#56b4e9",
    "ReSample": "#009e73",
    "StableSR": "#7a6a00",
    "CSE": "#7a6a00",
}
OTHERS = ("#332288", "#117733", "#882255", "#44aa99", "#999933", "#aa4499")
ZETAS = (0.05, 4.8)  # of Fig. 1: the ends of DPS's colour ramp
MARKERS = "osD^vPX*"
COLUMNS = 4  # pictures side by side, of the diversity
STYLE = {
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "legend.fontsize": FONT - 1,
    "figure.titlesize": FONT + 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e2e2",
    "legend.frameon": False,
}

Interval = tuple[str, float, float, float]  # label, mean, low, high


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
    except ImportError:
        raise ValueError("plots need matplotlib, which is not installed: pip install matplotlib") from None
    return matplotlib


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """`draw` with matplotlib's defaults and STYLE, whatever somebody else in the process has set."""

    @functools.wraps(draw)
    def styled(*args, **options):
        with _matplotlib().style.context([STYLE], after_reset=True):
            return draw(*args, **options)

    return styled


def colour(name: str) -> str:
    """A method's colour: that of its name or of its first word ("DPS + CSE" has DPS's), otherwise one of OTHERS, always the same."""
    known = COLOURS.get(name) or COLOURS.get(re.split(r"\W", name, maxsplit=1)[0])
    return known or OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]


def zeta_colour(zeta: float) -> tuple[float, float, float, float]:
    """The colour of DPS with that zeta where several are compared: from green, 0.05 and less, to dark violet, 4.8 and more."""
    low, high = ZETAS
    part = math.log(max(zeta, low) / low) / math.log(high / low)
    return _matplotlib().colormaps["viridis_r"](0.3 + 0.7 * min(part, 1.0))


def _figure(height: float, title: str, width: float = WIDTH) -> Figure:
    figure = _matplotlib().figure.Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(_wrapped(title, int(70 * width / WIDTH)))
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(_plain(line), width, break_long_words=False) for line in text.split("\n"))


def _zeta_label(zeta: float) -> str:
    return rf"DPS, $\zeta$ = {zeta:g}"


def _percent(part: float) -> str:
    """A part of 1 in percent; very small ones in powers of ten, for they are not 0."""
    return f"{100 * part:.1f} %" if part == 0 or part >= 5e-4 else f"{100 * part:.1e} %"


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 else f"{value:.3g}"


@_styled
def score_error_plot(errors: ScoreErrors, timesteps: Sequence[float] | Tensor | None = None, title: str = "") -> Figure:
    """Fig. 1: a line for every method over t, or over sigma without `timesteps` (T,), with a band of one standard error; log y.

    The unconditional score's is dashed; the dotted line is the norm of the conditional score itself.
    """
    figure = _figure(5.4, title)
    axes = figure.subplots()
    x = errors.sigmas.numpy() if timesteps is None else np.array([float(t) for t in timesteps])
    spacing = max(1, len(x) // 10)
    for i, (method, zeta, values) in enumerate(errors.methods()):
        means, deviations = (v.numpy() for v in mean_and_error(values))
        shade = colour(method) if zeta is None else zeta_colour(zeta)
        axes.plot(
            x,
            means,
            color=shade,
            linestyle="--" if zeta is None else "-",
            linewidth=2,
            marker=MARKERS[i % len(MARKERS)],
            markersize=6,
            markevery=spacing,
            label=method if zeta is None else _zeta_label(zeta),
        )
        # a log axis has no place for what a wide band has below 0
        axes.fill_between(x, np.maximum(means - deviations, means * 1e-2), means + deviations, color=shade, alpha=0.2, linewidth=0)
    axes.plot(
        x, errors.conditional_norm.mean(1).numpy(), color="#9a9a9a", linestyle=":", linewidth=2, label="norm of the conditional score"
    )
    axes.set_yscale("log")
    if timesteps is None:
        axes.set_xscale("log")
    axes.set_xlabel(r"noise level $\sigma$" if timesteps is None else "timestep $t$")
    axes.set_ylabel("score error, l2 norm")
    _legend_above(axes, columns=3)
    return figure


def _legend_above(axes: Any, columns: int, **options) -> None:
    """Outside the axes, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, **options)


@_styled
def score_mean_plot(means: Mapping[str | float, ScoreMean], title: str = "") -> Figure:
    """Table 2 as bars, log y: the mean over samples with the mark of what a score of mean 0 shows, and the statistic that the paper gives.

    means: as from `score_means`, numbers standing for DPS's zeta, with other models' scores under their names. k >= 2 samples in each.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not means:
        raise ValueError("means is empty; give at least one ScoreMean")
    figure = _figure(5.4, title)
    axes = figure.subplots()
    values = []
    for i, (key, mean) in enumerate(means.items()):
        shade = zeta_colour(key) if isinstance(key, float) else colour(key)
        bars = [
            *axes.bar(i - 0.2, mean.true_mean, 0.36, color=shade),
            *axes.bar(i + 0.2, mean.published, 0.36, facecolor="white", edgecolor=shade, hatch="///", linewidth=1.5),
        ]
        axes.hlines(mean.floor, i - 0.42, i + 0.02, color="black", linewidth=2.5)
        for bar in bars:
            # above the mark, should the two be close
            height = max(bar.get_height(), mean.floor if bar is bars[0] else 0)
            place = (bar.get_x() + bar.get_width() / 2, height)
            axes.annotate(_number(bar.get_height()), place, (0, 3), textcoords="offset points", ha="center", fontsize=FONT - 2)
        values += [mean.true_mean, mean.published, mean.floor]
    width = max(8, 76 // len(means))
    axes.set_xticks(
        range(len(means)), [_zeta_label(key).replace(", ", "\n") if isinstance(key, float) else _wrapped(key, width) for key in means]
    )
    axes.set_yscale("log")
    axes.set_ylim(min(v for v in values if v > 0) / 2, max(values) * 2)
    axes.grid(False, axis="x")
    axes.set_ylabel("mean of the score")
    samples = sorted({mean.k for mean in means.values()})
    legend = [
        Patch(facecolor="#808080", label=f"|mean over {' or '.join(map(str, samples))} samples|"),
        Line2D([], [], color="black", linewidth=2.5, label="what mean 0 would show"),
        Patch(facecolor="white", edgecolor="#808080", hatch="///", label="|mean over channels|, as published"),
    ]
    _legend_above(axes, columns=3, handles=legend, handlelength=1.5, columnspacing=1.2)
    return figure


@_styled
def diversity_plot(entries: Sequence[tuple[str, Diversity]], title: str = "") -> Figure:
    """Fig. 3 and Table 3: every method's mean picture and, below, its deviations, all on one scale; the mean deviation in the title."""
    if not entries:
        raise ValueError("entries is empty; give at least one (label, Diversity)")
    columns = min(COLUMNS, len(entries))
    blocks = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    height, width = entries[0][1].std.shape
    cell = min(3.2, (WIDTH - 1.2) / columns)
    figure = _figure(len(blocks) * (2 * cell * min(height / width, 1.5) + 0.7) + 0.5, title, columns * cell + 1.2)
    grid = figure.subplots(2 * len(blocks), columns, squeeze=False)
    # the few largest values would leave the rest of the maps dark
    top = max(float(np.quantile(d.std.numpy(), 0.995)) for _, d in entries) or 1.0
    figure.get_layout_engine().set(hspace=0, h_pad=0.06)
    for axes in grid.flat:
        axes.axis("off")
    for row, block in enumerate(blocks):
        for column, (label, d) in enumerate(block):
            above, below = grid[2 * row, column], grid[2 * row + 1, column]
            above.imshow(d.mean.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            error = "" if math.isnan(d.error) else rf" $\pm$ {d.error:.4f}"
            above.set_title(f"{_wrapped(label, 64 // columns)}\n{d.mean_std:.4f}{error}")
            shown = below.imshow(d.std.numpy(), vmin=0, vmax=top, cmap="magma", interpolation="nearest")
    bar = figure.colorbar(shown, ax=grid, extend="max", extendfrac=0.02, fraction=0.03, pad=0.02, aspect=20 * len(grid))
    bar.set_label("standard deviation of a pixel (black 0, white 1)")
    return figure


@_styled
def toy_plot(*toys: Toy, title: str = "") -> Figure:
    """Fig. 8: every method's samples, the centres of the prior and the line f(x) = y; a row of panels for every toy.

    The titles give the parts of the modes: counted, and of the true posterior in closed form.
    """
    if not toys:
        raise ValueError("toy_plot needs at least one Toy")
    panels = max(len(toy.samples) for toy in toys)
    figure = _figure(2.95 * len(toys) + 0.65 + 0.3 * bool(title), title)
    grid = figure.subplots(len(toys), panels, sharex=True, sharey=True, squeeze=False)
    for row, toy in zip(grid, toys, strict=True):
        for axes, (name, points) in zip(row, toy.samples.items(), strict=False):
            _toy_panel(axes, toy, name, points.numpy())
        row[0].set_ylabel(f"y = ({toy.y[0]:g}, 0)\nunseen coordinate")
    for axes in grid[-1]:
        axes.set_xlabel("seen coordinate")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), handletextpad=0.3)
    return figure


def _toy_panel(axes: Any, toy: Toy, name: str, points: np.ndarray) -> None:
    axes.scatter(*points.T, s=7, color=colour(name), alpha=0.3, linewidths=0)
    axes.axvline(toy.y[0], color="#666666", linestyle="--", linewidth=1.2, label="f(x) = y")
    axes.scatter(
        *np.transpose(CENTRES), marker="X", s=70, color="white", edgecolors="black", linewidths=1.2, zorder=3, label="centres of the prior"
    )
    summary = toy.true if name == TRUE else toy.summaries[name]
    upper, lower = (float(toy.weights[1]), float(toy.weights[0])) if name == TRUE else (summary.upper, 1 - summary.upper)
    axes.set_title(f"{name}\nupper {_percent(upper)}\nlower {_percent(lower)}")
    axes.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal", xticks=(-2, -1, 0, 1, 2), yticks=(-2, -1, 0, 1, 2))


@_styled
def metric_plot(rows: Sequence[tuple[str, str, float, float, float]], label: str, title: str = "") -> Figure:
    """A table's column: (method, group, mean, low, high) as points with confidence intervals, top to bottom, under the groups' names.

    Rows of a group stand together. NaN for low and high draws no interval. label: the metric's name, with its unit and which way is better.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one (label, group, mean, low, high)")
    groups = {group: [row for row in rows if row[1] == group] for group in dict.fromkeys(row[1] for row in rows)}
    lines = len(rows) + sum(1 for group in groups if group)
    figure = _figure(0.36 * lines + 1.3 + 0.4 * bool(title), title)
    axes = figure.subplots()
    ticks: list[tuple[float, str, bool]] = []
    place = 0
    for group, members in groups.items():
        if group:
            axes.axhspan(place - 0.42, place + 0.42, color="#f0f0f0", linewidth=0, zorder=0)
            ticks.append((place, _plain(group), True))
            place += 1
        for name, _, mean, low, high in members:
            _interval(axes, place, mean, low, high, colour(name))
            ticks.append((place, _plain(name), False))
            place += 1
    _name_lines(axes, ticks, place)
    axes.set_xlabel(_plain(label))
    return figure


@_styled
def steps_plot(series: Mapping[str, Sequence[Interval]], title: str = "") -> Figure:
    """Table 5: a panel for every metric, in it (label, mean, low, high) of every pair of T and K. The labels are shared."""
    if not series or not all(series.values()):
        raise ValueError("series is empty or has a metric without values; give (label, mean, low, high) for every metric")
    labels = list(dict.fromkeys(name for intervals in series.values() for name, *_ in intervals))
    columns = 2 if len(series) in (2, 4) else min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = _figure(rows * (0.36 * len(labels) + 1.1) + 0.5 * bool(title), title)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (metric, intervals) in zip(grid.flat, series.items(), strict=False):
        for name, mean, low, high in intervals:
            _interval(axes, labels.index(name), mean, low, high, colour(name))
        axes.set_xlabel(_wrapped(metric, 66 // columns))
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
    for axes in grid.flat[len(series) :]:
        axes.set_axis_off()
    _name_lines(grid[0, 0], [(i, _plain(name), False) for i, name in enumerate(labels)], len(labels))
    return figure


def _interval(axes: Any, place: float, mean: float, low: float, high: float, shade: Any) -> None:
    axes.hlines(place, low, high, color=shade, linewidth=2.5)
    axes.plot([mean], [place], marker="o", markersize=8, color=shade, markeredgecolor="white", linestyle="none")


def _name_lines(axes: Any, ticks: list[tuple[float, str, bool]], count: int) -> None:
    """Names beside the lines of a table drawn from top to bottom; those of groups are bold."""
    axes.set_yticks([place for place, _, _ in ticks], [name for _, name, _ in ticks])
    axes.set_ylim(count - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    for text, (_, _, bold) in zip(axes.get_yticklabels(), ticks, strict=True):
        text.set_fontweight("bold" if bold else "normal")


def render(figure: Figure) -> np.ndarray:
    """The picture, (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: Path | str) -> None:
    """Writes a PNG file; whoever reads `path` meanwhile, or after a failure, finds the one before it or none, but not a part of one."""
    write_whole(Path(path), lambda part: figure.savefig(part, format="png", dpi=DPI))
