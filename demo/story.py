"""What report.py says about the results: sentences around figures, each of them computed from the results that are there."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmap_core.evaluate.tables import Line, cell, grid, paired
from dmap_core.metrics.interval import Interval, mean_interval

ZETAS = ("0.05", "0.3", "1.0", "4.8", "7.5")
WORKS = ZETAS[-1]  # the one of the preset


@dataclass(frozen=True)
class Part:
    """A section of the report, and its result in a sentence; numbers: those of which the sentence is made, not rounded."""

    name: str
    short: str
    whole: str
    numbers: dict[str, Any]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def line_of(lines: list[Line], operator: str, name: str) -> Line:
    return next(line for line in lines if line.row.operator == operator and line.row.name == name)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def observations(out: Path, tables: dict) -> list[Part]:
    return [score_error(out, tables["table1"][2]), score_mean(out), diversity(out), toy(out), spread(out)]


def in_short(parts: list[Part]) -> str:
    lines = [f"- **{part.name}.** {part.short}" for part in parts]
    return "## In short\n\n" + "\n".join([*lines, "- **Methods.** " + METHODS])


METHODS = (
    "The paper's claims as differences on the same pictures are [below](#the-papers-claims-about-methods-as-paired-differences-of-psnr)."
)


def score_error(out: Path, table1: list[Line]) -> Part:
    rows = read_csv(out / "score-error" / "score-error.csv")
    plain = {row["sigma"]: float(row["mean"]) for row in rows if row["method"] == "unconditional"}
    norm = {row["sigma"]: float(row["conditional_norm"]) for row in rows}
    above, ratio, body = {}, {}, []
    for zeta in ZETAS:
        errors = {row["sigma"]: float(row["mean"]) for row in rows if row["zeta"] and float(row["zeta"]) == float(zeta)}
        above[zeta] = sum(errors[s] > plain[s] for s in plain)
        ratio[zeta] = median([errors[s] / plain[s] for s in plain])
        restored = cell(line_of(table1, "sr4", f"DPS zeta {zeta}"), "psnr")
        body.append([zeta, f"{above[zeta]} of {len(plain)}", f"{ratio[zeta]:.2f}", restored])
    share = median([plain[s] / norm[s] for s in plain])
    head = [
        "zeta of DPS",
        "noise levels with a larger error than the unconditional score's",
        "median ratio of the errors",
        "PSNR of DPS (dB)",
    ]
    best = max(ZETAS, key=lambda zeta: line_of(table1, "sr4", f"DPS zeta {zeta}").interval("psnr").mean)
    short = (
        f"With zeta {best}, the best of {', '.join(ZETAS)}, DPS's score is further from the conditional model's than the unconditional score is at {above[best]} of "
        f"{len(plain)} noise levels, the lower ones; with {ZETAS[0]}, which restores nothing, at {above[ZETAS[0]]}. "
        + ("As in the paper, that is everywhere." if above[best] == len(plain) else "In the paper it is further nearly everywhere.")
    )
    whole = (
        "## Observation I: the error of DPS's score (Fig. 1)\n\n"
        "The conditional model is the demo CSE, trained with 100 pictures, which restores alone with "
        f"{cell(line_of(table1, 'sr4', 'CSE alone'), 'psnr')} dB; StableSR cannot be had for this prior. Super-resolution x4, the first held-out picture, {rows[0]['n']} draws "
        f"of noise at each of the {len(plain)} levels of DPS's schedule. The unconditional score itself is off by "
        f"{100 * share:.0f} % of the conditional score's norm (median over the levels).\n\n"
        "![score error over noise levels](score-error.png)\n\n"
        + grid(head, body)
        + f"\n\n{short} The ratio grows with zeta and towards low noise: Prop. 1 divides "
        "zeta by the share of the noise that a step removes, and the residual's gradient does not shrink as the score's error does."
    )
    numbers = {"best": best, "levels": len(plain), "above": above, "ratio": ratio, "share of the norm": share}
    return Part("Observation I", short, whole, numbers)


def score_mean(out: Path) -> Part:
    few, many = (read_csv(out / name / "score-mean.csv") for name in ("score-mean", "score-mean-500"))
    mean, chance = list(few[0])[2:4]

    def times(row: dict[str, str]) -> float:
        return float(row[mean]) / float(row[chance])

    def told(row: dict[str, str]) -> str:
        return f"{float(row[mean]):.3f}, {times(row):.1f} times what chance would show"

    ours, theirs = ([row for row in rows if row["score"].startswith("DPS")][-1] for rows in (few, many))
    cse = next(row for row in few if row["score"] == "CSE")
    short = (
        f"At the paper's 500 noise levels {theirs['score']} has a mean of {told(theirs)} (unconditional: {times(many[0]):.1f} times), "
        f"{'as the paper finds' if times(theirs) > 1.5 * times(many[0]) else 'unlike in the paper'}. At the 20 levels with which DPS restores here, {ours['score']} has "
        f"{told(ours)} (unconditional: {times(few[0]):.1f} times), and the conditional model {told(cse)}."
    )
    whole = (
        "## Observation II: the mean of DPS's score at x_T (Table 2)\n\n"
        "With the 20 noise levels that DPS has here:\n\n![mean of the score](score-mean.png)\n\n" + score_mean_grid(few) + "\n\n"
        "With the paper's 500 levels, between the first two of which less noise is removed, so that the same zeta makes a larger part of the score "
        f"(by the rule of B.3, zeta {WORKS} at 20 levels is worth {float(WORKS) * 20 / 500:g} at 500):\n\n"
        + score_mean_grid(many)
        + f"\n\n{short} "
        "Table 2's figures near 0.4 are no mean over samples: a unit Gaussian of four channels gives 0.399 for its statistic, however many samples there are."
    )
    numbers = {"at 500 levels": times(theirs), "at 20 levels": times(ours), "conditional model": times(cse)}
    numbers |= {"unconditional at 500 levels": times(many[0]), "unconditional at 20 levels": times(few[0])}
    return Part("Observation II", short, whole, numbers)


def score_mean_grid(rows: list[dict[str, str]]) -> str:
    names = list(rows[0])
    return grid(names, [[row[names[0]], row["samples"], *(f"{float(row[name]):.4f}" for name in names[2:])] for row in rows])


def diversity(out: Path) -> Part:
    rows = {row["row"]: row for row in read_csv(out / "diversity" / "diversity.csv")}
    file = next(path.name for path in sorted((out / "diversity").glob("diversity-*.png")))
    key, error = "mean standard deviation", "standard error"
    body = [[row["row"], row["k"], f"{float(row[key]):.4f} (standard error {float(row[error]):.4f})"] for row in rows.values()]

    def share(name: str) -> float:
        return float(rows[name][key]) / float(rows["CSE alone"][key])

    dps = share(f"DPS zeta {WORKS}")
    short = (
        f"{rows['DMAP']['k']} restorations of one picture by DPS with zeta {WORKS} differ {dps:.2f} times as much as the conditional model's, "
        f"{'much less, as in the paper' if dps < 0.7 else 'which is not the small part that the paper finds'}; DMAP's {share('DMAP'):.2f} times."
    )
    whole = (
        "## Observation III: how different the restorations of one picture are (Fig. 3, Table 3)\n\n"
        f"![means and standard deviations per pixel]({file})\n\n"
        + grid(["row", "k", "mean standard deviation, pictures in [0, 1]"], body)
        + f"\n\n{short} "
        f"With zeta {ZETAS[0]} DPS is hardly guided and differs as the prior's pictures do. The conditional model is a weak one, which leaves the colours open."
    )
    return Part("Observation III", short, whole, {"DPS": dps, "DMAP": share("DMAP")})


def toy(out: Path) -> Part:
    rows = read_csv(out / "toy" / "toy.csv")
    names = {
        "upper": "part in the upper mode",
        "mean": "mean of the second coordinate",
        "std": "its standard deviation",
        "residual": "mean residual",
    }
    body = [[row["y"], row["method"], *(f"{float(row[name]):.4g}" for name in names)] for row in rows]
    dps = next(row for row in rows if row["method"] == "DPS" and float(row["y"]) == 0.5)
    short = (
        "With the published numbers (sigma_0 0.3, y = 0.5) the true posterior has one mode, and DPS leaves "
        f"{100 * (1 - float(dps['upper'])):.0f} % of its samples in the other one: this toy does not show that DPS seeks a mode."
    )
    whole = (
        "## The toy example (A.4, Fig. 8)\n\n![samples in the plane](toy.png)\n\n"
        + grid(["y", "method", *names.values()], body)
        + f"\n\n{short} "
        "At y = 0, where there are two modes, DPS finds both."
    )
    return Part("Toy example", short, whole, {"in the other mode": 1 - float(dps["upper"])})


NEAR = 0.1  # of 1, within which a ratio of deviations counts as right


def spread(out: Path) -> Part:
    rows = read_csv(out / "spread" / "spread.csv")
    settings = json.loads((out / "spread" / "spread.json").read_text(encoding="utf-8"))["settings"]
    numbers, told, more, body = {}, [], [], []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        exact, *solvers = (row for row in rows if row["problem"] == problem)
        best = min(solvers, key=lambda row: float(row["distance"]) if row["distance"] != "nan" else math.inf)
        both, off = ([row["method"] for row in solvers if calibrated(row, parts)] for parts in (("seen", "unseen"), ("unseen",)))
        numbers[problem] = {"nearest": best["method"], "distance": float(best["distance"]), "floor": float(exact["distance"])}
        numbers[problem] |= {"calibrated": both, "calibrated off the measurement": off}
        told.append(
            f"On *{problem}* {best['method']} comes nearest to the posterior (W2 {float(best['distance']):.3f}; exact samples {float(exact['distance']):.3f}); calibrated on and "
            f"off the measurement: {'; '.join(both) or 'none'}."
        )
        more.append(f"Off the measurement alone are, on *{problem}*: {'; '.join(off) or 'none'}.")
        body += [spread_cells(row) for row in (exact, *solvers)]
    short = " ".join(told)
    head = [
        "problem",
        "method",
        "guided evaluations",
        "W2",
        "W2, two modes",
        "ratio, unseen",
        "90 % holds, unseen",
        "ratio, seen",
        "90 % holds, seen",
    ]
    whole = (
        "## Where the posterior is known (A.4 and pictures of 8x8)\n\n"
        f"{settings['draws']} truths, {settings['versions']} versions of each, {settings['steps']} Karras noise levels, distances of {settings['samples']} samples, seed "
        f"{settings['seed']}, float64. *plane* is the toy example, at y = 0.5 as printed and at y = 0 with two modes; *averaging* are pictures that are reduced four times, of noise 0.1. The ratio is the "
        "versions' standard deviation over the posterior's, on and off what the measurement shows; calibrated is what has ratios within "
        f"{100 * NEAR:.0f} % and intervals that hold 90 % within their 95 % limits, on both.\n\n"
        "![deviations and coverage of every solver](spread.png)\n\n" + grid(head, body) + f"\n\n{' '.join([short, *more])} "
        "Coverage alone proves nothing: *no guidance* does not look at the measurement. The distance at two modes is mostly chance in how many of the samples a mode gets, also that of exact "
        "ones. LATINO keeps pictures between black and white, which the points of the plane are not."
    )
    return Part("Known posteriors", short, whole, numbers)


def calibrated(row: dict[str, str], parts: tuple[str, ...]) -> bool:
    """Whether a solver's versions are as different as the posterior's samples, on (seen) or off what was measured."""
    held = (float(row[f"coverage_90_{part}_low"]) <= 0.9 <= float(row[f"coverage_90_{part}_high"]) for part in parts)
    return all(held) and all(abs(float(row[f"ratio_{part}"]) - 1) <= NEAR for part in parts)


def spread_cells(row: dict[str, str]) -> list[str]:
    def number(name: str) -> str:
        return "" if row[name] == "nan" else f"{float(row[name]):.3g}"

    def held(part: str) -> str:
        share, low, high = (100 * float(row[f"coverage_90_{part}{end}"]) for end in ("", "_low", "_high"))
        return "diverged" if math.isnan(share) else f"{share:.0f} % ({low:.0f} to {high:.0f})"

    distances = [number("distance"), number("distance_two_modes")]
    return [
        row["problem"],
        row["method"],
        row["guided_evaluations"],
        *distances,
        number("ratio_unseen"),
        held("unseen"),
        number("ratio_seen"),
        held("seen"),
    ]


def difference(lines: list[Line], operator: str, a: str, b: str) -> Interval | None:
    """The PSNR of row a minus that of row b on the same pictures; None if no picture has both."""
    values = paired(line_of(lines, operator, a), line_of(lines, operator, b), "psnr")
    return mean_interval(values) if values else None


def told(found: Interval | None) -> str:
    """A difference in words."""
    if found is None:
        return "no picture has both"
    sure = "" if found.low > 0 or found.high < 0 else "; within the error"
    return f"{found.mean:+.2f} dB (95 % interval {found.low:+.2f} to {found.high:+.2f}, n {found.n}{sure})"


def claims(tables: dict) -> str:
    """The paper's claims about the methods, each with what came out here."""
    lines4, lines5, lines9 = (tables[name][2] for name in ("table4", "table5", "table9"))
    points = []
    for operator in dict.fromkeys(line.row.operator for line in lines4):
        for a, b in (("DMAP", "DPS"), ("DMAP full", "DMAP"), ("DMAP", "DSG")):
            points.append(f"{a} minus {b}, {operator}: {told(difference(lines4, operator, a, b))}")
    for a, b in (("DPS + CSE", "DPS"), ("DMAP + CSE", "DMAP")):
        points.append(f"{a} minus {b}, sr4: {told(difference(lines4, 'sr4', a, b))}")
    for other in ("DMAP, T 20, K 1", "DMAP, T 5, K 4"):
        points.append(f"T 10, K 2 minus {other.removeprefix('DMAP, ')}, sr8: {told(difference(lines5, 'sr8', 'DMAP, T 10, K 2', other))}")
    points.append(f"Ancestral steps minus PF-ODE, DPS, sr8: {told(difference(lines9, 'sr8', 'DPS ancestral', 'DPS PF-ODE'))}")
    return (
        "## The paper's claims about methods, as paired differences of PSNR\n\n"
        "In the paper every first one of these is the better one, by PSNR, LPIPS or FID; DMAP is its *same*.\n\n"
        + "\n".join(f"- {point}." for point in points)
    )
