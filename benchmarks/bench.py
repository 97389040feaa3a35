"""Guided steps against a plain reference and against the floor: the operations that a step needs, at the rate of a large matrix product.

    python -m benchmarks                       # both models: some minutes for the demo prior, half an hour for the full shape
    python -m benchmarks --models demo --runs 5

Every line is a process of its own. Seconds on a CPU are the process's own on one thread, so that others on the same cores count little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from dmap_core import costs
from dmap_core.gradient import STRATEGIES
from dmap_core.solvers import SOLVERS

from .step import REFERENCES, agreement, in_a_process

MODELS = {
    "demo": {"family": "demo prior", "decoder": "TAESD", "size": 128},
    "sd2": {"family": "SD 2.0", "decoder": "KL", "size": 256},
}
HEAD = "| step | seconds | of the floor | faster than plain | peak GiB | activations GiB | of plain's | gradient against plain |\n|---|---|---|---|---|---|---|---|"


def floor(row: dict) -> float:
    """Seconds of the operations that a guided step needs (a solver's step: those that it had) at the measured rate."""
    needed = row.get("flop") or costs.flop(row["family"], row["decoder"], (row["size"],) * 2)
    return needed / (row["rate_tflops"] * 1e12)


def line(row: dict, plain: dict) -> str:
    activations = [r["peak_gib"] - r["before_gib"] for r in (row, plain)]
    cells = [row["how"], f"{row['seconds']:.2f}", f"{row['seconds'] / floor(row):.2f}"]
    if row["how"] in SOLVERS:
        return "| " + " | ".join([*cells, "", f"{row['peak_gib']:.2f}", f"{activations[0]:.2f}", "", ""]) + " |"
    cells += [f"{plain['seconds'] / row['seconds']:.2f}", f"{row['peak_gib']:.2f}", f"{activations[0]:.2f}"]
    return "| " + " | ".join([*cells, f"{activations[0] / activations[1]:.2f}", f"{row['difference']:.0e}"]) + " |"


def rows(model: dict, hows: list[str], runs: int, seed: int, folder: Path):
    """Measured rows, the plain reference first."""
    for how in hows:
        job = {
            **model,
            "dtype": "fp32",
            "how": how,
            "device": "cpu",
            "threads": 1,
            "runs": runs,
            "seed": seed,
            "keep": str(folder / f"{how}.pt"),
        }
        row = in_a_process(job)
        del row["keep"]
        if how not in SOLVERS:
            row["difference"] = agreement(folder / f"{how}.pt", folder / f"{REFERENCES[0]}.pt")
        yield row


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", type=int, help="pixels of a side (default: 128 for demo, 256 for sd2)")
    parser.add_argument("--steps", nargs="+", choices=[*STRATEGIES, *REFERENCES, *SOLVERS], default=[*REFERENCES, *STRATEGIES, *SOLVERS])
    parser.add_argument("--runs", type=int, default=1, help="measured steps after the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    args = parser.parse_args(arguments)
    hows = [REFERENCES[0], *(how for how in args.steps if how != REFERENCES[0])]
    found: list[dict] = []
    for name in args.models:
        model = MODELS[name] | ({"size": args.size} if args.size else {})
        print(f"\n{model['family']}, {model['size']}x{model['size']}, fp32, seed {args.seed}, n {args.runs}\n\n{HEAD}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            plain = None
            for row in rows(model, hows, args.runs, args.seed, Path(folder)):
                plain = plain or row
                print(line(row, plain), flush=True)
                found.append(row)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
