"""demo/methods.py: its settings keep to their budgets, and what its tables and plot are made of."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from host import ROOT

from dmap_core.operators import centred_box, from_spec
from dmap_core.operators.inpainting import Inpainting
from dmap_core.presets import AUTO, Preset, automatic
from dmap_core.solvers import DMAP, DPS, SOLVERS


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import methods

    return methods


@dataclass
class Line:
    row: SimpleNamespace
    pictures: list
    values: dict


def line(name, operator, psnr, pictures="ab"):
    values = {
        key: list(psnr) for key in ("psnr", "psnr matched", "ssim", "ssim matched", "features", "features matched", "mismatch", "seconds")
    }
    return Line(SimpleNamespace(name=name, operator=operator), list(pictures), values)


def test_every_setting_keeps_to_its_budget(methods):
    f = from_spec({"operator": "SuperResolution", "scale": 8})
    hole = Inpainting(centred_box((128, 128), (48, 48)))
    for operator in (f, hole):
        for budget in methods.BUDGETS:
            rows = [row for row in methods.rows(operator, "damage", tuple(methods.METHODS), [budget], True) if "steps" in row]
            assert len(rows) == sum(len(settings[budget]) for _, settings in methods.METHODS.values())
            for row in rows:
                solver = SOLVERS[row["solver"]](**row["settings"])
                solver.check(operator, row["steps"])
                cost = solver.cost(row["steps"])
                largest = max(cost.denoiser, cost.decoder_gradients)
                assert 0.7 * budget <= largest <= 1.13 * budget, (row["name"], cost)


def test_steps_set_themselves_but_for_two(methods):
    f = from_spec({"operator": "GaussianBlur", "kernel_size": 61, "sigma": 3.0})
    for row in methods.rows(f, "blur", tuple(methods.METHODS), [8], False):
        assert ("zeta" in row.get("settings", {})) == (row["solver"] in ("PSLD", "DSG"))


def test_a_table_has_no_psld_where_there_is_no_transpose(methods):
    f = from_spec({"operator": "Jpeg", "quality": 10})
    assert "PSLD" not in {row["solver"] for row in methods.rows(f, "jpeg", tuple(methods.METHODS), [8, 30], False)}


def test_restore_is_what_the_node_takes(methods):
    f = from_spec({"operator": "GaussianBlur", "kernel_size": 61, "sigma": 3.0})
    rows = [row for row in methods.rows(f, "blur", ("DMAP", "Restore"), methods.BUDGETS, False) if row["name"].startswith("Restore")]
    for row, quality in zip(rows, ("look", "good", "best"), strict=True):
        plan = automatic(f, AUTO, quality)
        assert (SOLVERS[row["solver"]](**row["settings"]), row["steps"]) == (plan.solver, plan.steps)


def test_means_and_differences_are_of_the_same_pictures(methods):
    lines = [line("as given", "one", (20, 20)), line("as given", "two", (10, 10))]
    lines += [line("DMAP, 8", "one", (25, 27)), line("DMAP, 8", "two", (15, 15))]
    lines += [line("LATINO, 8", "one", (26, 29, 99), "abc"), line("LATINO, 8", "two", (15, 14))]
    lines += [line("DPS, 8", "one", (0, 0))]  # not through all damages yet
    found = methods.groups(lines)
    assert list(found) == [8] and list(found[8]) == ["as given", "DMAP", "LATINO", "DPS"]
    summary = {entry["method"]: entry for entry in methods.summary(found[8], {})}
    assert list(summary) == ["as given", "DMAP", "LATINO"] and summary["LATINO"]["n"] == 2
    assert summary["LATINO"]["psnr"] == 21 and summary["DMAP"]["psnr"] == 20.5
    assert summary["LATINO"]["psnr difference"].mean == 0.5  # (0.5, 0.5)
    assert [summary[name]["psnr matched gain"] for name in summary] == [0, 5.5, 6]
    table = methods.differences(found[8], "psnr", 2)
    assert "| LATINO | +1.50" in table and "| DPS | -26.00" in table and "as given" in table


def test_the_price_of_a_hole_is_in_the_mean(methods):
    plans = {
        ("DPS, 8", "blur"): Preset(DPS(jacobian="none"), 8, "exponential", ""),
        ("DPS, 8", "hole"): Preset(DPS(), 8, "exponential", ""),
    }
    calls, tera = methods.price(plans, "DPS, 8")
    assert calls.decoder_gradients == 8
    both = [methods.prices.tera(plan, guided=False) for plan in plans.values()]
    assert tera == pytest.approx(sum(both) / 2) and both[1] > both[0]
    assert methods.price(plans, "as given") is None


def test_what_is_written(methods, tmp_path):
    plans = {
        (f"{name}, {budget}", "one"): Preset(solver, budget, "exponential", "")
        for name, solver in (("DMAP", DMAP()), ("DPS", DPS()))
        for budget in (8, 30)
    }
    lines = [line("as given", "one", (20, 21))]
    lines += [
        line(f"{name}, {budget}", "one", (20 + budget, 21 + budget))
        for name, _ in plans
        for name, budget in [name.split(", ")]
        for budget in [int(budget)]
    ]
    methods.write(lines, plans, tmp_path)
    text = (tmp_path / "methods.md").read_text()
    assert "## 8 evaluations" in text and "## 30 evaluations" in text and "| DPS | 2 | 28.50 | 28.50 |" in text
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    summary = methods.summary(methods.groups(lines)[8], {name: methods.price(plans, f"{name}, 8") for name in ("DPS", "DMAP")})
    axes = methods.plot({8: summary}, "title").axes
    assert [ax.get_ylabel() for ax in axes] == ["PSNR in dB above matching alone", "feature distance minus that of matching alone"]
