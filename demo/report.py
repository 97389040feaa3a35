"""The paper's story on the demo prior: runs its tables and studies, and writes a report with what holds and what does not.

    python demo/report.py            # what `make report` does: hours on two CPU cores; goes on where it was cut; writes docs/report/
    python demo/report.py --quick    # `make report QUICK=1`: minutes, few pictures, not for quoting; writes output/report-quick/README.md

Results (pictures, figures of each) are kept below output/report/, and every table is one of studies/configs/demo/. Several processes share the
work if torchrun or accelerate launch starts this.
"""

import argparse
import csv
import json
import logging
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from host import import_torchvision  # noqa: E402

import_torchvision()

from accelerate import PartialState  # noqa: E402

from dmap_core.evaluate.config import read_config  # noqa: E402
from dmap_core.evaluate.report import write_table  # noqa: E402
from dmap_core.evaluate.results import write_text  # noqa: E402
from dmap_core.evaluate.run import evaluate, versions  # noqa: E402
from dmap_core.evaluate.tables import figures, grid  # noqa: E402
from dmap_core.metrics.interval import mean_interval  # noqa: E402
from dmap_core.studies import commands  # noqa: E402

CONFIGS = ROOT / "studies" / "configs" / "demo"
TABLES = ("table4", "table1", "table5", "table9", "table10")
PRIOR = HERE / "dmap-demo-prior.safetensors"
CSE = ROOT / "models" / "controlnet" / "dmap-demo-cse-sr4.safetensors"
PICTURE = HERE / "held-out" / "dmap-demo-00.png"
OPERATOR = '{"operator":"SuperResolution","scale":4}'
ZETAS = "0.05,0.3,1.0,4.8,7.5"
PAPER_ZETAS = "0.05,0.3,1.0,4.8"
FULL = {"count": None, "repeats": None, "samples": 1000, "fewer": 250, "noises": 8}
QUICK = {"count": 2, "repeats": 4, "samples": 32, "fewer": 32, "noises": 2}

log = logging.getLogger("report")


def problem(out: Path, **more) -> SimpleNamespace:
    """The options of a study on the first held-out picture, with the noise levels of DPS's preset for the demo prior."""
    given = {
        "checkpoint": PRIOR,
        "picture": PICTURE,
        "operator": OPERATOR,
        "cse": CSE,
        "zeta": ZETAS,
        "spacing": "exponential",
        "steps": 20,
    }
    return SimpleNamespace(**given, size=None, seed=0, precision="fp32", prompt="", weights=None, out=out, **more)


def once(study, args: SimpleNamespace, result: Path) -> None:
    """Run a study whose result is not there yet with these settings, in the main process."""
    settings = result.with_suffix(".json")
    wanted = json.loads(json.dumps(vars(args), default=str))
    if result.exists() and settings.exists():
        found = json.loads(settings.read_text())["settings"]
        if {name: found.get(name) for name in wanted} == wanted:
            return
    if PartialState().is_main_process:
        study(args)


def table(name: str, out: Path, sizes: dict, quick: bool):
    """(config, jobs, lines) of a finished table."""
    changes = {"count": sizes["count"]} if sizes["count"] else {}
    config = read_config(CONFIGS / f"{name}.yaml", **changes)
    if quick:  # one operator is enough to see that it works
        config = replace(config, rows=tuple(row for row in config.rows if row.operator == config.rows[0].operator))
    jobs = evaluate(config, out / name)
    return config, jobs, write_table(config, jobs, out / name) if PartialState().is_main_process else []


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def line_of(lines: list, operator: str, name: str):
    return next(line for line in lines if line.row.operator == operator and line.row.name == name)


def paired(lines: list, operator: str, a: str, b: str, metric: str = "psnr") -> str:
    """What the difference a - b is on the same pictures, in words."""
    first, second = line_of(lines, operator, a), line_of(lines, operator, b)
    found = mean_interval([x - y for x, y in zip(first.values[metric], second.values[metric], strict=True)])
    sure = "" if found.low > 0 or found.high < 0 else ", which is within the error"
    return f"{found.mean:+.2f} dB (95 % interval {found.low:+.2f} to {found.high:+.2f}, n {found.n}{sure})"


