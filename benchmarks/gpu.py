"""All that is to be known of one CUDA device, without downloads, in under eight minutes: one JSON file and the tables of docs/performance.md.

    python -m benchmarks gpu --json gpu.json
    python -m benchmarks gpu --tiny          # the same on a CPU with small networks, to see that it runs

Gradients in half precision against float32, on the full shapes. Seconds and peak memory of a guided step by plan, size, batch and in tiles,
against the count and the rate of a large matrix product. Whether weights are what they were. A restoration with and without dynamic VRAM.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from host import Host, comfyui_path
from prompts import to_prompt

from dmap_core import costs
from dmap_core.gradient import STRATEGIES

from . import ROOT, memory, precision, shapes
from .step import GIB, measure, rate, weights_hash

WORKFLOW = ROOT / "workflows" / "demo-super-resolution-x8.json"
SEED = 0


def full(device: str) -> dict:
    """What runs on a CUDA device: networks with their precisions, and steps (size, batch, plan, tile) of each."""
    sizes = [(size, 1, plan, None) for size in (512, 1024) for plan in STRATEGIES]
    batches = [(512, batch, "fast", None) for batch in (2, 4)]
    tiles = [(2048, 1, plan, 64) for plan in ("fast", "checkpoint")]
    sdxl = [(1024, 1, plan, None) for plan in STRATEGIES] + [(2048, 1, "checkpoint", 128)]
    return {
        "device": device,
        "precision": ("SD 2.0", "KL", 512, precision.SIGMAS),
        "steps": [
            (("SD 2.0", "KL", "fp16", "bf16"), sizes + batches + tiles),
            (("SD 2.0", "KL", "bf16", "bf16"), [(512, 1, "fast", None)]),
            (("SD 1.5", "KL", "fp16", "bf16"), [(512, 1, "fast", None)]),
            (("SDXL", "KL", "fp16", "bf16"), sdxl),
        ],
        "matrix": 8192,
    }


def tiny() -> dict:
    steps = [(64, 1, "lean", None), (64, 2, "checkpoint", None), (96, 1, "fast", 8)]  # to count one takes far longer than to run it
    return {
        "device": "cpu",
        "precision": ("tiny", "tiny KL", 32, precision.SIGMAS[:1]),
        "steps": [(("tiny", "tiny KL", "fp32", "fp32"), steps)],
        "matrix": 256,
    }


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cosines(family: str, decoder: str, size: int, sigmas: tuple[float, ...], device: str) -> list[dict]:
    """Of gradients in half precision to those in float32, with and without the scaling of cotangents, with and without a CSE."""
    networks = precision.Networks(family, decoder, size, device)
    cases = [(sigma, cse) for sigma in sigmas for cse in (False, True)]
    networks.to("fp32", "fp32")
    exact = {case: networks.gradient(*case) for case in cases}
    found = []
    for dtype, vae_dtype in (("fp16", "bf16"), ("fp16", "fp16"), ("bf16", "bf16")):
        networks.to(dtype, vae_dtype)
        for sigma, cse in cases:
            scaled = networks.gradient(sigma, cse)
            with precision.unscaled():
                plain = networks.gradient(sigma, cse)
            row = {"dtype": dtype, "vae_dtype": vae_dtype, "sigma": sigma, "cse": cse, "seed": precision.SEED, "size": size}
            row["cosine"], row["unscaled"] = (precision.cosine(g, exact[sigma, cse]) for g in (scaled, plain))
            found.append(row)
    return found


def counted_gib(job: dict) -> float:
    """GiB by the count, weights included."""
    if job["family"] in costs.FAMILIES:
        size = (job["size"], job["size"])
        told = (job["dtype"], job["how"], job["tile"])
        return costs.peak(job["family"], job["decoder"], size, *told, batch=job["batch"], vae_dtype=job["vae_dtype"]) / GIB
    return memory.counted(job["family"], job["decoder"], job["dtype"], job["size"], job["how"], job["tile"], batch=job["batch"])["peak_gib"]


def steps(network: tuple[str, str, str, str], wanted: list[tuple], device: str, runs: int, matrix: int) -> list[dict]:
    """Rows of one network's steps. One that does not fit the device says so, and is a finding, too."""
    family, decoder, dtype, vae_dtype = network
    prior = shapes.build(family, decoder, dtype, vae_dtype, device)
    before, found = weights_hash(prior), []
    for size, batch, how, tile in wanted:
        job = {"family": family, "decoder": decoder, "dtype": dtype, "vae_dtype": vae_dtype, "size": size, "batch": batch, "how": how}
        job |= {"tile": tile, "device": device, "matrix": matrix, "runs": 1 if tile else runs, "seed": SEED}
        free()
        try:
            row = measure(job, prior)
        except torch.OutOfMemoryError:
            row = job | {"seconds": None, "peak_gib": None}
        found.append(row | {"counted_gib": counted_gib(job)})
    unchanged = before == weights_hash(prior)
    return [row | {"weights_unchanged": unchanged} for row in found]


