"""Processes of the command line that start at once: forks of one that has imported torch, diffusers and accelerate and computed nothing yet.

    with Forks() as forks:
        process = forks.start(["evaluate", "--config", file], log, RANK="0")
        process.wait()

A fork is a process of its own in every respect that matters to a test: memory, files, session, signals, exit status.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

COMMAND_LINE = "import sys; from dmap_core.cli import main; main(sys.argv[1:])"


class Fork:
    """The part of subprocess.Popen that the tests need."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.returncode, self._status = pid, None, folder / str(pid)

    def poll(self) -> int | None:
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        return self.returncode


class Forks:
    """What the processes come from, for the time of a `with` block."""

    def __enter__(self) -> "Forks":
        self._folder = Path(tempfile.mkdtemp(prefix="dmap-forks-"))
        command = [sys.executable, __file__, str(self._folder)]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, argv: list, log: Path, code: str = COMMAND_LINE, errors: Path | None = None, **environment: str) -> Fork:
        """A process that runs the code with these arguments, in the log's folder; what it prints goes to the log, or errors to another."""
        wanted = {"argv": [str(part) for part in argv], "logs": [str(log), str(errors or log)], "code": code}
        wanted["environment"] = {**os.environ, **environment}
        self._parent.stdin.write(json.dumps(wanted) + "\n")
        self._parent.stdin.flush()
        return Fork(int(self._parent.stdout.readline()), self._folder)


def become(wanted: dict) -> int:
    """Here, in a fork, run the code; returns its exit status."""
    os.setsid()
    os.chdir(Path(wanted["logs"][0]).parent)
    writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), *((log, writing) for log in wanted["logs"])]):
        file = os.open(path, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv[1:] = wanted["argv"]
    try:
        exec(compile(wanted["code"], "<fork>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> None:
    """As the interpreter ends, but that it does not take its modules apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    from host import import_torchvision

    import_torchvision()
    import accelerate  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchmetrics  # noqa: F401
    import transformers  # noqa: F401
    import yaml  # noqa: F401

    import dmap_core.backends.diffusers_files
    import dmap_core.cli
    import dmap_core.cse.train
    import dmap_core.evaluate.report
    import dmap_core.evaluate.run  # noqa: F401

    gc.freeze()  # a collection would touch, and so copy, every page that forks share
    folder, children, rest = Path(sys.argv[1]), 0, b""
    while True:
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children -= 1
            part = folder / f"{pid}.part"
            part.write_text(str(os.waitstatus_to_exitcode(status)))
            part.rename(folder / str(pid))
        if not select.select([0], [], [], 0.005 if children else None)[0]:
            continue
        read = os.read(0, 1 << 20)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            pid = os.fork()
            if not pid:
                return end(become(json.loads(line)))
            children += 1
            os.write(1, b"%d\n" % pid)


if __name__ == "__main__":
    main()
