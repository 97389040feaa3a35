"""demo/report.py: what its sentences are made of, and when a study is not computed again."""

import csv
import json
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


def test_a_difference_says_whether_it_is_sure(story):
    table = lines(["a", "b", "c"], [[20.0, 21.0, 22.0], [19.0, 20.1, 20.9], [21.0, 19.0, 23.0]])
    assert story.difference(table, "sr4", "a", "b") == "+1.00 dB (95 % interval +0.75 to +1.25, n 3)"
    assert story.difference(table, "sr4", "a", "c").startswith("+0.00 dB") and "within the error" in story.difference(
        table, "sr4", "a", "c"
    )


@pytest.mark.parametrize(
    "factor, ending", [(2.0, "As in the paper, that is everywhere."), (0.5, "In the paper it is further nearly everywhere.")]
)
def test_observation_1_counts_levels(story, tmp_path, factor, ending):
    base = {"standard_error": 0, "n": 8, "conditional_norm": 10}
    rows = [{"sigma": s, "method": "unconditional", "zeta": "", "mean": 4.0} | base for s in (14, 3, 1)]
    rows += [{"sigma": s, "method": "DPS", "zeta": float(z), "mean": 4 * factor} | base for z in story.ZETAS for s in (14, 3, 1)]
    write(tmp_path / "score-error" / "score-error.csv", rows)
    names = [f"DPS zeta {zeta}" for zeta in story.ZETAS] + ["CSE alone"]
    part = story.score_error(tmp_path, lines(names, [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0], [26.0, 27.0], [24.0, 25.0], [19.0, 18.0]]))
    above = 3 if factor > 1 else 0
    assert part.short.startswith("With zeta 4.8, the best of 0.05, 0.3, 1.0, 4.8, 7.5")
    assert f"at {above} of 3 noise levels" in part.short and part.short.endswith(ending)
    assert f"| 7.5 | {above} of 3 | {factor:.2f} | 24.50" in part.whole and "40 % of the conditional score's norm" in part.whole


@pytest.mark.parametrize("mean, verdict", [(0.2, "as the paper finds"), (0.06, "unlike in the paper")])
def test_observation_2_compares_with_chance(story, tmp_path, mean, verdict):
    def row(score, mean, chance=0.05):
        return {"score": score, "samples": 9, "mean over samples": mean, "by chance": chance, "norm": 1, "Table 2's": 0.4}

    for name, last in (("score-mean", 0.05), ("score-mean-500", mean)):
        write(tmp_path / name / "score-mean.csv", [row("unconditional", 0.055), row("DPS, zeta 4.8", last), row("CSE", 0.1)])
    part = story.score_mean(tmp_path)
    assert f"has a mean of {mean:.3f}, {mean / 0.05:.1f} times what chance would show (unconditional: 1.1 times), {verdict}" in part.short
    assert "the conditional model 0.100, 2.0 times" in part.short


@pytest.mark.parametrize(
    "spread, verdict", [(0.01, "much less, as in the paper"), (0.05, "which is not the small part that the paper finds")]
)
def test_observation_3_compares_with_the_conditional_model(story, tmp_path, spread, verdict):
    values = {"DPS zeta 0.05": 0.2, "DPS zeta 7.5": spread, "DMAP": 0.025, "CSE alone": 0.05}
    rows = [{"row": name, "k": 20, "mean standard deviation": value, "standard error": 0.001} for name, value in values.items()]
    write(tmp_path / "diversity" / "diversity.csv", rows)
    (tmp_path / "diversity" / "diversity-a.png").touch()
    part = story.diversity(tmp_path)
    assert verdict in part.short and f"differ {spread / 0.05:.2f} times" in part.short and "DMAP's 0.50 times" in part.short
    assert "](diversity-a.png)" in part.whole


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
