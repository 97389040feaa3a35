"""demo/report.py: what its sentences are made of, and when a study is not computed again."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from host import ROOT

from dmap_core.evaluate.config import make_config, read_config
from dmap_core.evaluate.tables import Line

sys.path.insert(0, str(ROOT / "demo"))
CONFIGS = ROOT / "studies" / "configs" / "demo"


@pytest.fixture(scope="module")
def report():
    import report

    return report


@pytest.fixture(scope="module")
def story(report):
    import story

    return story


def lines(names, psnrs, operator="sr4"):
    """Finished rows of a table, with as many pictures as there are values."""
    rows = [{"operator": operator, "solver": "DPS", "name": name} for name in names]
    config = make_config({"operators": {operator: {"operator": "SuperResolution", "scale": 4}}, "rows": rows})
    return [
        Line(row, operator, [str(i) for i in range(len(values))], {"psnr": values, "seconds": values}, 0)
        for row, values in zip(config.rows, psnrs, strict=True)
    ]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_difference_is_of_the_same_pictures(story):
    table = lines(["a", "b", "c"], [[20.0, 21.0, 22.0], [19.0, 20.1, 20.9], [21.0, 19.0, 23.0]])
    found = story.difference(table, "sr4", "a", "b")
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((1.0, 0.7516, 1.2484, 3), abs=1e-4)
    unsure = story.difference(table, "sr4", "a", "c")
    assert unsure.mean == 0 and unsure.low < 0 < unsure.high
    texts = [story.told(difference) for difference in (found, unsure, None)]
    assert all(number in texts[0] for number in ("+1.00", "+0.75", "+1.25", "3")) and len(set(texts)) == 3


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_observation_1_counts_levels(story, tmp_path, factor):
    base = {"standard_error": 0, "n": 8, "conditional_norm": 10}
    rows = [{"sigma": s, "method": "unconditional", "zeta": "", "mean": 4.0} | base for s in (14, 3, 1)]
    rows += [{"sigma": s, "method": "DPS", "zeta": float(z), "mean": 4 * factor} | base for z in story.ZETAS for s in (14, 3, 1)]
    write(tmp_path / "score-error" / "score-error.csv", rows)
    names = [f"DPS zeta {zeta}" for zeta in story.ZETAS] + ["CSE alone"]
    part = story.score_error(tmp_path, lines(names, [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0], [26.0, 27.0], [24.0, 25.0], [19.0, 18.0]]))
    above = 3 if factor > 1 else 0
    assert part.numbers == {
        "best": "4.8",
        "levels": 3,
        "above": dict.fromkeys(story.ZETAS, above),
        "ratio": dict.fromkeys(story.ZETAS, factor),
        "share of the norm": 0.4,
    }
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.whole.splitlines() if line.startswith("| 7.5")]
    assert [found[:3] for found in cells] == [["7.5", f"{above} of 3", f"{factor:.2f}"]] and cells[0][3].startswith("24.50")


@pytest.mark.parametrize("mean", [0.2, 0.06])
def test_observation_2_compares_with_chance(story, tmp_path, mean):
    def row(score, mean, chance=0.05):
        return {"score": score, "samples": 9, "mean over samples": mean, "by chance": chance, "norm": 1, "Table 2's": 0.4}

    for name, last in (("score-mean", 0.05), ("score-mean-500", mean)):
        write(tmp_path / name / "score-mean.csv", [row("unconditional", 0.055), row("DPS, zeta 4.8", last), row("CSE", 0.1)])
    numbers = story.score_mean(tmp_path).numbers
    assert numbers == pytest.approx(
        {
            "at 500 levels": mean / 0.05,
            "at 20 levels": 1.0,
            "conditional model": 2.0,
            "unconditional at 500 levels": 1.1,
            "unconditional at 20 levels": 1.1,
        }
    )


@pytest.mark.parametrize("spread", [0.01, 0.05])
def test_observation_3_compares_with_the_conditional_model(story, tmp_path, spread):
    values = {"DPS zeta 0.05": 0.2, "DPS zeta 7.5": spread, "DMAP": 0.025, "CSE alone": 0.05}
    rows = [{"row": name, "k": 20, "mean standard deviation": value, "standard error": 0.001} for name, value in values.items()]
    write(tmp_path / "diversity" / "diversity.csv", rows)
    (tmp_path / "diversity" / "diversity-a.png").touch()
    part = story.diversity(tmp_path)
    assert part.numbers == pytest.approx({"DPS": spread / 0.05, "DMAP": 0.5})
    assert "](diversity-a.png)" in part.whole


def spread_row(problem, method, distance, ratio, share):
    row = {"problem": problem, "method": method, "guided_evaluations": "100", "distance": distance, "distance_two_modes": math.nan}
    for part in ("seen", "unseen"):
        row |= {f"ratio_{part}": ratio, f"coverage_90_{part}": share}
        row |= {f"coverage_90_{part}_low": share - 0.05, f"coverage_90_{part}_high": share + 0.05}
    return row


def test_known_posteriors_tell_the_nearest_and_the_calibrated(story, tmp_path):
    rows = [
        spread_row("plane", "exact samples", 0.06, 1.0, 0.9),
        spread_row("plane", "right", 0.3, 1.05, 0.92),
        spread_row("plane", "too narrow", 0.1, 0.5, 0.7),
        spread_row("plane", "too wide", 0.5, 1.5, 0.9),
        spread_row("plane", "diverged", math.nan, math.nan, math.nan),
        spread_row("averaging", "exact samples", 0.04, 1.0, 0.9),
        spread_row("averaging", "holds too little", 0.06, 1.0, 0.8),
        spread_row("averaging", "off it alone", 0.05, 1.0, 0.9) | {"coverage_90_seen_high": 0.89},
    ]

    def both(*names, off=None):
        return {"calibrated": list(names), "calibrated off the measurement": off or list(names)}

    write(tmp_path / "spread" / "spread.csv", rows)
    settings = {"draws": 80, "versions": 39, "steps": 100, "samples": 400, "seed": 0}
    (tmp_path / "spread" / "spread.json").write_text(json.dumps({"settings": settings}))
    part = story.spread(tmp_path)
    assert part.numbers == {
        "plane": {"nearest": "too narrow", "distance": 0.1, "floor": 0.06, **both("right")},
        "averaging": {"nearest": "off it alone", "distance": 0.05, "floor": 0.04, **both(off=["off it alone"])},
    }
    assert part.whole.count("\n| plane") == 5 and part.whole.count("\n| averaging") == 3
    assert "](spread.png)" in part.whole and "80 truths" in part.whole


def test_the_spread_of_the_report_is_not_computed_again(report, tmp_path, monkeypatch):
    """What the study writes of its settings is what the report asks for."""
    from dmap_core.studies import commands

    given = {"draws": 2, "steps": 3, "problems": "plane", "seed": 0, "solvers": "DPS", "out": tmp_path}
    report.once(commands.spread_study, given, tmp_path / "spread.png")
    monkeypatch.setattr(commands, "spread_study", None)
    report.once(commands.spread_study, given, tmp_path / "spread.png")


def test_verdicts_go_with_the_numbers(story, tmp_path):
    """What is near the paper's finding is told in other words than what is not, whatever the words."""
    parts = {}
    for spread in (0.01, 0.05):
        values = {"DPS zeta 0.05": 0.2, "DPS zeta 7.5": spread, "DMAP": 0.025, "CSE alone": 0.05}
        rows = [{"row": name, "k": 20, "mean standard deviation": value, "standard error": 0.001} for name, value in values.items()]
        write(tmp_path / "diversity" / "diversity.csv", rows)
        (tmp_path / "diversity" / "diversity-a.png").touch()
        parts[spread] = story.diversity(tmp_path).short.replace(f"{spread / 0.05:.2f}", "")
    assert parts[0.01] != parts[0.05]


