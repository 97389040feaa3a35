"""The training of a CSE: the weights, the optimiser, and the steps. Where it runs is the strategy's, its files are the session's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..backends.keys import original_names
from ..errors import Diverged
from ..memory import checkpointed
from ..operators import Operator
from ..prior import NetworkPrior
from .data import Examples, collate
from .loss import batch_loss
from .settings import TrainingSettings
from .strategy import Accelerated, Alone

READERS = 4  # threads that open and augment the pictures of the parts to come
AVERAGED = "module."  # before the names of an average's weights


def adam(settings: TrainingSettings) -> Callable[..., torch.optim.Optimizer]:
    """Raises ValueError where the kind with 8 bits is not installed."""
    if not settings.adam_8bit:
        return torch.optim.Adam
    try:
        from bitsandbytes.optim import Adam8bit  # pyright: ignore[reportMissingImports] (no package that is always there)
    except ModuleNotFoundError:
        raise ValueError("adam_8bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes") from None
    return Adam8bit


class Trainer:
    """Adam on a ControlNet's weights (float32). Step n sees examples n * batch_size and on, whatever happened before.

    prior: computes in the precision of the settings. recompute: blocks keep only their inputs and recompute the rest in the backward pass.
    losses: the mean loss of every step so far. stopped: whether somebody asked for an end after the last step.
    """

    def __init__(
        self,
        prior: NetworkPrior,
        controlnet: nn.Module,
        operator: Operator,
        examples: Examples,
        settings: TrainingSettings,
        recompute: bool = False,
        strategy: Alone | Accelerated | None = None,
        readers: int = READERS,
    ):
        self.prior, self.controlnet, self.operator, self.examples, self.settings = prior, controlnet, operator, examples, settings
        self.strategy, self.recompute, self.readers = strategy or Alone(), recompute, readers
        self.weights = list(controlnet.parameters())
        self.device = self.weights[0].device
        self.average: Any = AveragedModel(controlnet, multi_avg_fn=get_ema_multi_avg_fn(settings.ema)) if settings.ema else None
        self.optimizer = adam(settings)(self.weights, lr=settings.learning_rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.step, self.losses, self.stopped = 0, [], False
        self._original = original_names(controlnet.state_dict())
        self._prepared = self.strategy.prepare(controlnet)
        if self.average:
            self.average = self.strategy.average(self.average)

    @property
    def result(self) -> nn.Module:
        """The network to look at and to write: the average of the weights, if there is one."""
        return self.average or self.controlnet

    def result_weights(self) -> dict[str, Tensor]:
        """Its weights under the original names."""
        return self._named((self.average.module if self.average else self.controlnet).state_dict())

    def state(self) -> dict[str, Any]:
        """All that `resume` needs, in tensors, numbers and lists, under the original names: other networks of the same kind can go on from it."""
        moments = self.optimizer.state_dict()["state"]
        names = [self._original[name] for name, _ in self.controlnet.named_parameters()]
        state = {"weights": self._named(self.controlnet.state_dict()), "optimizer": {names[i]: moments[i] for i in moments}}
        state |= {"average": None, "scaler": self.scaler.state_dict() or None, "step": self.step, "losses": self.losses}
        if self.average:
            average = {name.removeprefix(AVERAGED): tensor for name, tensor in self.average.state_dict().items()}
            state["average"] = {"n_averaged": average.pop("n_averaged"), "weights": self._named(average)}
        return state

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave, with the learning rate of the settings."""
        self.controlnet.load_state_dict(self._own(state["weights"]))
        names = [self._original[name] for name, _ in self.controlnet.named_parameters()]
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {i: state["optimizer"][name] for i, name in enumerate(names)} if state["step"] else {}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.average:
            weights = {AVERAGED + name: tensor for name, tensor in self._own(state["average"]["weights"]).items()}
            self.average.load_state_dict(weights | {"n_averaged": state["average"]["n_averaged"]})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.losses = state["step"], list(state["losses"])

    def _named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._original[name]: tensor for name, tensor in weights.items()}

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {original: name for name, original in self._original.items()}
        return {own.get(name, name): tensor for name, tensor in weights.items()}  # the network names those that it does not have

    def parts(self) -> Iterator[dict]:
        """This process's share of the batches to come, each in `accumulation` parts. Pictures are read ahead by one part."""
        s, strategy = self.settings, self.strategy
        size = s.batch_size // (s.accumulation * strategy.processes)
        starts = range(self.step * s.batch_size + strategy.rank * size, s.steps * s.batch_size, size * strategy.processes)
        with ThreadPoolExecutor(max(1, self.readers)) as pool:
            following: list = []
            for i, start in enumerate(starts):
                now = following if i else [pool.submit(self.examples.__getitem__, k) for k in range(start, start + size)]
                ahead = starts[i + 1] if i + 1 < len(starts) else None
                following = [] if ahead is None else [pool.submit(self.examples.__getitem__, k) for k in range(ahead, ahead + size)]
                batch = collate([future.result() for future in now])
                yield {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def run(self) -> Iterator[float]:
        """Trains to the last step, or to the one after which `stopped` is set; yields the loss after every step.

        Raises Diverged for a loss or gradient that is not finite. No weight is then touched any more: what is saved between two steps is finite.
        """
        parts, split = self.parts(), self.settings.accumulation
        while self.step < self.settings.steps and not self.stopped:
            total = 0.0
            for part in range(split):
                with self.strategy.part(self._prepared, last=part == split - 1), torch.enable_grad(), self._economy():
                    loss = batch_loss(self.prior, self._prepared, self.operator, next(parts), self.settings) / split
                    self.scaler.scale(loss).backward()
                total += self.strategy.mean(loss.detach())
            self._check(total)
            self.scaler.unscale_(self.optimizer)
            norm = float(nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm))
            if not self.scaler.is_enabled():  # which lowers its scale and leaves the step out instead
                self._check(norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average:
                self.average.update_parameters(self.controlnet)
            self.step, self.stopped = self.step + 1, self.strategy.stops()
            self.losses.append(total)
            yield total

    def _economy(self) -> AbstractContextManager:
        return checkpointed(self.prior.controlled(self.controlnet, None).blocks()) if self.recompute else nullcontext()

    def _check(self, value: float) -> None:
        if value - value != 0:
            raise Diverged(
                f"the loss or its gradient is {value} at step {self.step + 1}: learning_rate {self.settings.learning_rate:g} is too high, "
                f"or precision {self.settings.precision} too low"
            )
