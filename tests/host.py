"""A real ComfyUI for the demo and the tests: start it, talk to it, stop it.

    with Host() as host:
        entry = host.run(prompt)
        paths = host.images(entry)

Run as a program it leaves a server with this pack running: `python tests/host.py [--port 8188]`. COMFYUI_PATH names the ComfyUI tree
(otherwise the one that `make setup` made) and COMFYUI_PYTHON the interpreter that runs it. The tree is only read: all that the server
writes goes to a base directory of its own.
"""

import argparse
import asyncio
import contextlib
import importlib.machinery
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACK = "ComfyUI-DMAP"
PRIOR = "dmap-demo-prior.safetensors"
FLOW_PRIOR = "dmap-demo-flow-prior.safetensors"
START_SECONDS = 180

_keep: list[Any] = []  # a torch.library.Library takes its operators with it when it is collected


class HostError(RuntimeError):
    """The server is missing, did not start, or died."""


class PromptFailed(RuntimeError):  # noqa: N818 (it is the prompt that fails, and the name says so)
    """ComfyUI refused a prompt, or running it failed."""


def comfyui_path() -> Path:
    """The ComfyUI tree to use."""
    tree = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI").absolute()
    if not (tree / "main.py").is_file():
        raise HostError(f"There is no ComfyUI in {tree}. Run `make setup`, or set COMFYUI_PATH to a ComfyUI folder.")
    return tree


def comfyui_python() -> str:
    """The interpreter that runs the server: COMFYUI_PYTHON, the venv of the user's own tree, or this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        named = os.environ["COMFYUI_PYTHON"]
        return os.path.abspath(shutil.which(named) or named)
    if os.environ.get("COMFYUI_PATH"):
        for name in ("venv", ".venv"):
            python = comfyui_path() / name / "bin" / "python"
            if python.exists():
                return str(python)
    return sys.executable


def import_torchvision() -> bool:
    """Import torchvision, whatever that takes. True if nothing special was needed.

    Its compiled part does not load beside a CPU build of torch, and then its import stops at the first operator it cannot find. ComfyUI
    only needs the module, so the two operators in question are declared without code.
    """
    import torch

    try:
        import torchvision
    except ModuleNotFoundError:
        return True  # not ours to repair: ComfyUI says what is missing
    except (RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)
        import torchvision  # noqa: F401

        return False
    return True


class _NoAudio(types.ModuleType):
    """A module with nothing in it that says why."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name} is not there: this Python has no torchaudio that works with its torch.")


def import_torchaudio() -> bool:
    """Import torchaudio, or put an empty module in its place. True if nothing special was needed.

    The package registry has no build of it that loads beside a CPU build of torch, and ComfyUI from 0.20 on does not start without the
    module. What works with sound then fails when it is used, and nothing else needs it.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        empty_torchaudio()
        return False
    return True


def empty_torchaudio() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]
    top = _NoAudio("torchaudio")
    parts = {part: _NoAudio(f"torchaudio.{part}") for part in ("functional", "transforms")}
    vars(top).update(parts, __path__=[])
    for module in (top, *parts.values()):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def import_comfy() -> None:
    """Make ComfyUI's modules importable in this process, on the CPU if there is no CUDA device."""
    tree = str(comfyui_path())
    if tree not in sys.path:
        sys.path.insert(0, tree)
    import torch

    import_torchvision()
    import_torchaudio()
    from comfy.cli_args import args

    if not torch.cuda.is_available():
        args.cpu = True