def observation_1(out: Path, table1: list) -> str:
    rows = read_csv(out / "score-error" / "score-error.csv")
    plain = {row["sigma"]: float(row["mean"]) for row in rows if row["method"] == "unconditional"}
    norm = {row["sigma"]: float(row["conditional_norm"]) for row in rows}
    body, above = [], {}
    for zeta in ZETAS.split(","):
        errors = {row["sigma"]: float(row["mean"]) for row in rows if row["zeta"] and float(row["zeta"]) == float(zeta)}
        above[zeta] = sum(errors[s] > plain[s] for s in plain)
        ratio = [errors[s] / plain[s] for s in plain]
        psnr = line_of(table1, "sr4", f"DPS zeta {zeta}")
        body.append(
            [f"DPS, zeta {zeta}", f"{above[zeta]} of {len(plain)}", f"{sorted(ratio)[len(ratio) // 2]:.2f}", psnr.interval("psnr").text(2)]
        )
    alone = line_of(table1, "sr4", "CSE alone").interval("psnr").text(2)
    relative = sorted(plain[s] / norm[s] for s in plain)[len(plain) // 2]
    head = ["score", "noise levels with a larger error than the unconditional score", "median ratio of the errors", "PSNR of DPS (dB)"]
    holds = all(above[z] == len(plain) for z in ZETAS.split(",")[2:])
    best = max(ZETAS.split(","), key=lambda z: line_of(table1, "sr4", f"DPS zeta {z}").interval("psnr").mean)
    verdict = (
        "As in the paper, DPS's score is further from the conditional model's than the unconditional score is, for every zeta of 1 and above at every level"
        if holds
        else "Not at every level is DPS's score further from the conditional model's than the unconditional score is, for a zeta of 1 and above"
    )
    return (
        "## Observation I: the error of DPS's score (Fig. 1)\n\n"
        f"The conditional model is the demo CSE, trained with 100 pictures (alone it restores with {alone} dB); StableSR cannot be had for this prior. "
        f"Super-resolution x4, the first held-out picture, {rows[0]['n']} draws of noise at each of the {len(plain)} levels of DPS's schedule. The "
        f"unconditional score itself is off by {100 * relative:.0f} % of the conditional score's norm (median over the levels).\n\n"
        "![score error over noise levels](score-error.png)\n\n" + grid(head, body) + "\n\n"
        f"{verdict}. The best PSNR of these has zeta {best}: {'a larger error goes with better pictures' if float(best) >= 4.8 else 'here the largest error does not go with the best pictures'}. "
        "The ratio grows with the step: Prop. 1 divides zeta by the share of noise that a step removes.\n"
    )


def score_mean_grid(rows: list[dict[str, str]]) -> str:
    names = list(rows[0])
    return grid(names, [[row[names[0]], row["samples"], *(f"{float(row[name]):.4f}" for name in names[2:])] for row in rows])


def observation_2(out: Path) -> str:
    few, many = (read_csv(out / name / "score-mean.csv") for name in ("score-mean", "score-mean-500"))
    mean, floor = list(few[0])[2:4]
    plain = few[0]
    found = {}
    for rows in (few, many):
        last = [row for row in rows if row["score"].startswith("DPS")][-1]
        found[len(found)] = (
            f"{last['score']} shows {float(last[mean]):.3f}, {float(last[mean]) / float(last[floor]):.1f} times what chance would"
        )
    cse = next(row for row in few if row["score"] == "CSE")
    return (
        "## Observation II: the mean of DPS's score at x_T (Table 2)\n\n"
        "With the 20 noise levels that DPS has here:\n\n![mean of the score](score-mean.png)\n\n" + score_mean_grid(few) + "\n\n"
        "With the paper's 500 levels, between the first two of which less noise is removed, so that the same zeta makes a larger part of the score "
        "(zeta 7.5 at 20 levels is worth 0.3 at 500, by the rule of B.3):\n\n" + score_mean_grid(many) + "\n\n"
        f"A score of the samples' density has mean 0; {plain['samples']} samples show {float(plain[floor]):.3f} of it by chance, the unconditional score "
        f"{float(plain[mean]):.3f}. At 20 levels {found[0]}; at 500 levels {found[1]}; the CSE's {float(cse[mean]):.3f} at 20 levels is "
        f"{float(cse[mean]) / float(cse[floor]):.1f} times. Table 2's figures near 0.4 are no mean over samples: a unit Gaussian of four channels gives 0.399 for "
        "its statistic, whatever the number of samples.\n"
    )


def observation_3(out: Path) -> str:
    rows = read_csv(out / "diversity" / "diversity.csv")
    found = {row["row"]: row for row in rows}
    key, error = "mean standard deviation", "standard error"
    body = [[row["row"], row["k"], f"{float(row[key]):.4f} +- {float(row[error]):.4f}"] for row in rows]
    ratio = float(found["DPS zeta 7.5"][key]) / float(found["CSE alone"][key])
    file = next(path.name for path in sorted((out / "diversity").glob("diversity-*.png")))
    return (
        "## Observation III: how different the restorations of one picture are (Fig. 3, Table 3)\n\n"
        f"![means and standard deviations per pixel]({file})\n\n"
        + grid(["row", "k", "mean standard deviation, of [0, 1], and its standard error"], body)
        + f"\n\nDPS with the zeta that works spreads {ratio:.2f} times as much as the conditional model"
        f"{', as in the paper much less' if ratio < 0.7 else ', which is not the small part of it that the paper finds'}. "
        "With zeta 0.05 it is hardly guided and spreads as the prior does.\n"
    )


def toy(out: Path) -> str:
    rows = read_csv(out / "toy" / "toy.csv")
    body = [[row["y"], row["method"], *(f"{float(row[name]):.4g}" for name in ("upper", "mean", "std", "residual"))] for row in rows]
    head = ["y", "method", "part in the upper mode", "mean of the second coordinate", "its standard deviation", "mean residual"]
    return (
        "## The toy example (A.4, Fig. 8)\n\n![samples in the plane](toy.png)\n\n" + grid(head, body) + "\n\n"
        "With the published numbers (sigma_0 0.3, y = 0.5) the true posterior has one mode, not the two of Fig. 8, and DPS leaves a third of its samples in the "
        "other one. At y = 0, where there are two modes, DPS finds both. So this toy does not show that DPS seeks a mode.\n"
    )


def claims(tables: dict, quick: bool) -> str:
    """The paper's claims about the methods, each with what came out here."""
    lines4, lines5, lines9 = (tables[name][2] for name in ("table4", "table5", "table9"))
    points = []
    for operator in dict.fromkeys(line.row.operator for line in lines4):
        points.append(f"- DMAP (same) minus DPS, {operator}: {paired(lines4, operator, 'DMAP', 'DPS')}.")
        points.append(f"- DMAP full minus DMAP (same), {operator}: {paired(lines4, operator, 'DMAP full', 'DMAP')}.")
        points.append(f"- DMAP (same) minus DSG, {operator}: {paired(lines4, operator, 'DMAP', 'DSG')}.")
    points.append(f"- DPS + CSE minus DPS, sr4: {paired(lines4, 'sr4', 'DPS + CSE', 'DPS')}.")
    points.append(f"- DMAP + CSE minus DMAP, sr4: {paired(lines4, 'sr4', 'DMAP + CSE', 'DMAP')}.")
    points.append(f"- T 10, K 2 minus T 20, K 1, sr8: {paired(lines5, 'sr8', 'DMAP, T 10, K 2', 'DMAP, T 20, K 1')}.")
    points.append(f"- T 10, K 2 minus T 5, K 4, sr8: {paired(lines5, 'sr8', 'DMAP, T 10, K 2', 'DMAP, T 5, K 4')}.")
    points.append(f"- Ancestral steps minus PF-ODE, DPS, sr8: {paired(lines9, 'sr8', 'DPS ancestral', 'DPS PF-ODE')}.")
    return "## The paper's claims about methods, as paired differences of PSNR\n\n" + "\n".join(points) + "\n"


def report(out: Path, docs: Path, tables: dict, quick: bool) -> None:
    """Write README.md and copy the plots that it shows."""
    docs.mkdir(parents=True, exist_ok=True)
    for source, name in ((out / "score-error", "score-error.png"), (out / "score-mean", "score-mean.png"), (out / "toy", "toy.png")):
        shutil.copy(source / name, docs / name)
        shutil.copy(source / Path(name).with_suffix(".csv"), docs)
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
        f"here need not hold there, and the other way round. n is {n} held-out pictures in the main table, fp32, one thread per process, seed 0 and up. "
        "LPIPS, FID and KID need backbones that are not shipped, so the EfficientNet-Lite0 feature distance stands in for LPIPS; with n this small "
        "no FID would mean anything.\n\n" + seconds(tables)
    )
    observations = [observation_1(out, tables["table1"][2]), observation_2(out), observation_3(out), toy(out)]
    made = "## Made with\n\n" + grid(["package", "version"], [[k, v] for k, v in versions().items()])
    first, *others = sections
    write_text(docs / "README.md", "\n\n".join([head, first, claims(tables, quick), *observations, *others, made]) + "\n")
    log.info("%s", docs / "README.md")


def seconds(tables: dict) -> str:
    """How long the restorations took."""
    total = sum(sum(line.values["seconds"]) for _, _, lines in tables.values() for line in lines)
    return f"All restorations of the tables together took {total / 3600:.1f} hours of one thread each."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures, minutes: to see that everything runs")
    parser.add_argument("--out", type=Path, help="results (default: output/report, or output/report-quick)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out = args.out or ROOT / "output" / ("report-quick" if args.quick else "report")
    sizes = QUICK if args.quick else FULL
    started = time.time()
    once(commands.toy_example, SimpleNamespace(samples=1000, zeta=0.05, seed=0, out=out / "toy"), out / "toy" / "toy.png")
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
        write_table(spread, jobs, out / "diversity")
        commands.write_diversity(spread, jobs, out / "diversity")
        report(out, out if args.quick else ROOT / "docs" / "report", tables, args.quick)
        log.info("this run took %.0f minutes", (time.time() - started) / 60)


if __name__ == "__main__":
    main()
