"""The server starts, with this pack in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from host import PACK, ROOT, Host, PromptFailed

PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "host"}},
}


def test_version(host: Host):
    assert re.match(r"\d+\.\d+", host.get("/system_stats")["system"]["comfyui_version"])


def test_pack_is_imported(host: Host):
    failures = [line for line in host.log.read_text().splitlines() if PACK in line and ("IMPORT FAILED" in line or "Cannot import" in line)]
    assert not failures, host.log.read_text()
    assert [node_id for node_id in host.object_info() if node_id.startswith("DMAP_")]


def test_torchaudio_may_be_missing():
    """ComfyUI's imports of it work, in the ways it writes them; what would need it says so."""
    code = """
import importlib.util, host
host.empty_torchaudio()
import torchaudio
import torchaudio.functional as functional
assert importlib.util.find_spec("torchaudio") is not None and torchaudio.functional is functional
try:
    from torchaudio.transforms import MelScale
except ImportError:
    torchaudio.functional.resample
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert "AttributeError: torchaudio.functional.resample is not there: this Python has no torchaudio" in answer.stderr


def test_prompt_makes_pictures(host: Host):
    with host.listen() as messages:
        entry = host.run(PICTURE)
    paths = host.images(entry, "2")
    assert len(paths) == 2
    assert all(path.is_file() and path.is_relative_to(host.output) for path in paths)
    assert "execution_success" in [message["type"] for message in messages if isinstance(message, dict)]


def test_refused_prompt_says_why(host: Host):
    with pytest.raises(PromptFailed, match=r"node 2 \(SaveImage\).*images"):
        host.queue({"2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "host"}}})


def test_failing_prompt_says_where(host: Host):
    broken = host.input / "broken.png"
    broken.write_bytes(b"this is no picture")
    prompt = {"1": {"class_type": "LoadImage", "inputs": {"image": broken.name}}, "2": PICTURE["2"]}
    with pytest.raises(PromptFailed, match=r"node 1 \(LoadImage\): .*UnidentifiedImageError"):
        host.run(prompt)


def test_links_in_its_folders_are_not_followed_for_a_list(host: Host):
    """People link their disks there. To list what lies behind such links had no end, and nothing else was answered meanwhile."""
    links = {host.input / "link": "/", host.output / "a": ".", host.output / "b": "."}
    for link, target in links.items():
        link.symlink_to(target)
    try:
        assert host.object_info()["DMAP_TrainCSE"]["input"]["required"]["folder"][0] == "STRING"
    finally:
        for link in links:
            link.unlink()


def test_tree_is_not_written_to(host: Host, comfyui_tree: Path):
    started = host.log.parent.joinpath("custom_nodes").stat().st_mtime
    assert not [path for path in comfyui_tree.rglob("*") if path.lstat().st_mtime > started]
