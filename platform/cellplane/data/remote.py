"""Folders of shards behind an fsspec URL (s3://, gs://, file://): copied there after conversion, mirrored here before training.

An object store has no renaming, so the manifest is the marker: files first, manifest last. A folder that was copied in part
has no manifest, or still its old one, and both describe only what arrived. Training maps files, so a URL is mirrored in
CELLPLANE_HOME/cache/shards, where every byte is checked against the manifest before it is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from cellplane.config import home
from cellplane.data.files import file_sha256, storage_errors, sync_folder
from cellplane.data.manifest import MANIFEST, Manifest, read_manifest
from cellplane.errors import CellplaneError, ConfigError, DataError, IntegrityError, StorageError

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

WAITS_S = (0.5, 2.0, 8.0)  # between the tries of one operation: a store that is busy, a connection that was cut
LOCK = ".lock"  # the one that a conversion takes too
OURS = re.compile(r".+-[0-9a-f]{12}\.(arrow|parquet|txt)")  # what may be removed; the rest of the place is not our business


def is_url(text: str) -> bool:
    """Whether a place is an fsspec URL and not a path."""
    return "://" in text


def shard_folder(text: str) -> Path:
    """Where the shards of a path or URL lie on this machine; asks nobody."""
    if not is_url(text):
        return Path(text)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text.rstrip("/").rsplit("/", 1)[-1])[:40]
    return home() / "cache" / "shards" / f"{name}-{hashlib.sha256(text.rstrip('/').encode()).hexdigest()[:12]}"


def fetch_shards(text: str) -> Path:
    """`shard_folder`, after a URL's mirror was brought up to date; a path is only handed back.

    What is here and intact is not fetched again. A store that is away costs a warning when an earlier fetch was complete.
    Raises DataError when no finished folder is there, IntegrityError when its bytes are not the promised ones, StorageError
    when the store keeps refusing, ConfigError for a URL of an unknown kind.
    """
    folder = shard_folder(text)
    if is_url(text):
        with _locked(folder):
            _mirror(_Store(text), folder)
    return folder


def shards_here(text: str) -> Path:
    """`shard_folder`, fetched only where this machine has none yet: for workers, whose driver has just looked."""
    folder = shard_folder(text)
    return folder if (folder / MANIFEST).is_file() else fetch_shards(text)


def send_shards(folder: Path, url: str) -> int:
    """Copies a finished folder to a URL, its manifest last; the number of files that were not there yet.

    Broken off at any moment it leaves the place as readers knew it, and goes on from there when it is called again. Raises
    StorageError when the store keeps refusing, DataError when the folder is not finished.
    """
    store, manifest = _Store(url), read_manifest(folder)
    sizes, sent = store.sizes(), 0
    for name in files_of(manifest):
        if sizes.get(name) != (folder / name).stat().st_size:  # a name carries a checksum of what it was made from
            store.put(folder / name)
            sent += 1
    store.check(folder, files_of(manifest))
    store.put(folder / MANIFEST)
    for name in sorted(set(sizes) - set(files_of(manifest))):
        if OURS.fullmatch(name):
            store.remove(name)
    log.info("shards of %s are at %s: %d files sent, %d were there", folder, url, sent, len(files_of(manifest)) - sent)
    return sent


def files_of(manifest: Manifest) -> dict[str, str]:
    """sha256 of every file that the manifest vouches for."""
    tables = {name: sha256 for dataset in manifest.datasets for name, sha256 in dataset.tables().items()}
    return {manifest.vocabulary_file: manifest.vocabulary_sha256, **{entry.name: entry.sha256 for entry in manifest.shards}, **tables}


def patiently(doing: str, work: Callable[[], Answer], waits_s: Sequence[float] | None = None) -> Answer:
    """What ``work`` gives, tried again after each wait; a store has exceptions of its own, so any counts as a refusal.

    Raises StorageError in the end, and at once those of ours that say more.
    """
    waits_s = WAITS_S if waits_s is None else waits_s
    for wait_s in waits_s:
        try:
            return work()
        except CellplaneError:
            raise
        except Exception as error:  # tried again, and raised below in the end
            log.warning("could not %s, trying again in %g s: %s", doing, wait_s, error)
            time.sleep(wait_s)
    try:
        return work()
    except CellplaneError:
        raise
    except Exception as error:
        raise StorageError(
            f"could not {doing} ({len(waits_s) + 1} tries): {error}; what is complete on this machine stays. Mend the access and run again"
        ) from error


def open_store(url: str, setting: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the place in it; ConfigError, naming the ``setting``, for a URL of an unknown kind."""
    try:
        system, place = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{setting} {url}: {error}; install the package of that protocol, or name a folder") from error
    return system, str(place).rstrip("/")


