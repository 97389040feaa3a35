"""A training with its files: goes on where it was cut, saves every so many steps, and keeps what was trained if it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import Diverged
from .checkpoint import FORMAT, STATE_SUFFIX, SaveError, read_cse, resuming, state_of, write_cse, write_state
from .metadata import CSEMetadata
from .trainer import Trainer
from .validation import sheet, validation_loss

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # of the file


def check_path(path: Path) -> None:
    """Raises ValueError for a file that no training could go on from, and that must not be overwritten."""
    state = path.with_suffix(STATE_SUFFIX)
    if path.exists() and not state.exists():
        raise ValueError(f"{path} exists, and there is no {state.name} beside it to go on from; choose another name")


class Session:
    """Trains into the file `path`, and beside it into one to go on from (suffix .training). Of several processes the first one writes.

    identity: what must be equal to go on. metadata: written into the file, with the steps filled in. looked_at: images (B, 3, S, S) for
    validation. precision: of the file. Raises ValueError if a file of that name belongs to another training.
    """

    def __init__(
        self,
        trainer: Trainer,
        path: Path,
        identity: dict[str, Any],
        metadata: CSEMetadata,
        looked_at: Tensor,
        precision: str = "fp16",
    ):
        self.trainer, self.path, self.identity, self.metadata, self.precision = trainer, path, identity, metadata, precision
        self.looked_at = looked_at.to(trainer.device)
        self.validations: list[list[float]] = []
        self.state_path = path.with_suffix(STATE_SUFFIX)
        self.writes = trainer.strategy.rank == 0
        check_path(path)
        if self.state_path.exists():
            state = state_of(self.state_path, identity)
            with resuming(self.state_path):
                trainer.resume(state)
                self.validations = list(state["validations"])
        self.saved = trainer.step

    def save(self) -> None:
        """State first: were there only the other file, a crash between the two would leave nothing to go on from.

        Raises Diverged for weights that the file cannot hold.
        """
        if not self.writes:
            return
        t, dtype = self.trainer, DTYPES[self.precision]
        weights = {name: tensor.to("cpu", dtype) for name, tensor in t.result_weights().items()}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise Diverged(
                f"weights are not finite, or too large for the file, at step {t.step}: learning_rate {t.settings.learning_rate:g} is too high, "
                f"or a precision too low ({t.settings.precision}; of the file: {self.precision})"
            )
        write_state(self.state_path, t.state() | {"format": FORMAT, "identity": self.identity, "validations": self.validations})
        write_cse(self.path, weights, replace(self.metadata, steps=t.step), dtype)
        self.saved = t.step

    def _written(self) -> bool:
        """Whether the file is there as it was last trained: a program may end between its two files."""
        if not self.path.exists():
            return False
        metadata = read_cse(self.path)[1]
        return metadata is not None and metadata.steps == self.trainer.step

    def validate(self) -> None:
        t = self.trainer
        loss = validation_loss(t.prior, t.result, t.operator, self.looked_at, t.settings)
        self.validations.append([t.step, loss])

    def sheet(self) -> Image.Image:
        """What the CSE makes of the validation pictures now."""
        t = self.trainer
        return sheet(t.prior, t.result, t.operator, self.looked_at, t.settings.hint_range)

    def train(
        self,
        save_every: int,
        validate_every: int | None = None,
        on_step: Callable[[int], None] | None = None,
        on_validation: Callable[[float], None] | None = None,
    ) -> None:
        """To the last step of the settings. Stopped by an exception, it saves first, unless the exception is about the weights or the disk.

        validate_every: steps, 0 for no validation; None: at every save. on_step(step) and on_validation(loss) are called before a save, the
        latter where files are written. Raises KeyboardInterrupt, having saved, if the strategy was asked to stop.
        """
        t = self.trainer
        validate_every = save_every if validate_every is None else validate_every
        if t.step >= t.settings.steps and self.writes and not self._written():
            self.save()
        try:
            with t.strategy.interrupts():
                for _ in t.run():
                    last = t.step == t.settings.steps
                    if self.writes and validate_every and (last or t.step % validate_every == 0):
                        self.validate()
                        if on_validation:
                            on_validation(self.validations[-1][1])
                    if on_step:
                        on_step(t.step)
                    if last or t.stopped or t.step % save_every == 0:
                        self.save()
                    if t.stopped and not last:
                        raise KeyboardInterrupt
        except Diverged as error:
            kept = f"The weights of step {self.saved} are in {self.path}" if self.saved else "Nothing was saved"
            raise Diverged(f"{error}. {kept}") from error
        except SaveError:
            raise
        except BaseException:  # the user's cancel, out of memory, the end of the program
            if t.step > self.saved:
                self.save()
            raise
