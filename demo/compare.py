"""Every solver on every operator with the demo prior: figures for a table, and the search for the settings in dmap_core/presets.py.

    python demo/compare.py --n 32                                     # the table, hours on a small machine; goes on where it was cut
    python demo/compare.py --search --solvers DPS --sweep zeta=0.5,1,2   # zeta of the preset times these, on other held-out pictures
    python demo/compare.py --cse demo/run/cse-100.safetensors --operators super-resolution-x4 --solvers "CSE alone,DPS,DMAP"
    python demo/compare.py --photographs --noise 5 --solvers "as given,DMAP automatic"   # natural photographs, whose model this is not
    python demo/compare.py --flow --solvers "DMAP automatic"          # with the demo prior as a flow
    python demo/compare.py --table                                    # only print what there is

Every figure is there twice, of the picture as the model leaves it and `matched` to its measurement. DMAP automatic is DMAPPreset's *look*, whose
steps set themselves; DMAP automatic exact and none are the same with the gradient through the denoiser, and without. This is `dmap evaluate` with
ComfyUI in this process as its backend: the pack's own nodes, one picture at a time, all from the same noise. What it writes is below --out: every
picture with its figures, and table.md. The table takes the first held-out pictures, the search the last ones.
"""

import argparse
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

from photographs import PHOTOGRAPHS, prepare
from run import FLOW_FILE, HERE, PRIOR_FILE, ROOT, names

OPERATORS: dict[str, dict[str, Any]] = {
    "super-resolution-x4": {"operator": "SuperResolution", "scale": 4},
    "super-resolution-x8": {"operator": "SuperResolution", "scale": 8},
    "gaussian-deblur": {"operator": "GaussianBlur", "kernel_size": 61, "sigma": 3.0},
    "motion-deblur": {"operator": "MotionBlur", "length": 21.0, "angle": 30.0},
    "inpainting": {},
    "nonlinear-deblur": {},
    "jpeg-cleanup": {"operator": "Jpeg", "quality": 10},
}
AS_GIVEN, CSE_ALONE = "as given", "CSE alone"
SOLVERS = (AS_GIVEN, "DPS", "PSLD", "FreeDoM", "ReSample", "DSG", "DMAP", "DMAP full")
AUTOMATIC = {
    "DMAP automatic": None,
    "DMAP automatic exact": "exact",
    "DMAP automatic none": "none",
}  # jacobian; None: what DMAPPreset takes
MODEL = "demo prior, 128 pixels"
HELD_OUT = len(list((HERE / "held-out").glob("*.png")))
WEIGHTS = "random-kernel-wizard.safetensors"  # of nonlinear-deblur, seed 0, as the published ones are not shipped


