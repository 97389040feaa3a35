"""How much of the posterior's spread solvers find (Observation III), where the posterior is known: distance, coverage and deviations.

Three problems whose prior is a mixture of Gaussians: the plane of A.4, and pictures of 8x8 that are reduced four times, or whose right half is
hidden. Truths are drawn from the prior and measured with noise, and a solver makes `versions` of each. A truth is as likely to have one rank among exact samples as another, so the
interval from the k-th smallest to the k-th largest of n versions holds it with probability (n + 1 - 2 k) / (n + 1), whatever the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends.mixture import GaussianMixture
from ..errors import Diverged
from ..metrics.backbones import needed
from ..operators import Inpainting, Noisy, Operator, SuperResolution
from ..operators.base import whole
from ..posterior import Posterior
from ..solvers import DAPS, DMAP, DPS, LATINO, SOLVERS, Cost, FlowDPS, Solver, Unguided
from .toy import BIMODAL_Y, CENTRES, PUBLISHED_Y, karras_levels

EXACT = "exact samples"
LEVELS = (0.5, 0.9, 0.95)
PARTS = ("seen", "unseen")
SIGMA_MAX, SIGMA_MIN, RHO = 4.0, 0.01, 7.0  # of the toy example
PAPER_STEPS = 500  # to which the windows of FreeDoM and ReSample belong
TOY_STEPS = 100  # to which the step sizes of A.4 belong
DIRECTIONS = 128  # of the sliced distance
# What has neither an automatic step nor a usual setting that fits: zeta is DPS's of A.4, gamma the paper's part of it.
SETTINGS: dict[str, dict[str, Any]] = {"PSLD": {"zeta": 0.05, "gamma": 0.0001}}
VARIANTS: dict[str, Solver] = {
    "DPS, zeta 0.05": DPS(zeta=0.05),
    "DPS, strength 0.3": DPS(strength=0.3),
    "DPS, eta 0": DPS(eta=0.0),
    "DPS, guided to 0.8": DPS(guide_end=0.8),
    "DMAP, zeta 0.1": DMAP(zeta=0.1),
    "LATINO, delta 1": LATINO(delta=1.0),
    "FlowDPS, published": FlowDPS(weight="published"),
    "DAPS, 20 iterations": DAPS(iterations=20),
    "DAPS, gradient": DAPS(move="gradient"),
    "no guidance": Unguided(),
}


@dataclass(frozen=True)
class SpreadProblem:
    """operator: linear, of pictures (B, 1, h, w); sigma_y: the measurement's noise, in their units; at: measurements (1, 1, h', w') at which distances are taken.

    sliced: the distance is the root mean square over directions of the distance of the projections, for many dimensions. in_range: its points are those of
    pictures, most of them in [-1, 1], where LATINO keeps them.
    """

    prior: GaussianMixture
    operator: Operator
    sigma_y: float
    at: dict[str, Tensor]
    sliced: bool = False
    in_range: bool = True

    @property
    def shape(self) -> torch.Size:
        return self.prior.means.shape[1:]

    @cached_property
    def _full(self) -> Tensor:
        d = self.prior.means[0].numel()
        return self.operator(torch.eye(d, dtype=self.prior.means.dtype).view(d, *self.shape)).flatten(1).mT

    @cached_property
    def _measured(self) -> Tensor:
        return self._full.abs().sum(1) > 0

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """Orthonormal rows (n, d): of the directions that the measurement shows, and of those that it does not."""
        matrix = self._full[self._measured]
        basis, rank = torch.linalg.svd(matrix, full_matrices=True)[2], int(torch.linalg.matrix_rank(matrix))
        return {"seen": basis[:rank], "unseen": basis[rank:]}

    def posterior(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and covariance of p(z0 | y), y being one measurement."""
        return self.prior.posterior(self._full[self._measured], y.flatten()[self._measured], self.sigma_y)

    def truths(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n pictures of the prior and their measurements."""
        means = self.prior.means
        weights = torch.ones(len(means)) if self.prior.weights is None else self.prior.weights
        x = means[torch.multinomial(weights, n, True, generator=generator)]
        x = x + self.prior.std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        y = self.operator(x)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        return x, self.operator.seen(y + self.sigma_y * noise)

    def exact(self, y: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """n samples (n, d) of p(z0 | y)."""
        weights, means, covariance = self.posterior(y)
        noise = torch.randn(n, means.shape[1], generator=generator, dtype=means.dtype)
        return means[torch.multinomial(weights, n, True, generator=generator)] + noise @ torch.linalg.cholesky(covariance).mT


def plane() -> SpreadProblem:
    """A.4, its points written as pictures of 1x2."""
    prior = GaussianMixture(torch.tensor(CENTRES, dtype=torch.float64).view(2, 1, 1, 2), 0.3)
    at = {f"y = ({y[0]:g}, 0)": torch.tensor([[[y]]], dtype=torch.float64) for y in (PUBLISHED_Y, BIMODAL_Y)}
    return SpreadProblem(prior, Inpainting(torch.tensor([[0.0, 1.0]])), 0.01, at, in_range=False)


def pictures(operator: Operator, sigma_y: float = 0.1) -> SpreadProblem:
    """Four Gaussians in 64 dimensions: what the left half shows says with 80 % which of two patterns the right half has."""
    shown, open_ = torch.zeros(2, 8, 8, dtype=torch.float64)
    shown[:4, :4], shown[4:, :4] = 0.25, -0.25
    checks = (torch.arange(8)[:, None] + torch.arange(8)[None]) % 2
    open_[:, 4:] = (0.5 * checks - 0.25)[:, 4:]
    means = torch.stack([a * shown + b * open_ for a in (-1, 1) for b in (-1, 1)])[:, None]
    prior = GaussianMixture(means, 0.3, torch.tensor([0.4, 0.1, 0.1, 0.4]))
    f = Noisy(operator, sigma_y / 2)
    return SpreadProblem(prior, f, sigma_y, {"y of a centre": f(means[3:])}, sliced=True)


PROBLEMS: dict[str, Callable[[], SpreadProblem]] = {
    "plane": plane,
    "averaging": lambda: pictures(SuperResolution(4)),
    "inpainting": lambda: pictures(Inpainting(torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1))),
}


def usual_solvers(steps: int) -> dict[str, Solver]:
    """Every solver there is: its automatic step where it has one, otherwise `SETTINGS`, otherwise what its node begins with; windows at the paper's place."""
    found = {}
    for name, solver in SOLVERS.items():
        usual = {n: s.usual for n, (f, s) in solver.described().items() if f.default is MISSING}
        made = solver(**(usual | SETTINGS.get(name, {})))
        found[name] = made.rescaled(steps / (TOY_STEPS if name in SETTINGS else PAPER_STEPS), steps)
    return found


def solvers_of(names: Sequence[str], steps: int) -> dict[str, Solver]:
    """Those of `usual_solvers` and VARIANTS with these names; all of them for no name. Raises ValueError for a name that there is not."""
    known = {**usual_solvers(steps), **VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"solvers: there is no {unknown[0]!r}; choose from {'; '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(names)} if names else known


def solver_names(text: str) -> tuple[str, ...]:
    """The names in a text, with semicolons between them, because some have commas of their own."""
    return tuple(name.strip() for name in text.split(";") if name.strip())


@dataclass(frozen=True)
class Coverage:
    """How many of `draws` truths lay in the interval that ought to hold `level` of them, and the 95 % limits of that share (Clopper and Pearson)."""

    level: float
    share: float
    low: float
    high: float
    draws: int


@dataclass(frozen=True)
class SpreadOf:
    """One solver on one problem. ratio: standard deviation of the versions over the posterior's, per part; distance: W2 at every measurement.

    NaN, and no coverage, where it diverged. cost: of a version; None of exact samples.
    """

    ratio: dict[str, float]
    coverage: dict[str, tuple[Coverage, ...]]
    distance: dict[str, float]
    cost: Cost | None


@dataclass(frozen=True)
class Spread:
    """found: problem -> method -> what came out, EXACT first. settings: what `spread` was called with."""

    found: dict[str, dict[str, SpreadOf]]
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A dict for every problem and method, for a CSV file."""
        rows = []
        for problem, methods in self.found.items():
            for method, one in methods.items():
                row: dict[str, Any] = {"problem": problem, "method": method}
                row |= {"denoiser_calls": "", "decoder_gradients": "", "guided_evaluations": ""}
                if one.cost:
                    row |= {"denoiser_calls": one.cost.denoiser, "decoder_gradients": one.cost.decoder_gradients}
                    row["guided_evaluations"] = f"{one.cost.weight():.0f}"
                distances = [*one.distance.values(), math.nan][:2]
                row |= {"distance": distances[0], "distance_two_modes": distances[1]}
                for part in PARTS:
                    row[f"ratio_{part}"] = one.ratio[part]
                    for i, level in enumerate(LEVELS):
                        c = one.coverage[part][i] if part in one.coverage else Coverage(level, math.nan, math.nan, math.nan, 0)
                        name = f"coverage_{100 * level:g}_{part}"
                        row |= {name: c.share, f"{name}_low": c.low, f"{name}_high": c.high}
                rows.append(row)
        return rows

    def text(self) -> str:
        """A line for each of them."""
        return "\n".join(
            f"{row['problem']}, {row['method']}: deviation {row['ratio_unseen']:.2f} of the posterior's where nothing was seen and {row['ratio_seen']:.2f} where it was; "
            f"90 % intervals hold {100 * row['coverage_90_unseen']:.0f} % and {100 * row['coverage_90_seen']:.0f} %; W2 {row['distance']:.3f}"
            for row in self.rows()
        )


def coverage(truth: Tensor, versions: Tensor) -> tuple[Coverage, ...]:
    """How often `versions` (T, n) held the truth (T,), for LEVELS. n + 1 has to be a multiple of 40, where the intervals have exactly those levels."""
    with needed("a binomial interval", "scipy"):
        from scipy import stats
    n = versions.shape[1]
    if (n + 1) % 40:
        raise ValueError(
            f"versions is {n}; it must be one less than a multiple of 40, such as 39, so that intervals of 50, 90 and 95 % exist"
        )
    below, not_above = (versions < truth[:, None]).sum(1), (versions <= truth[:, None]).sum(1)
    found = []
    for level in LEVELS:
        k = round((1 - level) / 2 * (n + 1))
        inside = int(((below >= k) & (not_above <= n - k)).sum())
        limits = stats.binomtest(inside, len(truth)).proportion_ci()
        found.append(Coverage(level, inside / len(truth), float(limits.low), float(limits.high), len(truth)))
    return tuple(found)


def deviation_ratio(samples: Tensor, variances: Tensor, basis: Tensor) -> float:
    """samples (T, n, d), variances (T, ): the posterior's, in the space of the rows of `basis`. The root of both sums' quotient."""
    return float(((samples @ basis.mT).var(1).sum() / variances.sum()).sqrt())


def wasserstein(a: Tensor, b: Tensor, sliced: bool, seed: int = 0) -> float:
    """W2 of two sets (n, d) of equal size: exact, by the best assignment, or sliced."""
    if sliced:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, a.shape[1], generator=generator, dtype=a.dtype), dim=1)
        return float(((a @ directions.mT).sort(0).values - (b @ directions.mT).sort(0).values).square().mean().sqrt())
    with needed("a Wasserstein distance", "scipy"):
        from scipy.optimize import linear_sum_assignment
    cost = torch.cdist(a, b).square()
    return float(cost[linear_sum_assignment(cost.numpy())].mean().sqrt())


def variance_in(weights: Tensor, means: Tensor, covariance: Tensor, basis: Tensor) -> Tensor:
    """The trace of a mixture's covariance in the space of the rows of `basis`."""
    projected = means @ basis.mT
    centre = weights @ projected
    return (basis @ covariance @ basis.mT).trace() + (weights @ (projected - centre).square()).sum()


def spread(
    solvers: Mapping[str, Solver] | None = None,
    problems: tuple[str, ...] = tuple(PROBLEMS),
    draws: int = 200,
    versions: int = 39,
    samples: int = 400,
    steps: int = 100,
    seed: int = 0,
    done: Callable[[str, str], None] = lambda problem, method: None,
) -> Spread:
    """Exact samples and every solver (None: `usual_solvers` and VARIANTS) on the problems.

    draws: truths, with `versions` (39, 79, ...) each. samples: of every distance. steps: Karras levels. Minutes for all solvers on one core; the
    directions that are looked at, one of each part for every truth, are the same for all. LATINO is left out of problems whose points are not those of
    pictures (`SpreadProblem.in_range`). Raises ValueError for settings without meaning, and for a problem of which no solver is left.
    """
    whole("draws", draws, 2)
    whole("samples", samples, 2)
    if unknown := [name for name in problems if name not in PROBLEMS]:
        raise ValueError(f"problems: there is no {unknown[0]!r}; it must be one of {', '.join(PROBLEMS)}")
    levels = karras_levels(steps, SIGMA_MIN, SIGMA_MAX, RHO)
    coverage(torch.zeros(1), torch.zeros(1, versions))  # refuses a wrong number before anything is computed
    solvers = solvers_of((), steps) if solvers is None else dict(solvers)
    made = {name: PROBLEMS[name]() for name in problems}
    chosen = {name: (problem, fitting(problem, solvers)) for name, problem in made.items()}
    for name, (_, fit) in chosen.items():
        if solvers and not fit:
            raise ValueError(
                f"solvers: {', '.join(solvers)} cannot do {name!r}, whose points lie outside of [-1, 1]; choose another problem"
            )
    found: dict[str, dict[str, SpreadOf]] = {}
    for name, (problem, fit) in chosen.items():
        drawn = draw(problem, draws, samples, seed)
        found[name] = {}
        for method, solver in {EXACT: None, **fit}.items():
            found[name][method] = one(problem, drawn, solver, levels, versions, samples, seed)
            done(name, method)
    settings = {"problems": list(problems), "draws": draws, "versions": versions, "samples": samples, "steps": steps, "seed": seed}
    return Spread(found, settings | {"solvers": {n: s.spec() for n, s in solvers.items()}})


def fitting(problem: SpreadProblem, solvers: Mapping[str, Solver]) -> dict[str, Solver]:
    """Those that can do a problem."""
    return {name: solver for name, solver in solvers.items() if problem.in_range or not isinstance(solver, LATINO)}


@dataclass(frozen=True)
class Drawn:
    """What all solvers of a problem are compared on.

    truths (T, d) and their measurements y (T, ...); per part the variances (T,) of their posteriors there and a direction (T, d) of each; references
    (samples, d): exact samples for every measurement of `SpreadProblem.at`.
    """

    truths: Tensor
    y: Tensor
    variances: dict[str, Tensor]
    directions: dict[str, Tensor]
    references: dict[str, Tensor]


def draw(problem: SpreadProblem, draws: int, samples: int, seed: int) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    truths, y = problem.truths(draws, generator)
    posteriors = [problem.posterior(one) for one in y]
    return Drawn(
        truths.flatten(1),
        y,
        {part: torch.stack([variance_in(*p, basis) for p in posteriors]) for part, basis in problem.parts.items()},
        {part: torch.randn(draws, len(b), generator=generator, dtype=truths.dtype) @ b for part, b in problem.parts.items()},
        {at: problem.exact(measured, samples, torch.Generator().manual_seed(seed + 2)) for at, measured in problem.at.items()},
    )


def one(problem: SpreadProblem, drawn: Drawn, solver: Solver | None, levels: Tensor, versions: int, samples: int, seed: int) -> SpreadOf:
    """A solver, or for None exact samples, on a problem."""
    own = torch.Generator().manual_seed(seed + 1)

    def made(y: Tensor, n: int) -> Tensor:
        """(len(y), n, d)"""
        if solver is None:
            return torch.stack([problem.exact(one, n, own) for one in y])
        z = SIGMA_MAX * torch.randn(len(y) * n, *problem.shape, generator=own, dtype=torch.float64)
        posterior = Posterior(problem.prior, problem.operator, y.repeat_interleave(n, 0), "fast")
        return solver(posterior, z, levels, generator=own).reshape(len(y), n, -1)

    cost = None if solver is None else solver.cost(len(levels) - 1)
    try:
        x = made(drawn.y, versions)
        distance = {at: wasserstein(made(y, samples)[0], drawn.references[at], problem.sliced) for at, y in problem.at.items()}
    except Diverged:
        return SpreadOf(dict.fromkeys(PARTS, math.nan), {}, dict.fromkeys(problem.at, math.nan), cost)
    ratio = {part: deviation_ratio(x, drawn.variances[part], basis) for part, basis in problem.parts.items()}
    held = {
        part: coverage((drawn.truths * direction).sum(1), torch.einsum("tnd,td->tn", x, direction))
        for part, direction in drawn.directions.items()
    }
    return SpreadOf(ratio, held, distance, cost)
