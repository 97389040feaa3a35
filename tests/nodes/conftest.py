"""The tests of this folder run inside ComfyUI, in a process of their own.

The pack's folder `nodes` hides ComfyUI's module `nodes` wherever the repository is on sys.path, as it is here. So this process only
collects the tests. It hands each of them to worker.py, which runs it where ComfyUI's modules are, and shows the report that comes back.
The test modules are therefore imported without ComfyUI: whatever needs it, they get from the fixture `lab` or import in their functions.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
IN_WORKER = "DMAP_TESTS_WORKER"  # set in the worker's environment, where tests run as they always do
_workers = []


class Worker:
    """The process that has ComfyUI, started for the first test and ended with the session."""

    def __init__(self, config):
        from host import HostError, comfyui_path, comfyui_python

        missing = None
        try:
            comfyui_path()
        except HostError as error:
            missing = error
        if missing:  # not in the handler: pytest would show the first error, too
            pytest.fail(f"{missing} `make test` installs all that the tests need.", pytrace=False)
        self.log = tempfile.NamedTemporaryFile(prefix="dmap-nodes-", suffix=".log")  # noqa: SIM115 (closed in end)
        environment = {
            "OMP_NUM_THREADS": "1",  # the pictures are tiny: more threads only wait for each other
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",  # ComfyUI's tree is only read
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            IN_WORKER: "1",
        }
        environment.pop("PYTEST_ADDOPTS", None)
        self.process = subprocess.Popen(
            [comfyui_python(), FOLDER / "worker.py", str(config.rootpath), sysconfig.get_paths()["purelib"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
        )

    def run(self, nodeid, next_nodeid):
        """The reports of a test: of its setup, its call and its teardown."""
        try:
            self.process.stdin.write(json.dumps([nodeid, next_nodeid]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will be missing, too
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            pytest.fail(f"The process with ComfyUI ended (exit code {code}).\n{self.tail()}", pytrace=False)
        return json.loads(answer)

    def tail(self, lines=60):
        return "\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-lines:])

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def _run(item, nextitem):
    if not _workers:
        _workers.append(Worker(item.config))
    # Session fixtures of the worker live until a test without successor in this folder.
    follows = nextitem is not None and FOLDER in nextitem.path.parents
    return _workers[0].run(item.nodeid, nextitem.nodeid if follows else None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    # pytest asks for the tests of other folders, too
    if IN_WORKER in os.environ or FOLDER not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    call = pytest.CallInfo.from_call(lambda: _run(item, nextitem), "call", reraise=(pytest.exit.Exception, KeyboardInterrupt))
    if call.excinfo:
        reports = [item.ihook.pytest_runtest_makereport(item=item, call=call)]
    else:
        reports = [item.config.hook.pytest_report_from_serializable(config=item.config, data=data) for data in call.result]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_unconfigure():
    while _workers:
        _workers.pop().end()


@pytest.fixture(scope="session")
def lab():
    """The module lab: ComfyUI, the pack, and a small problem to solve with them. Only in the worker."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    import lab

    return lab
