"""The work of a table run: every row on every picture, shared between the processes that `accelerate launch` starts.

Each (row, picture) is a job of its own, finished when its file is there. What a killed run has finished is never computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.fingerprint import fingerprint
from ..consistency import grey_levels, match
from ..cse.checkpoint import read_controlnet, read_description
from ..errors import Diverged
from ..metrics import PICTURE_METRICS, SET_METRICS, miou
from ..operators import Operator
from ..operators.base import size_of
from ..pictures import open_rgb, to_picture, to_tensor
from ..presets import Preset
from ..schedule import generators, randn_like
from .backend import Backend, Diffusers
from .config import AS_GIVEN, MATCHED, MIOU, Config, ConfigError, Row, solver_class
from .pictures import Picture, find_pictures
from .results import check_same, plain, read_picture_json, write_json, write_picture

log = logging.getLogger("dmap.evaluate")
FOREVER = timedelta(weeks=4)  # processes wait for each other at the end, and one may have had the slow jobs
LIMIT = 2**63  # of seeds
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} done, {remaining} left {postfix}"
Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    row: Row
    plan: Preset | None
    picture: Picture

    def file(self, out: Path) -> Path:
        """Where its figures are; the picture is beside it."""
        return out / self.row.slug() / f"{self.picture.name}.json"

    def seed(self, config: Config) -> int:
        """Of x_T. The next one is that of the steps, as in a graph, and the one after it the measurement noise's: no noise is used twice, unless stride is below SEEDS."""
        return (config.seed + config.stride * self.picture.index) % LIMIT

    def entry(self) -> dict[str, Any]:
        """What is written about it before there are figures."""
        return {"original": self.picture.identity, "metrics": {}, "plan": described(self.plan) if self.plan else None}

    def cost(self) -> float:
        """About how many guided evaluations it takes: for the time left."""
        return self.plan.solver.cost(self.plan.steps).weight() if self.plan else 0.05


def described(plan: Preset) -> dict[str, Any]:
    """A plan in plain values."""
    return {"solver": plan.solver.spec(), "steps": plan.steps, "spacing": plan.spacing, "start": plan.start, "source": plan.source}


def versions() -> dict[str, str]:
    """Of what may change a figure."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow", "torchmetrics", "lpips", "torch-fidelity"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def measurement(operator: Operator, x: Tensor, seeds: Sequence[int], rounded: bool = False) -> Tensor:
    """y of clean pictures x (B, 3, H, W), with the noise that the operator says it has. seeds: of the restorations. rounded: as a file of 8 bits holds it."""
    y = operator.measure(x)
    if operator.noise:
        y = y + operator.noise * randn_like(y, [g for seed in seeds for g in generators(seed + 2, 1)])
    return in_eight_bits(y) if rounded else y


def in_eight_bits(x: Tensor) -> Tensor:
    """Values in [-1, 1] as a picture file holds them: clamped and rounded."""
    return x.clamp(-1, 1).add(1).mul(127.5).round() / 127.5 - 1


def restored(config: Config, backend: Backend, jobs: Sequence[Job], operator: Operator, x: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """(pictures (B, 3, H, W) in [-1, 1], what each cost) of jobs of one row."""
    row, plan = jobs[0].row, jobs[0].plan
    seeds = [job.seed(config) for job in jobs]
    y = measurement(operator, x, seeds, config.rounded)
    if plan is None:
        image, costs = operator.hint(y), [{"seconds": 0.0, "denoiser_calls": 0, "decoder_calls": 0}] * len(jobs)
    else:
        image, costs = backend.restore(row, plan, operator, y, seeds)
    with torch.no_grad():
        residuals = operator.distance(operator(image), y).tolist()
        missed = misses(operator, operator(image.clamp(-1, 1)), y)
    return image, [{"residual": r} | miss | cost for r, miss, cost in zip(residuals, missed, costs, strict=True)]


def misses(operator: Operator, y_hat: Tensor, y: Tensor) -> list[dict[str, float]]:
    """`consistency.grey_levels` of every picture, for its figures; empty where there are none."""
    try:
        rms, worst = grey_levels(operator, y_hat, y)
    except NotImplementedError:
        return [{}] * len(y_hat)
    return [{"mismatch": r, "mismatch_worst": w} for r, w in zip(rms.tolist(), worst.tolist(), strict=True)]


def shared_identity(config: Config) -> dict[str, Any]:
    """Settings that decide the results of all rows."""
    return {
        name: getattr(config, name) for name in ("seed", "stride", "size", "precision", "prompt", "rounded", "tile", "distilled_guidance")
    }


RUN_DEFAULTS = {
    "stride": Config.stride,
    "rounded": Config.rounded,
    "tile": Config.tile,
    "distilled_guidance": Config.distilled_guidance,
}  # of settings that results of earlier versions do not name


def row_defaults(row: Row) -> dict[str, Any]:
    """The same for a row: earlier versions named no settings at their defaults."""
    if row.solver == AS_GIVEN:
        return {}
    described = solver_class(row.solver).described()
    return {"settings": {name: field.default for name, (field, _) in described.items() if field.default is not MISSING}, "start": Row.start}


def row_identity(
    config: Config, row: Row, plan: Preset | None, fingerprints: Callable[[Path], str], backend: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What decides a row's results. backend: its identity."""
    import hashlib

    found = {"operator": config.operator(row.operator).spec(), "solver": row.solver}
    if plan is not None:
        found |= {"settings": plan.solver.settings(), "steps": plan.steps, "spacing": plan.spacing, "start": plan.start}
        found |= {"checkpoint": fingerprints(config.checkpoint_of(row)), "prediction": row.prediction or config.prediction}
        found |= backend or {}
    for name in ("cse", "guidance"):
        if path := getattr(row, name):
            found[name] = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return plain(found)