def dynamic_vram() -> list[dict]:
    """Seconds and picture of a restoration in a running ComfyUI, as it starts by itself and without dynamic VRAM; empty before ComfyUI 0.16."""
    option = "--disable-dynamic-vram"
    if option not in (comfyui_path() / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
        return []
    found = []
    for extra in ([], [option]):
        with Host(*extra) as host:
            prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), host.object_info())
            started = time.perf_counter()
            pictures = sorted(host.images(host.run(prompt)))
            seconds = time.perf_counter() - started
            found.append({"options": extra, "seconds": seconds, "pictures": [hashlib.sha256(p.read_bytes()).hexdigest() for p in pictures]})
    return found


def of_rate(row: dict, rates: dict[str, float]) -> float | None:
    """Operations that the step needs over its seconds, as a share of the rate of bf16 products."""
    if row["family"] not in costs.FAMILIES or not row["seconds"]:
        return None
    size = (row["size"], row["size"])
    needed = costs.flop(row["family"], row["decoder"], size, row["how"], row["tile"], batch=row["batch"])
    return needed / row["seconds"] / rates["bf16"]


def told(report: dict) -> str:
    """The report as tables."""

    def cell(value, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    lines = [f"{report['name']}, torch {report['torch']}, seed {SEED}. TFLOP/s of matrix products: "]
    lines[0] += ", ".join(f"{name} {value / 1e12:.3g}" for name, value in report["rates"].items())
    lines += ["", "| UNet, VAE | sigma | CSE | cosine to fp32 | without scaling |", "|---|---|---|---|---|"]
    for r in report["precision"]:
        lines.append(
            f"| {r['dtype']}, {r['vae_dtype']} | {r['sigma']:g} | {'yes' if r['cse'] else 'no'} | {r['cosine']:.5f} | {r['unscaled']:.5f} |"
        )
    lines += [
        "",
        "| model | UNet, VAE | size | batch | plan | tile | seconds | of the bf16 rate | peak GiB | counted | weights |",
        "|" + "---|" * 11,
    ]
    for r in report["steps"]:
        cells = [
            r["family"],
            f"{r['dtype']}, {r['vae_dtype']}",
            r["size"],
            r["batch"],
            r["how"],
            r["tile"] or "",
            cell(r["seconds"], ".3f"),
        ]
        cells += [cell(of_rate(r, report["rates"]), ".0%"), cell(r["peak_gib"], ".2f"), f"{r['counted_gib']:.2f}"]
        lines.append("| " + " | ".join([*map(str, cells), "as they were" if r["weights_unchanged"] else "CHANGED"]) + " |")
    lines.append("")
    for r in report["dynamic_vram"]:
        lines.append(f"restoration with {' '.join(r['options']) or 'no option'}: {r['seconds']:.1f} s, picture {r['pictures'][0][:12]}")
    return "\n".join(lines if report["dynamic_vram"] else [*lines, "dynamic VRAM: this ComfyUI has none"])


@torch.no_grad()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small networks, on the CPU")
    parser.add_argument("--runs", type=int, default=3, help="measured steps after the first")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(arguments)
    if not (args.tiny or torch.cuda.is_available()):
        sys.exit("python -m benchmarks gpu: there is no CUDA device here; --tiny runs the same with small networks on a CPU")
    plan, started = tiny() if args.tiny else full("cuda"), time.perf_counter()
    device = torch.device(plan["device"])
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    report = {
        "name": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "rates": {name: rate(device, dtype, plan["matrix"]) for name, dtype in types.items()},
        "precision": cosines(*plan["precision"], plan["device"]),
        "steps": [],
    }
    for network, wanted in plan["steps"]:
        free()
        report["steps"] += steps(network, wanted, plan["device"], args.runs, plan["matrix"])
    free()
    report["dynamic_vram"] = dynamic_vram()
    report["minutes"] = (time.perf_counter() - started) / 60
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(told(report))
