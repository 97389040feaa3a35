"""How long a run still takes, from its own steps, and saying it: in the console and on the node."""

from __future__ import annotations

import logging
import time

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

log = logging.getLogger(__name__)
TIMED = 2  # steps before anything is said


class Clock:
    """Of a run of so many steps. The first one also loads, compiles and finds the memory's strategy: it counts as long as there is no better."""

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0
        self._first = time.perf_counter()

    def step(self, mismatch: float | None = None) -> None:
        """One more step is done: said on the node, and once in the console. mismatch: of the worst sample, in grey levels of 255."""
        self.done += 1
        if self.done == 1:
            self._first = time.perf_counter()
        left = self.left()
        told = "" if left is None else f", about {in_words(left)} left"
        missed = "" if mismatch is None else f", mismatch {mismatch:.1f} of 255 grey levels"
        say(f"step {self.done} of {self.steps}{told}{missed}")
        if self.done == TIMED and self.done < self.steps:
            log.info("DPSGuider: %d steps of %.1f s%s", self.steps, self.seconds_per_step(), told)

    def seconds_per_step(self) -> float | None:
        """None before there are two timed steps."""
        if self.done < TIMED:
            return None
        return (time.perf_counter() - self._first) / (self.done - 1)

    def left(self) -> float | None:
        """Seconds until the last step is done, about."""
        seconds = self.seconds_per_step()
        return None if seconds is None else seconds * (self.steps - self.done)


def in_words(seconds: float) -> str:
    """A duration as people say it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Shows a line on the node that is running; without a server, as in a program, nowhere."""
    context = get_executing_context()
    if context is not None:
        import server  # which imports nodes

        node = get_progress_state().dynprompt.get_display_node_id(context.node_id)  # one that was expanded shows what its parts say
        server.PromptServer.instance.send_progress_text(text, node)