def import_pack() -> None:
    """ComfyUI, and the pack as ComfyUI imports it."""
    import torch
    from host import import_comfy

    import_comfy()
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location("dmap_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["dmap_pack"] = pack
    spec.loader.exec_module(pack)


def backend(config, flow: bool = False):
    """The demo prior in ComfyUI. flow: the one that was distilled into a flow, as ModelSamplingSD3 makes ComfyUI see it."""
    import comfy.sd
    import torch
    from dmap_pack.nodes.host.backend import ComfyUI
    from dmap_pack.nodes.host.prior import null_conditioning

    model, _, vae = comfy.sd.load_checkpoint_guess_config(str(config.checkpoint), output_clip=False)[:3]
    if flow:
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        (model,) = ModelSamplingSD3().patch(model, shift=1.0)
    if not torch.cuda.is_available():  # a sixth faster there
        for network in (model.model.diffusion_model, vae.first_stage_model):
            network.to(memory_format=torch.channels_last)
    return ComfyUI(config, model, null_conditioning(model), vae)


def specs(names: list[str], weights: Path, noise: float = 0.0) -> dict[str, dict[str, Any]]:
    """The damage of the demo workflows. noise: of the measurements, in grey levels of 255."""
    from dmap_pack.dmap_core import operators
    from dmap_pack.dmap_core.operators.nonlinear_blur import random_kernel_wizard, save_kernel_wizard

    found = {name: OPERATORS[name] for name in names}
    if "inpainting" in found:
        found["inpainting"] = operators.Inpainting(operators.centred_box((128, 128), (48, 48))).spec()
    if "nonlinear-deblur" in found:
        network = random_kernel_wizard(seed=0)
        save_kernel_wizard(network, weights / WEIGHTS)
        found["nonlinear-deblur"] = operators.NonlinearBlur(network, seed=0, weights=WEIGHTS).spec()
    if noise:
        found = {name: {"operator": "Noisy", "of": spec, "sigma": noise / 255} for name, spec in found.items()}
    return found


def rows(operators: dict[str, dict[str, Any]], solvers: list[str], steps: int | None, cse: Path | None, weights: Path) -> list[dict]:
    """What PSLD cannot do is left out."""
    from dmap_core.operators import from_spec
    from dmap_core.presets import automatic

    found = []
    for operator, spec in operators.items():
        f = from_spec(dict(spec), lambda name: weights / name)
        for solver in solvers:
            if solver == "PSLD" and not f.linear:
                continue
            row = {"operator": operator, "solver": solver, "name": solver}
            if solver in AUTOMATIC:
                look = automatic(f, "DMAP", "look").solver
                row |= {"solver": "DMAP", "settings": {"strength": look.strength, "jacobian": AUTOMATIC[solver] or look.jacobian}}
            if solver != AS_GIVEN:
                if cse:
                    row |= {"cse": cse, "name": f"{row['name']} + {cse.stem}"}
                if steps and solver != CSE_ALONE:
                    row |= {"steps": steps, "name": f"{row['name']}, {steps} steps"}
            found.append(row)
    return found


def check_folder(out: Path) -> None:
    for file in out.glob("*.json"):
        if "pictures" in json.loads(file.read_text()):
            raise SystemExit(f"--out: {file} holds figures of an earlier version, which are not mixed with new ones; choose another folder")


def compare(
    n: int | None = None,
    photographs: bool = False,
    noise: float = 0.0,
    operators: str = ",".join(OPERATORS),
    solvers: str = ",".join(SOLVERS),
    steps: int | None = None,
    search: bool = False,
    sweep: str | None = None,
    cse: Path | None = None,
    seed: int = 0,
    out: Path | None = None,
    flow: bool = False,
    table: bool = False,
) -> None:
    """Restores what is asked for, and prints its table. The arguments are the options of this program."""
    if photographs and search:
        raise SystemExit("--search: settings are searched on held-out pictures, and --photographs are for a table")
    most = sum(map(len, PHOTOGRAPHS.values())) if photographs else HELD_OUT // 2
    n = n or (4 if search else min(32, most))
    if not 0 < n <= most:
        raise SystemExit(f"--n: {n} pictures wanted; there are {most} for the table" + ("" if photographs else " and as many for a search"))
    if not 0 <= noise <= 255:
        raise SystemExit(f"--noise is {noise}; it must be 0 to 255 grey levels")
    wanted, asked = names(operators, tuple(OPERATORS), "--operators"), names(solvers, (*SOLVERS, *AUTOMATIC, CSE_ALONE), "--solvers")
    if CSE_ALONE in asked and not cse:
        raise SystemExit("--solvers: 'CSE alone' needs --cse FILE")
    what = "search" if search else "photographs" if photographs else "table"
    if flow and cse:
        raise SystemExit("--flow: the demo CSEs were trained for the prior that predicts noise")
    out = out or ROOT / "output" / "compare" / f"{what}{f'-noise-{noise:g}' if noise else ''}{'-flow' if flow else ''}"
    check_folder(out)
    import_pack()
    from dmap_pack.dmap_core.evaluate.config import ConfigError, make_config
    from dmap_pack.dmap_core.evaluate.report import write_table
    from dmap_pack.dmap_core.evaluate.run import evaluate, plan_jobs
    from dmap_pack.dmap_core.evaluate.sweep import Sweep
    from dmap_pack.dmap_core.evaluate.tables import markdown, read_lines

    weights = out / "weights"
    damage = specs(wanted, weights, noise)
    images = prepare() if photographs else HERE / "held-out"
    given = {
        "operators": damage,
        "rows": rows(damage, asked, steps, cse, weights),
        "images": images,
        "checkpoint": FLOW_FILE if flow else PRIOR_FILE,
    }
    given |= {"count": n, "last": search, "seed": seed, "stride": 0, "metrics": ["psnr", "features"], "match": True}
    given |= {"rounded": True} if photographs else {}
    given |= {"settings_for": MODEL, "weights": weights, "title": f"Demo prior, {what}"}
    try:
        config = make_config(given)
        swept = Sweep.parse(sweep) if sweep else None
        full = swept.config(config) if swept else config
        if table:
            jobs = plan_jobs(full)
            lines = read_lines(full, jobs, out)
        else:
            jobs = evaluate(full, out, backend(full, flow))
            lines = write_table(full, jobs, out)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    print(markdown(full, jobs, lines))
    for sentence in swept.told(config, lines) if swept else ():
        print(sentence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, help="pictures (32 for the table, 4 for a search)")
    parser.add_argument(
        "--photographs", action="store_true", help="instead of held-out pictures: natural photographs, with 8-bit measurements"
    )
    parser.add_argument("--noise", type=float, default=0.0, help="of the measurements, in grey levels of 255 (default: 0)")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    parser.add_argument("--steps", type=int, help="instead of the preset's; zeta and windows are scaled with it")
    parser.add_argument("--search", action="store_true", help="use the last held-out pictures, which no table does")
    parser.add_argument("--sweep", help="factors on a setting of the presets, such as zeta=0.5,1,2")
    parser.add_argument("--cse", type=Path, help="restore with this ControlNet; 'CSE alone' is then a solver, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results folder (default: output/compare/table, or search)")
    parser.add_argument("--flow", action="store_true", help="with the demo prior that was distilled into a flow")
    parser.add_argument("--table", action="store_true", help="compute nothing, print the figures that there are")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    compare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
