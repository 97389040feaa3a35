"""One table of all methods: quality against cost on the demo prior, at about 8, 30 and 100 evaluations of the networks.

    python demo/methods.py --budgets 8 --n 32                          # hours on a small machine; goes on where it was cut
    python demo/methods.py --budgets 8,30 --operators inpainting --methods "DMAP,DPS inner,LATINO"
    python demo/methods.py --search --budgets 8 --methods DAPS         # other settings of a method, on held-out pictures that no table uses
    python demo/methods.py --table                                     # only print, write and plot what there is

A budget is an upper bound of both the denoiser's calls and the decoder's gradients; only *Restore*, what DMAP Restore takes at look, good and best,
has its own. What that takes on Stable Diffusion 2.0 at 512x512 differs between methods, so the table has those operations (dmap_core/costs.py) and the
plot is drawn over them. Steps set themselves where a solver has such a step; PSLD and DSG have what was searched for the demo prior. Every figure is
there of the picture as the model leaves it, and of the same after `match`. It writes below --out: every picture with its figures, methods.md,
methods.csv and methods.png.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import compare
import prices
from run import HERE, PRIOR_FILE, ROOT, names

from dmap_core.evaluate.results import write_text
from dmap_core.evaluate.tables import digits, grid, label, paired
from dmap_core.metrics.interval import PLUS_MINUS, mean_interval
from dmap_core.operators import from_spec
from dmap_core.plots import colour, new_figure, save, styled
from dmap_core.presets import AUTO, Preset, automatic, preset
from dmap_core.solvers import Cost

BUDGETS = (8, 30, 100)
OPERATORS = ("super-resolution-x4", "super-resolution-x8", "gaussian-deblur", "motion-deblur", "inpainting", "jpeg-cleanup")
BASELINE = "DMAP"  # what the others are compared with
ZETA = ("PSLD",)  # solvers without a step of their own
NOTE = (
    "The demo prior (128x128, fp32), seed 0, the first held-out pictures, ComfyUI; written by `python demo/methods.py`. Means over six kinds of damage; differences are of the same "
    f"pictures, {PLUS_MINUS} behind +-. *matched*: after Match Measurement. Mismatch is before it. Calls are those of a run, TFLOP what they take on Stable Diffusion 2.0 at 512x512 with its own "
    "decoder, means over the damages. Seconds are of one CPU thread beside another such process. Steps set themselves, but for PSLD and DSG. Holes take the exact gradient, where a method has one. "
    "PSLD has no transpose of a JPEG, and is in no mean. Where n differs compare the differences to DMAP. The plot has differences to matching alone, of each method's own pictures."
)
SHOWN = ("psnr", "psnr matched", "ssim", "ssim matched", "features", "features matched")
# Against matching alone, so that methods of unlike n can be drawn together; and which way is better.
PLOTTED = (
    ("psnr matched", "PSNR in dB above matching alone", 1),
    ("features matched", "feature distance minus that of matching alone", -1),
)
MARKERS = {"DMAP inner": "s", "DPS inner": "s", "DMAP warm": "^", "Restore": "*"}
BLACK = ("Restore",)  # what the others are looked at for


class Setting(NamedTuple):
    """Of a method at a budget. changes: to the settings that DMAPPreset takes. start: below 1 it begins with the measurement's own picture."""

    steps: int
    changes: dict[str, Any]
    start: float = 1.0

    def told(self) -> str:
        shown = {"start": self.start} if self.start < 1 else {}
        shown |= {key: value for key, value in self.changes.items() if key != "jacobian"}
        return ", ".join([f"{self.steps} steps", *(f"{key} {value}" for key, value in shown.items())])


def at(steps: int, start: float = 1.0, **changes: Any) -> Setting:
    return Setting(steps, changes, start)


def inner(steps: int, inner: int, **changes: Any) -> Setting:
    """With gradient steps that call no denoiser, which have no exact gradient."""
    return at(steps, inner=inner, jacobian="none", **changes)


def resample(steps: int, first: int, last: int, every: int, iterations: int) -> Setting:
    return at(steps, first=first, last=last, every=every, iterations=iterations, learning_rate=0.02, space="latent")


