"""Find zeta for the demo workflows: PSNR over a grid, on held-out pictures that no table uses (the last ones of demo/held-out).

    python demo/search_zeta.py --operators inpainting --solvers DPS,DMAP --zetas 1,2,4,8

The best values go into DEMO_ZETA of tools/build_workflows.py by hand. Finished settings are kept in --out and not computed again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from run import HERE, OPERATORS, ROOT, SOLVERS, Host, names, prepare, restore, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4, help="pictures per setting")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--solvers", default="DPS,DMAP")
    parser.add_argument("--zetas", default="1.5,3,6,12")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "zeta")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = sorted((HERE / "held-out").glob("*.png"))[-args.n :]
    file = args.out / "zeta.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    with Host() as host:
        info = host.object_info()
        for operator in names(args.operators, OPERATORS, "--operators"):
            workflow = json.loads((ROOT / "workflows" / f"demo-{operator}.json").read_text())
            for solver in names(args.solvers, SOLVERS, "--solvers"):
                for zeta in map(float, args.zetas.split(",")):
                    key = f"{operator} {solver} zeta {zeta:g} steps {args.steps or 'default'} n {args.n} seed {args.seed}"
                    if key not in found:
                        jobs = [prepare(workflow, info, picture, solver, args.seed, args.steps, zeta) for picture in pictures]
                        rows = [restore(host, job, args.out / "restored.png") for job in jobs]
                        found[key] = {
                            name: float(np.mean([row[name] for row in rows])) for name in ("psnr", "psnr_baseline", "residual", "seconds")
                        }
                        write_json(file, found)
                    print(key, {name: round(value, 2) for name, value in found[key].items()}, flush=True)


if __name__ == "__main__":
    main()
