"""demo/estimates.py: its damages are what they are called, and its lines count what they say."""

import pytest
import torch
from host import ROOT


@pytest.fixture
def estimates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import estimates

    return estimates


def test_photographs_of_the_table_are_not_those_of_the_tuning(estimates):
    names = [{name for group in groups.values() for name in group} for groups in (estimates.TUNING, estimates.TABLE)]
    assert not names[0] & names[1] and min(map(len, names)) >= 5


def test_every_case_is_a_damage_of_its_own(estimates):
    name, x = next(estimates.photographs({"skimage/data": ("chelsea.png",)}))
    assert name == "chelsea.png 0,0" and x.shape == (1, 3, estimates.SIDE, estimates.SIDE)
    made = {case.name: case.damage(x) for case in estimates.cases()}
    assert torch.equal(made["undamaged"], x)
    for case in estimates.cases():
        y = made[case.name]
        torch.testing.assert_close((y + 1) * 127.5, ((y + 1) * 127.5).round(), rtol=0, atol=1e-3)  # 8 bits
        assert y.shape[-1] == int((estimates.SIDE - 6 * (case.grid != (0, 0))) * case.enlarged)
        assert bool((y[:, :1] == y[:, 1:]).all()) is case.grey
    grain = (made["grain 8"] - x) * 127.5
    assert float(grain.std()) == pytest.approx(8, rel=0.02)


def test_a_line_counts(estimates):
    case = next(case for case in estimates.cases() if case.name == "blur 2.0")
    right = estimates.Estimate(size=(9, 9), blur=2.2)
    line = estimates.row(case, [right, right, estimates.Estimate(size=(9, 9), blur=None, enlarged=3.0)])
    assert line == "| blur 2.0 | 3 | 2 | 2.20 [2.20, 2.20], off by 0.20, unsure 1 | 0.00 [0.00, 0.00], off by 0.00 | none: 3 | 3 | 3 |"
