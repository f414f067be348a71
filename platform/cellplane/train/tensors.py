"""Tensors as safetensors files without a second copy of them: written, read and hashed piece by piece.

The library builds the whole file in memory before it can be hashed, and again when it is read; a training state is
three times its network. The format is simple: the length of a JSON header, the header, the tensors one behind another.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from cellplane.errors import IntegrityError

PIECE_BYTES = 4 * 1024**2  # hashed and then written while it is still in the processor's cache
LENGTH = struct.Struct("<Q")
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HashedFile:
    """A new file that knows its ``entry`` for a manifest (bytes, sha256) once the with statement is left, on the disk by then."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends the bytes."""
        view = memoryview(data)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._digest.update(piece)
            while len(piece):
                piece = piece[self._file.write(piece) :]
        self._bytes += len(view)

    @property
    def entry(self) -> dict[str, int | str]:
        """What a manifest says about the file."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_tensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, the tensors ordered as the library does: wide types first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH.size)
    file.write(LENGTH.pack(len(text)) + text)
    for name in names:
        if tensors[name].numel():
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file, sharing the memory of ``data``.

    ValueError, KeyError, TypeError or RuntimeError when it is none.
    """
    body = LENGTH.size + LENGTH.unpack_from(data)[0] if len(data) >= LENGTH.size else len(data) + 1
    header = json.loads(data[LENGTH.size : body]) if body <= len(data) else None
    if not isinstance(header, dict):
        raise ValueError("no safetensors file: its header is cut or none")
    return {name: _tensor(data, body, entry) for name, entry in header.items() if name != "__metadata__"}


def _tensor(data: bytearray, body: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], [int(length) for length in entry["shape"]]
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= len(data) - body or min(shape, default=1) < 0:
        raise ValueError("no safetensors file: a tensor lies outside of it")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=body + start).reshape(shape)


def read_checked(file: Path, expected: Mapping[str, Any]) -> bytearray:
    """The bytes of a file when they are those its manifest ``expected``; IntegrityError says what was found instead."""
    data = bytearray(_checked_size(file, expected))
    digest, view = hashlib.sha256(), memoryview(data)
    with file.open("rb", buffering=0) as opened:
        at = 0
        while at < len(view) and (read := opened.readinto(view[at : at + PIECE_BYTES])):
            digest.update(view[at : at + read])
            at += read
    _check_digest(file, digest.hexdigest(), expected)
    return data


def check_file(file: Path, expected: Mapping[str, Any]) -> None:
    """`read_checked` without keeping the bytes."""
    _checked_size(file, expected)
    _check_digest(file, str(hash_file(file)["sha256"]), expected)


def hash_file(file: Path) -> dict[str, int | str]:
    """What a manifest says about a file that something else wrote; it is on the disk afterwards."""
    digest, piece, size = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES)), 0
    with file.open("rb", buffering=0) as opened:
        while read := opened.readinto(piece):
            digest.update(piece[:read])
            size += read
        os.fsync(opened.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _checked_size(file: Path, expected: Mapping[str, Any]) -> int:
    if not file.is_file() or file.is_symlink():
        raise IntegrityError(f"{file} is missing; the manifest expects {expected['bytes']} bytes")
    if (size := file.stat().st_size) != expected["bytes"]:
        raise IntegrityError(f"{file} has {size} bytes, the manifest expects {expected['bytes']}")
    return size


def _check_digest(file: Path, found: str, expected: Mapping[str, Any]) -> None:
    if found != expected["sha256"]:
        raise IntegrityError(f"{file} is damaged: sha256 {found[:16]}..., the manifest expects {expected['sha256'][:16]}...")
