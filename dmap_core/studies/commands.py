"""The studies of the paper's observations on the command line: `score-error`, `score-mean`, `diversity`, `toy` and `spread`."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cse.settings import PRECISIONS
from ..plots import save
from .score import PAPER_ZETAS

log = logging.getLogger("dmap.studies")
MOST = {"steps": 10**6, "repeats": 4096, "samples": 10**8, "batch": 4096, "size": 16_384}  # more cannot have been meant


def add_parsers(commands: argparse._SubParsersAction, formatter: type) -> None:
    error = commands.add_parser(
        "score-error", help="Observation I, Fig. 1: how far DPS's score is from a conditional model's", formatter_class=formatter
    )
    _add_problem(error, cse_required=True)
    error.add_argument("--steps", type=int, default=100, help="noise levels (default: 100)")
    error.add_argument("--repeats", type=int, default=4, help="draws of the noise at every level (default: 4)")
    error.set_defaults(function=score_error)

    mean = commands.add_parser("score-mean", help="Observation II, Table 2: the mean of DPS's score at x_T", formatter_class=formatter)
    _add_problem(mean, cse_required=False)
    mean.add_argument("--steps", type=int, default=500, help="of the schedule whose first step is looked at (default: 500, the paper's)")
    mean.add_argument("--samples", type=int, default=1000, help="draws of x_T (default: 1000, the paper's)")
    mean.add_argument("--batch", type=int, default=1, help="of them at a time (default: 1)")
    mean.set_defaults(function=score_mean)

    from ..evaluate.command import add_arguments

    spread = commands.add_parser(
        "diversity",
        help="Observation III, Fig. 3: how different the restorations of one picture are",
        description="Restores every picture --repeats times, each with a seed of its own, as `evaluate` does (rows, resuming, several processes), "
        "and writes means and standard deviations per pixel.",
        formatter_class=formatter,
    )
    add_arguments(spread)
    spread.add_argument("--repeats", type=int, help="restorations of every picture (the paper's: 50)")
    spread.set_defaults(function=diversity)

    toy = commands.add_parser(
        "toy", help="A.4, Fig. 8: two Gaussians in the plane, of which everything is known", formatter_class=formatter
    )
    toy.add_argument("--out", type=Path, required=True, help="folder for the results")
    toy.add_argument("--samples", type=int, default=1000, help="of every method (default: 1000)")
    toy.add_argument("--zeta", type=float, default=0.05, help="of DPS (default: 0.05, the paper's)")
    toy.add_argument("--seed", type=int, default=0)
    toy.set_defaults(function=toy_example)

    known = commands.add_parser(
        "spread",
        help="Observation III where the posterior is known: coverage, deviations and distances of every solver",
        formatter_class=formatter,
    )
    known.add_argument("--out", type=Path, required=True, help="folder for the results")
    known.add_argument("--draws", type=int, default=200, help="truths that are measured and restored (default: 200)")
    known.add_argument("--versions", type=int, default=39, help="restorations of each: 39, 79, 119, ... (default: 39)")
    known.add_argument("--steps", type=int, default=100, help="noise levels (default: 100)")
    known.add_argument("--problems", default="", help="plane, averaging or inpainting, with commas (default: all)")
    known.add_argument("--solvers", default="", help='with semicolons, such as "DPS; DMAP; DAPS, gradient" (default: all that there are)')
    known.add_argument("--seed", type=int, default=0)
    known.set_defaults(function=spread_study)


def _add_problem(p: argparse.ArgumentParser, cse_required: bool) -> None:
    p.add_argument("--checkpoint", type=Path, required=True, help="the base model: a .safetensors or .ckpt file, or a diffusers folder")
    p.add_argument("--picture", type=Path, required=True, help="a clean picture")
    p.add_argument("--operator", required=True, help="the degradation, as JSON or a .json file")
    p.add_argument("--out", type=Path, required=True, help="folder for the results")
    p.add_argument("--cse", type=Path, required=cse_required, help="a ControlNet: the conditional model to compare with")
    p.add_argument("--zeta", default=Options.zeta, help=f"of DPS, with commas (default: {Options.zeta})")
    p.add_argument("--spacing", default="paper", help="of the noise levels: paper, exponential or karras (default: paper)")
    p.add_argument("--size", type=int, help="resize and centre-crop the picture to this")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the denoiser (default: fp32)")
    p.add_argument("--prompt", default="", help="default: empty, the paper's")
    p.add_argument("--distilled-guidance", type=float, help="of models that read one, such as Flux.1 dev (default: 3.5)")
    p.add_argument("--weights", type=Path, help="folder with the weights of learned operators")


@dataclass(frozen=True)
class Options:
    """What the studies of scores look at.

    checkpoint: the base model, picture: a clean one, operator: JSON or a .json file; cse: the conditional model to compare with. zeta: numbers
    with commas between them. steps: noise levels of the schedule. size: resize and centre-crop the picture to this. weights: a folder.
    distilled_guidance: of base models that read one; None: their usual one.
    """

    checkpoint: Path
    picture: Path
    operator: str
    steps: int
    cse: Path | None = None
    zeta: str = ",".join(map(str, PAPER_ZETAS))
    spacing: str = "paper"
    size: int | None = None
    seed: int = 0
    precision: str = "fp32"
    prompt: str = ""
    weights: Path | None = None
    distilled_guidance: float | None = None


class Problem:
    """A picture's measurement, the prior, and the conditional model if there is a CSE. Raises ValueError for what cannot be."""

    def __init__(self, options: Options):
        import torch

        from ..backends.diffusers_files import open_base
        from ..cse.options import read_operator
        from ..cse.use import hint_for, open_cse
        from ..evaluate.pictures import Picture
        from ..evaluate.run import measurement
        from ..operators.base import size_of
        from ..prior import DTYPES
        from ..schedule import SPACINGS

        if options.spacing not in SPACINGS:
            raise ValueError(f"--spacing is {options.spacing!r}; it must be one of {', '.join(SPACINGS)}")
        for name, path in (("checkpoint", options.checkpoint), ("picture", options.picture), ("cse", options.cse)):
            if path is not None and not path.exists():
                raise ValueError(f"--{name}: there is no {path}")
        self.zetas = zetas(options.zeta)
        check_numbers(steps=options.steps, size=options.size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.operator = read_operator(options.operator, options.weights).to(device)
        self.x = Picture(options.picture, 0).open(options.size).to(device)
        self.operator.check(size_of(self.x))
        self.y = measurement(self.operator, self.x, [options.seed])
        self.base = open_base(options.checkpoint, options.prompt, guidance=options.distilled_guidance).to(device, DTYPES[options.precision])
        size = size_of(self.x)
        self.prior = self.base.sized(size)
        self.conditional = None
        if options.cse:
            controlnet, metadata = open_cse(options.cse, self.base)
            if metadata and (warning := metadata.other_operator(self.operator, options.cse.name)):
                log.warning("%s", warning)
            self.conditional = self.prior.controlled(controlnet, hint_for(self.operator.hint(self.y), metadata))
        self.sigmas = SPACINGS[options.spacing](self.prior.sigmas.cpu(), options.steps)


def check_numbers(**given: int | None) -> None:
    """Raises ValueError for numbers that no machine could do."""
    for name, value in given.items():
        if value is not None and value > MOST[name]:
            raise ValueError(f"--{name} is too large; it must be at most {MOST[name]}")


def zetas(text: str) -> list[float]:
    """Raises ValueError for what is no list of positive numbers."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--zeta is {text!r}; it must be numbers with commas between them") from error
    if not all(0 < zeta < math.inf for zeta in found):
        raise ValueError(f"--zeta is {text!r}; step sizes must be above 0, and finite")
    return found


def score_error(out: Path, repeats: int = 4, steps: int = 100, **given: Any) -> None:
    """Observation I (Fig. 1): score-error.csv, .png and .json in the folder `out`. repeats: draws of the noise at every level; given: see `Options`."""
    import torch

    from ..posterior import Posterior
    from ..schedule import generators
    from . import plots
    from .score import score_errors, score_points, timesteps

    options = Options(steps=steps, **given)
    check_numbers(repeats=repeats)
    problem = Problem(options)
    if problem.conditional is None:
        raise ValueError("--cse: a conditional model to compare with is needed")
    y = problem.y.expand(repeats, -1, -1, -1)
    with torch.no_grad():
        z0 = problem.prior.encode(problem.x).expand(repeats, -1, -1, -1)
    progress = _progress(steps, "noise levels")
    points = score_points(
        Posterior(problem.prior, problem.operator, y),
        z0,
        problem.sigmas,
        generators(options.seed, repeats),
        lambda i, point: progress(),
    )
    with torch.no_grad():
        conditional = [problem.conditional.denoise(point.z, point.sigma) for point in points]
    errors = score_errors(points, conditional, problem.zetas)
    t = timesteps(errors.sigmas, problem.base.sigmas)
    write_csv(out / "score-error.csv", errors.rows(t))
    save(plots.score_error_plot(errors, timesteps=t, title=f"Score error, {problem.operator.describe()}"), out / "score-error.png")
    write_settings(out / "score-error.json", out=out, repeats=repeats, **asdict(options))
    log.info("%s", out / "score-error.png")


def score_mean(out: Path, samples: int = 1000, batch: int = 1, steps: int = 500, **given: Any) -> None:
    """Observation II (Table 2): score-mean.csv, .png and .json in the folder `out`. samples: draws of x_T, `batch` at a time; given: see `Options`."""
    from ..posterior import Posterior
    from . import plots
    from .score import plain_score_mean, score_mean_rows, score_means

    options = Options(steps=steps, **given)
    check_numbers(samples=samples, batch=batch)
    problem = Problem(options)
    posterior = Posterior(problem.prior, problem.operator, problem.y)
    shape, (sigma, sigma_next) = problem.prior.latent_shape(), (float(s) for s in problem.sigmas[:2])
    progress, seed = _progress(samples, "samples"), options.seed
    means = score_means(posterior, shape, sigma, sigma_next, problem.zetas, samples, batch, seed, lambda done, k: progress(done))
    if problem.conditional:
        means["CSE"] = plain_score_mean(problem.conditional.denoise, shape, sigma, samples, batch, seed, device=problem.y.device)
    write_csv(out / "score-mean.csv", score_mean_rows(means))
    save(plots.score_mean_plot(means), out / "score-mean.png")
    write_settings(out / "score-mean.json", out=out, samples=samples, batch=batch, **asdict(options))
    log.info("%s", out / "score-mean.png")


def diversity(out: Path, **given: Any) -> None:
    """Observation III (Fig. 3): a table of several restorations of every picture, and what `write_diversity` writes. given: see `config_of`."""
    from accelerate import PartialState

    from ..evaluate.command import config_of
    from ..evaluate.report import write_table
    from ..evaluate.run import evaluate

    config = config_of(**given)
    if config.repeats < 2:
        raise ValueError("--repeats: a spread needs at least 2 restorations of a picture (the paper's: 50)")
    jobs = evaluate(config, out)
    if PartialState().is_main_process:
        write_table(config, jobs, out)
        write_diversity(config, jobs, out)


def write_diversity(config: Any, jobs: Sequence[Any], out: Path) -> list[dict[str, Any]]:
    """diversity.csv, and a plot for every picture, of a finished run with repeats."""
    import torch

    from ..evaluate.run import saved
    from . import plots
    from .diversity import diversity

    records = []
    for file in dict.fromkeys(job.picture.file for job in jobs):
        found = []
        for row in config.rows:
            files = [job.file(out).with_suffix(".png") for job in jobs if job.row is row and job.picture.file == file]
            files = [f for f in files if f.exists()]
            if len(files) > 1:
                spread = diversity((torch.cat([saved(f) for f in files]) + 1) / 2)
                found.append((row.name, spread))
                records.append(
                    {"picture": file.name, "operator": row.operator, "row": row.name, "k": spread.k}
                    | {"mean standard deviation": spread.mean_std, "standard error": spread.error}
                )
        if not found:
            raise ValueError(f"diversity: no row has two restorations of {file.name} that did not diverge; lower zeta")
        save(plots.diversity_plot(found), out / f"diversity-{file.stem}.png")
        log.info("%s", out / f"diversity-{file.stem}.png")
    write_csv(out / "diversity.csv", records)
    return records


def toy_example(out: Path, samples: int = 1000, zeta: float = 0.05, seed: int = 0) -> None:
    """A.4 (Fig. 8): toy.csv, .png and .json, at the published measurement, where the posterior has one mode, and at one where it has two."""
    from . import plots
    from .toy import BIMODAL_Y, PUBLISHED_Y
    from .toy import toy_example as example

    check_numbers(samples=samples)
    toys = [example(samples=samples, zeta=zeta, dmap_zeta=2 * zeta, seed=seed, y=y) for y in (PUBLISHED_Y, BIMODAL_Y)]
    write_csv(out / "toy.csv", [row for toy in toys for row in toy.rows()])
    save(plots.toy_plot(*toys), out / "toy.png")
    write_settings(out / "toy.json", out=out, samples=samples, zeta=zeta, seed=seed)
    log.info("%s", out / "toy.png")


def spread_study(
    out: Path, draws: int = 200, versions: int = 39, steps: int = 100, seed: int = 0, problems: str = "", solvers: str = ""
) -> None:
    """spread.csv, .png and .json: solvers on problems of `spread.PROBLEMS`, with exact samples beside them. problems: with commas; solvers: see `solver_names`."""
    from . import plots
    from .spread import PROBLEMS, solver_names, solvers_of, spread

    check_numbers(samples=draws, repeats=versions, steps=steps)
    chosen = tuple(dict.fromkeys(name.strip() for name in problems.split(","))) if problems.strip() else tuple(PROBLEMS)
    given = solvers_of(solver_names(solvers), steps)
    found = spread(given, chosen, draws, versions, steps=steps, seed=seed, done=lambda problem, method: log.info("%s: %s", problem, method))
    write_csv(out / "spread.csv", found.rows())
    save(plots.spread_plot(found), out / "spread.png")
    asked = {"draws": draws, "versions": versions, "steps": steps, "seed": seed, "problems": problems, "solvers": solvers}
    write_settings(out / "spread.json", out=out, **asked, samples=found.settings["samples"], made=found.settings["solvers"])
    log.info("%s", out / "spread.png")


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    from ..evaluate.results import csv_text, write_text

    write_text(path, csv_text(records))


def write_settings(path: Path, **given: Any) -> None:
    """What was asked for, and the versions of what computed it."""
    from ..evaluate.results import write_text
    from ..evaluate.run import versions

    write_text(path, json.dumps({"settings": given, "versions": versions()}, indent=1, default=str) + "\n")


def _progress(total: int, what: str):
    """A function that moves a bar by one, or to a place."""
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=what)

    def move(done: int | None = None) -> None:
        bar.update(1 if done is None else done - bar.n)
        if bar.n >= total:
            bar.close()

    return move
