"""Log lines of a command: for people, or one JSON object a line with the ids of run and job for whoever collects them.

Lines of Ray's own processes (workers, replicas) are Ray's to write: RAY_LOGGING_CONFIG_ENCODING=JSON makes them JSON with
job, node and actor, `logging_config` of what Serve deploys those of the endpoints with request ids.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from cellplane.errors import ConfigError

FORMAT_VARIABLE = "CELLPLANE_LOG_FORMAT"
_ids: dict[str, str] = {}  # of this process: it works on one run at a time


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, logger, message, the ids noted so far and, after an error, its traceback."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage(), **_ids}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


FORMATS = {"text": lambda: logging.Formatter("%(levelname)s %(name)s: %(message)s"), "json": JsonLines}


def start_logging(level: int) -> None:
    """Write log lines of this process to standard error, in the form $CELLPLANE_LOG_FORMAT names (text or json)."""
    form = os.environ.get(FORMAT_VARIABLE, "text")
    if form not in FORMATS:
        raise ConfigError(f"{FORMAT_VARIABLE} is {form!r}; it may be {' or '.join(FORMATS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATS[form]())
    logging.basicConfig(level=level, handlers=[handler])


def note(name: str, value: str | None) -> None:
    """From now on every JSON line carries this id; None takes it away."""
    if value is None:
        _ids.pop(name, None)
    else:
        _ids[name] = value


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
