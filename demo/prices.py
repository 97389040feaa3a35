"""What cheaper guidance costs: quality on the demo prior against operations at Stable Diffusion 2.0's shape, as a table and a plot.

    python demo/prices.py --operator super-resolution-x4 --n 16                     # hours on a small machine; goes on where it was cut
    python demo/prices.py --operator gaussian-deblur --n 8 --rows "DMAP 10, K 2;DPS 10, inner 4"
    python demo/prices.py --operator super-resolution-x4 --guidance taesd.safetensors   # and with another decoder for gradients
    python demo/prices.py --table                                                   # only print and plot what there is

The pictures are the last held-out ones, on which settings are searched, and no table of results uses. Operations are counted for one 512x512 picture of Stable
Diffusion 2.0 with its own decoder, or with TAESD in rows that have a guidance decoder (dmap_core/costs.py).
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import compare
from run import HERE, PRIOR_FILE, ROOT

from dmap_core import costs
from dmap_core.metrics.interval import mean_interval

STRENGTH = 0.7
SIZE = (512, 512)
GUIDED = " + guidance decoder"


def row(solver: str, steps: int, jacobian: str = "none", **settings: Any) -> dict[str, Any]:
    return {
        "solver": solver,
        "steps": steps,
        "spacing": "exponential",
        "settings": {"strength": STRENGTH, "jacobian": jacobian} | settings,
    }


ROWS = {
    "DMAP 10, K 2, exact": row("DMAP", 10, "exact", K=2),
    "DMAP 10, K 2": row("DMAP", 10, K=2),
    "DMAP 10, K 2, every 2": row("DMAP", 10, K=2, every=2),
    "DMAP 10, K 2, from 0.3": row("DMAP", 10, K=2, guide_start=0.3),
    "DMAP 10, K 2, to 0.7": row("DMAP", 10, K=2, guide_end=0.7),
    "DMAP 10, K 1": row("DMAP", 10, K=1),
    "DMAP 10, K 1, inner 2": row("DMAP", 10, K=1, inner=2),
    "DMAP 10, K 1, inner 4": row("DMAP", 10, K=1, inner=4),
    "DMAP 20, K 2": row("DMAP", 20, K=2),
    "DPS 20, exact": row("DPS", 20, "exact"),
    "DPS 20": row("DPS", 20),
    "DPS 6, inner 4": row("DPS", 6, inner=4),
    "DPS 10, inner 2": row("DPS", 10, inner=2),
    "DPS 10, inner 2, from 0.3": row("DPS", 10, inner=2, guide_start=0.3),
    "DPS 10, inner 4": row("DPS", 10, inner=4),
    "DPS 20, inner 4, from 0.3": row("DPS", 20, inner=4, guide_start=0.3),
}
WITH_GUIDANCE = ("DMAP 10, K 2", "DPS 10, inner 2, from 0.3")


def tera(plan, guided: bool) -> float:
    """TFLOP of a run at Stable Diffusion 2.0's shape."""
    return costs.run_flop("SD 2.0", "KL", SIZE, plan.solver.cost(plan.steps), guidance="TAESD" if guided else None) / costs.TERA


def lines_of(config, out: Path) -> list[dict[str, Any]]:
    """What every row reached on the pictures that all of them have."""
    from dmap_pack.dmap_core.evaluate.run import plan_jobs
    from dmap_pack.dmap_core.evaluate.tables import read_lines

    jobs, found = plan_jobs(config), []
    lines = read_lines(config, jobs, out)
    common = set.intersection(*(set(line.pictures) for line in lines))
    for line in lines:
        plan = next(job.plan for job in jobs if job.row is line.row)
        here = [i for i, name in enumerate(line.pictures) if name in common]
        values = {name: [values[i] for i in here] for name, values in line.values.items() if len(values) == len(line.pictures)}
        found.append(
            {
                "name": line.row.name,
                "n": len(here),
                "psnr": mean_interval(values["psnr"]),
                "matched": mean_interval(values["psnr matched"]),
                "mismatch": mean(values["mismatch"]),
                "seconds": mean(values["seconds"]),
                "calls": plan.solver.cost(plan.steps) if plan else None,
                "tera": tera(plan, line.row.guidance is not None) if plan else 0.0,
            }
        )
    return found


