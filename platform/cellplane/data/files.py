"""Writing files so that a reader never sees half of one, and ending a process on purpose to prove it.

Whatever a disk says when it is full or closed to us becomes one StorageError with the free space in it. `fault` names
the points at which the tests kill a writer: wherever it dies, what is visible must be whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pyarrow as pa

from cellplane.errors import ConfigError, DataError, StorageError

NO_SPACE = (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT
NO_PERMISSION = (13, 30, 1)  # EACCES, EROFS, EPERM
HASH_CHUNK_BYTES = 1024 * 1024
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt
HEAP_BYTES, KEPT_BYTES = 32 * 1024**2, 128 * 1024**2  # 32 MiB is the largest block glibc takes from its heap


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; synced and renamed when the block ends well, removed when it does not.

    A full disk or a missing permission becomes StorageError, whatever the writing library made of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            fault("before_rename")
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def gone_if_empty(folder: Path) -> Iterator[None]:
    """The folder and those above it go again when the block made them and left them empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for path in made:
                if path.exists():
                    path.rmdir()


@contextmanager
def leaves_nothing(folder: Path, began: Callable[[], bool]) -> Iterator[None]:
    """A folder that the block made goes again, whatever is in it, when inputs or settings are refused before the work ``began``."""
    made = not folder.exists()
    with gone_if_empty(folder):
        try:
            yield
        except (ConfigError, DataError):
            if made and folder.exists() and not began():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def fault(point: str) -> None:
    """Kill this process at a named point when FAULT_AT=point:n (or point:n:flag_file) asks for it, to test recovery.

    n counts the visits of the point in this process from 0; with a flag file it happens once for all processes.
    FAULT_SIGNAL=SIGSTOP stops it there instead.
    """
    asked, _, rest = os.environ.get("FAULT_AT", "").partition(":")
    if asked != point:
        return
    number, _, flag = rest.partition(":")
    _visits[point] = _visits.get(point, -1) + 1
    if _visits[point] != int(number or 0) or (flag and Path(flag).exists()):
        return
    if flag:
        Path(flag).touch()
    os.kill(os.getpid(), signal.Signals[os.environ.get("FAULT_SIGNAL", "SIGKILL")])


_visits: dict[str, int] = {}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what libraries say about a full disk or a missing permission into StorageError with the free space."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError, pa.ArrowInvalid) as error:
        number, text = getattr(error, "errno", None), str(error)
        if number in NO_SPACE or any(hint in text for hint in ("No space left", "File too large", "Disk quota")):
            raise StorageError(f"no room to write {path}: {free_bytes(path)} bytes free; free some or choose another folder") from error
        if number in NO_PERMISSION:
            raise StorageError(f"{path} may not be written: {os.strerror(int(number or 0))}; choose another folder") from error
        raise


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds ``path`` (or will)."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    stat = os.statvfs(existing)
    return int(stat.f_bavail * stat.f_frsize)


@cache
def keep_memory() -> None:
    """Let this process use freed memory again instead of giving it back: fresh pages cost more than most work on them."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, HEAP_BYTES)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
