"""Files that are whole or not there, names that are safe, and a lock on what only one process may write. Needs nothing but Python."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

NAME_BYTES = 200  # of a file's name: file systems take 255, and endings and a process id come behind it
SLUG_LETTERS = 40  # of a slug that is not the whole text; three bytes each at most, in the scripts that people write names in
DIGEST = 8  # hexadecimal digits behind it
TAKEN = ("plots",)  # folders that a results folder has beside those of its rows
PLAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 _.-]*[A-Za-z0-9_-])?")
LOCK_SUFFIX = ".lock"
LOCKED_BYTE = 1 << 30  # behind all contents: Windows lets nobody read a byte that is locked
UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under a name of this call first, on the disk, then put it in place of the old one.

    What `write` raises goes on, and what it began is removed.
    """
    # machines that share a disk may have processes of one number
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # as where the folder could not be made
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """A text file (UTF-8), whole or not at all."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def check_name(name: str, what: str) -> None:
    """Raises ValueError for a file's name that is too long to be written, or no text that a file could hold."""
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: the name {name.encode('utf-8', 'backslashreplace').decode()} is not UTF-8; choose another") from error
    if size > NAME_BYTES:
        raise ValueError(
            f"{what}: the name {name[:SLUG_LETTERS]}... is {size} bytes long; {NAME_BYTES} are the most, so choose a shorter one"
        )


def _hashed(text: str) -> str:
    letters = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text).lower())[:SLUG_LETTERS].strip("-")
    return "-".join(part for part in (letters, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]) if part)


def slug(text: str) -> str:
    """A folder's name for a text, never empty: a-z, 0-9 and hyphens where the text is ASCII; else its letters, and a hash that tells texts apart."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain if text.isascii() and plain and len(plain) <= NAME_BYTES and plain not in TAKEN else _hashed(text)


def file_name(text: str) -> str:
    """A part of a file's name for a text, never empty: the text itself where every file system takes it, else its letters and a hash."""
    return text if len(text) <= NAME_BYTES // 2 and PLAIN.fullmatch(text) else _hashed(text)


class Busy(ValueError):
    """Another process is at work on the file."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Only one process (and only one caller in it) is in this context for a path. The lock is a file beside it, and ends with its process.

    what: says in messages what the path is. Raises Busy if somebody else is there. Where the file system knows no locks it is logged.
    """
    file = path.with_name(path.name + LOCK_SUFFIX)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(file, path, what)
    try:
        yield
    finally:
        _unlock(descriptor, file)


def _lock(file: Path, path: Path, what: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _try_lock(descriptor)
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                owner = os.pread(descriptor, 20, 0) if hasattr(os, "pread") else os.read(descriptor, 20)
                os.close(descriptor)
                by = f" (process {owner.decode('ascii', 'replace').strip()})" if owner.strip() else ""
                raise Busy(
                    f"{what}: {path} is being written by another training{by}; wait for it, stop it, or choose another name"
                ) from error
            log.warning("%s cannot be locked on this file system: see that no second training writes to it", path)
        try:
            # the one before removes the file when it is done, and might have done so between the two calls above
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode("ascii"))
    return descriptor


def _unlock(descriptor: int, file: Path) -> None:
    if sys.platform == "win32":  # which removes no open file
        os.close(descriptor)
        with contextlib.suppress(OSError):  # somebody else has it by now
            file.unlink()
    else:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _try_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