def table(lines: list[dict[str, Any]]) -> str:
    out = ["| row | n | PSNR | matched | mismatch | s | denoiser | decoder gradients | TFLOP |", "|---|---|---|---|---|---|---|---|---|"]
    for line in lines:
        calls = line["calls"]
        numbers = (calls.denoiser, calls.decoder_gradients) if calls else (0, 0)
        out.append(
            f"| {line['name']} | {line['n']} | {line['psnr'].mean:.2f} | {line['matched'].mean:.2f} | {line['mismatch']:.1f} | {line['seconds']:.0f} | "
            f"{numbers[0]} | {numbers[1]} | {line['tera']:.0f} |"
        )
    return "\n".join(out)


def front(points: Iterable[tuple[float, float]], sign: int = 1) -> list[tuple[float, float]]:
    """Points (cost, quality) to the left of which nothing is as good. sign: -1 where less is better."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not found or sign * value > sign * found[-1][1]:
            found.append((cost, value))
    return found


def plot(lines: list[dict[str, Any]], title: str):
    """Quality against operations, before and after matching, the front drawn: nothing to the left of it is as good."""
    from dmap_core.plots import COLOURS, library, styled

    @styled
    def draw():
        figure = library().figure.Figure(figsize=(9, 9), dpi=100, layout="constrained")
        axes = figure.subplots(2, 1)
        for ax, key, what in zip(axes, ("psnr", "matched"), ("PSNR in dB", "PSNR in dB, matched"), strict=True):
            for line in lines:
                ax.plot(line["tera"], line[key].mean, "o", color=COLOURS[line["name"].split()[0]])
            names = {(line["tera"], line[key].mean): line["name"] for line in lines}
            best = front(names)
            ax.plot(*zip(*best, strict=True), color="#999999", zorder=0)
            for i, point in enumerate(best):
                ax.annotate(names[point], point, fontsize=9, xytext=(4, 6 if i % 2 else -14), textcoords="offset points")
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.margins(x=0.15)
            ax.set_ylabel(what)
        axes[-1].set_xlabel("TFLOP at 512x512, Stable Diffusion 2.0")
        figure.suptitle(title)
        return figure

    return draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", default="super-resolution-x4", choices=list(compare.OPERATORS))
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--rows", help="some of them, with semicolons between")
    parser.add_argument("--guidance", type=Path, help="a small decoder (TAESD) of the demo prior's latents, for rows of its own")
    parser.add_argument("--out", type=Path, help="results folder (default: output/prices/OPERATOR)")
    parser.add_argument("--table", action="store_true", help="compute nothing, print and plot what there is")
    options = parser.parse_args()
    out = options.out or ROOT / "output" / "prices" / options.operator
    compare.import_pack()
    from dmap_pack.dmap_core.evaluate.config import make_config
    from dmap_pack.dmap_core.evaluate.run import evaluate
    from dmap_pack.dmap_core.plots import save

    weights = out / "weights"
    damage = compare.specs([options.operator], weights)
    rows = dict(ROWS)
    if options.guidance:
        rows |= {name + GUIDED: ROWS[name] | {"guidance": str(options.guidance)} for name in WITH_GUIDANCE}
    if options.rows:
        rows = {name.strip(): rows[name.strip()] for name in options.rows.split(";")}
    given = {"operators": damage, "rows": [{"operator": options.operator, "name": name, **values} for name, values in rows.items()]}
    given |= {"images": HERE / "held-out", "checkpoint": PRIOR_FILE, "count": options.n, "last": True, "seed": 0, "stride": 0}
    given |= {"metrics": ["psnr"], "match": True, "settings_for": compare.MODEL, "weights": weights}
    config = make_config(given)
    if not options.table:
        evaluate(config, out, compare.backend(config))
    lines = lines_of(config, out)
    print(table(lines))
    save(plot(lines, f"{options.operator}, demo prior, n {min(line['n'] for line in lines)}"), out / "prices.png")


if __name__ == "__main__":
    main()
