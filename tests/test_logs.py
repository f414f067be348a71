"""Log lines are text for people, or JSON objects with the ids of run and job."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cellplane import logs
from cellplane.errors import ConfigError
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import MetricPump, RunSpec, local_uri


def line(message: str, *arguments: object, error: bool = False) -> dict[str, str]:
    """What a record becomes."""
    try:
        raise ValueError("why")
    except ValueError:
        info = sys.exc_info() if error else None
    record = logging.LogRecord("cellplane.probe", logging.WARNING, __file__, 1, message, arguments, info)
    said: dict[str, str] = json.loads(logs.JsonLines().format(record))
    return said


def test_a_record_is_one_object_even_with_newlines_and_errors() -> None:
    said = line("%d cells\nof %s", 3, 'a "file"', error=True)
    assert said["message"] == '3 cells\nof a "file"'
    assert (said["level"], said["logger"]) == ("WARNING", "cellplane.probe")
    assert said["time"].endswith("+00:00")
    assert "ValueError: why" in said["error"]


def test_lines_carry_run_and_job_once_a_run_has_begun(tmp_path: Path) -> None:
    spec = RunSpec(run_key="mine", experiment="e", name="n", tags={"ray_job_id": "05000000"})
    pump = MetricPump(spec, local_uri(tmp_path), Journal(tmp_path / "journal.jsonl"), interval_s=60)
    for name in ("run", "job"):  # an earlier test of this process may have begun one
        logs.note(name, None)
    try:
        assert "run" not in line("before")
        with pump:
            said = line("during")
            assert (said["run"], said["job"]) == ("mine", "05000000")
    finally:
        logs.note("run", None)
        logs.note("job", None)
    assert "run" not in line("after")


def test_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(ConfigError, match="text or json"):
        logs.start_logging(logging.INFO)


@pytest.mark.parametrize(("form", "begins"), [("json", "{"), ("text", "WARNING probe: ")])
def test_the_environment_chooses_the_form(form: str, begins: str) -> None:
    code = "import logging; from cellplane.logs import start_logging; start_logging(20); logging.getLogger('probe').warning('told')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path), logs.FORMAT_VARIABLE: form}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(begins)
