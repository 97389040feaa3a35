"""What a results folder says: means with confidence intervals, paired differences, and the paper's figures beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..metrics import PICTURE_METRICS, SET_METRICS
from ..metrics.distribution import frechet, frechet_warning, kernel
from ..metrics.interval import PLUS_MINUS, Interval, mean_interval
from .config import AS_GIVEN, MATCHED, MISMATCHES, Config, Row
from .results import csv_text, read_picture_json
from .run import Job, cse_warnings, saved

LABELS = {"miou": "mIoU"}
COSTS = {
    "residual": "residual",
    "mismatch": "mismatch (levels)",
    "mismatch_worst": "worst (levels)",
    "seconds": "seconds",
    "denoiser_calls": "denoiser calls",
    "peak_memory": "peak memory (GiB)",
}
DIMENSIONS = {"fid": 2048, "fd-efficientnet": 1280}  # of the features of Frechet distances
BATCH = 16  # pictures whose features are taken at once


@dataclass(frozen=True)
class Line:
    """A row of the finished table. values: per picture, in the order of `pictures`; diverged: how many have none. sets: FID and its like."""

    row: Row
    operator: str
    pictures: list[str]
    values: dict[str, list[float]]
    diverged: int
    sets: dict[str, tuple[float, float | None]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.values["seconds"])

    def interval(self, name: str) -> Interval:
        return mean_interval(self.values[name])


def read_lines(config: Config, jobs: Sequence[Job], out: Path) -> list[Line]:
    """A line for every row of which at least one picture is finished, or has diverged."""
    lines, features = [], Features(config)
    for row in config.rows:
        names = config.measured(config.operator(row.operator))
        found = {job.picture.name: read_picture_json(job.file(out), job.picture.identity) for job in jobs if job.row is row}
        entries = {name: e for name, e in found.items() if e and ("diverged" in e or e["metrics"].keys() >= set(names))}
        if not entries:
            continue
        pictures = [name for name, entry in entries.items() if "diverged" not in entry]
        good = [entries[name] for name in pictures]
        values = {name: [e["metrics"][name] for e in good] for name in names}
        values |= {name: [float(e[name]) for e in good] for name in ("residual", "seconds", "denoiser_calls")}
        values |= {name: [e[name] for e in good if name in e] for name in MISMATCHES}  # results of earlier versions have none
        values["peak_memory"] = [e["peak_memory"] / 2**30 for e in good if e.get("peak_memory")]
        sets = _sets(features, [job for job in jobs if job.row is row], out)
        lines.append(Line(row, config.operator(row.operator).describe(), pictures, values, len(entries) - len(good), sets))
    return lines


class Features:
    """Features of sets of pictures, on the GPU if there is one; those of the originals are computed once for all rows."""

    def __init__(self, config: Config):
        import torch

        self.config, self.device = config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.extractors: dict[str, Any] = {}
        self.originals: dict[tuple, Any] = {}

    def _of(self, name: str, pictures: Sequence[Callable[[], Any]]):
        """(n, D) of pictures that are opened when their turn comes."""
        import torch

        metric = next(metric for metric in SET_METRICS.values() if metric.features == name)
        if name not in self.extractors:
            self.extractors[name] = metric.open(self.config.weights)
            self.extractors[name].to(self.device)
        parts = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
        return torch.cat([self.extractors[name](((torch.cat([p() for p in part]) + 1) / 2).to(self.device)).cpu() for part in parts])

    def pair(self, name: str, jobs: Sequence[Job], out: Path) -> tuple[Any, Any]:
        """(those of the originals, those of the restored pictures) of finished jobs."""
        key = (name, *(job.picture for job in jobs))
        if key not in self.originals:
            self.originals[key] = self._of(name, [partial(job.picture.open, self.config.size) for job in jobs])
        return self.originals[key], self._of(name, [partial(saved, job.file(out).with_suffix(".png")) for job in jobs])


def _sets(features: Features, jobs: Sequence[Job], out: Path) -> dict[str, tuple[float, float | None]]:
    """(value, its standard deviation or None) of the metrics of whole sets for a row's jobs."""
    names = [name for name in features.config.metrics if name in SET_METRICS]
    jobs = [job for job in jobs if job.file(out).with_suffix(".png").exists()]
    if len(jobs) < 2:
        return {}
    pairs = {feature: features.pair(feature, jobs, out) for feature in {SET_METRICS[name].features for name in names}}
    found = {}
    for name in names:
        pair = pairs[SET_METRICS[name].features]
        found[name] = (frechet(*pair), None) if SET_METRICS[name].distance == "frechet" else kernel(*pair)
    return found


