"""Progress where nobody watches: a job's log gets a line now and then, and short work none."""

from __future__ import annotations

import pytest

from cellplane.cli import common


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute_with_what_is_left(clock, capsys):
    with common.progress("fine-tuning run", "now scores") as show:
        for done in range(1, 101):
            clock[0] = float(done)
            show(done, 100, {"train/loss": 2.5})
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "fine-tuning run: 30 of 100  loss 2.5  about 70 s left",
        "fine-tuning run: 60 of 100  loss 2.5  about 40 s left",
        "fine-tuning run: 90 of 100  loss 2.5  about 10 s left",
        "fine-tuning run: 100 of 100  loss 2.5  now scores",
    ]


def test_work_of_a_few_seconds_says_nothing(clock, capsys):
    with common.progress("exporting") as show:
        for done in range(5):
            clock[0] += 1
            show(done + 1, 5, {})
    assert capsys.readouterr().err == ""
