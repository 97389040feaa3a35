"""The files of a finished, or half finished, table run: table.md, table.csv, pictures.csv, plots and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageFont

from .. import plots
from ..files import file_name
from ..metrics import SET_METRICS
from ..pictures import Layout, Tile, open_rgb, to_picture
from ..pictures import sheet as painted
from .config import Config
from .results import write_picture, write_text
from .run import Job, measurement
from .tables import Line, columns, label, markdown, pictures_csv, read_lines, table_csv

SHEET_PICTURES = 4
GAP, TEXT = 6, 13
UNPLOTTED = ("denoiser_calls", "peak_memory", "mismatch_worst")


def write_table(config: Config, jobs: Sequence[Job], out: Path) -> list[Line]:
    """Everything that can be said about what is finished by now."""
    lines = read_lines(config, jobs, out)
    write_text(out / "table.md", markdown(config, jobs, lines))
    write_text(out / "table.csv", table_csv(config, lines))
    write_text(out / "pictures.csv", pictures_csv(config, jobs, out))
    write_plots(config, lines, out)
    for operator in dict.fromkeys(line.row.operator for line in lines):
        write_picture(out / f"pictures-{file_name(operator)}.png", sheet(config, jobs, lines, operator, out))
    return lines


def write_plots(config: Config, lines: Sequence[Line], out: Path) -> None:
    """A picture of means and intervals for every column."""
    for name in columns(config, lines):
        if name in UNPLOTTED or name in SET_METRICS:
            continue
        points = [(line.row.name, line.row.operator, *_limits(line, name)) for line in lines if line.values.get(name)]
        if points:
            (out / "plots").mkdir(exist_ok=True)
            plots.save(plots.metric_plot(points, label(name)), out / "plots" / f"{name}.png")


def _limits(line: Line, name: str) -> tuple[float, float, float]:
    found = line.interval(name)
    return found.mean, found.low, found.high


def sheet(config: Config, jobs: Sequence[Job], lines: Sequence[Line], operator: str, out: Path) -> Image.Image:
    """A picture with a row for each of the first originals: the measurement, what every row made of it, and the original."""
    rows = [line.row for line in lines if line.row.operator == operator]
    pictures = list(dict.fromkeys(job.picture for job in jobs))[:SHEET_PICTURES]
    originals = {picture: picture.open(config.size) for picture in pictures}
    height, width = originals[pictures[0]].shape[-2:]
    files = {(job.row.slug(), job.picture): job.file(out).with_suffix(".png") for job in jobs}
    f, shown = config.operator(operator), []
    for picture in pictures:
        y = measurement(f, originals[picture], [next(job for job in jobs if job.picture == picture).seed(config)])
        tiles = [to_picture(f.picture(y)[0]).resize((width, height), Image.Resampling.NEAREST)]
        for row in rows:
            file = files[row.slug(), picture]
            tiles.append(open_rgb(file) if file.exists() else Image.new("RGB", (width, height), "lightgray"))
        shown.append([Tile(tile) for tile in (*tiles, to_picture(originals[picture][0]))])
    font = ImageFont.load_default(size=TEXT)
    layout = Layout((width, height), (GAP, GAP), (GAP, 2 * TEXT, GAP, TEXT + GAP), head=TEXT // 2, font=font)
    return painted(shown, layout, heads=["measurement", *(row.name for row in rows), "original"])
