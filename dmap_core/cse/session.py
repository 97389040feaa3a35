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
from .checkpoint import STATE_SUFFIX, SaveError, read_cse, resuming, state_of, write_cse, write_state
from .metadata import CSEMetadata
from .trainer import Trainer
from .validation import sheet, validation_loss

DTYPE = torch.float16  # of the file


class Session:
    """Trains into the file `path`, and beside it into one to go on from (suffix .training).

    identity: what must be equal to go on. metadata: written into the file, with the steps filled in. looked_at: images (B, 3, S, S) for
    validation. Raises ValueError if a file of that name belongs to another training.
    """

    def __init__(self, trainer: Trainer, path: Path, identity: dict[str, Any], metadata: CSEMetadata, looked_at: Tensor):
        self.trainer, self.path, self.identity, self.metadata = trainer, path, identity, metadata
        self.looked_at = looked_at.to(trainer.device)
        self.validations: list[list[float]] = []
        self.state_path = path.with_suffix(STATE_SUFFIX)
        if path.exists() and not self.state_path.exists():
            raise ValueError(f"{path} exists, and there is no {self.state_path.name} beside it to go on from; choose another name")
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
        weights = {name: tensor.to("cpu", DTYPE) for name, tensor in self.trainer.controlnet.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise Diverged(
                f"weights are not finite, or too large for the file, at step {self.trainer.step}: "
                f"learning_rate {self.trainer.settings.learning_rate:g} is too high"
            )
        write_state(self.state_path, self.trainer.state() | {"identity": self.identity, "validations": self.validations})
        write_cse(self.path, weights, replace(self.metadata, steps=self.trainer.step), DTYPE)
        self.saved = self.trainer.step

    def _written(self) -> bool:
        """Whether the file is there as it was last trained: a program may end between its two files."""
        if not self.path.exists():
            return False
        metadata = read_cse(self.path)[1]
        return metadata is not None and metadata.steps == self.trainer.step

    def validate(self) -> None:
        t = self.trainer
        loss = validation_loss(t.base, t.controlnet, t.operator, self.looked_at, t.settings)
        self.validations.append([t.step, loss])

    def sheet(self) -> Image.Image:
        """What the CSE makes of the validation pictures now."""
        t = self.trainer
        return sheet(t.base, t.controlnet, t.operator, self.looked_at, t.settings.hint_range)

    def train(self, save_every: int, on_step: Callable[[int], None] | None = None) -> None:
        """To the last step of the settings. Stopped by an exception, it saves first, unless the exception is about the weights or the disk."""
        t = self.trainer
        if t.step >= t.settings.steps and not self._written():
            self.save()
        try:
            for _ in t.run():
                if t.step % save_every == 0 or t.step == t.settings.steps:
                    self.validate()
                    self.save()
                if on_step:
                    on_step(t.step)
        except Diverged as error:
            kept = f"The weights of step {self.saved} are in {self.path}" if self.saved else "Nothing was saved"
            raise Diverged(f"{error}. {kept}") from error
        except SaveError:
            raise
        except BaseException:  # the user's cancel, out of memory, the end of the program
            if t.step > self.saved:
                self.save()
            raise


def identity(settings: Any, operator: Any, base: str, prediction: str, conditioning: str, pictures: list[str]) -> dict[str, Any]:
    """What a training is: two with the same identity and seed make the same weights. `base` and `conditioning` are fingerprints or texts."""
    described = {"operator": operator.spec(), "base": base, "prediction": prediction, "conditioning": conditioning, "pictures": pictures}
    return settings.identity() | described
