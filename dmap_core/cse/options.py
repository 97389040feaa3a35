"""The options of `python -m dmap_core.cse.train`: from the command line, and from a config file below them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import check_name
from .settings import HINT_RANGES, PRECISIONS, TrainingSettings

if TYPE_CHECKING:
    from ..operators import Operator

MISSING = "training needs {0}, which is not installed: pip install accelerate diffusers transformers tensorboard"
VALIDATED = 4  # pictures
SHOWN = 200  # characters of a text in a message


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m dmap_core.cse.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = {f.name: f.default for f in fields(TrainingSettings)}

    what = p.add_argument_group("what to train")
    what.add_argument("--config", type=Path, help="YAML file with any of these options")
    what.add_argument("--checkpoint", type=Path, help="the base model: a .safetensors or .ckpt file, or a diffusers folder")
    what.add_argument("--pictures", type=Path, help="folder with the training pictures")
    what.add_argument("--operator", help="the degradation, as JSON or a .json file; docs/cse.md lists them")
    what.add_argument("--weights", type=Path, help="folder with the weights of learned operators")
    what.add_argument("--out", type=Path, help="the file to write (.safetensors); ComfyUI finds it in models/controlnet")
    what.add_argument("--count", type=int, help="use only the first so many pictures, by name")
    what.add_argument("--prompt", default="", help="the conditioning during training (default: empty, the paper's)")
    what.add_argument("--prediction", choices=("auto", "eps", "v"), default="auto", help="what the base model predicts (default: auto)")
    what.add_argument("--validation", type=Path, help=f"folder with pictures to look at (default: the first {VALIDATED} training pictures)")
    what.add_argument("--licence", default="", help="licence of the file that is written, stored in it")
    what.add_argument("--source", default="", help="where the pictures are from, stored in the file")

    how = p.add_argument_group("how to train")
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
        how.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default[name], help=f"{text} (default: {default[name]})")
    how.add_argument(
        "--resize",
        type=float,
        nargs=2,
        default=list(default["resize"]),
        metavar=("LOW", "HIGH"),
        help="random scale of the crops (default: 0.8 2.0)",
    )
    how.add_argument("--precision", choices=PRECISIONS, default=default["precision"], help="of the arithmetic (default: fp32)")
    how.add_argument(
        "--hint-range",
        choices=HINT_RANGES,
        default=default["hint_range"],
        help="values of the hint (default: 0..1, ComfyUI's and diffusers')",
    )
    how.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: about a third slower, much less memory")
    how.add_argument("--adam-8bit", action="store_true", help="keep Adam's moments in 8 bits (needs bitsandbytes)")
    how.add_argument(
        "--ema", type=float, default=0.0, help="write an exponential moving average of the weights with this decay (default: 0, off)"
    )
    how.add_argument("--save-every", type=int, default=500, help="steps between two saves (default: 500)")
    how.add_argument("--validate-every", type=int, default=500, help="steps between two validations, 0 for none (default: 500)")
    how.add_argument(
        "--unreadable", choices=("refuse", "skip"), default="refuse", help="what to do about files that cannot be read (default: refuse)"
    )
    how.add_argument("--workers", type=int, default=2, help="processes that read pictures, per training process (default: 2)")
    how.add_argument("--save-precision", choices=("fp16", "fp32"), default="fp16", help="of the file that is written (default: fp16)")
    return p


def config_options(p: argparse.ArgumentParser, file: Path) -> list[str]:
    """What a config file says, as options of the command line. Ends the program with a message for what cannot be one."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        sys.exit(MISSING.format(error.name))
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # no text, a number of thousands of digits, or too deep
        p.error(f"--config: {file} cannot be read: {error}")
    known = {a.dest: a for a in p._actions if a.dest not in ("help", "config")}
    if not isinstance(given, dict) or not set(given) <= set(known):
        unknown = sorted(str(name) for name in set(given) - set(known)) if isinstance(given, dict) else []
        p.error(f"--config: {file} must map option names to values{f'; unknown: {unknown}' if unknown else ''}. Known: {', '.join(known)}")
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
            p.error(f"--config: {name} is {value!r}; it must be {wanted}")
    return options


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The options, those of a config file below those of the command line. Ends the program with a message for what makes no sense."""
    p = parser(description)
    argv = sys.argv[1:] if argv is None else argv
    first = p.parse_args(argv)
    if first.config:
        first = p.parse_args([*config_options(p, first.config), *argv])
    for name in ("checkpoint", "pictures", "operator", "out"):
        if not getattr(first, name):
            p.error(f"--{name} is missing")
    if first.out.suffix != ".safetensors":
        p.error(f"--out: {first.out} must end in .safetensors")
    try:
        check_name(first.out.name, "--out")
    except ValueError as error:
        p.error(str(error))
    if first.save_every < 1 or first.validate_every < 0 or not 0 <= first.ema < 1:
        p.error("--save-every must be at least 1, --validate-every at least 0, and --ema lie in [0, 1)")
    return first


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