RESTORE = "Restore"  # what the node DMAP Restore takes, whatever that costs
QUALITY = {8: "look", 30: "good", 100: "best"}  # of it, by budget
# By method: the solver, and for every budget the setting of the table, then others that were tried on the search pictures.
METHODS: dict[str, tuple[str, dict[int, list[Setting]]]] = {
    "DMAP": ("DMAP", {8: [at(4, K=1), at(3), at(5, K=1, guide_start=0.3)], 30: [at(10)], 100: [at(34)]}),
    "DMAP inner": (
        "DMAP",
        {8: [inner(4, 3, K=1), inner(3, 2)], 30: [inner(10, 3, K=1)], 100: [inner(34, 3, K=1)]},
    ),
    "DMAP warm": ("DMAP", {8: [at(4, 0.4, K=1), at(3, 0.4), at(4, 0.6, K=1)], 30: [at(10, 0.4)], 100: [at(34, 0.4)]}),
    "DPS": ("DPS", {8: [at(8), at(8, strength=1.0), at(8, 0.4)], 30: [at(30)], 100: [at(100)]}),
    "DPS inner": (
        "DPS",
        {
            8: [inner(6, 2, guide_start=0.4), inner(4, 2), inner(3, 3)],
            30: [inner(10, 4, guide_start=0.3), inner(20, 2, guide_start=0.3)],
            100: [inner(34, 4, guide_start=0.3)],
        },
    ),
    "PSLD": ("PSLD", {8: [at(8)], 30: [at(30)], 100: [at(100)]}),
    "FreeDoM": ("FreeDoM", {8: [at(6, first=2, last=3)], 30: [at(24, first=6, last=11)], 100: [at(80, first=20, last=39)]}),
    "ReSample": ("ReSample", {8: [resample(4, 2, 2, 2, 4)], 30: [resample(15, 6, 12, 6, 7)], 100: [resample(50, 20, 40, 20, 25)]}),
    "DSG": ("DSG", {8: [at(8)], 30: [at(30)], 100: [at(100)]}),
    "LATINO": ("LATINO", {8: [at(8), at(8, eta=0.0), at(8, eta=0.5), at(8, 0.4)], 30: [at(30)], 100: [at(100)]}),
    "FlowDPS": (
        "FlowDPS",
        {
            8: [
                at(8, inner=1),
                at(4, inner=2),
                at(4, inner=2, noise="falling"),
                at(3, inner=3),
                at(8, inner=1, noise="falling"),
                at(8, 0.4, inner=1),
            ],
            30: [at(10, inner=3), at(30, inner=1)],
            100: [at(34, inner=3)],
        },
    ),
    "DAPS": (
        "DAPS",
        {
            8: [at(8, iterations=1), at(4, iterations=2), at(2, iterations=4), at(4, iterations=2, strength=1.0)],
            30: [at(15, iterations=2), at(30, iterations=1)],
            100: [at(50, iterations=2)],
        },
    ),
}


def rows(f: Any, operator: str, methods: Sequence[str], budgets: Sequence[int], search: bool) -> Iterator[dict[str, Any]]:
    """Of one operator f; as given, and every method at every budget. search: with the settings that were tried besides."""
    yield {"operator": operator, "solver": compare.AS_GIVEN, "name": compare.AS_GIVEN}
    for budget in budgets:
        if RESTORE in methods:
            plan = automatic(f, AUTO, QUALITY[budget])
            yield row_of(plan, operator) | {"name": f"{RESTORE}, {budget}"}
        for name in methods:
            if name == RESTORE:
                continue
            solver, settings = METHODS[name]
            if solver == "PSLD" and not f.linear:  # it needs the transpose
                continue
            for setting in settings[budget] if search else settings[budget][:1]:
                known = preset(f, solver, compare.MODEL) if solver in ZETA else automatic(f, solver, "look")
                plan = known.with_steps(setting.steps).with_settings(**setting.changes)
                row = row_of(replace(plan, start=setting.start), operator)
                yield row | {"name": f"{name}, {setting.told()}" if search else f"{name}, {budget}"}


def row_of(plan: Preset, operator: str) -> dict[str, Any]:
    """Of a table of `dmap evaluate`, but for its name."""
    settings = {key: value for key, value in plan.solver.settings().items() if value is not None}
    return {
        "operator": operator,
        "solver": plan.solver.name(),
        "steps": plan.steps,
        "spacing": plan.spacing,
        "start": plan.start,
        "settings": settings,
    }


def settings_table() -> str:
    """What every method was given, in Markdown."""
    body = [[name, *(settings[budget][0].told() for budget in BUDGETS)] for name, (_, settings) in METHODS.items()]
    body.append([RESTORE, *(f"DMAPPreset's {QUALITY[budget]}" for budget in BUDGETS)])
    return grid(["method", *map(str, BUDGETS)], body)


