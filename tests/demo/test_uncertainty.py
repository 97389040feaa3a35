"""demo/uncertainty.py: its figures where the spread is known to be right, too small, or in the wrong place."""

import sys

import pytest
import torch
from host import ROOT

sys.path.insert(0, str(ROOT / "demo"))
SIDE, K = 96, 8


@pytest.fixture(scope="module")
def uncertainty():
    import uncertainty

    return uncertainty


def made(understated=1.0):
    """(versions, truth) with a deviation that rises from left to right tenfold, of which the versions have that part."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(K + 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 1.0, SIDE)
    return x[:K] / understated, x[K]


@pytest.mark.parametrize("understated", [1.0, 3.0])
def test_samples_of_one_distribution_are_calibrated_and_narrower_ones_off_by_their_factor(uncertainty, understated):
    found = uncertainty.figures(*made(understated))
    true = ((1 + 1 / (K * understated**2)) / ((1 + 1 / K) / understated**2)) ** 0.5
    assert found["factor"] == pytest.approx(true, rel=0.03)
    assert found["factor_smooth"] == pytest.approx(true, rel=0.05)
    assert found["rank_smooth"] > 0.95 > found["rank"] > 0.5
    if understated == 1:
        assert found["held"] == pytest.approx(0.9, abs=0.01)
    else:
        assert found["held"] < 0.6


def test_a_spread_in_the_wrong_place_has_the_wrong_rank(uncertainty):
    versions, truth = made()
    assert uncertainty.figures(versions.flip(-1), truth)["rank_smooth"] < -0.95


def test_only_where_it_looks_counts(uncertainty):
    versions, truth = made()
    where = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    where[:, :30] = True
    truth[:, :, 40:] = 100.0
    found = uncertainty.figures(versions, truth, where)
    assert found["factor"] == pytest.approx(1, abs=0.05) and found["error"] < 0.5


def test_smoothing_keeps_what_is_flat_and_the_sum(uncertainty):
    assert uncertainty.smooth(torch.full((40, 40), 2.0)) == pytest.approx(torch.full((40, 40), 2.0), abs=1e-5)
    point = torch.zeros(41, 41)
    point[20, 20] = 1
    assert float(uncertainty.smooth(point).sum()) == pytest.approx(1, abs=1e-5)


def test_the_ground_is_what_has_the_colour_of_the_corner(uncertainty):
    picture = torch.ones(3, 8, 8)
    picture[0, 2:5, 3:6] = -1
    assert uncertainty.drawn(picture).sum() == 9
