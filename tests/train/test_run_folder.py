"""A run remembers what it was begun with and how often it began."""

from __future__ import annotations

import os
import stat

import pytest

from cellplane.errors import StorageError
from cellplane.train.identity import DETERMINING
from cellplane.train.run_folder import RunFolder


def test_what_is_remembered_is_read_back_with_the_settings_that_differ(run_config, cellplane_home):
    folder = RunFolder.of("r")
    assert folder.differences(run_config("r"), DETERMINING) == []
    folder.remember(run_config("r"), '{"identity": "a", "vocabulary_fingerprint": "b", "n_genes": 3}')
    assert folder.origin() == {"identity": "a", "vocabulary_fingerprint": "b", "n_genes": 3}
    assert folder.differences(run_config("r", {"workers": {"count": 1}}), DETERMINING) == []
    found = folder.differences(run_config("r", {"optimizer": {"lr": 0.5}, "plan": {"seed": 7}}), DETERMINING)
    assert found == ["plan.seed is 0 there and 7 here", "optimizer.lr is 0.003 there and 0.5 here"]


@pytest.mark.parametrize("text", ["", "{", "{}", '{"identity": "a"}'])
def test_a_run_of_an_earlier_version_has_no_origin(cellplane_home, text):
    folder = RunFolder.of("r")
    folder.path.mkdir(parents=True)
    (folder.path / "origin.json").write_text(text)
    assert folder.origin() == {}


def test_every_start_is_written_down_and_a_torn_line_is_only_a_note_less(cellplane_home):
    folder = RunFolder.of("r")
    assert folder.starts() == []
    folder.started(2, 0, "submitted")
    folder.started(1, 6, "a node was lost")
    with (folder.path / "starts.jsonl").open("a") as file:
        file.write('{"time_ms": 1')
    assert [(start.workers, start.step, start.because) for start in folder.starts()] == [(2, 0, "submitted"), (1, 6, "a node was lost")]


def test_a_folder_that_may_not_be_written_is_an_error_that_says_what_to_do(run_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "file"))
    for write in (lambda: RunFolder.of("r").started(1, 0, ""), lambda: RunFolder.of("r").remember(run_config("r"), "{}")):
        with pytest.raises(StorageError, match="choose another CELLPLANE_HOME"):
            write()


def test_no_half_written_configuration_is_left(run_config, cellplane_home):
    folder = RunFolder.of("r")
    folder.remember(run_config("r"), "{}")
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "origin.json"]
    assert stat.S_ISREG(os.stat(folder.config).st_mode)
