"""A training with its files: goes on where it was cut, saves every so many steps, and keeps what was trained if it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import Diverged
from .checkpoint import STATE_SUFFIX, SaveError, check_same, read_state, write_cse, write_state
from .metadata import CSEMetadata
from .trainer import Trainer
from .validation import sheet, validation_loss


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
        if self.state_path.exists():
            state = read_state(self.state_path)
            check_same(state["identity"], identity, self.state_path)
            trainer.resume(state)
            self.validations = state["validations"]
        elif path.exists():
            raise ValueError(f"{path} exists, and there is no {self.state_path.name} beside it to go on from; choose another name")
        self.saved = trainer.step

    def save(self) -> None:
        """State first: were there only the other file, a crash between the two would leave nothing to go on from."""
        write_state(self.state_path, self.trainer.state() | {"identity": self.identity, "validations": self.validations})
        write_cse(self.path, self.trainer.controlnet.state_dict(), replace(self.metadata, steps=self.trainer.step))
        self.saved = self.trainer.step

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