@lru_cache
def checkpoint_identity(path: Path) -> str:
    """Name and fingerprint of a checkpoint file, or of the files of a diffusers folder."""
    from ..weights import read_tensors

    if path.is_dir():
        files = sorted(
            file
            for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
            for file in (path / part).glob("*.safetensors")
        )
        return " ".join([path.name, *(fingerprint(read_tensors(file)) for file in files)])
    return f"{path.name} {fingerprint(read_tensors(path))}"


def check_files(config: Config) -> Path:
    """The folder of pictures. Raises ConfigError for files that are not there, before anything is computed."""
    if config.images is None:
        raise ConfigError("images: no folder of pictures is given (--images)")
    needs_model = [row for row in config.rows if row.solver != AS_GIVEN]
    for row in needs_model:
        path = config.checkpoint_of(row)
        if not path.exists():
            raise ConfigError(f"checkpoint: there is no {path}")
    for row in config.rows:
        if row.cse and not row.cse.is_file():
            raise ConfigError(f"cse: there is no {row.cse} (row {row.name}); train it, or take the row out")
        if row.guidance and not row.guidance.is_file():
            raise ConfigError(f"guidance: there is no {row.guidance} (row {row.name}); name the file of a small decoder, or take it out")
    return config.images


def cse_warnings(config: Config) -> list[str]:
    """What is to be said about CSEs that were trained for another operator than their row's."""
    found = []
    for row in config.rows:
        if row.cse and (metadata := read_description(row.cse)):
            warning = metadata.other_operator(config.operator(row.operator), row.cse.name)
            found += [f"row {row.name!r} ({row.operator}): {warning}"] if warning else []
    return found


def plan_jobs(config: Config) -> list[Job]:
    """All jobs, those of one base model together, and within it picture by picture, so that an unfinished table compares equal pictures."""
    images = check_files(config)
    pictures = find_pictures(images, config.count, config.size, config.expected, config.repeats, config.unreadable, config.last)
    plans, size = {}, size_of(pictures[0].open(config.size))
    for row in config.rows:
        try:
            plans[row] = config.plan(row)
            operator = config.operator(row.operator)
            operator.check(size, config.batch)
            if plans[row]:
                plans[row].solver.check(operator, plans[row].steps)
        except ValueError as error:
            raise ConfigError(f"row {row.name!r} ({row.operator}): {error}") from error
        if MIOU in config.metrics and operator.name != "Segmentation":
            raise ConfigError(f"metrics: miou is of segmentations, and row {row.name!r} has {operator.describe()}; make a table of its own")
        if config.rounded and operator.name == "Segmentation":
            raise ConfigError(f"rounded: labels are no grey levels, and row {row.name!r} has {operator.describe()}; leave it out")
    checkpoints = list(dict.fromkeys(row.checkpoint or config.checkpoint for row in config.rows))
    jobs = [Job(row, plans[row], picture) for picture in pictures for row in config.rows]
    return sorted(jobs, key=lambda job: checkpoints.index(job.row.checkpoint or config.checkpoint))


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """The jobs in groups of up to `size` of one row, in about the same order."""
    waiting: dict[str, list[Job]] = {}
    found = []
    for job in jobs:
        group = waiting.setdefault(job.row.slug(), [])
        group.append(job)
        if len(group) == size:
            found.append(waiting.pop(job.row.slug()))
    return found + list(waiting.values())


