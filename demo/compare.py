"""Every solver on every operator with the demo prior: figures for a table, and the search for the settings in dmap_core/presets.py.

    python demo/compare.py --n 32                                     # the table, hours on a small machine; goes on where it was cut
    python demo/compare.py --search --solvers DPS --sweep zeta=0.5,1,2   # zeta of the preset times these, on other held-out pictures
    python demo/compare.py --cse demo/run/cse-100.safetensors --operators super-resolution-x4 --solvers "CSE alone,DPS,DMAP"
    python demo/compare.py --table                                    # only print what there is

Runs the pack's own nodes in ComfyUI, in this process, one picture at a time. Figures are written to --out after every picture, one file
per operator, solver and settings. The table takes the first held-out pictures, the search the last ones.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from run import HERE, PRIOR_FILE, ROOT, fingerprint, names, write_json

OPERATORS = (
    "super-resolution-x4",
    "super-resolution-x8",
    "gaussian-deblur",
    "motion-deblur",
    "inpainting",
    "nonlinear-deblur",
    "jpeg-cleanup",
)
AS_GIVEN = "as given"
CSE_ALONE = "CSE alone"
CSE_STEPS = 20  # of a stock sampler with the CSE alone: as many as DPS's preset has
SOLVERS = (AS_GIVEN, "DPS", "PSLD", "FreeDoM", "ReSample", "DSG", "DMAP", "DMAP full")
MODEL = "demo prior, 128 pixels"


def import_pack():
    """The pack as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location("dmap_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["dmap_pack"] = pack
    spec.loader.exec_module(pack)


def make_operator(name: str):
    """The damage of the demo workflows; nonlinear-deblur has random weights (seed 0), as the published ones are not shipped."""
    from dmap_pack.dmap_core import operators
    from dmap_pack.dmap_core.operators.nonlinear_blur import random_kernel_wizard

    return {
        "super-resolution-x4": lambda: operators.SuperResolution(4),
        "super-resolution-x8": lambda: operators.SuperResolution(8),
        "gaussian-deblur": lambda: operators.GaussianBlur(61, 3.0),
        "motion-deblur": lambda: operators.MotionBlur(21.0, 30.0),
        "inpainting": lambda: operators.Inpainting(operators.centred_box((128, 128), (48, 48))),
        "jpeg-cleanup": lambda: operators.Jpeg(10),
        "nonlinear-deblur": lambda: operators.NonlinearBlur(random_kernel_wizard(seed=0), seed=0),
    }[name]()


class Bench:
    """The demo prior in ComfyUI, and pictures through it."""

    def __init__(self):
        import torch
        from host import import_comfy  # of tests/, which run.py put on the path

        import_comfy()
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        import comfy.sd

        import_pack()
        from dmap_pack.dmap_core.metrics.reference import FeatureDistance
        from dmap_pack.nodes import cse, guiders, operators, samplers

        self.cse = None
        self.feature_distance = FeatureDistance()
        self.nodes = {cls.__name__: cls for module in (cse, guiders, operators, samplers) for cls in module.NODES}
        self.model, _, self.vae = comfy.sd.load_checkpoint_guess_config(str(PRIOR_FILE), output_clip=False)[:3]
        if args.cpu:  # a sixth faster there
            for network in (self.model.model.diffusion_model, self.vae.first_stage_model):
                network.to(memory_format=torch.channels_last)
        self.conditioning = self.call("DMAPUnconditional", model=self.model)[0]

    def call(self, name: str, **inputs):
        return self.nodes[name].execute(**inputs).result

    def load_cse(self, file: Path) -> None:
        """All that is restored from now on is restored with this CSE."""
        from dmap_pack.nodes.host.controlnet import load_cse

        self.cse, _ = load_cse(file)

    def restore(self, image, operator, preset, seed: int):
        """(restored picture (1, H, W, 3) in [0, 1], report) of a picture that is damaged first; without a preset by the CSE alone, no report."""
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
        from dmap_pack.nodes.host.guider import SolverSampler

        measurement = self.call("Degrade", image=image, operator=operator, noise_sigma=0.0, seed=seed)[0]
        latent = self.call("EmptyMeasurementLatent", measurement=measurement, operator=operator, vae=self.vae, batch_size=1)[0]
        steps, spacing = (preset.steps, preset.spacing) if preset else (CSE_STEPS, "exponential")
        sigmas = self.call("DMAPScheduler", model=self.model, steps=steps, spacing=spacing)[0]
        positive = self.conditioning
        if self.cse:
            given = {"cse": self.cse, "measurement": measurement, "operator": operator, "model": self.model}
            positive = self.call("ApplyCSE", conditioning=positive, strength=1.0, start_percent=0.0, end_percent=1.0, **given)[0]
        noise = Noise_RandomNoise(seed).generate_noise(latent)
        if preset is None:
            guider = comfy.samplers.CFGGuider(self.model)
            guider.set_conds(positive, positive)
            samples = guider.sample(noise, latent["samples"], comfy.samplers.sampler_object("euler_ancestral"), sigmas, seed=seed)
            return self.vae.decode(samples), None
        problem = {"positive": positive, "vae": self.vae, "operator": operator, "measurement": measurement, "zeta": 1.0}
        guider = self.call("DPSGuider", model=self.model, **problem)[0]
        sampler = SolverSampler(preset.solver)
        samples = guider.sample(noise, latent["samples"], sampler, sigmas, seed=seed)
        return self.vae.decode(samples), guider.report


def measure(bench: Bench, file: Path, operator, solver: str, preset, seed: int) -> dict:
    """Figures of one restoration, or of the measurement itself, enlarged if it is smaller."""
    import torch

    original = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float()[None] / 255
    with torch.inference_mode():
        if solver == AS_GIVEN:
            x = original.movedim(-1, 1) * 2 - 1
            y = operator.measure(x)
            hint = operator.hint(y)
            restored = ((hint + 1) / 2).movedim(1, -1)
            cost = {"residual": float(operator.distance(operator(hint), y)), "seconds": 0.0, "denoiser_calls": 0, "decoder_calls": 0}
        else:
            started = time.perf_counter()
            restored, report = bench.restore(original, operator, preset, seed)
            if report:
                cost = {"residual": report.residuals[-1][0], "seconds": report.seconds}
                cost |= {"denoiser_calls": report.denoiser_calls, "decoder_calls": report.decoder_calls}
            else:
                x = operator.measure(original.movedim(-1, 1) * 2 - 1)
                residual = float(operator.distance(operator(restored.movedim(-1, 1) * 2 - 1), x))
                cost = {"residual": residual, "seconds": time.perf_counter() - started, "denoiser_calls": CSE_STEPS, "decoder_calls": 1}
        restored = (restored * 255).round().clamp(0, 255) / 255  # what a saved picture holds
        error = (restored - original).double().square().mean()
        distance = bench.feature_distance(restored.movedim(-1, 1), original.movedim(-1, 1))
        return {"psnr": float(-10 * error.log10()), "features": float(distance)} | cost


def mean(rows: list[dict], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def line(entry: dict) -> str:
    rows = list(entry["pictures"].values())
    error = np.std([row["psnr"] for row in rows], ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else float("nan")
    settings = " ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry["settings"].items())
    return (
        f"| {entry['operator']} | {entry['solver']}{' + ' + entry['cse'] if 'cse' in entry else ''} | {entry['steps']} | {settings} | {len(rows)} | {mean(rows, 'psnr'):.2f} +- {error:.2f} "
        f"| {mean(rows, 'features'):.4f} | {mean(rows, 'residual'):.2f} | {mean(rows, 'denoiser_calls'):.0f} | {mean(rows, 'seconds'):.1f} |"
    )


def table(out: Path, pictures: str) -> str:
    entries = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    head = "| operator | solver | steps | settings | n | PSNR (standard error) | feature distance | residual | denoiser calls | seconds |"
    order = {name: i for i, name in enumerate(OPERATORS)}
    chosen = sorted((e for e in entries if e["set"] == pictures), key=lambda e: (order[e["operator"]], e["solver"]))
    return "\n".join([head, "|---" * 10 + "|", *map(line, chosen)])


def vertex(factors: list[float], psnrs: list[float]) -> str:
    """Where a parabola through the figures has its top, the factors taken by their logarithm."""
    if len(factors) < 3:
        return "three factors or more are needed to see where the best lies"
    curve, slope, _ = np.polyfit(np.log(factors), psnrs, 2)
    top = float(np.exp(-slope / (2 * curve))) if curve < 0 else None
    if top is None or not min(factors) <= top <= max(factors):
        return f"the best lies outside of the factors {min(factors):g} to {max(factors):g}: sweep further"
    return f"the best factor is about {top:.2f}"


def variants(preset, sweep: str | None) -> list:
    """The preset, or one for every factor of a sweep such as zeta=0.5,1,2."""
    if not sweep:
        return [preset]
    key, _, factors = sweep.partition("=")
    settings = preset.solver.settings()
    if key not in settings:
        raise SystemExit(f"--sweep: {preset.solver.name()} has no setting {key!r}; it has {', '.join(settings)}")
    return [preset.with_settings(**{key: settings[key] * float(f)}) for f in factors.split(",")]


def presets_of(operator, solver: str, steps: int | None, sweep: str | None) -> list:
    """What to run: presets, or None for the measurement as it is."""
    if solver in (AS_GIVEN, CSE_ALONE):
        return [None]
    from dmap_pack.dmap_core.presets import preset

    base = preset(operator, solver, MODEL)
    return variants(base.with_steps(steps) if steps else base, sweep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, help="pictures (32 for the table, 4 for a search)")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    parser.add_argument("--steps", type=int, help="instead of the preset's; zeta and windows are scaled with it")
    parser.add_argument("--search", action="store_true", help="use the last held-out pictures, which no table does")
    parser.add_argument("--sweep", help="factors on a setting of the presets, such as zeta=0.5,1,2")
    parser.add_argument("--cse", type=Path, help="restore with this ControlNet; 'CSE alone' is then a solver, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "compare")
    parser.add_argument("--table", action="store_true", help="compute nothing, print the figures that there are")
    args = parser.parse_args()
    which = "search" if args.search else "table"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(table(args.out, which))
        return
    files = sorted((HERE / "held-out").glob("*.png"))
    n = args.n or (4 if args.search else 32)
    if not 0 < n <= len(files) // 2:
        raise SystemExit(f"--n: {n} pictures wanted; there are {len(files) // 2} for the table and as many for a search")
    files = files[-n:] if args.search else files[:n]
    operators, solvers = names(args.operators, OPERATORS, "--operators"), names(args.solvers, (*SOLVERS, CSE_ALONE), "--solvers")
    if CSE_ALONE in solvers and not args.cse:
        raise SystemExit("--solvers: 'CSE alone' needs --cse FILE")
    bench = Bench()
    if args.cse:
        bench.load_cse(args.cse)
    prior = fingerprint(PRIOR_FILE)
    for operator_name in operators:
        operator = make_operator(operator_name)
        for solver in solvers:
            if solver == "PSLD" and not operator.linear:
                continue
            psnrs = []
            for p in presets_of(operator, solver, args.steps, args.sweep):
                entry = {"operator": operator_name, "damage": operator.describe(), "solver": solver, "set": which, "prior": prior}
                entry |= {"settings": p.solver.notable() if p else {}, "steps": p.steps if p else 0, "spacing": p.spacing if p else ""}
                entry |= {"seed": args.seed if p or solver == CSE_ALONE else 0}
                if args.cse:
                    entry |= {"cse": args.cse.stem, "cse_sha256": fingerprint(args.cse)}
                key = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:8]
                file = args.out / f"{operator_name}-{solver.replace(' ', '-')}-{which}-{key}.json"
                done = json.loads(file.read_text())["pictures"] if file.exists() else {}
                for picture in files:
                    if picture.stem not in done:
                        done[picture.stem] = measure(bench, picture, operator, solver, p, args.seed)
                        write_json(file, entry | {"pictures": done})
                shown = {picture.stem: done[picture.stem] for picture in files}
                print(time.strftime("%H:%M:%S"), line(entry | {"pictures": shown}), flush=True)
                psnrs.append(mean(list(shown.values()), "psnr"))
            if args.sweep and solver != AS_GIVEN:
                print(f"{operator_name} {solver}: {vertex([float(f) for f in args.sweep.partition('=')[2].split(',')], psnrs)}", flush=True)


if __name__ == "__main__":
    main()
