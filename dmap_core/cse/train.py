"""Train a CSE from the command line, on one machine or many.

    dmap train-cse --checkpoint 512-base-ema.safetensors --pictures photos/ \\
        --operator '{"operator": "SuperResolution", "scale": 8}' --out sr8.safetensors
    accelerate launch --num_processes 4 -m dmap_core.cli train-cse --config training.yaml

The defaults are the paper's (B.2). batch_size counts the pictures of one optimiser step in all processes together, so the result does not
depend on how many there are. The same command goes on with a training that was cut, be it one of the node TrainCSE; a finished one is
prolonged by more --steps. Beside OUT it writes OUT's name with .training (to go on from), and a folder with .logs (TensorBoard, validation
pictures). A config file is YAML with the names of the options, without dashes; what is given on the command line comes first. Distribution
(processes, GPUs, machines) is accelerate's: see `accelerate config`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import VALIDATED, add_arguments, merged, read_operator
from .settings import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ..operators import Operator
    from .session import Session
    from .strategy import Accelerated

__all__ = ["add_arguments", "train_cse", "train_with_options"]
log = logging.getLogger("dmap.cse")


def train_with_options(**given: Any) -> None:
    """`train_cse` with those options of the command line (see `add_arguments`) that are given, below them those of a config file."""
    given = merged(given)
    settings = TrainingSettings(**{name: given.pop(name) for name in TrainingSettings.names()})
    operator = read_operator(given.pop("operator"), given.pop("weights"))
    train_cse(operator=operator, settings=settings, **given)


def train_cse(
    *,
    checkpoint: Path,
    pictures: Path,
    operator: Operator,
    out: Path,
    settings: TrainingSettings,
    count: int | None = None,
    prompt: str = "",
    prediction: str = "auto",
    validation: Path | None = None,
    licence: str = "",
    source: str = "",
    gradient_checkpointing: bool = False,
    save_every: int = 500,
    validate_every: int = 500,
    unreadable: str = "refuse",
    workers: int = 4,
    save_precision: str = "fp16",
) -> None:
    """Trains a CSE into the file `out`, in this process or in those that accelerate started; goes on where one was cut.

    pictures: a folder, of which the first `count` are taken. prompt, prediction: see `open_base`. validation: a folder with pictures to look at;
    without it the first training pictures. unreadable: "refuse" or "skip" files that cannot be read. workers: threads that read pictures.
    save_precision: of the file, "fp16" or "fp32". Raises ValueError for what makes no sense, errors.Diverged, OSError for a full disk, and
    KeyboardInterrupt after Ctrl-C, when what was trained is saved.
    """
    import tensorboard  # noqa: F401, whose absence should be known now

    from ..backends.diffusers_files import open_base
    from ..pictures import file_identity, folder_files
    from ..prior import DTYPES
    from .checkpoint import STATE_SUFFIX
    from .data import Examples
    from .identity import identity
    from .metadata import CSEMetadata
    from .network import initial_controlnet
    from .session import Session, check_path
    from .strategy import Accelerated
    from .trainer import Trainer, adam

    strategy = Accelerated(settings, out.with_suffix(".logs"))
    log.setLevel(logging.INFO if strategy.rank == 0 else logging.ERROR)
    with strategy.files(out):
        # what is wrong should be known before the base model is read
        check_path(out)
        adam(settings)
        operator = operator.to(strategy.device)
        operator.check((settings.size, settings.size), settings.batch_size // (settings.accumulation * strategy.processes))
        CSEMetadata(operator=operator.spec(), source=source, licence=licence).write()
        files = _files(pictures, count, unreadable)
        examples = Examples(files, settings, timesteps=0)
        looked_at = _looked_at(files if validation is None else folder_files(validation, unreadable)[0], settings.size)

        prior = open_base(checkpoint, prompt, prediction)
        weights = prior.original_weights()  # of a UNet: no others have a CSE
        examples.timesteps = len(prior.sigmas)
        described = CSEMetadata.of_training(prior, settings, operator, prior.name, len(files), source, licence)
        same = identity(prior, settings, operator, [file_identity(file) for file in files])
        controlnet = prior.new_controlnet(initial_controlnet(weights, settings.seed)).to(strategy.device)
        # autocast does the arithmetic; a frozen network needs no weights in full precision
        prior.to(strategy.device, DTYPES[settings.precision])
        trainer = Trainer(prior, controlnet, operator, examples, settings, gradient_checkpointing, strategy, workers)
        session = Session(trainer, out, same, described, looked_at, save_precision)
        if trainer.step:
            log.info("going on from step %d of %s", trainer.step, out.with_suffix(STATE_SUFFIX))
        if trainer.step >= settings.steps:
            log.info("%s is trained for %d steps already; give more --steps to go on", out, trainer.step)
        _run(session, strategy, save_every, validate_every)


def _files(folder: Path, count: int | None, unreadable: str) -> list[Path]:
    from ..pictures import folder_files, ignored_files, named

    files, bad = folder_files(folder, unreadable)
    if bad:
        log.warning("%d files cannot be read and are left out: %s", len(bad), named(bad))
    if ignored := ignored_files(folder):
        log.info("%s", ignored)
    if count is not None and not 0 < count <= len(files):
        raise ValueError(f"count is {count}, but there are {len(files)} pictures")
    return files[:count]


def _looked_at(files: Sequence[Path], size: int) -> Tensor:
    """(B, 3, S, S)"""
    import torch

    from ..pictures import centred, open_rgb, to_tensor

    return torch.stack([to_tensor(centred(open_rgb(file), size)) for file in files[:VALIDATED]])


def _run(session: Session, strategy: Accelerated, save_every: int, validate_every: int) -> None:
    """Trains, with a progress bar, TensorBoard and validation pictures in the folder of the logs."""
    from tqdm.auto import tqdm

    trainer, out, accelerator = session.trainer, session.path, strategy.accelerator
    logs = out.with_suffix(".logs")
    accelerator.init_trackers("cse")

    def on_step(step: int) -> None:
        bar.update()
        bar.set_postfix(loss=f"{trainer.losses[-1]:.4f}", refresh=False)
        accelerator.log({"loss": trainer.losses[-1]}, step=step)

    def on_validation(loss: float) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        session.sheet().save(logs / f"step-{trainer.step:06d}.png")
        accelerator.log({"validation loss": loss}, step=trainer.step)
        log.info("step %d: validation loss %.5f, pictures in %s", trainer.step, loss, logs)

    try:
        with tqdm(total=trainer.settings.steps, initial=trainer.step, disable=strategy.rank > 0, desc="training") as bar:
            session.train(save_every, validate_every, on_step, on_validation)
    except KeyboardInterrupt:
        log.info("interrupted: %d steps are saved in %s", trainer.step, out)
        raise
    finally:
        accelerator.end_training()
    log.info("%s: %d steps", out, trainer.step)
