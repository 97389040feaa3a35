"""Pictures of the studies' results, drawn as `dmap_core.plots` draws.

Every function takes what `score`, `diversity`, `toy` or `spread` gives and returns a Figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..plots import FONT, WIDTH, colour, library, new_figure, styled, wrapped
from .diversity import Diversity
from .score import ScoreErrors, ScoreMean, mean_and_error
from .spread import PARTS, Spread
from .toy import CENTRES, TRUE, Toy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZETAS = (0.05, 4.8)  # of Fig. 1: the ends of DPS's colour ramp
MARKERS = "osD^vPX*"
COLUMNS = 4  # pictures side by side, of the diversity


def zeta_colour(zeta: float) -> tuple[float, float, float, float]:
    """The colour of DPS with that zeta where several are compared: from green, 0.05 and less, to dark violet, 4.8 and more."""
    low, high = ZETAS
    part = math.log(max(zeta, low) / low) / math.log(high / low)
    return library().colormaps["viridis_r"](0.3 + 0.7 * min(part, 1.0))


def _zeta_label(zeta: float) -> str:
    return rf"DPS, $\zeta$ = {zeta:g}"


def _percent(part: float) -> str:
    """A part of 1 in percent; very small ones in powers of ten, for they are not 0."""
    return f"{100 * part:.1f} %" if part == 0 or part >= 5e-4 else f"{100 * part:.1e} %"


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 else f"{value:.3g}"


@styled
def score_error_plot(errors: ScoreErrors, timesteps: Sequence[float] | Tensor | None = None, title: str = "") -> Figure:
    """Fig. 1: a line for every method over t, or over sigma without `timesteps` (T,), with a band of one standard error; log y.

    The unconditional score's is dashed; the dotted line is the norm of the conditional score itself.
    """
    figure = new_figure(5.4, title)
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


@styled
def score_mean_plot(means: Mapping[str | float, ScoreMean], title: str = "") -> Figure:
    """Table 2 as bars, log y: the mean over samples with the mark of what a score of mean 0 shows, and the statistic that the paper gives.

    means: as from `score_means`, numbers standing for DPS's zeta, with other models' scores under their names. k >= 2 samples in each.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not means:
        raise ValueError("means is empty; give at least one ScoreMean")
    figure = new_figure(5.4, title)
    axes = figure.subplots()
    values = []
    for i, (key, mean) in enumerate(means.items()):
        shade = colour(key) if isinstance(key, str) else zeta_colour(key)
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
        range(len(means)), [wrapped(key, width) if isinstance(key, str) else _zeta_label(key).replace(", ", "\n") for key in means]
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


@styled
def diversity_plot(entries: Sequence[tuple[str, Diversity]], title: str = "") -> Figure:
    """Fig. 3 and Table 3: every method's mean picture and, below, its deviations, all on one scale; the mean deviation in the title, with its standard error."""
    if not entries:
        raise ValueError("entries is empty; give at least one (label, Diversity)")
    columns = min(COLUMNS, len(entries))
    blocks = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    height, width = entries[0][1].std.shape
    cell = min(3.2, (WIDTH - 1.2) / columns)
    figure = new_figure(len(blocks) * (2 * cell * min(height / width, 1.5) + 0.7) + 0.5, title, columns * cell + 1.2)
    grid = figure.subplots(2 * len(blocks), columns, squeeze=False)
    # the few largest values would leave the rest of the maps dark
    top = max(float(np.quantile(d.std.numpy(), 0.995)) for _, d in entries) or 1.0
    figure.set_layout_engine("constrained", hspace=0, h_pad=0.06)
    for axes in grid.flat:
        axes.axis("off")
    for row, block in enumerate(blocks):
        for column, (label, d) in enumerate(block):
            above, below = grid[2 * row, column], grid[2 * row + 1, column]
            above.imshow(d.mean.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            error = "" if math.isnan(d.error) else f" (s.e. {d.error:.4f})"
            above.set_title(f"{wrapped(label, 64 // columns)}\n{d.mean_std:.4f}{error}")
            shown = below.imshow(d.std.numpy(), vmin=0, vmax=top, cmap="magma", interpolation="nearest")
    bar = figure.colorbar(shown, ax=grid, extend="max", extendfrac=0.02, fraction=0.03, pad=0.02, aspect=20 * len(grid))
    bar.set_label("standard deviation of a pixel (black 0, white 1)")
    return figure


@styled
def toy_plot(*toys: Toy, title: str = "") -> Figure:
    """Fig. 8: every method's samples, the centres of the prior and the line f(x) = y; a row of panels for every toy.

    The titles give the parts of the modes: counted, and of the true posterior in closed form.
    """
    if not toys:
        raise ValueError("toy_plot needs at least one Toy")
    panels = max(len(toy.samples) for toy in toys)
    figure = new_figure(2.95 * len(toys) + 0.65 + 0.3 * bool(title), title)
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


@styled
def spread_plot(spread: Spread, title: str = "") -> Figure:
    """Above the methods' deviations over the posterior's, log; below what their 90 % intervals held, with the binomial limits; a column for every problem."""
    from matplotlib import ticker

    if not spread.found:
        raise ValueError("spread_plot needs at least one problem")
    rows, columns = spread.rows(), len(spread.found)
    methods = list(dict.fromkeys(m for found in sorted(spread.found.values(), key=len, reverse=True) for m in found))
    figure = new_figure(2 * (0.28 * len(methods) + 0.9) + 0.6, title)
    grid = figure.subplots(2, columns, sharey=True, squeeze=False)
    for problem, (above, below) in zip(spread.found, grid.T, strict=True):
        own = [row for row in rows if row["problem"] == problem]
        places = np.array([methods.index(row["method"]) for row in own])  # some problems lack some methods
        for part, shift, shade in zip(PARTS, (-0.17, 0.17), ("#4477aa", "#cc6677"), strict=True):
            share, low, high = (np.array([row[f"coverage_90_{part}{end}"] for row in own]) for end in ("", "_low", "_high"))
            above.plot([max(row[f"ratio_{part}"], 1e-2) for row in own], places + shift, "o", color=shade, label=part)
            below.errorbar(share, places + shift, xerr=np.stack([share - low, high - share]), fmt="o", color=shade, label=part)
        above.axvline(1, color="black", linewidth=1)
        below.axvline(0.9, color="black", linewidth=1)
        above.set_xscale("log")
        low, high = above.get_xlim()
        above.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 8) if high < 10 * low else (1,)))
        above.xaxis.set_major_formatter("{x:g}")
        above.xaxis.set_minor_formatter(ticker.NullFormatter())
        above.set_yticks(range(len(methods)), methods)
        above.set_title(problem)
        above.set_xlabel("deviation / true")
        below.set_xlabel("90 % intervals hold")
        below.set_xlim(-0.02, 1.02)
    grid[0][0].invert_yaxis()
    if columns > 1:
        for axes in grid[:, 1:].flat:
            axes.tick_params(labelleft=False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