def groups(lines: Sequence[Any]) -> dict[int, dict[str, dict[str, Any]]]:
    """Finished rows by budget, method and operator; the measurement as given is in every budget that has any."""
    given = {line.row.operator: line for line in lines if line.row.name == compare.AS_GIVEN}
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line.row.name != compare.AS_GIVEN:
            method, budget = line.row.name.rsplit(", ", 1)
            found.setdefault(int(budget), {compare.AS_GIVEN: given}).setdefault(method, {})[line.row.operator] = line
    return found


def of_pictures(line: Any, name: str, pictures: Sequence[str]) -> list[float]:
    """A metric of those pictures, in their order."""
    found = dict(zip(line.pictures, line.values[name], strict=True))
    return [found[picture] for picture in pictures]


def common(*methods: dict[str, Any]) -> list[str]:
    """Pictures that these methods, lines by damage, have all restored from every damage."""
    return sorted(set.intersection(*(set(line.pictures) for lines in methods for line in lines.values())))


def averaged(lines: dict[str, Any], operators: Sequence[str], name: str, pictures: Sequence[str]) -> list[float]:
    """A metric of every picture, averaged over the damages."""
    return [mean(values) for values in zip(*(of_pictures(lines[operator], name, pictures) for operator in operators), strict=True)]


def through_all(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that have been through all damages."""
    return {name: lines for name, lines in methods.items() if lines.keys() == methods[compare.AS_GIVEN].keys()}


def summary(methods: dict[str, dict[str, Any]], costs: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for every method of a budget that has been through all damages: means over them, and paired differences, picture by picture, to BASELINE and
    ("gain") to the measurement as given.

    Each is of the pictures that the method and BASELINE have: where n differs between methods, differences can be compared and means cannot.
    """
    operators = list(methods[compare.AS_GIVEN])
    whole = through_all(methods)
    base, found = whole.get(BASELINE), []
    for name, lines in whole.items():
        pictures = common(lines, base or lines)
        if not pictures:
            continue
        line = {"method": name, "n": len(pictures), "cost": costs.get(name)}
        line |= {key: mean(averaged(lines, operators, key, pictures)) for key in (*SHOWN, "mismatch", "seconds")}
        for key, _, _ in PLOTTED:
            alone = averaged(methods[compare.AS_GIVEN], operators, key, pictures)
            line[f"{key} gain"] = line[key] - mean(alone)
        if base:
            for key in SHOWN:
                pairs = zip(averaged(lines, operators, key, pictures), averaged(base, operators, key, pictures), strict=True)
                line[f"{key} difference"] = mean_interval([a - b for a, b in pairs])
        found.append(line)
    return found


def summary_table(lines: Sequence[dict[str, Any]]) -> str:
    """Of one budget, in Markdown."""
    keys = (*SHOWN, "mismatch", "seconds")
    head = ["method", "n", *map(label, keys), "denoiser", "decoder", "with gradient", "encoder", "TFLOP"]
    body = []
    for line in lines:
        calls, tera = line["cost"] or (Cost(0, 0, 0, 0), 0.0)
        numbers = [calls.denoiser, calls.decoder, calls.decoder_gradients, calls.encoder, f"{tera:.0f}"]
        body.append([line["method"], line["n"], *(f"{line[key]:.{digits(key)}f}" for key in keys), *numbers])
    if not any(f"{SHOWN[0]} difference" in line for line in lines):
        return grid(head, body)
    minus = [
        [line["method"], *(line[f"{key} difference"].text(digits(key), "+") for key in SHOWN)]
        for line in lines
        if line["method"] != BASELINE
    ]
    return f"{grid(head, body)}\n\nMinus {BASELINE}, of the same pictures:\n\n{grid(['method', *map(label, SHOWN)], minus)}"


def differences(methods: dict[str, dict[str, Any]], key: str, decimals: int) -> str:
    """A metric of every method and damage minus that of BASELINE on the same pictures, in Markdown."""
    operators, body = list(methods[compare.AS_GIVEN]), []
    for name, lines in methods.items():
        cells = [name]
        for operator in operators if name != BASELINE else ():
            found = paired(lines[operator], methods[BASELINE][operator], key) if operator in lines and operator in methods[BASELINE] else []
            cells.append(f"{mean_interval(found).text(decimals, '+')}, n {len(found)}" if found else "")
        body += [cells] if len(cells) > 1 else []
    return grid(["method", *operators], body)


def plot(summaries: dict[int, Sequence[dict[str, Any]]], title: str):
    """Quality against operations, a line per method through its budgets, and the front: nothing to the left of it is as good."""

    @styled
    def draw():
        figure = new_figure(12, title)
        for ax, (key, what, sign) in zip(figure.subplots(2, 1), PLOTTED, strict=True):
            points: dict[str, list[tuple[float, float]]] = {}
            for line in (line for lines in summaries.values() for line in lines if line["cost"]):
                points.setdefault(line["method"], []).append((line["cost"][1], line[f"{key} gain"]))
            ax.axhline(0, color="#999999", linestyle=":", label=f"{compare.AS_GIVEN}, matched")
            for name, found in points.items():
                ax.plot(
                    *zip(*sorted(found), strict=True),
                    MARKERS.get(name, "o") + "-",
                    color="black" if name in BLACK else colour(name),
                    label=name,
                    markersize=8,
                )
            front = prices.front((point for found in points.values() for point in found), sign)
            ax.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=6, zorder=0, solid_capstyle="round", label="front")
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_xlabel("TFLOP at 512x512, Stable Diffusion 2.0")
            ax.set_ylabel(what)
        figure.axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    return draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="of 8, 30, 100")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--methods", default=",".join([*METHODS, RESTORE]))
    parser.add_argument("--n", type=int, help="pictures (32, or 4 of a search)")
    parser.add_argument("--search", action="store_true", help="the settings that were tried, on the last held-out pictures")
    parser.add_argument("--out", type=Path, help="results folder (default: output/methods, or methods-search)")
    parser.add_argument("--table", action="store_true", help="compute nothing, write what there is")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parser.parse_args()
    budgets = [int(budget) for budget in names(options.budgets, tuple(map(str, BUDGETS)), "--budgets")]
    methods, wanted = names(options.methods, (*METHODS, RESTORE), "--methods"), names(options.operators, OPERATORS, "--operators")
    out = options.out or ROOT / "output" / ("methods-search" if options.search else "methods")
    compare.import_pack()
    from dmap_pack.dmap_core.evaluate.config import make_config
    from dmap_pack.dmap_core.evaluate.report import write_table
    from dmap_pack.dmap_core.evaluate.run import evaluate, plan_jobs
    from dmap_pack.dmap_core.evaluate.tables import read_lines, table_csv

    damage = compare.specs(wanted, out / "weights")
    table = [row for name, spec in damage.items() for row in rows(from_spec(dict(spec)), name, methods, budgets, options.search)]
    given = {"operators": damage, "rows": table, "images": HERE / "held-out", "checkpoint": PRIOR_FILE, "seed": 0, "stride": 0}
    given |= {"count": options.n or (4 if options.search else 32), "last": options.search, "metrics": ["psnr", "ssim", "features"]}
    given |= {"match": True, "settings_for": compare.MODEL, "title": "Every method at equal cost"}
    config = make_config(given)
    jobs = plan_jobs(config) if options.table else evaluate(config, out, compare.backend(config))
    if options.search:
        write_table(config, jobs, out)
    else:
        lines = read_lines(config, jobs, out)
        write_text(out / "methods.csv", table_csv(config, lines))
        write(lines, {(job.row.name, job.row.operator): job.plan for job in jobs if job.plan}, out)


