"""The paper's story on the demo prior: runs its tables and studies, and writes a report with what holds and what does not.

    python demo/report.py            # what `make report` does: hours on two CPU cores; goes on where it was cut; writes docs/report/
    python demo/report.py --quick    # `make report QUICK=1`: minutes, few pictures, not for quoting; writes output/report-quick/README.md

Results (pictures, figures of each) are kept below output/report/, and every table is one of studies/configs/demo/. Several processes share the
work if torchrun or accelerate launch starts this.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests"))

from host import import_torchvision  # noqa: E402

import_torchvision()

import story  # noqa: E402
from accelerate import PartialState  # noqa: E402

from dmap_core.evaluate.config import read_config  # noqa: E402
from dmap_core.evaluate.report import write_table  # noqa: E402
from dmap_core.evaluate.results import write_text  # noqa: E402
from dmap_core.evaluate.run import evaluate, versions  # noqa: E402
from dmap_core.evaluate.tables import figures, grid  # noqa: E402
from dmap_core.studies import commands  # noqa: E402

CONFIGS = ROOT / "studies" / "configs" / "demo"
TABLES = ("table4", "table1", "table5", "table9", "table10")
PRIOR = ROOT / "models" / "checkpoints" / "dmap-demo-prior.safetensors"
CSE = ROOT / "models" / "controlnet" / "dmap-demo-cse-sr4.safetensors"
PICTURE = HERE / "held-out" / "dmap-demo-00.png"
OPERATOR = '{"operator":"SuperResolution","scale":4}'
ZETAS = ",".join(story.ZETAS)
PAPER_ZETAS = "0.05,0.3,1.0,4.8"
SPREAD = "plane,averaging"  # problems of which the posterior is known
FULL = {"count": None, "repeats": None, "samples": 1000, "fewer": 250, "noises": 8, "truths": 200, "levels": 100}
QUICK = {"count": 2, "repeats": 3, "samples": 32, "fewer": 32, "noises": 2, "truths": 4, "levels": 20}

log = logging.getLogger("report")


def problem(out: Path, **more) -> dict:
    """The options of a study on the first held-out picture, with the noise levels of DPS's preset for the demo prior unless others are given."""
    given = {
        "checkpoint": PRIOR,
        "picture": PICTURE,
        "operator": OPERATOR,
        "cse": CSE,
        "zeta": ZETAS,
        "spacing": "exponential",
        "steps": 20,
    }
    given |= {"size": None, "seed": 0, "precision": "fp32", "prompt": "", "weights": None, "out": out}
    return given | more


def once(study, given: dict, result: Path) -> None:
    """Run a study whose result is not there yet with these settings, in the main process."""
    settings = result.with_suffix(".json")
    wanted = json.loads(json.dumps(given, default=str))
    if result.exists() and settings.exists():
        found = json.loads(settings.read_text())["settings"]
        if {name: found.get(name) for name in wanted} == wanted:
            return
    if PartialState().is_main_process:
        study(**given)


def table(name: str, out: Path, sizes: dict, quick: bool):
    """(config, jobs, lines) of a finished table."""
    changes = {"count": sizes["count"]} if sizes["count"] else {}
    config = read_config(CONFIGS / f"{name}.yaml", **changes)
    if quick:  # one operator is enough to see that it works
        config = replace(config, rows=tuple(row for row in config.rows if row.operator == config.rows[0].operator))
    jobs = evaluate(config, out / name)
    return config, jobs, write_table(config, jobs, out / name) if PartialState().is_main_process else []


