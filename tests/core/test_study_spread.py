"""The study of spread against closed forms: exact samples are right, a point is not."""

import math

import pytest
import torch
from scipy import stats

from dmap_core.solvers import DPS, LATINO, SOLVERS, Unguided
from dmap_core.studies import plots
from dmap_core.studies.spread import (
    EXACT,
    LEVELS,
    PARTS,
    PROBLEMS,
    coverage,
    deviation_ratio,
    draw,
    solver_names,
    solvers_of,
    spread,
    usual_solvers,
    variance_in,
    wasserstein,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_exact_samples_have_ratio_1_and_the_intervals_hold_what_they_say(problem):
    one = spread({}, (problem,), draws=120, samples=200, steps=2).found[problem][EXACT]
    for part in PARTS:
        assert one.ratio[part] == pytest.approx(1, abs=0.03)
        for level, found in zip(LEVELS, one.coverage[part], strict=True):
            assert stats.binomtest(round(found.share * found.draws), found.draws, level).pvalue > 1e-3
            assert found.low <= found.share <= found.high


@pytest.mark.parametrize("sliced", [False, True])
def test_the_distance_of_gaussians_is_the_closed_form(sliced):
    """W2^2 of N(0, 1) and N(m, s^2 1) is |m|^2 + d (s - 1)^2; projections have its d-th part. n 1000: the best assignment is some 1 % above."""
    d, shift, s = 2, torch.tensor([3.0, 4.0], dtype=torch.float64), 2.0
    true = math.sqrt((25 + d * (s - 1) ** 2) / (d if sliced else 1))
    assert wasserstein(randn(1000, d), shift + s * randn(1000, d, seed=1), sliced) == pytest.approx(true, rel=0.06)
    assert wasserstein(randn(50, d), randn(50, d).flip(0), sliced) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("problem", ["plane", "averaging"])
def test_exact_samples_are_at_the_floor_and_narrower_ones_above_it(problem):
    """The distance of exact samples from others, over seeds, is what the study's row of them says; half the deviation is further than all of those."""
    made = PROBLEMS[problem]()
    y, n = list(made.at.values())[0], 100

    def exact(seed):
        return made.exact(y, n, torch.Generator().manual_seed(seed))

    reference = exact(1000)
    floors = [wasserstein(exact(seed), reference, made.sliced) for seed in range(24)]
    found = spread({}, (problem,), draws=2, samples=n, steps=2).found[problem][EXACT]
    assert 0.5 * min(floors) < list(found.distance.values())[0] < 2 * max(floors)
    _, means, _ = made.posterior(y)
    centre = (made.posterior(y)[0] @ means).expand(n, -1)
    assert wasserstein(centre + 0.5 * (exact(0) - centre), reference, made.sliced) > max(floors)


def test_the_floor_falls_with_the_root_of_the_number_of_samples():
    made = PROBLEMS["averaging"]()
    y = made.at["y of a centre"]

    def floor(n, seed):
        a, b = (made.exact(y, n, torch.Generator().manual_seed(s)) for s in (seed, seed + 500))
        return wasserstein(a, b, True) ** 2

    few, many = (sum(floor(n, seed) for seed in range(16)) for n in (100, 400))
    assert few / many == pytest.approx(4, rel=0.25)


def test_intervals_of_exact_samples_hold_what_they_say():
    for level, found in zip(LEVELS, coverage(randn(4000), randn(4000, 39, seed=1)), strict=True):
        assert found.share == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 4000))


def test_without_guidance_the_ratio_is_the_priors_over_the_posteriors():
    made = PROBLEMS["inpainting"]()
    means, weights = made.prior.means.flatten(1), made.prior.weights.double()
    prior = {
        part: float(variance_in(weights, means, made.prior.std**2 * torch.eye(64, dtype=torch.float64), basis))
        for part, basis in made.parts.items()
    }
    one = spread({"no guidance": Unguided()}, ("inpainting",), draws=10, samples=4, steps=150).found["inpainting"]["no guidance"]
    truths = draw(made, 10, 4, 0)
    for part in PARTS:
        assert one.ratio[part] == pytest.approx(math.sqrt(prior[part] / float(truths.variances[part].mean())), rel=0.03)


def test_a_point_has_no_deviation_and_holds_nothing():
    point = torch.ones(30, 39, 4, dtype=torch.float64)
    assert deviation_ratio(point, torch.ones(30), torch.eye(4, dtype=torch.float64)) == 0
    for c in coverage(randn(30), point[..., 0]):
        assert (c.share, c.low) == (0, 0)


def test_half_the_deviation_is_a_ratio_of_one_half():
    ratio = deviation_ratio(0.5 * randn(200, 39, 4), torch.full((200,), 4.0), torch.eye(4, dtype=torch.float64))
    assert ratio == pytest.approx(0.5, rel=0.02)


