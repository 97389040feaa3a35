"""The paper's studies as nodes: its observations about DPS (Sec. 3), the toy example (A.4), solvers where the posterior is known, and the comparisons of Tables 5 and 9."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..dmap_core.evaluate.results import csv_text
from ..dmap_core.metrics import PICTURE_METRICS, mean_interval
from ..dmap_core.metrics.backbones import needed
from ..dmap_core.plots import render, steps_plot
from ..dmap_core.schedule import SPACINGS, check_sigmas, generators
from ..dmap_core.solvers import DMAP, DPS, DSG, Solver
from ..dmap_core.studies import (
    Diversity,
    ScoreMean,
    plain_score_mean,
    plots,
    score_errors,
    score_means,
    score_points,
    timesteps,
    toy_example,
)
from ..dmap_core.studies.comparison import Outcome, comparison_rows, comparison_series
from ..dmap_core.studies.diversity import deviation_maps, diversity, diversity_rows
from ..dmap_core.studies.score import PAPER_ZETAS, score_mean_rows
from ..dmap_core.studies.spread import PROBLEMS, solver_names, solvers_of, spread
from .host.compute import Bar, measuring, residuals
from .host.gradients import normal
from .host.guider import PosteriorGuider
from .host.run import (
    Problem,
    check_conditional,
    check_guider,
    check_size,
    known_sigmas,
    latent_shape,
    noise_levels,
    restore,
    with_denoiser,
    with_posterior,
)
from .metrics import picture
from .pictures import to_core, to_image
from .schema import schema

CATEGORY = "DMAP/studies"
SETS = 4  # of the diversity
CONDITIONAL = "conditional"


# inputs that several have


def seed_input(what: str):
    return io.Int.Input("noise_seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip=f"Seed of {what}.")


def zetas_input():
    return io.String.Input(
        "zetas",
        default=", ".join(f"{zeta:.1f}" if zeta >= 1 else f"{zeta:g}" for zeta in PAPER_ZETAS),
        tooltip="Step sizes of DPS to look at, with commas between them. All of them together cost what one costs.",
    )


def spacing_input(optional: bool = False):
    return io.Combo.Input(
        "spacing",
        options=list(SPACINGS),
        default="paper",
        optional=optional,
        tooltip="Of the noise levels, as in DMAPScheduler: paper is made for hundreds of steps, exponential is better for a few dozens.",
    )


def reference_input():
    return io.Image.Input(
        "reference", tooltip="The undamaged picture, of the size that the guider restores: one, or one for each of its measurements."
    )


def csv_output():
    return io.String.Output(display_name="csv", tooltip="The numbers behind the plot, a line for each, for a spreadsheet.")


# what they have in common


def check_matplotlib() -> None:
    """Raises ValueError where no plot can be drawn, which is better known before the computation than after it."""
    with needed("a study's plot", "matplotlib"):
        import matplotlib.figure  # noqa: F401


def numbers(text: str, name: str, kind: type = float) -> list:
    """The numbers above 0 of a text with commas. Raises ValueError, naming the input."""
    what = "whole numbers" if kind is int else "numbers"
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; it must be {what} with commas between them") from error
    if not all(0 < number < math.inf for number in found):
        raise ValueError(f"{name} is {text!r}; {what} above 0 are needed")
    if len(set(found)) != len(found):
        raise ValueError(f"{name} is {text!r}; every number is to be there only once")
    return found


def check_step_size(value: float, name: str, largest: float = math.inf) -> None:
    if not (0 < value <= largest and math.isfinite(value)):
        raise ValueError(f"{name} is {value:g}; it must be above 0" + (f" and at most {largest:g}" if largest < math.inf else ""))


def schedule(sigmas: Tensor, name: str) -> None:
    """Raises ValueError, naming the node, for noise levels that no solver would take."""
    try:
        check_sigmas(sigmas)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def one_picture(image: Tensor, name: str) -> Tensor:
    """(1, 3, H, W) in [-1, 1]"""
    if len(image) != 1:
        raise ValueError(f"{name}: {len(image)} pictures are given, and this study is about one; choose it with ImageFromBatch")
    return to_core(image, name)


def drawn(figure: Any) -> Tensor:
    """A plot as a picture (1, H, W, 3)."""
    return to_image([render(figure)])


# the observations


class ScoreErrorStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_ScoreErrorStudy",
            display_name="Score Error Study",
            category=CATEGORY,
            description="Observation I (Fig. 1): does DPS's guidance bring the model nearer to one that was trained to see the measurement? "
            "Compares both at every noise level of a clean picture. Costs one gradient and one call of the other model per level.",
            inputs=[
                io.Guider.Input("guider", tooltip="DPSGuider without a CSE: measurement, operator and the unconditional model."),
                io.Guider.Input(
                    CONDITIONAL,
                    tooltip="The model that sees the measurement: a DPSGuider whose positive went through ApplyCSE, or CFGGuider or BasicGuider with a ControlNet "
                    "or a patched model.",
                ),
                io.Image.Input("picture", tooltip="The clean picture of which the guider has the measurement."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels to look at, from DMAPScheduler. Fewer are faster."),
                zetas_input(),
                io.Int.Input(
                    "repeats",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Draws of the noise at every level, computed together: more make the curves smoother, and need more memory.",
                ),
                seed_input("the noise"),
            ],
            outputs=[io.Image.Output(display_name="plot"), csv_output()],
        )

    @classmethod
    def execute(cls, guider, conditional, picture, sigmas, zetas, repeats, noise_seed) -> io.NodeOutput:
        name = "Score Error Study"
        check_matplotlib()
        steps = numbers(zetas, f"{name}: zetas")
        schedule(sigmas, f"{name}: sigmas")
        check_guider(guider, f"{name}: guider", one=True)
        check_conditional(conditional, guider, f"{name}: {CONDITIONAL}")
        sigmas = known_sigmas(guider, sigmas)
        x = normal(one_picture(picture, f"{name}: picture"))
        check_size(picture, guider, f"{name}: picture")
        bar = Bar(2 * (len(sigmas) - 1))

        def points(posterior):
            z0 = posterior.prior.encode(x.to(posterior.y)).expand(repeats, -1, -1, -1)
            return score_points(posterior, z0, sigmas, generators(noise_seed, repeats), lambda i, point: bar.move())

        found = with_posterior(guider, name, sigmas, repeats, points)

        def answers(denoise, device):
            return [_moved(bar, denoise(point.z, point.sigma)) for point in found]

        theirs = with_denoiser(conditional, name, sigmas, found[0].z.shape, answers)
        errors = score_errors(found, theirs, steps)
        t = timesteps(errors.sigmas, noise_levels(guider))
        figure = plots.score_error_plot(errors, timesteps=t, title=f"Score error, {guider.operator.describe()}")
        return io.NodeOutput(drawn(figure), csv_text(errors.rows(t)))


def _moved(bar: Bar, value: Tensor) -> Tensor:
    bar.move()
    return value


class ScoreMeanStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_ScoreMeanStudy",
            display_name="Score Mean Study",
            category=CATEGORY,
            description="Observation II (Table 2): a true score averages to zero over many starting noises. Does DPS's? Looks at the first noise level only. "
            "Costs a gradient per sample.",
            inputs=[
                io.Guider.Input("guider", tooltip="DPSGuider without a CSE: measurement, operator and the unconditional model."),
                io.Sigmas.Input("sigmas", tooltip="From DMAPScheduler; the first noise level and the next are used (paper: 500 steps)."),
                zetas_input(),
                io.Int.Input(
                    "samples",
                    default=1000,
                    min=2,
                    max=1_000_000,
                    tooltip="Starting noises (paper: 1000). Fewer are faster; the plot marks what a mean of zero would show from that few.",
                ),
                io.Int.Input("batch", default=1, min=1, max=256, tooltip="Samples at a time: changes speed and memory, not the result."),
                seed_input("the starting noises"),
                io.Guider.Input(
                    CONDITIONAL,
                    optional=True,
                    tooltip="A model that sees the measurement, to compare with: a DPSGuider with ApplyCSE, or CFGGuider or BasicGuider with a ControlNet or a "
                    "patched model.",
                ),
            ],
            outputs=[io.Image.Output(display_name="plot"), csv_output()],
        )

    @classmethod
    def execute(cls, guider, sigmas, zetas, samples, batch, noise_seed, conditional=None) -> io.NodeOutput:
        name = "Score Mean Study"
        check_matplotlib()
        steps = numbers(zetas, f"{name}: zetas")
        schedule(sigmas, f"{name}: sigmas")
        check_guider(guider, f"{name}: guider", one=True)
        if conditional is not None:
            check_conditional(conditional, guider, f"{name}: {CONDITIONAL}")
        sigmas = known_sigmas(guider, sigmas)
        shape, (sigma, sigma_next) = latent_shape(guider), (float(s) for s in sigmas[:2])
        batch = min(batch, samples)
        bar = Bar(samples * (1 if conditional is None else 2))

        def moved() -> Callable[[int, int], None]:
            done = [0]

            def move(now: int, total: int) -> None:
                bar.move(now - done[0])
                done[0] = now

            return move

        def means(posterior) -> dict[str | float, ScoreMean]:
            return score_means(posterior, shape, sigma, sigma_next, steps, samples, batch, noise_seed, moved())

        def theirs(denoise, device) -> ScoreMean:
            return plain_score_mean(denoise, shape, sigma, samples, batch, noise_seed, moved(), device)

        found = with_posterior(guider, name, sigmas, batch, means)
        if conditional is not None:
            found[CONDITIONAL] = with_denoiser(conditional, name, sigmas, (batch, *shape), theirs)
        figure = plots.score_mean_plot(found, title=f"Mean of the score at sigma {sigma:.4g}, {guider.operator.describe()}")
        return io.NodeOutput(drawn(figure), csv_text(score_mean_rows(found)))


class DiversityStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DiversityStudy",
            display_name="Diversity Study",
            category=CATEGORY,
            description="Observation III (Fig. 3, Table 3): how different several restorations of one measurement are. A true posterior sampler's differ where the "
            "measurement says little; DPS's hardly do.",
            inputs=[
                io.Image.Input(
                    "images_1",
                    tooltip="A batch of restorations of one measurement, at least 2 (paper: 50). batch_size of Empty Measurement Latent makes them.",
                ),
                *(
                    io.Image.Input(f"images_{i}", optional=True, tooltip="The same of another solver or setting.")
                    for i in range(2, SETS + 1)
                ),
                io.String.Input(
                    "names",
                    default="",
                    optional=True,
                    tooltip="Names of the batches in their order, with commas between them, such as: DPS, DMAP.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="mean_picture", tooltip="The mean of every batch."),
                io.Image.Output(
                    display_name="std_map",
                    tooltip="Where the pictures of every batch differ: standard deviations, white being the largest.",
                ),
                csv_output(),
            ],
        )

    @classmethod
    def execute(cls, images_1, names="", **more) -> io.NodeOutput:
        check_matplotlib()
        given = {"images_1": images_1, **{f"images_{i}": more.get(f"images_{i}") for i in range(2, SETS + 1)}}
        given = {name: images for name, images in given.items() if images is not None}
        entries = list(zip(own_names(names, list(given), "Diversity Study"), _spreads(given), strict=True))
        found = [d for _, d in entries]
        means = torch.stack([d.mean for d in found]).movedim(1, -1)
        maps = deviation_maps(found).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()
        return io.NodeOutput(drawn(plots.diversity_plot(entries)), means, maps, csv_text(diversity_rows(entries)))


def _spreads(given: dict[str, Tensor]) -> list[Diversity]:
    found = []
    for name, images in given.items():
        x = picture(images, f"Diversity Study: {name}")
        size, first = (f"{s[2]}x{s[1]}" for s in (images.shape, given["images_1"].shape))
        if size != first:
            raise ValueError(f"Diversity Study: {name} is {size} and images_1 {first}; all must be restorations of one measurement")
        try:
            found.append(diversity(x))
        except ValueError as error:
            raise ValueError(f"Diversity Study: {name}: {error}") from error
    return found


def own_names(names: str, given: list[str], node: str) -> list[str]:
    """The names in a text with commas, one for each of `given`, or those themselves. Raises ValueError for another number of them."""
    own = [name.strip() for name in names.split(",")] if names.strip() else given
    if len(own) != len(given):
        raise ValueError(f"{node}: names holds {len(own)} names for {len(given)}; give one for each, or none")
    if len(set(own)) != len(own):
        raise ValueError(f"{node}: names is {names!r}; every name is to be there only once")
    return own


class ToyStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        defaults = {"default": 0.1, "min": 0.001, "max": 10.0, "step": 0.01, "round": 0.001}
        return io.Schema(
            node_id="DMAP_ToyStudy",
            display_name="Toy Study",
            category=CATEGORY,
            description="The toy example (A.4, Fig. 8): two Gaussians in the plane, of which the measurement shows the first coordinate. The true answer is known. "
            "Needs no model and takes seconds.",
            inputs=[
                io.Float.Input("zeta", **{**defaults, "default": 0.05}, tooltip="Step size of DPS (paper: 0.05)."),
                io.Int.Input("K", default=2, min=1, max=100, tooltip="Gradient steps of DMAP per noise level."),
                io.Int.Input("steps", default=100, min=2, max=1000, tooltip="Noise levels (paper: 100)."),
                io.Int.Input("samples", default=1000, min=2, max=20000, tooltip="Points of every method."),
                io.Float.Input(
                    "y0",
                    default=0.5,
                    min=-2.0,
                    max=2.0,
                    step=0.1,
                    round=0.001,
                    tooltip="The measured first coordinate. Paper: 0.5, where the true posterior has all but one mode; at 0 it has two that are equal.",
                ),
                seed_input("the noise"),
                io.Float.Input(
                    "dsg_zeta",
                    default=0.08,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    optional=True,
                    tooltip="Mix rate of DSG; 0.08 is the paper's for pictures.",
                ),
                io.Float.Input("dmap_zeta", **defaults, optional=True, tooltip="Step size of DMAP: twice DPS's, as for pictures."),
            ],
            outputs=[io.Image.Output(display_name="plot"), io.String.Output(display_name="text"), csv_output()],
        )

    @classmethod
    def execute(cls, zeta, K, steps, samples, y0, noise_seed, dsg_zeta=0.08, dmap_zeta=0.1) -> io.NodeOutput:
        check_matplotlib()
        with measuring():
            toy = toy_example(samples, steps, zeta, dsg_zeta, dmap_zeta, K, y=(y0, 0.0), seed=noise_seed)
        return io.NodeOutput(drawn(plots.toy_plot(toy)), toy.text(), csv_text(toy.rows()))


class SpreadStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_SpreadStudy",
            display_name="Spread Study",
            category=CATEGORY,
            description="How honestly does a solver spread (Observation III)? On small problems whose true answer is known: how much of its spread the versions have, how often they "
            "hold the truth, and how far they are from it. Needs no model; takes seconds for every solver.",
            search_aliases=["calibration", "coverage", "uncertainty", "posterior", "Wasserstein"],
            inputs=[
                io.Combo.Input(
                    "problem",
                    options=list(PROBLEMS),
                    default="inpainting",
                    tooltip="plane: points, of which one coordinate is measured, nearly without noise (A.4). averaging: pictures of 8x8 that are reduced four times. "
                    "inpainting: their right half is hidden.",
                ),
                io.String.Input(
                    "solvers",
                    default="DPS; DMAP; LATINO; FlowDPS; DAPS",
                    tooltip="With semicolons between them. Empty: all that there are, settings other than the usual among them; the csv has their names.",
                ),
                io.Int.Input("truths", default=80, min=2, max=10000, tooltip="Answers that are drawn, measured and restored."),
                io.Int.Input(
                    "versions",
                    default=39,
                    min=39,
                    max=399,
                    step=40,
                    tooltip="Restorations of each: 39, 79 and so on, of which intervals of exactly 90 % can be made.",
                ),
                io.Int.Input("steps", default=100, min=2, max=1000, tooltip="Noise levels."),
                seed_input("truths, measurements and versions"),
            ],
            outputs=[io.Image.Output(display_name="plot"), io.String.Output(display_name="text"), csv_output()],
        )

    @classmethod
    def execute(cls, problem, solvers, truths, versions, steps, noise_seed) -> io.NodeOutput:
        check_matplotlib()
        chosen = solvers_of(solver_names(solvers), steps)
        bar = Bar(1 + len(chosen))
        with measuring():
            found = spread(chosen, (problem,), truths, versions, steps=steps, seed=noise_seed, done=lambda problem, method: bar.move())
        return io.NodeOutput(drawn(plots.spread_plot(found)), found.text(), csv_text(found.rows()))


# comparisons of whole runs


@dataclass(frozen=True)
class Plan:
    """A run to be made. about: what the CSV file says of it."""

    label: str
    guider: PosteriorGuider
    solver: Solver
    sigmas: Tensor
    about: dict[str, Any]


def compare(plans: Sequence[Plan], reference: Tensor, seed: int, node: str, title: str) -> io.NodeOutput:
    """(plot, pictures, csv) of the runs, all from the same noise. Raises ValueError before the first of them for what can be known then."""
    check_matplotlib()
    metrics = [(PICTURE_METRICS[name].label, PICTURE_METRICS[name].open(None)) for name in ("psnr", "ssim")]
    mean_interval([0.0, 1.0])  # raises for a package that is missing
    wanted = picture(reference, f"{node}: reference")
    bar = Bar(sum(len(plan.sigmas) - 1 for plan in plans))
    warm, pictures, outcomes = None, [], []
    for plan in plans:
        run = restore(Problem(plan.guider), plan.solver, plan.sigmas, seed, bar.move, warm_up=warm is not plan.guider)
        warm = plan.guider
        pictures.append((run.images.cpu().float().clamp(0, 1) * 255).round() / 255)  # as if they had been saved
        x = pictures[-1].movedim(-1, 1)
        with measuring():
            values = {label: metric(normal(x), normal(wanted.expand_as(x))).tolist() for label, metric in metrics}
            values["residual"] = residuals(plan.guider.operator, normal(x), normal(plan.guider.y)).tolist()
        outcomes.append(Outcome(plan.label, plan.about, values, run.seconds, run.report.denoiser_calls))
    figure = steps_plot(comparison_series(outcomes), title=title)
    return io.NodeOutput(drawn(figure), torch.cat(pictures), csv_text(comparison_rows(outcomes)))


class StepsStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_StepsStudy",
            display_name="Steps Study",
            category=CATEGORY,
            description="Many small steps or fewer good ones (Table 5)? Restores the guider's measurement with DPS, DSG and DMAP, all with the same number of gradient "
            "steps, and compares quality and time.",
            inputs=[
                io.Guider.Input("guider", tooltip="DPSGuider: measurement, operator, model. Its own zeta is not used."),
                reference_input(),
                io.Int.Input(
                    "budget",
                    default=100,
                    min=2,
                    max=10000,
                    tooltip="Gradient steps of every run: DPS and DSG take that many noise levels, DMAP takes budget / K levels with K steps at each.",
                ),
                io.String.Input(
                    "K",
                    default="1, 2, 4",
                    tooltip="Gradient steps of DMAP per noise level, with commas between them. Each must divide the budget.",
                ),
                io.Float.Input(
                    "zeta",
                    default=4.8,
                    min=0.001,
                    max=1000.0,
                    step=0.1,
                    round=0.001,
                    tooltip="Step size of DPS. DMAP with K takes K times that, because it has that many times fewer levels (B.3).",
                ),
                io.Float.Input(
                    "dsg_zeta", default=0.08, min=0.001, max=1.0, step=0.01, round=0.001, tooltip="Mix rate of DSG (paper: 0.08)."
                ),
                spacing_input(),
                seed_input("the noise, the same for every run"),
            ],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="pictures", tooltip="The restorations: DPS, DSG, then DMAP with every K."),
                csv_output(),
            ],
        )

    @classmethod
    def execute(cls, guider, reference, budget, K, zeta, dsg_zeta, spacing, noise_seed) -> io.NodeOutput:
        name = "Steps Study"
        check_guider(guider, f"{name}: guider")
        check_size(reference, guider, f"{name}: reference")
        check_step_size(zeta, f"{name}: zeta")
        check_step_size(dsg_zeta, f"{name}: dsg_zeta", 1.0)
        table = noise_levels(guider)

        def plan(solver: Solver, T: int) -> Plan:
            k = solver.settings().get("K")
            label = f"{solver.name()}, T = {T}" if k is None else f"{solver.name()}, K = {k}, T = {T}"
            about = {"method": solver.name(), "K": k or "", "T": T, "zeta": solver.settings()["zeta"]}
            return Plan(label, guider, solver, SPACINGS[spacing](table, T), about)

        plans = [plan(DPS(zeta=zeta), budget), plan(DSG(zeta=dsg_zeta), budget)]
        plans += [plan(DMAP(zeta=zeta * k, K=k), T) for k, T in divided(budget, K, name)]
        return compare(plans, reference, noise_seed, name, f"{budget} gradient steps, {guider.operator.describe()}")


def divided(budget: int, K: str, node: str) -> list[tuple[int, int]]:
    """(K, noise levels) of every K in a text with commas. Raises ValueError for one that does not divide the budget or leaves no level to guide."""
    found = [(k, budget // k) for k in numbers(K, f"{node}: K", int)]
    for k, levels in found:
        if k * levels != budget:
            raise ValueError(f"{node}: K {k} does not divide the budget of {budget} gradient steps; choose another K or budget")
        if levels < 2:
            raise ValueError(
                f"{node}: K {k} leaves one noise level of the budget of {budget}, and DMAP does not guide the last; choose a smaller K"
            )
    return found


class SolverStudy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_SolverStudy",
            display_name="Solver Study",
            category=CATEGORY,
            description="With or without fresh noise, and with which model (Table 9)? Restores the measurement with DPS as an ancestral sampler (eta 1) and along the "
            "deterministic path, the PF-ODE (eta 0), for one or two base models.",
            inputs=[
                io.Guider.Input(
                    "guider_1", tooltip="DPSGuider with the first model, such as Stable Diffusion 2.0. Its own zeta is not used."
                ),
                reference_input(),
                io.Int.Input("steps", default=500, min=2, max=10000, tooltip="Noise levels of every run (paper: 500)."),
                io.Float.Input(
                    "zeta", default=4.8, min=0.001, max=1000.0, step=0.1, round=0.001, tooltip="Step size of every run, as in DPSSampler."
                ),
                seed_input("the noise, the same for every run"),
                io.Guider.Input(
                    "guider_2",
                    optional=True,
                    tooltip="DPSGuider with another model, such as Stable Diffusion 1.5, and the same measurement.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    optional=True,
                    tooltip="Names of the models in their order, with a comma between them, such as: SD 2.0, SD 1.5.",
                ),
                spacing_input(optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="pictures", tooltip="The restorations: of every model the ancestral one, then the PF-ODE's."),
                csv_output(),
            ],
        )

    @classmethod
    def execute(cls, guider_1, reference, steps, zeta, noise_seed, guider_2=None, names="", spacing="paper") -> io.NodeOutput:
        node = "Solver Study"
        check_step_size(zeta, f"{node}: zeta")
        guiders = {name: guider for name, guider in (("guider_1", guider_1), ("guider_2", guider_2)) if guider is not None}
        for name, guider in guiders.items():
            check_guider(guider, f"{node}: {name}")
            check_size(reference, guider, f"{node}: reference, for {name}")
        if len({len(guider.y) for guider in guiders.values()}) > 1:
            raise ValueError(f"{node}: guider_1 has {len(guider_1.y)} measurement(s) and guider_2 {len(guider_2.y)}; give both the same")
        plans = []
        for model, guider in zip(own_names(names, list(guiders), node), guiders.values(), strict=True):
            sigmas = SPACINGS[spacing](noise_levels(guider), steps)
            for sampler, eta in (("ancestral", 1.0), ("PF-ODE", 0.0)):
                about = {"model": model, "sampler": sampler, "eta": eta, "steps": steps, "zeta": zeta}
                plans.append(Plan(f"{model}, {sampler}", guider, DPS(zeta=zeta, eta=eta), sigmas, about))
        return compare(plans, reference, noise_seed, node, f"DPS, {steps} steps, {guider_1.operator.describe()}")


NODES = [ScoreErrorStudy, ScoreMeanStudy, DiversityStudy, ToyStudy, SpreadStudy, StepsStudy, SolverStudy]