def report(out: Path, docs: Path, tables: dict, spread: list, quick: bool) -> None:
    """Write README.md and copy the plots that it shows."""
    docs.mkdir(parents=True, exist_ok=True)
    for study in ("score-error", "score-mean", "toy", "spread"):
        for kind in ("png", "csv"):
            shutil.copy(out / study / f"{study}.{kind}", docs)
    for file in (*(out / "diversity").glob("diversity-*.png"), out / "diversity" / "diversity.csv"):
        shutil.copy(file, docs)
    sections = []
    for name, (config, _, lines) in tables.items():
        for file in ("table.md", "table.csv"):
            shutil.copy(out / name / file, docs / f"{name}{Path(file).suffix}")
        shutil.copy(out / name / "plots" / "psnr.png", docs / f"{name}-psnr.png")
        pictures = []
        for operator in dict.fromkeys(line.row.operator for line in lines):
            shutil.copy(out / name / f"pictures-{operator}.png", docs / f"{name}-{operator}.png")
            pictures.append(f"![{operator}: the measurement, every row and the original]({name}-{operator}.png)")
        more = f"Settings, paired differences of all metrics: [{name}.md]({name}.md)."
        sections.append(
            "\n\n".join([f"## {config.title}", config.note, figures(config, lines), more, f"![PSNR]({name}-psnr.png)", *pictures])
        )
    n = max(line.n for line in tables["table4"][2])
    head = (
        "# The paper's story on the demo prior\n\n"
        + (f"**QUICK: n is {n}. This shows that everything runs; no figure here says anything about the methods.**\n\n" if quick else "")
        + f"Made by `make report{' QUICK=1' if quick else ''}` with the demo prior (a small model of emoji, 128x128, see demo/README.md), not with Stable Diffusion: what holds "
        f"here need not hold there, and the other way round. n is {n} held-out pictures in the main table, fp32, one thread per process, seeds 0, 3 and so on. "
        "LPIPS, FID and KID need backbones that are not shipped, so the EfficientNet-Lite0 feature distance stands in for LPIPS; with n this small "
        "no FID would mean anything.\n\n" + seconds(tables, spread)
    )
    told = story.observations(out, tables)
    made = "## Made with\n\n" + grid(["package", "version"], [[k, v] for k, v in versions().items()])
    first, *others = sections
    write_text(
        docs / "README.md",
        "\n\n".join([head, story.in_short(told), first, story.claims(tables), *(part.whole for part in told), *others, made]) + "\n",
    )
    log.info("%s", docs / "README.md")


def seconds(tables: dict, spread: list) -> str:
    """How long the restorations took."""
    lines = [line for _, _, found in tables.values() for line in found] + spread
    total = sum(sum(line.values["seconds"]) for line in lines)
    return f"All {sum(line.n for line in lines)} restorations together took {total / 3600:.1f} hours of one CPU thread beside other work; the scores come on top."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures, minutes: to see that everything runs")
    parser.add_argument("--out", type=Path, help="results (default: output/report, or output/report-quick)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out = args.out or ROOT / "output" / ("report-quick" if args.quick else "report")
    sizes = QUICK if args.quick else FULL
    started = time.time()
    once(commands.toy_example, {"samples": 1000, "zeta": 0.05, "seed": 0, "out": out / "toy"}, out / "toy" / "toy.png")
    known = {"draws": sizes["truths"], "steps": sizes["levels"], "problems": SPREAD, "seed": 0, "out": out / "spread"}
    once(commands.spread_study, known, out / "spread" / "spread.png")
    error = problem(out / "score-error", repeats=sizes["noises"])
    once(commands.score_error, error, out / "score-error" / "score-error.png")
    mean = problem(out / "score-mean", samples=sizes["samples"], batch=8)
    once(commands.score_mean, mean, out / "score-mean" / "score-mean.png")
    paper = {"zeta": PAPER_ZETAS, "spacing": "paper", "steps": 500, "samples": sizes["fewer"], "batch": 8}
    once(commands.score_mean, problem(out / "score-mean-500", **paper), out / "score-mean-500" / "score-mean.png")
    tables = {name: table(name, out, sizes, args.quick) for name in TABLES}
    spread = read_config(CONFIGS / "diversity.yaml", **({"repeats": sizes["repeats"]} if sizes["repeats"] else {}))
    jobs = evaluate(spread, out / "diversity")
    if PartialState().is_main_process:
        lines = write_table(spread, jobs, out / "diversity")
        commands.write_diversity(spread, jobs, out / "diversity")
        report(out, out if args.quick else ROOT / "docs" / "report", tables, lines, args.quick)
        log.info("this run took %.0f minutes", (time.time() - started) / 60)


if __name__ == "__main__":
    main()
