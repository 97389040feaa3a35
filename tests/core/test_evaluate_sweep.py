"""A sweep of a setting: its rows, and where the best factor lies."""

import math

import pytest

from dmap_core.evaluate.config import AS_GIVEN, ConfigError, make_config
from dmap_core.evaluate.sweep import Sweep, best_factor
from dmap_core.evaluate.tables import Line
from dmap_core.presets import MODELS

SR8 = {"operator": "SuperResolution", "scale": 8}


def config(*rows):
    rows = [{"operator": "sr8", **row} for row in rows]
    return make_config({"operators": {"sr8": SR8}, "rows": rows, "settings_for": MODELS[1], "checkpoint": "c"})


def test_the_top_of_a_parabola_in_the_logarithm():
    factors = [0.4, 1.0, 2.5]
    psnrs = [25 - 3 * math.log(f / 1.3) ** 2 for f in factors]
    assert best_factor(factors, psnrs) == "the best factor is about 1.30"
    assert "outside" in best_factor(factors, [20.0, 21.0, 23.0])
    assert "outside" in best_factor(factors, [23.0, 20.0, 23.0])  # a valley has no top
    assert "three" in best_factor([1.0, 2.0], [20.0, 21.0])


def test_a_row_for_every_factor_of_the_planned_setting():
    given = config({"solver": AS_GIVEN}, {"solver": "DPS"}, {"solver": "DPS", "steps": 7, "name": "few"})
    swept = Sweep.parse("zeta=0.5,1").config(given)
    assert [row.name for row in swept.rows] == [AS_GIVEN, "DPS, zeta x 0.5", "DPS, zeta x 1", "few, zeta x 0.5", "few, zeta x 1"]
    for row, plain in zip(swept.rows[1:], (1, 1, 2, 2), strict=True):
        whole = given.plan(given.rows[plain])
        assert swept.plan(row).steps == whole.steps
        assert swept.plan(row).solver.settings()["zeta"] == whole.solver.settings()["zeta"] * (0.5 if row.name.endswith("0.5") else 1)
    assert len({row.slug() for row in swept.rows}) == 5


def test_what_cannot_be_swept():
    for text in ("zeta", "zeta=", "zeta=a", "zeta=1,1", "zeta=0,1", "=1,2"):
        with pytest.raises(ConfigError, match="sweep: "):
            Sweep.parse(text)
    with pytest.raises(ConfigError, match="DPS has no setting 'K' that is a number; it has zeta"):
        Sweep.parse("K=1,2").config(config({"solver": "DPS"}))
    with pytest.raises(ConfigError, match="no setting 'optimizer' that is a number"):
        Sweep.parse("optimizer=1,2").config(config({"solver": "DPS"}))


def test_what_is_told_of_finished_rows():
    given, sweep = config({"solver": AS_GIVEN}, {"solver": "DPS"}), Sweep.parse("zeta=0.4,1,2.5")
    swept = sweep.config(given)

    def lines(values):
        return [Line(row, "", ["a"], {"psnr": [value], "seconds": [1.0]}, 0) for row, value in zip(swept.rows[1:], values, strict=False)]

    psnrs = [25 - 3 * math.log(f / 1.3) ** 2 for f in sweep.factors]
    assert sweep.told(given, lines(psnrs)) == ["sr8, DPS: the best factor is about 1.30"]
    assert "three factors" in sweep.told(given, lines(psnrs[:2]))[0]
    assert sweep.told(given, []) == ["sr8, DPS: nothing is finished"]
