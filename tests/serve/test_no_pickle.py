"""No pickle is read between a model's folder and its answers, whatever the format or task, and none lies in the folder."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

from serve.options import OPTIONS
from tests.serve.specialists import Specialist, imputer, perturber
from tests.serve.test_tasks import denoiser
from tests.serve.wire import run_beside

__all__ = ["denoiser", "imputer", "perturber"]

ZIP = b"PK\x03\x04"  # torch.save's container of pickles


def is_pickle(data: bytes) -> bool:
    """Whether bytes begin as a pickle of protocol 2 to 5 does, or as the archive that torch.save puts pickles into."""
    return (data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or data.startswith(ZIP)


@pytest.fixture
def folders(model_path: Path, denoiser: Path, imputer: Specialist, perturber: Specialist) -> list[Path]:
    """A model of every task."""
    return [model_path, denoiser, imputer.path, perturber.path]


def test_nothing_is_unpickled_from_the_folder_to_the_answer(folders: list[Path]) -> None:
    found = run_beside("tests.serve.unpickled", *map(str, folders), timeout_s=300)
    assert found["heard"] == []
    assert found["control"], "the ear hears a pickle when there is one"
    refused = {name for name, status in found["statuses"].items() if status != 200}
    assert refused == {f"{folder.name} a pickle" for folder in folders}
    assert {name.split()[1] for name in found["statuses"]} >= set(OPTIONS)


def test_no_file_of_a_model_is_a_pickle(folders: list[Path], tmp_path: Path) -> None:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 20
    assert not [path.name for path in files if is_pickle(path.read_bytes())]
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    assert is_pickle((tmp_path / "archive").read_bytes())
    assert all(is_pickle(pickle.dumps({"a": 1}, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))
