"""Files that are whole, names that are safe, and locks that end with their process."""

import errno
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dmap_core import files
from dmap_core.files import NAME_BYTES, Busy, check_name, file_name, locked, slug, write_whole

ROOT = Path(__file__).resolve().parents[2]


def process(code, *argv):
    """A Python process of its own, in which `files` is imported."""
    code = f"import sys, os, time\nfrom pathlib import Path\nfrom dmap_core import files\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


# ---- whole files

SAVES = """
for i in range(100):
    files.write_whole(Path(sys.argv[1]), lambda part: part.write_bytes(sys.argv[2].encode() * 50_000))
"""


def test_two_processes_that_write_one_file(tmp_path):
    """None of their saves fails, and whoever reads the file finds all of one of them."""
    path = tmp_path / "cse.safetensors"
    both = [process(SAVES, path, letter) for letter in "ab"]
    seen = set()
    while any(p.poll() is None for p in both):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 50_000 and len(set(content)) == 1
            seen.add(content[:1])
    assert [p.wait() for p in both] == [0, 0] and seen
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_whole(path, lambda part: part.write_text("first"))

    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def fail(part, error=error):
            part.write_text("half")
            raise error

        with pytest.raises(type(error)):
            write_whole(path, fail)
        assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


# ---- names


def test_slugs_of_plain_names_are_what_they_were():
    """Results folders of earlier versions are named so."""
    for text, wanted in (
        ("sr8 DPS", "sr8-dps"),
        ("sr8 dps (1)", "sr8-dps-1"),
        ("sr8 zeta 3.5", "sr8-zeta-3-5"),
        ("Blur  DMAP full ", "blur-dmap-full"),
    ):
        assert slug(text) == wanted
    for name in ("sr8", "SR8", "motion blur", "sr_8.v2", "x"):
        assert file_name(name) == name


ODD = [
    *("", " ", "...", "..", "../../home/photos/cat", "/etc/x", "a/b", "a\\b", "C:\\x", "plots", "run.json", "a\0b", "a\nb", "-"),
    *("\u8d85\u5206\u8fa8\u7387", "\u53bb\u6a21\u7cca", "Gr\u00f6\u00dfe 8", "\u212a8", "\ud800", "\U0001f600", "x" * 300, "\u00e4" * 300),
    *("cafe\u0301", "caf\u00e9", ".", "a.", "a "),
]


def test_slugs_of_any_text(tmp_path):
    for make in (slug, file_name):
        made = [make(text) for text in ODD]
        for name in made:
            assert name and name.strip(". ") == name and not {*name} & {*'/\\:*?"<>|\0\n'} and len(name.encode()) <= NAME_BYTES
            (tmp_path / f"{name}.png").touch()
            assert (tmp_path / name / "x").resolve().is_relative_to(tmp_path.resolve())
        special = [text for text in ODD if not text.isascii() or not text.strip(" .-/\\")]
        assert len({make(text) for text in special}) == len(special)
    assert len({file_name(text) for text in ODD}) == len(ODD)
    assert slug("plots") != "plots"  # a folder that is there already


def test_names_that_no_file_can_have():
    check_name("\u00e4" * 100, "out")
    with pytest.raises(ValueError, match=r"out: the name x{40}\.\.\. is 201 bytes long; 200 are the most"):
        check_name("x" * 201, "out")
    with pytest.raises(ValueError, match="is 202 bytes long"):
        check_name("\u00e4" * 101, "out")
    with pytest.raises(ValueError, match=r"out: the name a\\udcff is not UTF-8"):
        check_name("a\udcff", "out")


# ---- locks

HOLDS = """
with files.locked(Path(sys.argv[1]), "CSE"):
    print("held", flush=True)
    time.sleep(300)
"""


def test_only_one_at_a_time(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    for _ in range(2):
        with locked(path, "CSE"):
            with (
                pytest.raises(Busy, match=rf"CSE: .*a\.safetensors is being written by another training \(process {os.getpid()}\)"),
                locked(path, "CSE"),
            ):
                pass
            with locked(tmp_path / "new" / "b.safetensors", "CSE"):
                pass
        assert list(path.parent.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "a.safetensors"
    other = process(HOLDS, path)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=rf"process {other.pid}\); wait for it, stop it, or choose another name"), locked(path, "CSE"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(path, "CSE"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening and locking the file, the one before is done and removes it."""
    path, file = tmp_path / "a", tmp_path / "a.lock"
    real, calls = files._try_lock, []

    def try_lock(descriptor):
        if not calls:
            file.unlink()
        calls.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(files, "_try_lock", try_lock)
    with locked(path, "CSE"):
        assert len(calls) == 2 and file.exists()
        monkeypatch.undo()
        with pytest.raises(Busy), locked(path, "CSE"):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_try_lock", fail)
    with locked(tmp_path / "a", "CSE"):
        assert "cannot be locked on this file system" in caplog.text


def test_on_windows(tmp_path, monkeypatch):
    """There a byte is locked that nobody needs to read, and a file is removed when it is closed."""

    def locking(descriptor, mode, count):
        assert (mode, count) == (2, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) == files.LOCKED_BYTE
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    spec = importlib.util.spec_from_file_location("files_on_windows", files.__file__)
    there = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "platform", "win32")
    spec.loader.exec_module(there)
    with there.locked(tmp_path / "a", "CSE"), pytest.raises(there.Busy, match="is being written"), there.locked(tmp_path / "a", "CSE"):
        pass
    assert list(tmp_path.iterdir()) == []
