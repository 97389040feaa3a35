"""demo/prices.py: what its columns and its plot are made of."""

import pytest
from host import ROOT

from dmap_core import costs
from dmap_core.metrics.interval import mean_interval
from dmap_core.presets import Preset
from dmap_core.solvers import DMAP, DPS

SIZE = (512, 512)


@pytest.fixture
def prices(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import prices

    return prices


def plan(solver, steps):
    return Preset(solver, steps, "exponential", "test")


def test_operations_are_those_of_the_calls(prices):
    exact = prices.tera(plan(DPS(), 10), guided=False)
    assert exact == pytest.approx(10 * costs.flop("SD 2.0", "KL", SIZE) / costs.TERA)
    none = prices.tera(plan(DPS(jacobian="none"), 10), guided=False)
    assert none == pytest.approx(10 * costs.flop("SD 2.0", "KL", SIZE, jacobian="none") / costs.TERA)
    decoded = costs.run_flop("SD 2.0", "KL", SIZE, DMAP().cost(1)) / costs.TERA - costs.denoiser_flop("SD 2.0", SIZE) / costs.TERA
    small = prices.tera(plan(DPS(jacobian="none"), 10), guided=True)
    assert small == pytest.approx(10 * costs.flop("SD 2.0", "TAESD", SIZE, jacobian="none") / costs.TERA)
    plain = costs.denoiser_flop("SD 2.0", SIZE) / costs.TERA
    assert prices.tera(plan(DMAP(jacobian="none"), 10), guided=False) == pytest.approx(1.8 * none + 10 * plain + decoded)


def test_every_row_is_a_solver_with_its_settings(prices):
    for name, row in prices.ROWS.items():
        solver = {"DPS": DPS, "DMAP": DMAP}[row["solver"]](**row["settings"])
        solver.check(None, row["steps"])
        assert name.startswith(f"{row['solver']} {row['steps']}") and solver.zeta is None
    assert set(prices.WITH_GUIDANCE) <= prices.ROWS.keys()


def test_table_and_plot(prices):
    lines = [
        {
            "name": name,
            "n": 3,
            "psnr": mean_interval([20.0 + i, 21.0 + i, 22.5 + i]),
            "matched": mean_interval([25.0, 26.0, 27.0 + i]),
            "mismatch": 3.0,
            "seconds": 9.0,
            "calls": DPS().cost(10),
            "tera": 50.0 * (i + 1),
        }
        for i, name in enumerate(("DPS 10", "DMAP 10, K 2"))
    ]
    assert "| DMAP 10, K 2 | 3 | 22.17 | 26.33 | 3.0 | 9 | 10 | 10 | 100 |" in prices.table(lines)
    axes = prices.plot(lines, "title").axes
    assert [ax.get_ylabel() for ax in axes] == ["PSNR in dB", "PSNR in dB, matched"] and len(axes[0].texts) == 2


def test_the_front_is_what_nothing_cheaper_beats(prices):
    points = [(3, 10.0), (1, 8.0), (2, 7.0), (1, 9.0), (4, 10.0)]
    assert prices.front(points) == [(1, 9.0), (3, 10.0)]
    assert prices.front(points, -1) == [(1, 8.0), (2, 7.0)]