def columns(config: Config, lines: Sequence[Line]) -> list[str]:
    """Names of the columns that have figures."""
    given = [name for metric in config.metrics for name in (metric, metric + MATCHED)]
    names = [name for name in given if name in SET_METRICS or any(line.values.get(name) for line in lines)]
    return names + [name for name in COSTS if any(line.values[name] for line in lines)]


def label(name: str) -> str:
    if name.endswith(MATCHED):
        return label(name.removesuffix(MATCHED)) + MATCHED
    metric = PICTURE_METRICS.get(name) or SET_METRICS.get(name)
    return metric.label if metric else (LABELS | COSTS)[name]


def digits(name: str) -> int:
    name = name.removesuffix(MATCHED)
    metric = PICTURE_METRICS.get(name) or SET_METRICS.get(name)
    return (
        metric.digits
        if metric
        else {"miou": 4, "residual": 3, "mismatch": 2, "mismatch_worst": 1, "seconds": 1, "denoiser_calls": 0, "peak_memory": 2}[name]
    )


def cell(line: Line, name: str) -> str:
    d = digits(name)
    if name in SET_METRICS:
        value, spread = line.sets.get(name, (None, None))
        return "" if value is None else f"{value:.{d}f}" + (f" (sd {spread:.{d}f})" if spread is not None and spread == spread else "")
    if not line.values.get(name):
        return ""
    found = line.interval(name)
    if name in ("denoiser_calls", "peak_memory", "seconds"):
        return f"{found.mean:.{d}f}"
    return found.text(d)


def published(config: Config, line: Line, name: str) -> str:
    """The paper's figure; a distance between sets only beside one over as many pictures."""
    value = line.row.published.get(name)
    if value is None:
        return ""
    if name in SET_METRICS and line.n != config.published_n:
        return f"not comparable: n is {config.published_n or 'unknown'} there"
    return f"{value:g}"


def settings_text(job: Job) -> str:
    if job.plan is None:
        return ""
    start = [f"start {job.plan.start:g}"] if job.plan.start < 1 else []
    return ", ".join([job.plan.solver.told(), f"{job.plan.steps} steps", job.plan.spacing, *start])


