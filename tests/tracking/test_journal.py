"""The journal keeps every value once, survives crashes and goes back to a restored step."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cellplane.errors import IntegrityError, StorageError
from cellplane.tracking.journal import Journal, JournalRow


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run" / "metrics.jsonl")


def test_rows_come_back_in_order_with_their_times(journal: Journal) -> None:
    assert journal.append(1, {"train/loss": 2.0}, time_ms=1000)
    assert journal.append(2, {"train/loss": 1.0, "val/loss": 3.0}, time_ms=2000)
    assert journal.rows() == [JournalRow(1, 1000, {"train/loss": 2.0}), JournalRow(2, 2000, {"train/loss": 1.0, "val/loss": 3.0})]
    assert Journal(journal.path).rows() == journal.rows()


def test_each_line_is_the_promised_json(journal: Journal) -> None:
    journal.append(7, {"a": 0.5}, time_ms=3)
    assert json.loads(journal.path.read_text()) == {"step": 7, "time_ms": 3, "metrics": {"a": 0.5}}


def test_no_file_means_no_rows_and_reading_makes_none(journal: Journal) -> None:
    assert journal.rows() == []
    assert not journal.path.exists()


def test_a_key_is_journalled_once_per_step_also_after_reopening(journal: Journal) -> None:
    assert journal.append(1, {"a": 1.0})
    assert not journal.append(1, {"a": 2.0})
    assert Journal(journal.path).append(1, {"a": 3.0, "b": 4.0})
    assert [row.metrics for row in journal.rows()] == [{"a": 1.0}, {"b": 4.0}]


def test_the_cut_forgets_later_steps_which_may_then_be_written_again(journal: Journal) -> None:
    for step in range(1, 6):
        journal.append(step, {"a": float(step)})
    journal.cut(3)
    assert [row.step for row in journal.rows()] == [1, 2, 3]
    assert not journal.append(3, {"a": 9.0})
    assert journal.append(4, {"a": 44.0})
    assert [row.metrics["a"] for row in Journal(journal.path).rows()] == [1.0, 2.0, 3.0, 44.0]
    assert [path.name for path in journal.path.parent.iterdir()] == ["metrics.jsonl"]


TORN = [b'{"step":3,"time_ms":1,"metr', b'{"step":3,"time_ms":1,"metrics":{"a":3.0}}', b"\x00\x00\x00\n", b'{"step":3\n']


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_never_read_and_the_next_write_removes_it(journal: Journal, torn: bytes) -> None:
    journal.append(1, {"a": 1.0})
    journal.append(2, {"a": 2.0})
    with journal.path.open("ab") as file:
        file.write(torn)
    again = Journal(journal.path)
    assert [row.step for row in again.rows()] == [1, 2]
    assert again.append(3, {"a": 33.0})
    assert [row.metrics["a"] for row in again.rows()] == [1.0, 2.0, 33.0]
    assert journal.path.read_bytes().count(b"\n") == 3


def test_every_possible_tear_of_the_last_line_leaves_the_rows_before_it(journal: Journal) -> None:
    journal.append(1, {"a": 1.0}, time_ms=1)
    whole = journal.path.stat().st_size
    journal.append(2, {"a": 2.0}, time_ms=2)
    content = journal.path.read_bytes()
    for size in range(whole, len(content)):
        journal.path.write_bytes(content[:size])
        assert [row.step for row in Journal(journal.path).rows()] == [1]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(journal: Journal) -> None:
    for step in range(3):
        journal.append(step, {"a": 1.0})
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(IntegrityError, match="line 2 of 3"):
        journal.rows()


def test_values_that_are_not_finite_are_kept(journal: Journal) -> None:
    journal.append(1, {"nan": math.nan, "inf": math.inf})
    metrics = journal.rows()[0].metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] == math.inf


def test_a_killed_writer_loses_nothing_it_had_appended(journal: Journal) -> None:
    code = (
        "import os, sys; from pathlib import Path; from cellplane.tracking.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for step in range(50): journal.append(step, {'a': 1.0})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(journal.path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row.step for row in journal.rows()] == list(range(50))


def test_a_reader_in_another_thread_sees_only_whole_rows(journal: Journal) -> None:
    reader = Journal(journal.path)
    counts: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            counts.append(len(reader.rows()))

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(300):
        journal.append(step, {"a": float(step)})
    done.set()
    thread.join()
    assert counts == sorted(counts)
    assert len(reader.rows()) == 300


def test_a_full_disk_is_a_storage_error_and_writing_goes_on_after_it(journal: Journal) -> None:
    journal.append(1, {"a": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, before[1]))
        with pytest.raises(StorageError, match="free some space"):
            journal.append(2, {"a": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert journal.append(2, {"a": 2.0})
    assert [row.step for row in journal.rows()] == [1, 2]


def test_importing_the_journal_does_not_import_mlflow() -> None:
    code = "import sys, cellplane.tracking.journal, cellplane.tracking.runs, cellplane.tracking.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 0
