"""The study of spread against closed forms: exact samples are right, a point is not."""

import math

import pytest
import torch
from scipy import stats

from dmap_core.solvers import DPS, SOLVERS
from dmap_core.studies import plots
from dmap_core.studies.spread import (
    EXACT,
    LEVELS,
    PARTS,
    PROBLEMS,
    coverage,
    deviation_ratio,
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
    ],
)
def test_settings_without_meaning_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        spread(**{"solvers": {}, "problems": ("plane",), "draws": 2, "samples": 2, "steps": 4} | wrong)
