"""What a CSE is trained with. The defaults are the paper's (B.2), which followed diffusers' example of training a ControlNet."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

HINT_RANGES = ("0..1", "-1..1")
FREE = ("steps", "accumulation", "learning_rate")  # a training that diverged can go on with a lower rate
MOST = {"steps": 1_000_000, "batch_size": 65_536, "size": 16_384}  # what cannot have been meant; a machine's limits come earlier
PRECISIONS = ("fp32", "bf16", "fp16")
PREDICTIONS = ("eps", "v", "flow")  # what a base model predicts
PREDICTION_OPTIONS = ("auto", *PREDICTIONS)  # what may be asked for


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training.

    steps: optimiser steps. batch_size: pictures of one step, in all processes together. accumulation: parts that a step's batch is computed
    in, one after the other, to need less memory; the result is the same. learning_rate: of Adam, constant. precision: of the networks'
    arithmetic; weights are kept in float32. size: height and width of the crops in pixels. resize: range of the crop's random scale
    (1: the picture's shorter side fills it). flip: probability. jitter: strength of the change of colours, 0 to 0.5. hint_range: values that
    the hint has. max_grad_norm: gradients are scaled down to it. snr_gamma: of min-SNR weights,
    0 for none (the paper); see loss.denoising_loss. ema: decay of an exponential moving average of the weights, which is what is written;
    0 for none. adam_8bit: Adam's moments in 8 bits. Raises ValueError, naming the setting, for values that make no sense.
    """

    steps: int = 5000
    batch_size: int = 64
    accumulation: int = 1
    learning_rate: float = 5e-6
    precision: str = "fp32"
    seed: int = 0
    size: int = 512
    resize: tuple[float, float] = (0.8, 2.0)
    flip: float = 0.5
    jitter: float = 0.1
    hint_range: str = "0..1"
    max_grad_norm: float = 1.0
    snr_gamma: float = 0.0
    ema: float = 0.0
    adam_8bit: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is too large; it must be at most {most}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^64 - 1")
        for name in ("learning_rate", "flip", "jitter", "max_grad_norm", "snr_gamma", "ema"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be a number")
        if self.size % 8:
            raise ValueError(f"size is {self.size}; it must be a multiple of 8, the autoencoder's factor")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation is {self.accumulation}; it must divide batch_size, which is {self.batch_size}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must lie between 0 and 1 (paper: 5e-6)")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r}; it must be above 0")
        if not 0 <= self.snr_gamma < float("inf"):
            raise ValueError(f"snr_gamma is {self.snr_gamma!r}; it must be at least 0, which is none (usual: 5)")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema!r}; it must be at least 0, which is none, and below 1 (usual: 0.999)")
        if not isinstance(self.adam_8bit, bool):
            raise ValueError(f"adam_8bit is {self.adam_8bit!r}; it must be true or false")
        try:
            object.__setattr__(self, "resize", tuple(float(s) for s in self.resize))
        except (TypeError, ValueError):
            object.__setattr__(self, "resize", (self.resize,))  # refused below
        if len(self.resize) != 2 or not 0.1 <= self.resize[0] <= self.resize[1] <= 10:
            raise ValueError(f"resize is {self.resize!r}; it must be two rising numbers from 0.1 to 10 (paper: 0.8 and 2.0)")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip!r}; it must be a probability, 0 to 1")
        if not 0 <= self.jitter <= 0.5:
            raise ValueError(f"jitter is {self.jitter!r}; it must be a number from 0 to 0.5")
        if self.hint_range not in HINT_RANGES:
            raise ValueError(f"hint_range is {self.hint_range!r}; it must be one of {', '.join(HINT_RANGES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")

    def identity(self) -> dict[str, Any]:
        """What must be equal for a training to go on from a saved state: all but how far and how fast it goes, and how a step is split."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]
