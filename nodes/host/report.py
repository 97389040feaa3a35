"""What one sampling run cost and reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...dmap_core.consistency import MISFIT, verdict

STUCK = 0.9  # of the first residual: above it, it has not fallen
REPORT = "dmap_report"  # attribute of the latents of a run, which outlive its guider in ComfyUI's cache


@dataclass
class Report:
    """What one sampling run cost and reached.

    seconds_per_step: without the first one, which also loads. residuals[step][sample]; levels: the same in grey levels
    (RMS), empty where they have none. peak_memory: bytes on the GPU, None where there is none. flop, counted_memory: operations and bytes that were counted before the run, None for
    networks that were not counted. mismatch[sample], mismatch_worst[sample]: what f of the
    finished picture and the measurement differ by, in grey levels (0..255), as a root mean square and at most; empty where they cannot be compared.
    noise: of the measurement, in grey levels, where it is known.
    """

    solver: str
    operator: str
    memory: str = ""
    seconds: float = 0.0
    seconds_per_step: float | None = None
    denoiser_calls: int = 0
    decoder_calls: int = 0
    guidance_calls: int = 0
    peak_memory: int | None = None
    flop: float | None = None
    counted_memory: float | None = None
    residuals: list[list[float]] = field(default_factory=list)
    levels: list[list[float]] = field(default_factory=list)
    mismatch: list[float] = field(default_factory=list)
    mismatch_worst: list[float] = field(default_factory=list)
    noise: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def misfits(self, noise: float = 0.0) -> list[str]:
        """Warnings about a result that does not reproduce its measurement. noise: its known standard deviation, in grey levels."""
        found = []
        if self.residuals and any(last > first for first, last in zip(self.residuals[0], self.residuals[-1], strict=True)):
            first, last = max(zip(self.residuals[0], self.residuals[-1], strict=True), key=lambda pair: pair[1] - pair[0])
            found.append(
                f"the residual rose from {first:.4g} to {last:.4g}, so the result moved away from the measurement; take step auto, or lower zeta"
            )
        elif self.missed(noise) and any(last > STUCK * first for first, last in zip(self.residuals[0], self.residuals[-1], strict=True)):
            found.append("the residual hardly fell, so the measurement was not followed; take step auto, raise zeta, or check the operator")
        if self.missed(noise):
            found.append(
                f"the result misses the measurement by {max(self.mismatch):.0f} of 255 grey levels, so it shows something else; "
                "check the operator, then take more steps or step auto"
            )
        return found

    def missed(self, noise: float) -> bool:
        return any(levels > MISFIT + noise for levels in self.mismatch)

    def text(self) -> str:
        last = ", ".join(f"{r:.4g}" for r in self.residuals[-1]) if self.residuals else "none"
        peak = f" with a peak of {self.peak_memory / 2**30:.1f} GiB" if self.peak_memory else ""
        counted = f", counted {self.flop / 1e12:.3g} TFLOP and {self.counted_memory / 2**30:.1f} GiB" if self.flop else ""
        pace = f" ({self.seconds_per_step:.2f} s a step)" if self.seconds_per_step else ""
        return (
            f"{self.solver} on {self.operator}: {len(self.residuals)} steps, {self.denoiser_calls} denoiser calls, {self.decoder_calls} decoder calls, "
            + f"{self.guidance_calls} guidance decoder calls, " * bool(self.guidance_calls)
            + f"{self.seconds:.1f} s{pace}, memory plan {self.memory}{peak}{counted}, final residual ||f(x) - y|| = {last}"
            + (
                f", mismatch {_listed(self.mismatch)} of 255 grey levels (RMS), {_listed(self.mismatch_worst)} at worst"
                f": {verdict(max(self.mismatch), self.noise)}"
                if self.mismatch
                else ""
            )
            + "".join(f". Warning: {warning}" for warning in self.warnings)
        )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def report_of(samples: Tensor) -> Report | None:
    """The report of the run that made these latents, if they are as it returned them."""
    return getattr(samples, REPORT, None)