class Host:
    """A ComfyUI server with this pack in it, for the time of a `with` block.

    base: folder for everything the server reads and writes (models/, input/, output/, user/, temp/, custom_nodes/). Without it, a
    temporary one that is removed at the end.
    """

    def __init__(self, *extra_args: str, base: Path | None = None, port: int | None = None) -> None:
        self._extra_args = extra_args
        self._temporary = base is None
        self.client_id = uuid.uuid4().hex
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.base = Path(tempfile.mkdtemp(prefix="dmap-comfyui-")) if base is None else base.absolute()
        self.input = self.base / "input"
        self.output = self.base / "output"
        self.log = self.base / "comfyui.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Host":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server with all its children."""
        if self.process:
            for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
            self.process.stdin.close()
            self.process = None
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def _start(self) -> None:
        tree = comfyui_path()
        for name in ("custom_nodes", "models/checkpoints", "input", "output", "user", "temp"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        _link(self.base / "custom_nodes" / PACK, ROOT)
        for name in (PRIOR, FLOW_PRIOR):
            if (ROOT / "models" / "checkpoints" / name).exists():
                _link(self.base / "models" / "checkpoints" / name, ROOT / "models" / "checkpoints" / name)

        arguments = ["--base-directory", self.base, "--listen", "127.0.0.1", "--port", self.port, "--disable-auto-launch"]
        known = (tree / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        optional = {
            "--preview-method": ["latent2rgb"],
            "--database-url": [f"sqlite:///{self.base / 'user' / 'comfyui.db'}"],  # its default lies in the tree
            "--disable-api-nodes": [],  # nothing here needs a paid service or the internet
        }
        for option, values in optional.items():
            if f'"{option}"' in known:
                arguments += [option, *values]
        command = [comfyui_python(), __file__, "--serve", tree, *arguments, *self._extra_args]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if os.environ.get("COMFYUI_PATH"):  # nothing is written to the user's own tree
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.base,
                env=environment,
                stdin=subprocess.PIPE,  # the server ends when this pipe does, however this process dies
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            self._check_alive()
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer within {START_SECONDS} s.\n{self.tail()}")
            time.sleep(0.2)

    def _check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            raise HostError(f"ComfyUI is not running any more.\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The end of the server's log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def post(self, path: str, body: Any) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        # A proxy from the environment would be asked for 127.0.0.1, too.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def object_info(self) -> dict[str, Any]:
        """Every node the server knows, by id."""
        return self.get("/object_info")

    def upload(self, path: Path | str) -> str:
        """Put a picture where LoadImage finds it; returns the name to give to LoadImage."""
        return Path(shutil.copy(path, self.input)).name

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def queue(self, prompt: dict[str, Any], client_id: str | None = None, extra_data: dict[str, Any] | None = None) -> str:
        """Queue a prompt in API format."""
        body = {"prompt": prompt, "client_id": client_id or self.client_id, "extra_data": extra_data or {}}
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            raise PromptFailed(_refusal(error.read())) from None
        if answer.get("node_errors"):  # ComfyUI leaves out the outputs that it refuses and runs the others
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptFailed(_refusal(json.dumps(answer).encode()))
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """Wait for a prompt's end; returns its history entry."""
        deadline = time.monotonic() + timeout
        while True:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                break
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id} did not end within {timeout} s\n{self.tail()}")
            time.sleep(0.1)
        status = entry.get("status") or {}
        for event, data in status.get("messages", []):
            if event == "execution_error":
                where = f"node {data['node_id']} ({data['node_type']})"
                message = f"{data['exception_type']}: {data['exception_message'].strip()}"
                raise PromptFailed("\n".join([f"{where}: {message}", *data.get("traceback", [])]))
            if event == "execution_interrupted":
                raise PromptFailed(f"interrupted at node {data.get('node_id')} ({data.get('node_type')})")
        if status.get("status_str") != "success":
            raise PromptFailed(f"prompt {prompt_id} ended as {status}")
        return entry

    def run(self, prompt: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        return self.wait(self.queue(prompt), timeout)

    def images(self, entry: dict[str, Any], node_id: str | None = None) -> list[Path]:
        """The picture files of a history entry, of all nodes or of one."""
        outputs = entry["outputs"]
        nodes = list(outputs) if node_id is None else [str(node_id)]
        files = [file for node in nodes for file in outputs.get(node, {}).get("images", [])]
        return [self.base / file["type"] / file.get("subfolder", "") / file["filename"] for file in files]

    @contextlib.contextmanager
    def listen(self, client_id: str | None = None) -> Iterator[list[Any]]:
        """A list that fills with the server's messages: decoded JSON, and ("binary", bytes) for previews."""
        messages: list[Any] = []
        connected = threading.Event()
        failure: list[BaseException] = []
        loop = asyncio.new_event_loop()
        address = f"{self.url}/ws?clientId={client_id or self.client_id}"
        task = loop.create_task(_receive(address, messages, connected))

        def work() -> None:
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                failure.append(error)
            finally:
                connected.set()
                loop.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            connected.wait(60)
            if failure:
                raise HostError("cannot listen to ComfyUI's messages") from failure[0]
            yield messages
            time.sleep(0.2)  # a prompt's history is there before its last messages are
        finally:
            with contextlib.suppress(RuntimeError):  # closed already if the server went away
                loop.call_soon_threadsafe(task.cancel)
            thread.join(10)


async def _receive(address: str, messages: list[Any], connected: threading.Event) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
        async for message in socket_:
            if message.type is aiohttp.WSMsgType.TEXT:
                messages.append(json.loads(message.data))
            elif message.type is aiohttp.WSMsgType.BINARY:
                messages.append(("binary", message.data))
            connected.set()  # the server greets: from here on nothing is missed


def _refusal(answer: bytes) -> str:
    """What /prompt has to say about a prompt it does not like, in lines."""
    try:
        content = json.loads(answer)
    except ValueError:
        return answer.decode(errors="replace")
    error = content.get("error") or {}
    if isinstance(error, str):
        error = {"message": error}
    lines = [f"{error.get('message', 'ComfyUI refuses a part of this prompt')} {error.get('details', '')}".strip()]
    for node_id, node in (content.get("node_errors") or {}).items():
        for problem in node.get("errors", []):
            lines.append(f"node {node_id} ({node.get('class_type')}): {problem.get('message')}: {problem.get('details')}")
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _end_with_parent() -> None:
    def watch() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def serve(tree: str, arguments: list[str]) -> None:
    """Become ComfyUI: its main.py in this process, after what this machine's torch needs."""
    # This file's folder has names in it that ComfyUI uses too (server, nodes).
    here = Path(__file__).resolve().parent
    sys.path[:] = [tree, *(entry for entry in sys.path if entry and Path(entry).resolve() not in (here, ROOT))]
    again = os.environ.pop("DMAP_HOST_PLAIN", None)
    if again == "silent":
        empty_torchaudio()
    elif not again:
        import torch

        plain = import_torchvision()
        audible = import_torchaudio()
        if torch.cuda.is_available():
            if plain:  # ComfyUI sets up CUDA's allocator before it imports torch: start over in a fresh process
                environment = {**os.environ, "DMAP_HOST_PLAIN": "audible" if audible else "silent"}
                os.execve(sys.executable, [sys.executable, __file__, "--serve", tree, *arguments], environment)
        elif "--cpu" not in arguments:
            arguments = [*arguments, "--cpu"]
    _end_with_parent()
    main = os.path.join(tree, "main.py")
    sys.argv = [main, *arguments]
    runpy.run_path(main, run_name="__main__")


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="Leave a ComfyUI with this pack running.")
    parser.add_argument("--port", type=int, help="default: a free one")
    arguments, extra = parser.parse_known_args()
    print("Starting ComfyUI ...", flush=True)
    with Host(*extra, base=ROOT / ".host" / "serve", port=arguments.port) as host:
        print(f"ComfyUI with {PACK} runs at {host.url}\nIts files are in {host.base}\nCtrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            host.process.wait()
            print(f"ComfyUI ended.\n{host.tail()}")


if __name__ == "__main__":
    main()
