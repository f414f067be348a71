"""Looking at a file before believing it: refuse what is not a whole, self-contained AnnData, without reading its data.

An HDF5 file can point at other files and declare matrices far larger than itself; a folder may be anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import zarr

from cellplane.errors import CellplaneError, DataError, FileFormatError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
OTHER_SIGNATURES = {b"PK\x03\x04": "a zip archive", b"\x89PNG": "a PNG image", b"\x1f\x8b": "gzip data", b"ARROW1": "an Arrow file"}
BOMB_BYTES, BOMB_RATIO = 64 * 1024**2, 1100  # deflate cannot shrink by more than 1032
HOLLOW_RATIO = 100_000  # zarr leaves out chunks of zeros, and zstd makes little of them
ZARR_MARKS = (".zgroup", "zarr.json")


def is_zarr(path: Path) -> bool:
    """Whether this is a zarr folder (format 2 or 3)."""
    return any((path / mark).is_file() for mark in ZARR_MARKS)


def check_source(path: Path) -> None:
    """Refuse what is neither a whole h5ad nor an AnnData zarr folder. Raises DataError or FileFormatError."""
    if not is_zarr(path):
        check_h5ad(path)
        return
    with readable(path):
        group = zarr.open_group(str(path), mode="r")
        found = sorted(group.keys())
        if not {"obs", "var"} <= set(found):
            raise FileFormatError(f"{path} is zarr but not AnnData: it holds {found[:8]}, expected obs and var")
        for link in path.rglob("*"):
            if link.is_symlink():
                raise FileFormatError(f"{path}: {link.name} is a symbolic link, which may point anywhere; expected a self-contained folder")
        for name, node in group.members(max_depth=None):
            if isinstance(node, zarr.Array) and node.nbytes > BOMB_BYTES:
                _refuse_hollow(path, name, int(node.nbytes))


def _refuse_hollow(path: Path, name: str, declared: int) -> None:
    stored = 1
    for file in (path / name).rglob("*"):
        stored += file.stat().st_size
        if declared <= HOLLOW_RATIO * stored:
            return
    raise FileFormatError(f"{path}: {name} declares {declared} bytes but stores {stored}; refused, it would fill the memory")


@contextmanager
def quiet() -> Iterator[None]:
    """Old files are welcome: anndata's notes about their age are not for our users."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What libraries say about a file they cannot read becomes one FileFormatError with its path and size."""
    try:
        yield
    except (CellplaneError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        way_out = "; it is cut short: copy or download it again" if "truncated" in reason else ""
        found = f"{path} ({_size(path)} bytes) cannot be read as AnnData"
        raise FileFormatError(f"{found}: {type(error).__name__}: {reason}{way_out}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # absent, or in a folder that may not be entered
        return 0


def check_h5ad(path: Path) -> None:
    """Refuse what is not a whole, self-contained h5ad, without reading any data (see `read_h5ad` for the errors)."""
    with readable(path):  # a folder on the way may be closed to us
        exists, is_folder = path.exists(), path.is_dir()
    if not exists:
        raise DataError(f"{path}: no such file")
    if is_folder:
        raise FileFormatError(f"{path} is a folder{' (zarr)' if is_zarr(path) else ''}; expected an .h5ad file")
    with readable(path):
        if not h5py.is_hdf5(path):
            raise FileFormatError(f"{path} ({_size(path)} bytes) is not an HDF5 file but {_detected(path)}; expected an .h5ad file")
        with h5py.File(path, "r") as file:
            _refuse_unsafe(path, file)
            if not {"obs", "var"} <= set(file):
                raise FileFormatError(
                    f"{path} ({_size(path)} bytes) is HDF5 but not AnnData: it holds {sorted(file)[:8]}, expected obs and var "
                    f"(encoding-type {file.attrs.get('encoding-type', 'missing')!r})"
                )


def refuse_if_none_opens(paths: Sequence[Path]) -> None:
    """DataError with the reason for each when none of these is an h5ad; one that is will do: the rest is said of the others later."""
    reasons: list[str] = []
    for path in paths:
        try:
            check_h5ad(path)
        except DataError as error:
            reasons.append(str(error))
        else:
            return
    if reasons:
        raise DataError(none_usable(reasons))


def none_usable(reasons: Sequence[str]) -> str:
    """The message about files of which none can be used, one reason each."""
    return reasons[0] if len(reasons) == 1 else f"none of the {len(reasons)} files can be used: {'; '.join(reasons)}"


def _detected(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "empty"
    if head.startswith(HDF5_SIGNATURE):
        return "a damaged HDF5 file"
    for signature, name in OTHER_SIGNATURES.items():
        if head.startswith(signature):
            return name
    return "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "unknown data"


def _refuse_unsafe(path: Path, file: h5py.File) -> None:
    todo, seen = [("", file["/"])], set()
    while todo:
        prefix, group = todo.pop()
        for name in group:
            place = f"{prefix}/{name}"
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                found = f"{place} is a {type(link).__name__}, which may point anywhere"
                raise FileFormatError(f"{path}: {found}; expected a self-contained file")
            node = group[name]
            address = h5py.h5o.get_info(node.id).addr
            if isinstance(node, h5py.Dataset):
                _refuse_dataset(path, place, node)
            elif address not in seen:
                todo.append((place, node))
            seen.add(address)


def _refuse_dataset(path: Path, place: str, node: h5py.Dataset) -> None:
    if node.external or node.is_virtual:
        raise FileFormatError(f"{path}: the data of {place} lie in other files; expected a self-contained file")
    declared, stored = int(node.size or 0) * node.dtype.itemsize, node.id.get_storage_size()
    if declared > BOMB_BYTES and declared > BOMB_RATIO * max(stored, 1):
        raise FileFormatError(f"{path}: {place} declares {declared} bytes but stores {stored}; refused, it would fill the memory")
