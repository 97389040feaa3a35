"""Plots as matplotlib Figures that belong to no window and no global state: their look, the columns of tables, and how they become files.

Every function that draws returns a Figure, 9 inches and 900 pixels wide (less for one or two pictures); `render` and `save` make it pixels.
A method has the same colour in every picture, one that colour-blind people can tell from the others: most are those of Okabe and Ito (2008).
matplotlib is imported when something is drawn. Raises ValueError if it is missing.
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

from .files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
DPI = 100
FONT = 12.0  # points: 17 pixels of 900
COLOURS = {
    "unconditional": "#4d4d4d",
    "true posterior": "#000000",
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


def library() -> Any:
    """matplotlib, or a ValueError that says how to install it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
    except ImportError:
        raise ValueError("plots need matplotlib, which is not installed: pip install matplotlib") from None
    return matplotlib


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """`draw` with matplotlib's defaults and STYLE, whatever somebody else in the process has set."""

    @functools.wraps(draw)
    def with_style(*args, **options):
        with library().style.context([STYLE], after_reset=True):
            return draw(*args, **options)

    return with_style


def colour(name: str) -> str:
    """A method's colour: that of its name or of its first word ("DPS + CSE" has DPS's), otherwise one of OTHERS, always the same."""
    known = COLOURS.get(name) or COLOURS.get(re.split(r"\W", name, maxsplit=1)[0])
    return known or OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]


def new_figure(height: float, title: str, width: float = WIDTH) -> Figure:
    figure = library().figure.Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(wrapped(title, int(70 * width / WIDTH)))
    return figure


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(plain(line), width, break_long_words=False) for line in text.split("\n"))


@styled
def metric_plot(rows: Sequence[tuple[str, str, float, float, float]], label: str, title: str = "") -> Figure:
    """A table's column: (method, group, mean, low, high) as points with confidence intervals, top to bottom, under the groups' names.

    Rows of a group stand together. NaN for low and high draws no interval. label: the metric's name, with its unit and which way is better.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one (label, group, mean, low, high)")
    groups = {group: [row for row in rows if row[1] == group] for group in dict.fromkeys(row[1] for row in rows)}
    lines = len(rows) + sum(1 for group in groups if group)
    figure = new_figure(0.36 * lines + 1.3 + 0.4 * bool(title), title)
    axes = figure.subplots()
    ticks: list[tuple[float, str, bool]] = []
    place = 0
    for group, members in groups.items():
        if group:
            axes.axhspan(place - 0.42, place + 0.42, color="#f0f0f0", linewidth=0, zorder=0)
            ticks.append((place, plain(group), True))
            place += 1
        for name, _, mean, low, high in members:
            _interval(axes, place, mean, low, high, colour(name))
            ticks.append((place, plain(name), False))
            place += 1
    _name_lines(axes, ticks, place)
    axes.set_xlabel(plain(label))
    return figure


@styled
def steps_plot(series: Mapping[str, Sequence[Interval]], title: str = "") -> Figure:
    """Table 5: a panel for every metric, in it (label, mean, low, high) of every pair of T and K. The labels are shared."""
    if not series or not all(series.values()):
        raise ValueError("series is empty or has a metric without values; give (label, mean, low, high) for every metric")
    labels = list(dict.fromkeys(name for intervals in series.values() for name, *_ in intervals))
    columns = 2 if len(series) in (2, 4) else min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = new_figure(rows * (0.36 * len(labels) + 1.1) + 0.5 * bool(title), title)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (metric, intervals) in zip(grid.flat, series.items(), strict=False):
        for name, mean, low, high in intervals:
            _interval(axes, labels.index(name), mean, low, high, colour(name))
        axes.set_xlabel(wrapped(metric, 66 // columns))
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
    for axes in grid.flat[len(series) :]:
        axes.set_axis_off()
    _name_lines(grid[0, 0], [(i, plain(name), False) for i, name in enumerate(labels)], len(labels))
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
