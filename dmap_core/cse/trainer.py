"""One process's training of a CSE, with nothing but torch: what a host runs in its graph. `train` does the same with accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ..errors import Diverged
from ..operators import Operator
from .data import Examples, collate
from .loss import Base, batch_loss
from .settings import TrainingSettings

READERS = 4  # threads that open and augment the pictures of the parts to come


class Trainer:
    """Adam on a ControlNet's weights (float32). Step n sees examples n * batch_size and on, whatever happened before.

    base: computes in the precision of the settings. losses: the mean loss of every step so far.
    """

    def __init__(self, base: Base, controlnet: nn.Module, operator: Operator, examples: Examples, settings: TrainingSettings):
        self.base, self.controlnet, self.operator, self.examples, self.settings = base, controlnet, operator, examples, settings
        self.weights = list(controlnet.parameters())
        self.device = self.weights[0].device
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.learning_rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.step, self.losses = 0, []

    def state(self) -> dict[str, Any]:
        """All that `resume` needs, in tensors, numbers and lists."""
        state = {"weights": self.controlnet.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return state | {"step": self.step, "losses": self.losses}

    def resume(self, state: dict[str, Any]) -> None:
        self.controlnet.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate  # a training may go on with another
        self.scaler.load_state_dict(state["scaler"] or {})
        self.step, self.losses = state["step"], list(state["losses"])

    def parts(self) -> Iterator[dict]:
        """The batches to come, each in `accumulation` parts. Pictures are read ahead by one part."""
        size = self.settings.batch_size // self.settings.accumulation
        starts = range(self.step * self.settings.batch_size, self.settings.steps * self.settings.batch_size, size)
        with ThreadPoolExecutor(READERS) as pool:
            ahead = [pool.submit(self.examples.__getitem__, k) for k in range(starts.start, min(starts.start + size, starts.stop))]
            for start in starts:
                now, following = ahead, range(start + size, min(start + 2 * size, starts.stop))
                ahead = [pool.submit(self.examples.__getitem__, k) for k in following]
                batch = collate([future.result() for future in now])
                yield {key: value.to(self.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def run(self) -> Iterator[float]:
        """Trains to the last step; yields the loss after every step. Raises Diverged for a loss or gradient that is not finite.

        No weight is then touched any more: what is saved between two steps is finite.
        """
        parts, split = self.parts(), self.settings.accumulation
        while self.step < self.settings.steps:
            total = 0.0
            for _ in range(split):
                with torch.enable_grad():
                    loss = batch_loss(self.base, self.controlnet, self.operator, next(parts), self.settings) / split
                    self.scaler.scale(loss).backward()
                total += float(loss.detach())
            self._check(total)
            self.scaler.unscale_(self.optimizer)
            norm = float(nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm))
            if not self.scaler.is_enabled():  # which lowers its scale and leaves the step out instead
                self._check(norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.losses.append(total)
            yield total

    def _check(self, value: float) -> None:
        if value - value != 0:
            raise Diverged(
                f"the loss or its gradient is {value} at step {self.step + 1}: learning_rate {self.settings.learning_rate:g} is too high, "
                f"or precision {self.settings.precision} too low"
            )
