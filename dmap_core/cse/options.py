"""The options of `dmap train-cse`: from the command line, and from a config file below them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_name
from .settings import HINT_RANGES, PRECISIONS, PREDICTION_OPTIONS, TrainingSettings

if TYPE_CHECKING:
    from ..operators import Operator

VALIDATED = 4  # pictures
SHOWN = 200  # characters of a text in a message
REQUIRED = ("checkpoint", "pictures", "operator", "out")
# Of what is not given; the settings of the training have theirs in TrainingSettings.
DEFAULTS = {
    "weights": None,
    "count": None,
    "prompt": "",
    "prediction": "auto",
    "validation": None,
    "licence": "",
    "source": "",
    "gradient_checkpointing": False,
    "save_every": 500,
    "validate_every": 500,
    "unreadable": "refuse",
    "workers": 4,
    "save_precision": "fp16",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that are not given are no attributes, so that a config file can stand between them and the defaults."""
    parser.argument_default = argparse.SUPPRESS
    default = {f.name: f.default for f in fields(TrainingSettings)}

    what = parser.add_argument_group("what to train")
    what.add_argument("--config", type=Path, help="YAML file with any of these options")
    what.add_argument("--checkpoint", type=Path, help="the base model: a .safetensors or .ckpt file, or a diffusers folder")
    what.add_argument("--pictures", type=Path, help="folder with the training pictures")
    what.add_argument("--operator", help="the degradation, as JSON or a .json file; docs/cse.md lists them")
    what.add_argument("--weights", type=Path, help="folder with the weights of learned operators")
    what.add_argument("--out", type=Path, help="the file to write (.safetensors); ComfyUI finds it in models/controlnet")
    what.add_argument("--count", type=int, help="use only the first so many pictures, by name")
    what.add_argument("--prompt", help="the conditioning during training (default: empty, the paper's)")
    what.add_argument("--prediction", choices=PREDICTION_OPTIONS, help="what the base model predicts (default: auto)")
    what.add_argument("--validation", type=Path, help=f"folder with pictures to look at (default: the first {VALIDATED} training pictures)")
    what.add_argument("--licence", help="licence of the file that is written, stored in it")
    what.add_argument("--source", help="where the pictures are from, stored in the file")

    how = parser.add_argument_group("how to train")
    for name, kind, text in (
        ("steps", int, "optimiser steps"),
        ("batch_size", int, "pictures of one step, in all processes together"),
        ("accumulation", int, "parts that a process computes its share of a step in, to need less memory"),
        ("learning_rate", float, "of Adam"),
        ("seed", int, "of everything random"),
        ("size", int, "height and width of the crops"),
        ("flip", float, "probability of a mirrored picture"),
        ("jitter", float, "strength of the change of colours"),
        ("max_grad_norm", float, "gradients are scaled down to this norm"),
        ("snr_gamma", float, "of min-SNR weights, which let high noise levels count more; 0 is none, the paper's, 5 usual"),
    ):
        how.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text} (default: {default[name]})")
    how.add_argument(
        "--resize",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="random scale of the crops (default: 0.8 2.0)",
    )
    how.add_argument("--precision", choices=PRECISIONS, help="of the arithmetic (default: fp32)")
    how.add_argument(
        "--hint-range",
        choices=HINT_RANGES,
        help="values of the hint (default: 0..1, ComfyUI's and diffusers')",
    )
    how.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: about a third slower, much less memory")
    how.add_argument("--adam-8bit", action="store_true", help="keep Adam's moments in 8 bits (needs bitsandbytes)")
    how.add_argument("--ema", type=float, help="write an exponential moving average of the weights with this decay (default: 0, off)")
    how.add_argument("--save-every", type=int, help="steps between two saves (default: 500)")
    how.add_argument("--validate-every", type=int, help="steps between two validations, 0 for none (default: 500)")
    how.add_argument("--unreadable", choices=("refuse", "skip"), help="what to do about files that cannot be read (default: refuse)")
    how.add_argument("--workers", type=int, help="threads that read pictures, per process (default: 4)")
    how.add_argument("--save-precision", choices=("fp16", "fp32"), help="of the file that is written (default: fp16)")


def config_options(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """What a config file says, as options of the command line. Raises ValueError for what cannot be one."""
    import yaml

    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # no text, a number of thousands of digits, or too deep
        raise ValueError(f"--config: {file} cannot be read: {error}") from error
    known = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    if not isinstance(given, dict) or not set(given) <= set(known):
        unknown = sorted(str(name) for name in set(given) - set(known)) if isinstance(given, dict) else []
        raise ValueError(
            f"--config: {file} must map option names to values{f'; unknown: {unknown}' if unknown else ''}. Known: {', '.join(known)}"
        )
    options = []
    for name, value in given.items():
        if name == "operator" and isinstance(value, dict):
            value = json.dumps(value)
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        nargs = known[name].nargs
        if nargs == 0 and isinstance(value, bool):
            options += [option] * value
        elif nargs and isinstance(value, list):
            options += [option, *map(str, value)]
        elif nargs is None and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            options.append(f"{option}={value}")
        else:
            wanted = "true or false" if nargs == 0 else "a list" if nargs else "one text or number"
            raise ValueError(f"--config: {name} is {value!r}; it must be {wanted}")
    return options


def merged(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option by its name: the given ones of the command line, below it of its config file, below that the defaults. Raises ValueError for what makes no sense."""
    parser = argparse.ArgumentParser(prog="--config", usage="a YAML file with names and values of options", add_help=False)
    add_arguments(parser)
    options = dict(given)
    if file := options.pop("config", None):
        options = vars(parser.parse_args(config_options(parser, file))) | options
    found: dict[str, Any] = DEFAULTS | {f.name: f.default for f in fields(TrainingSettings)} | options
    for name in REQUIRED:
        if not found.get(name):
            raise ValueError(f"--{name} is missing")
    if found["out"].suffix != ".safetensors":
        raise ValueError(f"--out: {found['out']} must end in .safetensors")
    check_name(found["out"].name, "--out")
    if found["save_every"] < 1 or found["validate_every"] < 0:
        raise ValueError("--save-every must be at least 1, and --validate-every at least 0")
    return found


def read_operator(text: str, weights: Path | None) -> Operator:
    """The operator of a JSON text or file. Raises ValueError that says what is wrong with it."""
    from ..operators import from_spec  # here, so that --help needs no torch

    def find(name: str) -> Path:
        path = (weights or Path()) / Path(name).name
        if weights is None or not path.is_file():
            raise ValueError(f"operator: it needs the weights file {name}; name its folder with --weights")
        return path

    if text.endswith(".json"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"operator: {text} cannot be read: {error}") from error
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'operator: {text[:SHOWN]!r} is not JSON ({error}); an example is {{"operator": "SuperResolution", "scale": 8}}'
        ) from error
    if not isinstance(spec, dict):
        raise ValueError(f'operator: {text[:SHOWN]!r} is no JSON object; an example is {{"operator": "SuperResolution", "scale": 8}}')
    return from_spec(spec, find)
