"""Tables, studies and trainings without ComfyUI: `dmap COMMAND --help`, or `python -m dmap_core.cli`, as for accelerate launch."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

MISSING = "this needs {0}, which is not installed: pip install accelerate diffusers transformers tensorboard torchmetrics matplotlib scipy pyyaml tqdm psutil"


def parser() -> argparse.ArgumentParser:
    # here, so that Ctrl-C during the seconds that these take ends the program as it does later
    from .cse import generate, train
    from .evaluate import command as evaluate
    from .studies import commands as studies

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="dmap", description=__doc__, formatter_class=raw)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    table = commands.add_parser(
        "evaluate", help="restore many pictures and write a table", description=evaluate.__doc__, formatter_class=raw
    )
    evaluate.add_arguments(table)
    table.add_argument("--sweep", help="a setting and factors on it, each a row of its own, such as zeta=0.5,1,2")
    table.set_defaults(function=evaluate.evaluate_table)
    studies.add_parsers(commands, raw)
    for name, module, function, text in (
        ("train-cse", train, train.train_with_options, "train a conditional score estimator"),
        ("generate-cse", generate, generate.generate_cse, "make training pictures for one with the model itself"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__, formatter_class=raw)
        module.add_arguments(command)
        command.set_defaults(function=function)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    try:
        _main(argv)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _main(argv: Sequence[str] | None) -> None:
    import torch

    from .errors import Diverged

    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        given = vars(args)
        del given["command"]
        given.pop("function")(**given)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {MISSING.format(error.name)}")
    except (ValueError, Diverged, OSError) as error:
        sys.exit(f"error: {' '.join(map(str.strip, str(error).splitlines()))}")  # those of other packages may have several lines
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: the GPU has too little memory; lower --batch or --size, or set memory to checkpoint in a config ({error})")


if __name__ == "__main__":
    main()