def evaluate(config: Config, out: Path, backend: Backend | None = None) -> list[Job]:
    """Restore what is not restored yet, then measure what is not measured yet. Returns the jobs of the table. backend: diffusers' if None.

    Raises ConfigError for what cannot be run, before any of it is. A job that diverges is a figure of the table and not the end of it.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from tqdm.auto import tqdm

    jobs = plan_jobs(config)
    measures = {name: PICTURE_METRICS[name].open(config.weights) for name in config.metrics if name in PICTURE_METRICS}
    if MIOU in config.metrics:
        measures[MIOU] = miou
    for name in config.metrics:  # backbones that are missing should be known before the work and not after it
        if name in SET_METRICS:
            SET_METRICS[name].open(config.weights)
    state: Any = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=FOREVER)
    log.setLevel(logging.INFO if state.is_main_process else logging.ERROR)
    for path in {row.cse for row in config.rows if row.cse}:
        read_controlnet(path)  # a damaged one should be known before the work, too
    for warning in cse_warnings(config):
        log.warning("%s", warning)
    backend = backend or Diffusers(config, state.device)
    check_same(out / "run.json", shared_identity(config), RUN_DEFAULTS)
    identities = {
        out / row.slug() / "row.json": row_identity(config, row, jobs_plan(jobs, row), checkpoint_identity, backend.identity)
        for row in config.rows
    }
    for row, (file, identity) in zip(config.rows, identities.items(), strict=True):
        check_same(file, identity, row_defaults(row))
    if state.is_main_process:
        for file, identity in identities.items():
            write_json(file, identity)
        write_json(out / "run.json", shared_identity(config))
        write_json(out / "versions.json", versions())
    state.wait_for_everyone()
    operators = {name: config.operator(name).to(backend.device) for name in {row.operator for row in config.rows}}
    for name, measure in measures.items():
        if name != MIOU:
            measure.to(backend.device)
    todo = [job for job in jobs if unfinished(job, out, config.measured(operators[job.row.operator]))]
    state.wait_for_everyone()  # a process that looks when others are at work would see another list, and take other parts of it
    log.info("%d of %d jobs are to be done, by %d processes", len(todo), len(jobs), state.num_processes)
    with state.split_between_processes(batches(todo, config.batch)) as mine:
        total = sum(job.cost() for group in mine for job in group)
        with tqdm(total=total, desc="restoring", disable=not state.is_local_main_process, bar_format=BAR) as bar:
            for group in mine:
                bar.set_postfix_str(f"{group[0].row.operator}, {group[0].row.name}, {group[0].picture.name}")
                do(config, backend, operators[group[0].row.operator], group, out, measures)
                bar.update(sum(job.cost() for job in group))
    state.wait_for_everyone()
    return jobs


def jobs_plan(jobs: list[Job], row: Row) -> Preset | None:
    return next(job.plan for job in jobs if job.row is row)


def unfinished(job: Job, out: Path, names: Sequence[str]) -> bool:
    entry = read_picture_json(job.file(out), job.picture.identity)
    return entry is None or ("diverged" not in entry and not set(names) <= entry["metrics"].keys())


def do(config: Config, backend: Backend, operator: Operator, jobs: Sequence[Job], out: Path, measures: dict[str, Measure]) -> None:
    """Restore the pictures of jobs of one row, those that are not restored yet, and add the figures that are missing."""
    new = [job for job in jobs if read_picture_json(job.file(out), job.picture.identity) is None]
    if new:
        x = torch.cat([job.picture.open(config.size) for job in new]).to(backend.device)
        try:
            images, costs = restored(config, backend, new, operator, x)
        except Diverged as error:
            if len(new) > 1:  # find out which
                for job in new:
                    do(config, backend, operator, [job], out, measures)
            else:
                log.warning("%s on %s: %s", new[0].row.name, new[0].picture.file.name, error)
                write_json(new[0].file(out), plain(new[0].entry() | {"diverged": str(error)}))
        else:
            for job, image, cost in zip(new, images, costs, strict=True):
                write_picture(job.file(out).with_suffix(".png"), to_picture(image))
                write_json(job.file(out), plain(job.entry() | cost))
    for job in jobs:
        entry: Any = read_picture_json(job.file(out), job.picture.identity)
        missing = [] if "diverged" in entry else [name for name in config.measured(operator) if name not in entry["metrics"]]
        if missing:
            # figures are of the 8-bit picture that is there for everyone to see
            image, x = (t.to(backend.device) for t in (saved(job.file(out).with_suffix(".png")), job.picture.open(config.size)))
            matched = (
                matched_picture(operator, image, measurement(operator, x, [job.seed(config)], config.rounded))
                if _any_matched(missing)
                else image
            )
            for name in missing:
                shown = matched if name.endswith(MATCHED) else image
                pair = (operator.measure(shown), operator.measure(x)) if name == MIOU else ((shown + 1) / 2, (x + 1) / 2)
                entry["metrics"][name] = float(measures[name.removesuffix(MATCHED)](*pair))
            write_json(job.file(out), entry)


def _any_matched(names: Sequence[str]) -> bool:
    return any(name.endswith(MATCHED) for name in names)


def matched_picture(operator: Operator, image: Tensor, y: Tensor) -> Tensor:
    """The picture that explains y, as a file would hold it."""
    return in_eight_bits(match(operator, image, y).image)


def saved(file: Path) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of a restored picture."""
    return to_tensor(open_rgb(file)).unsqueeze(0)
