"""Damage held-out pictures, restore them in a real ComfyUI with the demo prior, and say how well that went.

    python demo/run.py                                       # what `make demo` does: 2 pictures, 4 kinds of damage, DPS and DMAP
    python demo/run.py --n 32 --solvers DPS,DMAP,DMAP-full    # the table of the README

Queues the demo workflows of workflows/ through ComfyUI's API. Writes below --out: the restored pictures, sheet.png (one comparison),
summary.json (a list of rows) and table.md. A run that was cut goes on where it was: finished pictures are kept with their figures.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests"))

from host import Host  # noqa: E402
from prompts import titled, to_prompt, upstream, use_picture  # noqa: E402

from dmap_core.evaluate.pictures import Picture  # noqa: E402
from dmap_core.evaluate.results import plain, read_picture_json, write_json, write_text  # noqa: E402
from dmap_core.evaluate.tables import grid  # noqa: E402
from dmap_core.metrics.interval import mean_interval  # noqa: E402
from dmap_core.pictures import Layout, Tile  # noqa: E402
from dmap_core.pictures import sheet as painted  # noqa: E402

OPERATORS = ("super-resolution-x8", "super-resolution-x4", "gaussian-deblur", "inpainting", "old-photo")
QUICK = ("super-resolution-x8", "gaussian-deblur", "inpainting", "old-photo")
PRIOR_FILE = ROOT / "models" / "checkpoints" / "dmap-demo-prior.safetensors"
FLOW_FILE = ROOT / "models" / "checkpoints" / "dmap-demo-flow-prior.safetensors"  # the same, distilled into a rectified flow
SOLVERS = ("DPS", "DMAP", "DMAP-full")
CELL, TEXT = 128, 18  # pixels of a picture and of a line on the sheet


def psnr(a: Image.Image, b: Image.Image) -> float:
    """PSNR in dB of two 8-bit RGB pictures."""
    error = np.asarray(a.convert("RGB"), np.float64) - np.asarray(b.convert("RGB"), np.float64)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


@dataclass
class Job:
    """One picture through one branch of a workflow. `settings` decides whether a finished picture may be used again."""

    prompt: dict
    branch: str
    picture: Path
    settings: dict


def prepare(workflow: dict, info: dict, picture: Path, solver: str, seed: int, steps: int | None = None, zeta: float | None = None) -> Job:
    """The prompt of a workflow with everything set. DMAP-full is DMAP with K 3 and all steps. zeta: in the place of the automatic step."""
    prompt = to_prompt(workflow, info)

    def inputs(title: str) -> dict:
        return prompt[titled(prompt, title)]["inputs"]

    use_picture(prompt, "Original picture", picture.name)
    next(node for node in prompt.values() if node["class_type"] == "RandomNoise")["inputs"]["noise_seed"] = seed
    if steps:
        inputs("DPS: schedule")["steps"] = steps
        inputs("DMAP: schedule")["steps"] = max(1, steps // 2)
    branch = "DMAP" if solver.startswith("DMAP") else "DPS"
    sampler, schedule = inputs(f"{branch}: sampler"), inputs(f"{branch}: schedule")
    if solver == "DMAP-full":
        sampler["K"] = 3
        schedule["steps"] = inputs("DPS: schedule")["steps"]
    if zeta:
        sampler |= {"zeta": zeta, "step": "zeta"}
    step = "auto" if sampler["step"] == "auto" else f"zeta {sampler['zeta']:g}"
    settings = {"steps": schedule["steps"], "step": step, "K": sampler.get("K"), "seed": seed}
    return Job(prompt, branch, picture, settings | {"prior": fingerprint(PRIOR_FILE), "original": fingerprint(picture)})


@functools.cache  # every job asks for the prior's, 37 MB
def fingerprint(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def restore(host: Host, job: Job, restored: Path) -> dict:
    """Run a job; returns what is kept of it. Writes `restored`, and the degraded and the bicubic picture beside it."""
    save, degraded, report = (titled(job.prompt, title) for title in (f"{job.branch}: save", "Degraded: save", f"{job.branch}: report"))
    host.upload(job.picture)
    entry = host.run(upstream(job.prompt, [save, degraded, report]), timeout=3600)
    stem = restored.parent / job.picture.stem
    shutil.copy(host.images(entry, degraded)[0], f"{stem}-degraded.png")
    shutil.copy(host.images(entry, save)[0], restored)
    original = Image.open(job.picture)
    baseline = Image.open(f"{stem}-degraded.png").resize(original.size, Image.BICUBIC)
    baseline.save(f"{stem}-baseline.png")
    cost = json.loads(entry["outputs"][report]["text"][0])
    return {
        "original": Picture(job.picture, 0).identity,
        "settings": job.settings,
        "metrics": {"psnr": psnr(Image.open(restored), original), "psnr_baseline": psnr(baseline, original)},
        "seconds": cost["seconds"],
        "denoiser_calls": cost["denoiser_calls"],
        "residual": cost["residuals"][-1][0],
    }


def kept(job: Job, restored: Path) -> dict | None:
    """What is there of a job, unless it was made with other settings."""
    entry = read_picture_json(restored.with_suffix(".json"), Picture(job.picture, 0).identity)
    return entry if entry and entry["settings"] == plain(job.settings) else None


def summarise(operator: str, solver: str, seed: int, entries: list[dict]) -> dict:
    """A row of summary.json: means over pictures, rounded; psnr_low and psnr_high are the limits of the 95 % interval, if there are several."""
    rows = [entry["metrics"] | {name: entry[name] for name in ("seconds", "residual")} for entry in entries]
    found = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    limits = {"psnr_low": found["psnr"].low, "psnr_high": found["psnr"].high} if len(rows) > 1 else {}
    same = {name: entries[0]["settings"][name] for name in ("steps", "K", "step")}
    return (
        {"operator": operator, "solver": solver, "n": len(rows), "seed": seed}
        | {name: round(interval.mean, 3) for name, interval in found.items()}
        | same
        | {"denoiser_calls": entries[0]["denoiser_calls"]}
        | {name: round(value, 3) for name, value in limits.items()}
    )


def table(summary: list[dict]) -> str:
    head = ["operator", "solver", "steps", "K", "step", "denoiser calls", "n", "PSNR baseline", "PSNR", "seconds per picture"]
    body = [
        [r["operator"], r["solver"], r["steps"], r["K"] or "-", r["step"], r["denoiser_calls"], r["n"]]
        + [f"{r['psnr_baseline']:.2f}", f"{r['psnr']:.2f}", f"{r['seconds']:.1f}"]
        for r in summary
    ]
    return grid(head, body)


def sheet(out: Path, pictures: list[Path], operators: list[str], solvers: list[str], rows: dict, per_operator: int) -> Path:
    """Degraded | bicubic | the solvers | original, a row per picture, with PSNR in dB under each."""
    columns = ["degraded", "bicubic", *solvers, "original"]
    shown, labels = [], []
    for operator in operators:
        for i, picture in enumerate(pictures[:per_operator]):
            stem, tiles = out / operator / picture.stem, []
            for name in columns:
                file = {"degraded": f"{stem}-degraded.png", "bicubic": f"{stem}-baseline.png", "original": picture}.get(
                    name, f"{stem}-{name}.png"
                )
                tile = Image.open(file).convert("RGB")
                caption = f"{tile.width}x{tile.height}" if name == "degraded" else ""
                if name in ("bicubic", *solvers):
                    figures = rows[operator, solvers[0] if name == "bicubic" else name][i]["metrics"]
                    caption = f"{figures['psnr_baseline' if name == 'bicubic' else 'psnr']:.2f} dB"
                tiles.append(Tile(tile.resize((CELL, CELL), Image.Resampling.NEAREST), [caption]))
            shown.append(tiles)
            labels.append(operator)
    layout = Layout((CELL, CELL), (8, TEXT + 6), (150, TEXT + 6, 8, TEXT + 6), text=(4, 2), head=4)
    page = painted(shown, layout, columns, labels)
    path = out / "sheet.png"
    page.save(path)
    return path


def names(text: str, known: tuple[str, ...], what: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2, help="pictures per operator")
    parser.add_argument("--operators", default=",".join(QUICK), help=f"of {', '.join(OPERATORS)}")
    parser.add_argument("--solvers", default="DPS,DMAP", help=f"of {', '.join(SOLVERS)}")
    parser.add_argument("--steps", type=int, help="steps of DPS and DMAP-full, half of it for DMAP (default: the workflow's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, default=HERE / "held-out", help="folder of 128x128 originals")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--again", action="store_true", help="compute finished pictures again")
    args = parser.parse_args()
    operators, solvers = names(args.operators, OPERATORS, "--operators"), names(args.solvers, SOLVERS, "--solvers")
    pictures = sorted(args.pictures.glob("*.png"))[: args.n]
    if args.n < 1 or len(pictures) < args.n:
        raise SystemExit(f"--n: {args.n} pictures wanted, {args.pictures} holds {len(pictures)}")
    started = time.perf_counter()
    rows: dict[tuple[str, str], list[dict]] = {}
    summary: list[dict] = []
    with Host() as host:
        info = host.object_info()
        version = host.get("/system_stats")["system"]["comfyui_version"]
        print(
            f"ComfyUI {version} runs at {host.url}; {len(pictures)} pictures, {len(operators)} kinds of damage, {', '.join(solvers)}",
            flush=True,
        )
        for operator in operators:
            workflow = json.loads((ROOT / "workflows" / f"demo-{operator}.json").read_text())
            folder = args.out / operator
            folder.mkdir(parents=True, exist_ok=True)
            for solver in solvers:
                if (folder / f"{solver}.json").exists():
                    raise SystemExit(
                        f"--out: {folder} holds figures of an earlier version, which are not mixed with new ones; choose another folder"
                    )
                rows[operator, solver] = []
                for picture in pictures:
                    job = prepare(workflow, info, picture, solver, args.seed, args.steps)
                    restored = folder / f"{picture.stem}-{solver}.png"
                    entry = None if args.again else kept(job, restored)
                    if entry is None:
                        entry = restore(host, job, restored)
                        write_json(restored.with_suffix(".json"), entry)
                    rows[operator, solver].append(entry)
                summary.append(row := summarise(operator, solver, args.seed, rows[operator, solver]))
                print(
                    f"{operator:20} {solver:10} {row['psnr']:6.2f} dB (baseline {row['psnr_baseline']:.2f}) {row['seconds']:6.1f} s per picture",
                    flush=True,
                )
    write_text(args.out / "summary.json", json.dumps(summary, indent=1))
    where = f"ComfyUI {version}, {platform.machine()}, {os.cpu_count()} cores, seed {args.seed}, {time.strftime('%Y-%m-%d')}"
    write_text(args.out / "table.md", f"{table(summary)}\n\n{where}\n")
    path = sheet(args.out, pictures, operators, solvers, rows, per_operator=min(2, len(pictures)))
    print(
        f"\n{table(summary)}\n\n{time.perf_counter() - started:.0f} s in all. Comparison: {path}\nPictures, table.md and summary.json: {args.out}"
    )


if __name__ == "__main__":
    main()