def markdown(config: Config, jobs: Sequence[Job], lines: Sequence[Line]) -> str:
    """The table with what has to be said about it."""
    first = {job.row.slug(): job for job in reversed(jobs)}
    parts = [f"# {config.title or 'Results'}", config.note.strip(), figures(config, lines)]
    parts.append(
        f"Means over n pictures; +- is {PLUS_MINUS}. Seeds {config.seed}, {config.seed + config.stride} and so on, "
        f"{config.precision}. Figures are of the saved 8-bit pictures; the residual ||f(x) - y|| is of the float ones, in [-1, 1]. "
        "Seconds are wall time of one picture on the machine of the run, which may have been busy otherwise."
    )
    if any(line.row.published for line in lines):
        size = f" over {config.published_n} pictures" if config.published_n else ""
        parts.append(f"*paper*: published figures{size}, of other pictures and another model unless the settings below say the same.")
    n = max((line.n for line in lines), default=0)
    parts += [f"**Warning:** {warning}." for warning in cse_warnings(config)]
    parts += [frechet_warning(n, DIMENSIONS[name]) or "" for name in config.metrics if name in DIMENSIONS]
    parts += [
        differences(config, lines),
        "## Settings\n\n" + grid(["operator", "row", "solver", "settings", "from"], _settings(lines, first)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(config: Config, lines: Sequence[Line]) -> str:
    """The figures alone, as a Markdown table."""
    names = columns(config, lines)
    papers = {name for line in lines for name in line.row.published}
    head = ["operator", "row", "n"]
    for name in names:
        head += [label(name), "paper"] if name in papers else [label(name)]
    body = []
    for line in lines:
        cells = [line.row.operator, line.row.name, f"{line.n}{f' ({line.diverged} diverged)' if line.diverged else ''}"]
        for name in names:
            cells += [cell(line, name), published(config, line, name)] if name in papers else [cell(line, name)]
        body.append(cells)
    return grid(head, body)


def _settings(lines: Sequence[Line], first: dict[str, Job]) -> list[list[str]]:
    found = []
    for line in lines:
        job = first[line.row.slug()]
        extra = "".join(f", {what} {path.name}" for what, path in (("CSE", line.row.cse), ("model", line.row.checkpoint)) if path)
        found.append([line.operator, line.row.name, line.row.solver, settings_text(job) + extra, job.plan.source if job.plan else ""])
    return found


def differences(config: Config, lines: Sequence[Line]) -> str:
    """Paired differences to the first solver of every operator: what a comparison on the same pictures can tell, and means cannot."""
    names = [name for name in columns(config, lines) if name not in SET_METRICS and name not in COSTS]
    body = []
    for operator in dict.fromkeys(line.row.operator for line in lines):
        group = [line for line in lines if line.row.operator == operator and line.row.solver != AS_GIVEN and not line.diverged]
        for line in group[1:]:
            cells = [operator, line.row.name, group[0].row.name]
            body.append(cells + [_difference(line, group[0], name) for name in names])
    if not body:
        return ""
    return "## Paired differences\n\n" + grid(["operator", "row", "minus", *map(label, names)], body)


def paired(line: Line, first: Line, name: str) -> list[float]:
    """A metric's value minus that of another row, for every picture that both have."""
    if not (line.values.get(name) and first.values.get(name)):
        return []
    others = dict(zip(first.pictures, first.values[name], strict=True))
    return [a - others[picture] for picture, a in zip(line.pictures, line.values[name], strict=True) if picture in others]


def _difference(line: Line, first: Line, name: str) -> str:
    """Empty where no picture has both, or both are infinite."""
    values = paired(line, first, name)
    if not values or any(value != value for value in values):
        return ""
    return mean_interval(values).text(digits(name), "+")


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A bar or a line's end in a cell would break it."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(" ".join(str(cell).replace("|", "/").split()) for cell in row) + " |" for row in rows)


def table_csv(config: Config, lines: Sequence[Line]) -> str:
    """A line for every row, with all digits: mean, limits of the interval, and the paper's figure of every column."""
    records = []
    for line in lines:
        record: dict[str, Any] = {"operator": line.row.operator, "row": line.row.name, "n": line.n, "diverged": line.diverged}
        for name in columns(config, lines):
            if name in SET_METRICS:
                record[name], record[f"{name}_sd"] = line.sets.get(name, ("", ""))
            elif line.values.get(name):
                found = line.interval(name)
                record |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
            if name in line.row.published:
                record[f"{name}_paper"] = line.row.published[name]
        records.append(record)
    return csv_text(records)


def pictures_csv(config: Config, jobs: Sequence[Job], out: Path) -> str:
    """A line for every row and picture."""
    records = []
    for job in jobs:
        entry = read_picture_json(job.file(out), job.picture.identity)
        if entry is None:
            continue
        record = {
            "operator": job.row.operator,
            "row": job.row.name,
            "picture": job.picture.file.name,
            "seed": job.seed(config),
        }
        record |= {name: entry.get(name, "") for name in COSTS} | entry["metrics"] | {"diverged": entry.get("diverged", "")}
        records.append(record)
    return csv_text(records)