class _Store:
    """The files directly below a URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, self._root = open_store(self.url, "shards")

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name; empty when there is nothing."""
        return patiently(f"list {self.url}", self._sizes)

    def _sizes(self) -> dict[str, int]:
        self._system.invalidate_cache()
        try:
            listed: list[dict[str, Any]] = self._system.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {str(item["name"]).rsplit("/", 1)[-1]: int(item["size"]) for item in listed if item["type"] == "file"}

    def manifest(self) -> bytes:
        """The marker's bytes; DataError when there is none."""

        def read() -> bytes:
            self._system.invalidate_cache()
            try:
                return bytes(self._system.cat_file(f"{self._root}/{MANIFEST}"))
            except FileNotFoundError:
                raise DataError(
                    f"{self.url} holds no {MANIFEST}: it is no shard folder, or was not copied to its end; convert again"
                ) from None

        return patiently(f"read the manifest of {self.url}", read)

    def put(self, path: Path) -> None:
        """Copies a file; what was there under its name is replaced."""

        def put() -> None:
            self._system.makedirs(self._root, exist_ok=True)
            self._system.put_file(str(path), f"{self._root}/{path.name}")

        patiently(f"copy {path} to {self.url}", put)

    def check(self, folder: Path, names: Mapping[str, str]) -> None:
        """StorageError unless every file arrived at its full size."""
        sizes = self.sizes()
        if wrong := [name for name in names if sizes.get(name) != (folder / name).stat().st_size]:
            raise StorageError(f"{self.url}/{wrong[0]} is not whole after it was sent ({len(wrong)} such files); run the conversion again")

    def remove(self, name: str) -> None:
        """Removes a file."""
        patiently(f"remove {name} from {self.url}", lambda: self._system.rm_file(f"{self._root}/{name}"))

    def get(self, name: str, folder: Path, sha256: str) -> Path:
        """A verified copy in ``folder``; IntegrityError when the store's own copy is damaged or missing."""
        target = folder / name

        def get() -> str:
            try:
                self._system.get_file(f"{self._root}/{name}", str(target))
            except FileNotFoundError:
                raise IntegrityError(f"{self.url}/{name} is missing though its manifest names it; convert again") from None
            return file_sha256(target)

        found = patiently(f"fetch {self.url}/{name}", get)
        if found != sha256:
            raise IntegrityError(f"{self.url}/{name} has sha256 {found}, expected {sha256}; remove it there and convert again")
        return target


def _mirror(store: _Store, folder: Path) -> None:
    """Fetches what the mirror lacks, the manifest last."""
    try:
        described = store.manifest()
    except StorageError as error:
        if not (folder / MANIFEST).is_file():
            raise
        log.warning("going on with the shards fetched before: %s", error)
        return
    with storage_errors(folder), tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as name:
        incoming = Path(name)
        (incoming / MANIFEST).write_bytes(described)
        files = files_of(_checked(incoming, store.url))
        for file, sha256 in files.items():
            if not _is_intact(folder / file, sha256):
                store.get(file, incoming, sha256).replace(folder / file)
        sync_folder(folder)
        (incoming / MANIFEST).replace(folder / MANIFEST)
        for path in folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in files:
                path.unlink()


def _checked(incoming: Path, url: str) -> Manifest:
    """The manifest, if its names stay inside the folder."""
    try:
        manifest = read_manifest(incoming)
    except DataError as error:
        raise type(error)(str(error).replace(str(incoming), url)) from None
    if outside := [name for name in files_of(manifest) if Path(name).name != name or not OURS.fullmatch(name)]:
        raise IntegrityError(f"the manifest of {url} names a file {outside[0]!r}, which no conversion writes; convert again")
    return manifest


def _is_intact(path: Path, sha256: str) -> bool:
    from cellplane.data.loader import verify_once  # and with it torch, which a conversion does not need

    def check() -> None:
        if not path.is_file() or file_sha256(path) != sha256:
            raise IntegrityError(f"{path} is damaged")

    try:
        verify_once(path, check, sha256)
    except DataError:
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One fetch at a time; the others wait, and then find everything here."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