def test_a_study_with_the_same_settings_is_not_computed_again(report, tmp_path):
    calls = []

    def study(**given):
        calls.append(given["zeta"])
        result.touch()
        result.with_suffix(".json").write_text(json.dumps({"settings": given | {"command": "x"}}, default=str))

    result = tmp_path / "plot.png"
    for zeta in ("1", "1", "2"):
        report.once(study, {"zeta": zeta, "out": tmp_path}, result)
    assert calls == ["1", "2"]


def test_every_row_that_the_report_speaks_of_is_in_a_table(report, story):
    """The names in story.py are those of the shipped configs."""
    tables = {name: read_config(CONFIGS / f"{name}.yaml") for name in report.TABLES}

    def made(config):
        return [Line(row, row.operator, ["1", "2"], {"psnr": [20.0, 21.0], "seconds": [1.0, 1.0]}, 0) for row in config.rows]

    text = story.claims({name: (config, [], made(config)) for name, config in tables.items()})
    assert text.count("\n- ") == 14
    names = {row.name for row in tables["table1"].rows}
    assert {f"DPS zeta {zeta}" for zeta in story.ZETAS} | {"CSE alone"} <= names
    spread = {row.name for row in read_config(CONFIGS / "diversity.yaml").rows}
    assert {f"DPS zeta {story.WORKS}", f"DPS zeta {story.ZETAS[0]}", "DMAP", "CSE alone"} <= spread


def test_the_shipped_report_is_whole():
    """Every picture and page that docs/report/README.md links is there, and it is not the quick one."""
    import re

    folder = ROOT / "docs" / "report"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "QUICK" not in text
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 10 and [link for link in links if not (folder / link).is_file()] == []