def price(plans: dict[tuple[str, str], Any], name: str) -> tuple[Cost, float] | None:
    """(calls, TFLOP) of a row. TFLOP are a mean over the damages: a hole takes the exact gradient, which costs more. None for the measurement as given."""
    found = [plan for (row, _), plan in plans.items() if row == name]
    return (found[0].solver.cost(found[0].steps), mean(prices.tera(plan, guided=False) for plan in found)) if found else None


def write(lines: Sequence[Any], plans: dict[tuple[str, str], Any], out: Path) -> None:
    """methods.md and methods.png of finished rows. plans: by the names of rows and damages."""
    parts, found = ["# Every method at equal cost", NOTE, settings_table()], sorted(groups(lines).items())
    prices_of = {budget: {name: price(plans, f"{name}, {budget}") for name in methods} for budget, methods in found}
    for budget, methods in found:
        parts += [f"## {budget} evaluations", summary_table(summary(methods, prices_of[budget]))]
        if BASELINE in methods:
            parts += [f"{label(key)} minus that of {BASELINE}:\n\n{differences(methods, key, digits(key))}" for key in SHOWN]
    write_text(out / "methods.md", "\n\n".join(parts) + "\n")
    drawn = {budget: summary(methods, prices_of[budget]) for budget, methods in found}
    counts = [line["n"] for lines in drawn.values() for line in lines if line["cost"]]
    if counts:
        n = f"n {min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"n {min(counts)}"
        save(plot(drawn, f"Means over six kinds of damage, after matching, {n}"), out / "methods.png")


if __name__ == "__main__":
    main()