def test_the_variance_of_a_mixture_is_that_of_its_samples():
    problem = PROBLEMS["averaging"]()
    y = problem.at["y of a centre"]
    x = problem.exact(y, 20_000, torch.Generator().manual_seed(0))
    for basis in problem.parts.values():
        assert float(variance_in(*problem.posterior(y), basis)) == pytest.approx(float((x @ basis.mT).var(0).sum()), rel=0.03)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_unseen_changes_no_measurement(problem):
    problem = PROBLEMS[problem]()
    unseen = problem.parts["unseen"]
    assert problem.operator(unseen.view(-1, *problem.shape)).abs().max() < 1e-12
    assert sum(map(len, problem.parts.values())) == problem.prior.means[0].numel()


def test_every_solver_is_there_and_runs():
    assert usual_solvers(20).keys() == SOLVERS.keys()
    found = spread(problems=("inpainting",), draws=2, samples=4, steps=8)
    rows = found.rows()
    assert {row["method"] for row in rows} >= {EXACT, *SOLVERS}
    assert len(found.text().splitlines()) == len(rows)
    assert all(math.isfinite(row["ratio_unseen"]) for row in rows if row["method"] in (EXACT, "DPS", "DMAP"))


@pytest.mark.parametrize("steps", [50, 100, 200])
def test_step_sizes_are_those_of_the_toy_and_windows_those_of_the_paper(steps):
    """PSLD's zeta of 0.05 belongs to 100 levels, and FreeDoM's window of 25 to 50 to 500."""
    found = usual_solvers(steps)
    assert found["PSLD"].zeta == pytest.approx(0.05 * 100 / steps)
    assert found["PSLD"].gamma == pytest.approx(0.0001 * 100 / steps)
    assert (found["FreeDoM"].first, found["FreeDoM"].last) == (round(25 * steps / 500), round(50 * steps / 500))
    assert found["DSG"].zeta == usual_solvers(10)["DSG"].zeta


def test_solvers_by_name():
    assert solver_names(" DPS; DAPS, gradient ;") == ("DPS", "DAPS, gradient")
    assert list(solvers_of(("DAPS, gradient", "DPS"), 20)) == ["DAPS, gradient", "DPS"]
    assert solvers_of((), 20).keys() > SOLVERS.keys()
    with pytest.raises(ValueError, match="solvers: there is no 'DIP'; choose from DPS; "):
        solvers_of(("DPS", "DIP"), 20)


def test_points_outside_of_pictures_are_not_for_latino():
    found = spread({"LATINO": LATINO(), "DPS": DPS()}, ("plane", "averaging"), draws=2, samples=4, steps=3).found
    assert list(found["plane"]) == [EXACT, "DPS"] and list(found["averaging"]) == [EXACT, "LATINO", "DPS"]


def test_a_seed_is_a_result():
    first, again, other = (spread({"DPS": DPS()}, ("plane",), draws=2, samples=4, steps=4, seed=s).rows()[1] for s in (1, 1, 2))
    assert {k: v for k, v in first.items() if v == v} == {k: v for k, v in again.items() if v == v}
    assert first["ratio_seen"] != other["ratio_seen"]


def test_the_plot_has_a_column_for_every_problem():
    found = spread({"DPS": DPS()}, ("plane", "inpainting"), draws=4, samples=4, steps=4)
    figure = plots.spread_plot(found)
    assert [axes.get_title() for axes in figure.axes] == ["plane", "inpainting", "", ""]
    points = [line for line in figure.axes[1].lines if line.get_label() == "unseen"][0].get_xdata()
    assert list(points) == [row["ratio_unseen"] for row in found.rows() if row["problem"] == "inpainting"]
    both = spread({"LATINO": LATINO(), "DPS": DPS()}, ("plane", "averaging"), draws=2, samples=4, steps=3)
    left, right = plots.spread_plot(both).axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()] == [EXACT, "LATINO", "DPS"]
    places = [[line for line in axes.lines if line.get_label() == "seen"][0].get_ydata().round() for axes in (left, right)]
    assert [list(p) for p in places] == [[0, 2], [0, 1, 2]]  # the plane has no LATINO
    with pytest.raises(ValueError, match="at least one problem"):
        plots.spread_plot(spread({}, (), draws=4, samples=4, steps=4))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"versions": 38}, "versions is 38"),
        ({"draws": 1}, "draws is 1"),
        ({"samples": 1}, "samples is 1"),
        ({"problems": ("space",)}, "there is no 'space'"),
        ({"steps": 1}, "steps is 1"),
        ({"solvers": {"LATINO": LATINO()}}, "solvers: LATINO cannot do 'plane'"),
    ],
)
def test_settings_without_meaning_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        spread(**{"solvers": {}, "problems": ("plane",), "draws": 2, "samples": 2, "steps": 4} | wrong)
