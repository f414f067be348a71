"""What a task keeps beside its network travels with the model folder, listed and verified like all else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellplane.artifact.folder import load_model, pack_tensors, save_model, unpack_tensors
from cellplane.errors import DataError, FileFormatError, IntegrityError
from tests.tiny import TINY, tiny_folder


def test_attachments_come_back_as_they_were_and_do_not_change_what_the_model_is(tmp_path):
    plain = tiny_folder(TINY)
    kept = replace(plain, attachments={"notes.json": b"{}", "cells.bin": b"\x00\x01"})
    one, other = (load_model(save_model(model, tmp_path / name)) for name, model in (("plain", plain), ("kept", kept)))
    assert (one.attachments, dict(other.attachments)) == ({}, {"notes.json": b"{}", "cells.bin": b"\x00\x01"})
    assert one.model_sha256 == other.model_sha256


def test_a_flipped_bit_of_an_attachment_is_noticed(tmp_path):
    path = save_model(replace(tiny_folder(TINY), attachments={"cells.bin": b"\x00\x01"}), tmp_path / "model")
    (path / "cells.bin").write_bytes(b"\x00\x03")
    with pytest.raises(IntegrityError, match=r"cells\.bin"):
        load_model(path)


def test_an_attachment_may_not_take_the_name_of_a_file_of_the_model(tmp_path):
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        save_model(replace(tiny_folder(TINY), attachments={"weights.safetensors": b""}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tensors_are_packed_without_pickle():
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.ones(2)}
    found = unpack_tensors(pack_tensors(tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(FileFormatError, match="not a readable attachment"):
        unpack_tensors(b"nothing")
