"""`evaluate`: restore many pictures, measure them, and write a table.

    dmap evaluate --images photos/ --size 512 --checkpoint 512-base-ema.safetensors \\
        --operator '{"operator": "SuperResolution", "scale": 8}' --solver DPS,DMAP --out results/
    accelerate launch --num_processes 4 -m dmap_core.cli evaluate --config studies/configs/table4.yaml --images imagenet/ --out results/

The same command goes on where it was cut: every finished picture is on disk. Several processes share the work, on machines that see the
same results folder. What is given on the command line comes before the config file.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from ..presets import MODELS
from .config import NAMES, PRECISIONS, UNREADABLE, Config, ConfigError, make_config, read_config

DEFAULT_METRICS = "psnr,ssim"
log = logging.getLogger("dmap.evaluate")
SHOWN = 200  # characters of a text in a message


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The options that make a config, for all commands that need one."""
    p.add_argument("--config", type=Path, help="YAML file with the rows of a table; see docs/studies.md")
    p.add_argument("--images", type=Path, help="folder with clean pictures")
    p.add_argument(
        "--checkpoint",
        type=Path,
        help="the base model: a .safetensors or .ckpt file, or a diffusers folder, of a UNet or a flow transformer",
    )
    p.add_argument("--out", type=Path, required=True, help="results folder; goes on with what is in it")
    p.add_argument("--operator", help="the degradation, as JSON or a .json file (without --config)")
    p.add_argument("--solver", help=f"solvers with commas between them (without --config): {', '.join(NAMES)}")
    p.add_argument("--settings", help="of the solver instead of its preset's, as JSON: '{\"zeta\": 4.8}' (without --config)")
    p.add_argument("--steps", type=int, help="instead of the preset's (without --config)")
    p.add_argument("--spacing", help="of the noise levels instead of the preset's (without --config)")
    p.add_argument("--cse", type=Path, help="a ControlNet that takes part in every row (without --config)")
    p.add_argument("--count", type=int, help="take the first so many pictures by name")
    p.add_argument("--size", type=int, help="resize and centre-crop all pictures to this")
    p.add_argument("--seed", type=int, help="of the first picture; each takes three, for its start, its steps and measurement noise")
    p.add_argument("--precision", choices=PRECISIONS, help="of the denoiser (the autoencoder is fp32)")
    p.add_argument("--metrics", help=f"with commas between them (default: {DEFAULT_METRICS})")
    p.add_argument("--weights", type=Path, help="folder with weights of metrics' backbones and of learned operators")
    p.add_argument("--settings-for", choices=MODELS, help="whose presets fill in what is not given")
    p.add_argument("--unreadable", choices=UNREADABLE, help="what to do about pictures that cannot be read (default: refuse)")
    p.add_argument("--match", action="store_true", default=None, help="measure every picture once more, matched to its measurement")
    p.add_argument("--batch", type=int, help="pictures restored at once")
    p.add_argument("--prompt", help="the conditioning (default: empty, the paper's)")
    p.add_argument("--distilled-guidance", type=float, help="of models that read one, such as Flux.1 dev (default: 3.5)")


def config_of(
    *,
    config: Path | None = None,
    operator: str | None = None,
    solver: str | None = None,
    settings: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    cse: Path | None = None,
    **changes: Any,
) -> Config:
    """The config of a file with other values of `Config`, or of one operator and a row for every solver. None is not given. Raises ConfigError.

    operator: JSON, or a .json file; solver: names with commas between them; settings: JSON, of all of them.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    row = {"operator": operator, "solver": solver, "settings": settings, "steps": steps, "spacing": spacing, "cse": cse}
    given = [f"--{name}" for name, value in row.items() if value is not None]
    if config:
        if given:
            raise ConfigError(f"{', '.join(given)}: the rows of {config} say this; leave it out, or leave out --config")
        return read_config(config, **changes)
    if not operator or not solver:
        raise ConfigError("give a --config, or an --operator and a --solver")
    row |= {"operator": "operator", "settings": _json(settings, "--settings")}
    row = {name: value for name, value in row.items() if value is not None}
    rows = [row | {"solver": name.strip()} for name in solver.split(",")]
    return make_config({"operators": {"operator": _spec(operator)}, "rows": rows} | changes)


def _json(text: str | None, option: str) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, or too deep
        raise ConfigError(f"{option}: {text[:SHOWN]!r} is not JSON ({error})") from error


def _spec(text: str) -> Any:
    if text.endswith(".json"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--operator: {text} cannot be read: {error}") from error
    return _json(text, "--operator")


def evaluate_table(out: Path, sweep: str | None = None, **given: Any) -> None:
    """Restores, measures and writes the table of a config into the folder `out`. sweep: see `Sweep.parse`; given: see `config_of`."""
    from accelerate import PartialState

    from .report import write_table
    from .run import evaluate
    from .sweep import Sweep

    asked = config_of(**given)
    swept = Sweep.parse(sweep) if sweep else None
    config = swept.config(asked) if swept else asked
    jobs = evaluate(config, out)
    if PartialState().is_main_process:
        lines = write_table(config, jobs, out)
        for sentence in swept.told(asked, lines) if swept else ():
            log.info("%s", sentence)
