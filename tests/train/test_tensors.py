"""Our safetensors files are the library's, and no more memory is taken for them than they are large."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from cellplane.errors import IntegrityError
from cellplane.train.tensors import DTYPES, HashedFile, check_file, hash_file, read_checked, read_tensors, write_tensors

MIXED = {
    "weight": torch.arange(15, dtype=torch.float32).reshape(5, 3).T,
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "steps": torch.tensor([7, 8, 9]),
    "mask": torch.tensor([True, False, True]),
    'name with \u00e4 and "': torch.ones(2, dtype=torch.float64),
}


def written(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int | str]:
    with HashedFile(path) as file:
        write_tensors(file, tensors)
    return file.entry


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_the_library_reads_what_we_write(tmp_path):
    written(tmp_path / "t", MIXED)
    assert_equal(load((tmp_path / "t").read_bytes()), MIXED)


def test_we_read_what_the_library_writes():
    whole = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    assert_equal(read_tensors(bytearray(save(whole))), MIXED)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_comes_back(tmp_path, dtype):
    tensors = {"odd": torch.ones(3, dtype=torch.bool), "a": torch.tensor([[0, 1], [1, 1]]).to(dtype)}
    entry = written(tmp_path / "t", tensors)
    assert_equal(read_tensors(read_checked(tmp_path / "t", entry)), tensors)


def test_the_entry_of_a_file_is_what_its_bytes_say(tmp_path):
    entry = written(tmp_path / "t", {"large": torch.arange(3_000_000)})  # more than a piece
    data = (tmp_path / "t").read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} == hash_file(tmp_path / "t")
    assert read_checked(tmp_path / "t", entry) == data
    check_file(tmp_path / "t", entry)


@pytest.mark.parametrize("read", [read_checked, check_file])
def test_a_changed_file_is_told_from_the_one_expected(tmp_path, read):
    entry = written(tmp_path / "t", MIXED)
    data = bytearray((tmp_path / "t").read_bytes())
    data[-1] ^= 4
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(IntegrityError, match="is damaged: sha256"):
        read(tmp_path / "t", entry)
    (tmp_path / "t").write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=f"has {len(data) - 1} bytes"):
        read(tmp_path / "t", entry)
    (tmp_path / "t").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        read(tmp_path / "t", entry)


HEADERS = [
    b"",
    b"\0" * 7,
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 2**60) + b"{}",
    struct.pack("<Q", 9) + b'{"a": {}}',
    *(
        struct.pack("<Q", len(text)) + text + b"\0" * 8
        for text in (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,12]}}',
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
            b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        )
    ),
]


@pytest.mark.parametrize("data", HEADERS)
def test_what_is_no_safetensors_file_is_refused(data):
    with pytest.raises((ValueError, KeyError, TypeError, RuntimeError)):
        read_tensors(bytearray(data))


def test_tensors_share_the_memory_they_were_read_into(tmp_path):
    entry = written(tmp_path / "t", {"a": torch.zeros(4)})
    data = read_checked(tmp_path / "t", entry)
    tensors = read_tensors(data)
    data[-4:] = struct.pack("<f", 3.0)
    assert tensors["a"].tolist() == [0.0, 0.0, 0.0, 3.0]


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    (tmp_path / "t").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == b"mine"
