"""Where a training runs: in this process alone, with nothing but torch, or in the processes that accelerate started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import training_files
from .settings import TrainingSettings

PRECISION_OF_ACCELERATE = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # no process has all the weights that are saved


class Alone:
    """This process. What stops a training is an exception, such as the cancel of a host.

    rank, processes: of this process, and how many there are.
    """

    rank, processes = 0, 1

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network whose parts of a step are computed, for the one whose weights are trained."""
        return network

    def average(self, network: nn.Module) -> nn.Module:
        """An average of the weights, ready to be called."""
        return network

    def part(self, network: nn.Module, last: bool) -> AbstractContextManager:
        """The context of a part of a step; gradients of the processes meet in the last one."""
        return nullcontext()

    def mean(self, loss: Tensor) -> float:
        """Of the losses of all processes."""
        return float(loss)

    def stops(self) -> bool:
        """Whether one of the processes is to stop; the same in all of them."""
        return False

    def files(self, path: Path) -> AbstractContextManager:
        """Nobody else writes to the files of the training in this context. Raises files.Busy."""
        return training_files(path)

    def interrupts(self) -> AbstractContextManager:
        """Ctrl-C is answered at the end of a step in this context, if this is a program's main thread."""
        return nullcontext()


class Accelerated:
    """The processes of `accelerate launch`, which share every step; one, without it. Raises ValueError for what they cannot do.

    logs: folder for TensorBoard.
    """

    def __init__(self, settings: TrainingSettings, logs: Path):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import ProjectConfiguration

        self.accelerator = Accelerator(
            mixed_precision=PRECISION_OF_ACCELERATE[settings.precision],
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.rank, self.processes, self.device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        self.stopping = False
        if self.accelerator.distributed_type.value in SHARDED:
            raise ValueError(
                f"accelerate is set to {self.accelerator.distributed_type.value}, which divides the weights; training shares out the pictures "
                "only. Choose several GPUs without it in `accelerate config`"
            )
        if settings.batch_size % (settings.accumulation * self.processes):
            raise ValueError(
                f"batch_size is {settings.batch_size}; it must be divisible by accumulation times the number of processes, "
                f"{settings.accumulation} x {self.processes}"
            )
        if settings.precision == "fp16" and self.device.type == "cpu":
            raise ValueError("precision is 'fp16', which needs a GPU; on the CPU choose bf16 or fp32")

    def prepare(self, network: nn.Module) -> nn.Module:
        return self.accelerator.prepare_model(network)

    def average(self, network: nn.Module) -> nn.Module:
        return self.accelerator.prepare_model(network, evaluation_mode=True)

    def part(self, network: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accelerator.no_sync(network)

    def mean(self, loss: Tensor) -> float:
        return float(self._gathered(loss.view(1)).mean())

    def stops(self) -> bool:
        return bool(self._gathered(torch.tensor([self.stopping], device=self.device)).any())

    def _gathered(self, values: Tensor) -> Tensor:
        found: Any = self.accelerator.gather(values)  # of a tensor a tensor
        return found

    @contextmanager
    def files(self, path: Path) -> Iterator[None]:
        from accelerate.utils import broadcast_object_list

        with ExitStack() as stack:
            refused: list[str | None] = [None]
            if self.rank == 0:
                try:
                    stack.enter_context(training_files(path))
                except (ValueError, OSError) as error:
                    refused = [str(error)]
            if broadcast_object_list(refused)[0]:
                raise ValueError(refused[0])
            yield

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            self.stopping = True  # at the end of the step: in the middle of one there is nothing that could be saved

        default = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, default)
