"""Which files a person meant: folders, globs and URLs as a list of h5ad files and zarr folders, and what identifies each.

A URL is fetched into the cache of CELLPLANE_HOME through fsspec, once for each version of it: reading HDF5 over a network
would fetch most of the file in small pieces.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import fsspec

from cellplane.config import home
from cellplane.data.files import HASH_CHUNK_BYTES, storage_errors
from cellplane.data.guard import is_zarr
from cellplane.errors import CellplaneError, ConfigError, DataError

SOURCE_DIGITS = 16  # of a source's checksum that a model keeps, to tell whether it has seen a file
WHOLE_BYTES = 256 * 1024**2  # a smaller source is hashed byte by byte
END_BYTES, SAMPLES, SAMPLE_BYTES = 4 * 1024**2, 256, 64 * 1024  # of a larger one: both ends, where HDF5 keeps its tables, and samples
GLOB_CHARACTERS = "*?["


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files and zarr folders meant by paths, folders, globs and URLs, each once, sorted within what names several.

    One that is reached in two ways (a link, a relative path) is one: its cells would count double. Raises DataError for
    a text that means nothing.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        for path in _meant(text):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def check_answers(inputs: Sequence[Path], out: Path) -> None:
    """ConfigError when answers named as their inputs would overwrite one another or an input, DataError for an input that is not there."""
    if len({path.name for path in inputs}) != len(inputs):
        raise ConfigError("two inputs have the same file name, their answers would overwrite each other: rename one")
    for path in inputs:
        if path.is_dir():
            raise DataError(f"{path} is a folder; answers go into copies of h5ad files: name those, or write the zarr as h5ad first")
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.resolve().parent == out.resolve():
            raise ConfigError(f"the answer for {path} would overwrite it: choose another folder for out")


def _meant(text: str) -> list[Path]:
    if "://" in text:
        return _fetch(text)
    path = Path(text)
    if path.is_dir() and not is_zarr(path):
        shown = [child for child in path.iterdir() if not child.name.startswith(".")]  # "._cells.h5ad" is not what it seems
        files = sorted(child for child in shown if child.suffix == ".h5ad" or (child.is_dir() and is_zarr(child)))
        if not files:
            raise DataError(f"{path} is a folder without .h5ad files or zarr folders; name the files, or another folder")
        return files
    if not path.exists() and any(character in text for character in GLOB_CHARACTERS):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise DataError(f"nothing matches {text!r}; quote globs, or name the files")
        return [Path(match) for match in matches]
    return [path]


def _fetch(url: str) -> list[Path]:
    """Local copies of what a URL (or a glob of one) names."""
    try:
        system, place = fsspec.core.url_to_fs(url)
        several = not url.startswith("http") and any(character in place for character in GLOB_CHARACTERS)  # "?" begins a query there
        places = sorted(system.glob(place)) if several else [place]
        if not places:
            raise FileNotFoundError
        return [_copy(system, str(one)) for one in places]
    except FileNotFoundError:
        raise DataError(f"{url}: no such file; check the address") from None
    except CellplaneError:
        raise
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be read: {error}; install the package of that protocol, or copy the file here") from error
    except Exception as error:  # every store has errors of its own: no credentials, no route, no permission
        raise DataError(
            f"{url} cannot be read: {type(error).__name__}: {error}; check address and access, or copy the file here"
        ) from error


def _copy(system: fsspec.AbstractFileSystem, place: str) -> Path:
    version = hashlib.sha256(json.dumps([system.protocol, place, _state(system, place)], sort_keys=True).encode()).hexdigest()[:16]
    target = home() / "cache" / "inputs" / version / place.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    if not target.exists():
        fetched = target.parent.with_name(f".{version}.{os.getpid()}.tmp")  # somebody else may fetch it too
        with storage_errors(target):
            shutil.rmtree(fetched, ignore_errors=True)
            fetched.mkdir(parents=True)
            system.get(place, str(fetched / target.name), recursive=system.isdir(place))
            with suppress(OSError):  # the other one was first: the same version, so the same bytes
                fetched.rename(target.parent)
            shutil.rmtree(fetched, ignore_errors=True)
    return target


def _state(system: fsspec.AbstractFileSystem, place: str) -> dict[str, dict[str, str]]:
    """What tells a version of a remote file from another; of a folder, that of every file in it."""
    found = system.find(place, detail=True) if system.isdir(place) else {place: system.info(place)}
    telling = ("size", "etag", "mtime", "created", "last_modified")
    return {name: {key: str(value) for key, value in info.items() if key.lower() in telling} for name, info in found.items()}


def source_sha256(path: Path, full: bool) -> str:
    """What identifies a source: sha256 over its files' names, sizes and bytes, sampled above 256 MiB unless ``full``."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    whole = full or sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    for file in files:
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.relative_to(path)}\n{size}\n".encode())
        for chunk in _chunks(file, size, whole):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path, size: int, whole: bool) -> Iterator[bytes]:
    with path.open("rb") as file:
        if whole or size <= 2 * END_BYTES + SAMPLES * SAMPLE_BYTES:
            while chunk := file.read(HASH_CHUNK_BYTES):
                yield chunk
            return
        spread = (END_BYTES + (size - 2 * END_BYTES) * number // SAMPLES for number in range(SAMPLES))
        for at, length in ((0, END_BYTES), *((at, SAMPLE_BYTES) for at in spread), (size - END_BYTES, END_BYTES)):
            file.seek(at)
            yield file.read(length)
