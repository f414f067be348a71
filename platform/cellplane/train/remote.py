"""A copy of a run's checkpoints behind an fsspec URL: s3://, gs://, file://, memory://.

An object store has no renaming, so the manifest is the marker: files first, manifest last, and the other way round when one
is removed. A half-uploaded checkpoint therefore has no manifest and is not seen. Nothing is believed that was not fetched and
verified; nothing local goes because a copy failed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellplane.artifact.folder import MANIFEST
from cellplane.data.remote import WAITS_S, open_store, patiently
from cellplane.data.shards import fault
from cellplane.train.retention import Entry, entry_of, step_of

log = logging.getLogger(__name__)


class RemoteFolder:
    """Checkpoints under a URL. Every method raises StorageError when the store still refuses after a few tries."""

    def __init__(self, url: str, waits_s: Sequence[float] = WAITS_S) -> None:
        self.url, self._waits_s = url, waits_s
        self._system, self._root = open_store(url, "checkpoint.folder")

    def entries(self) -> list[Entry]:
        """What is there, oldest first; only one whose manifest arrived unharmed, and all files with it, is whole."""
        found = patiently(f"list {self.url}", self._entries, self._waits_s)
        return sorted(found, key=lambda entry: entry.step)

    def put(self, path: Path) -> None:
        """Copies a complete checkpoint folder, its manifest last."""
        began = time.perf_counter()
        patiently(f"copy {path} to {self.url}", lambda: self._put(path), self._waits_s)
        log.info("checkpoint %s is copied to %s, %.1f s", path.name, self.url, time.perf_counter() - began)

    @contextmanager
    def fetched(self, name: str, beside: Path) -> Iterator[Path]:
        """A local copy of a checkpoint while the block lasts, not verified yet; ``beside`` is a folder with room for it."""
        holder = Path(tempfile.mkdtemp(prefix=f".{name}.fetched.", dir=beside))
        try:
            local = holder / name
            patiently(f"fetch {name} from {self.url}", lambda: self._fetch(name, local), self._waits_s)
            yield local
        finally:
            shutil.rmtree(holder, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes a checkpoint, its manifest first."""
        patiently(f"remove {name} from {self.url}", lambda: self._remove(name), self._waits_s)

    def _entries(self) -> list[Entry]:
        self._system.invalidate_cache()
        try:
            listed = self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = sorted({str(place).rstrip("/").rsplit("/", 1)[-1] for place in listed})
        return [self._entry(name) for name in names if step_of(name) is not None]

    def _entry(self, name: str) -> Entry:
        sizes = self._sizes(name)
        manifest = self._system.cat_file(f"{self._root}/{name}/{MANIFEST}") if MANIFEST in sizes else b""
        return entry_of(name, manifest, sizes)

    def _sizes(self, name: str) -> dict[str, int]:
        place = f"{self._root}/{name}"
        found: dict[str, dict[str, Any]] = self._system.find(place, detail=True)
        return {path.removeprefix("/").removeprefix(f"{place.removeprefix('/')}/"): int(info["size"]) for path, info in found.items()}

    def _put(self, path: Path) -> None:
        self._remove(path.name)
        files = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: (file.name == MANIFEST, file))
        for file in files:
            fault("in_upload")
            target = f"{self._root}/{path.name}/{file.relative_to(path).as_posix()}"
            self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._system.put_file(str(file), target)
        self._system.invalidate_cache()
        if not self._entry(path.name).whole:
            raise OSError("what arrived is not what was sent")

    def _fetch(self, name: str, local: Path) -> None:
        shutil.rmtree(local, ignore_errors=True)
        for file in self._sizes(name):
            target = local / file
            if not target.resolve().is_relative_to(local.resolve()):
                raise OSError(f"the store names a file {file!r}, which lies outside of the checkpoint")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._system.get_file(f"{self._root}/{name}/{file}", str(target))

    def _remove(self, name: str) -> None:
        place = f"{self._root}/{name}"
        self._system.invalidate_cache()
        if self._system.exists(f"{place}/{MANIFEST}"):
            self._system.rm_file(f"{place}/{MANIFEST}")
        fault("in_remote_removal")
        if self._system.exists(place):
            self._system.rm(place, recursive=True)
