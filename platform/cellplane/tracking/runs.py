"""Runs in MLflow: one run per piece of work, found again by its key after any restart.

Training never talks to the tracker. It writes a journal; a ``MetricPump`` replays it from a thread of its own, with
the original times, and keeps trying when the tracker is away. A replay sends what the tracker does not have yet, so
it may be repeated at will. MLflow is imported by the functions that need it: it costs seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from cellplane.config import Config, home
from cellplane.errors import CellplaneError, ConfigError, ServiceError
from cellplane.logs import note
from cellplane.tracking.journal import Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_OPENING = threading.Lock()  # a pump and the work it serves may open the same run at the same moment
RUN_KEY = "cellplane.run_key"
TAG_PREFIX, MLFLOW_PREFIX = "cellplane.", "mlflow."
NOTHING_TO_TELL_S = 2.0  # for a tracker that is slow to answer, when work was refused before it began
# MLflow's own limits (mlflow.utils.validation)
MAX_KEY, MAX_PARAM, MAX_TAG, PARAMS_PER_CALL, METRICS_PER_CALL = 250, 6000, 8000, 100, 1000
# The default client waits minutes for a dead server; ours fails at once and leaves retrying to the pump
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # shown in the UI as training runs, not as chats


class TrackingConfig(Config):
    """Where runs and models are recorded."""

    enabled: bool = True
    """False records nothing but the journal."""
    uri: str | None = None
    """MLflow's address or database; None means $MLFLOW_TRACKING_URI, else sqlite in CELLPLANE_HOME."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run is, known before any tracker is asked.

    ``run_key`` identifies the run across restarts. ``params`` may be nested. Keys of ``tags`` get the prefix
    `cellplane.` when they lack it. ``started_ms``: the true start when the tracker is met later, else None.
    """

    run_key: str
    experiment: str
    name: str
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, object] = field(default_factory=dict)
    started_ms: int | None = None


def resolve_uri(uri: str | None = None) -> str:
    """The tracker to use: ``uri``, else $MLFLOW_TRACKING_URI, else the sqlite file of CELLPLANE_HOME.

    Raises ConfigError for a plain folder or file: address, which MLflow no longer accepts.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI") or local_uri(home())
    if urlsplit(found).scheme in ("", "file"):
        raise ConfigError(f"tracking address {found!r} is a folder, which MLflow refuses; use sqlite:///FILE.db or http://HOST:PORT")
    return found


def local_uri(folder: Path) -> str:
    """The sqlite address of the tracker that lives in ``folder``."""
    return f"sqlite:///{folder / 'mlflow.db'}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the tracker that fails within seconds when nobody answers."""
    address = resolve_uri(uri)
    for key, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    if address.startswith("sqlite:///"):
        Path(address.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    with tracker_errors(address):
        return MlflowClient(tracking_uri=address, registry_uri=address)


@contextmanager
def tracker_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into one ServiceError that names the tracker (without its password) and the way out."""
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except CellplaneError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the tracker {shown(uri)} needs the Python package {error.name}, which is not installed; "
            "install it, or name another driver in the address, such as postgresql+psycopg2://"
        ) from error
    except RestException as error:
        raise ServiceError(f"the tracker {shown(uri)} refused: {_first_line(error)}", error.get_http_status_code()) from error
    except (MlflowException, OSError) as error:
        if uri.startswith("http") and "API request to" in str(error):
            hint = "start it with `cellplane up`, or set MLFLOW_TRACKING_URI to one that runs"
            raise ServiceError(f"the tracker {shown(uri)} cannot be reached or gave no answer in time; {hint}") from error
        raise ServiceError(f"the tracker {shown(uri)} failed: {_first_line(error)}") from error


def shown(uri: str) -> str:
    """The address as it may be printed: no user, no password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _first_line(error: BaseException) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0])[:500]


class TrackedRun:
    """One open run of the tracker. Every method raises ServiceError when the tracker is away."""

    def __init__(self, client: MlflowClient, run_id: str, uri: str) -> None:
        self.client, self.run_id, self.uri = client, run_id, uri
        self._sent: dict[str, set[int]] | None = None  # steps the tracker has for each key; None = ask it

    @classmethod
    def open(cls, spec: RunSpec, uri: str | None = None) -> TrackedRun:
        """The run with this key, set running again, or a new one. Parameters already logged are kept as they are."""
        address = resolve_uri(uri)
        client = connect(address)
        with _OPENING, tracker_errors(address):
            run = _find_or_create(client, spec, address)
            _log_missing_params(client, run, flatten(spec.params))
            _set_tags(client, run.info.run_id, spec.tags)
        return cls(client, run.info.run_id, address)

    def replay(self, journal: Journal) -> int:
        """Send what the tracker lacks, with the times of the journal; the number of values sent.

        What the tracker has is asked once and again after every failure, so nothing is doubled even when an answer
        was lost or the journal was cut and written anew.
        """
        from mlflow.entities import Metric

        try:
            with tracker_errors(self.uri):
                sent = self._sent = self._history() if self._sent is None else self._sent
                values = (
                    Metric(_key(key), value, row.time_ms, row.step)
                    for row in journal.rows()
                    for key, value in row.metrics.items()
                    if row.step not in sent.get(_key(key), ())
                )
                total = 0
                while batch := list(islice(values, METRICS_PER_CALL)):
                    self.client.log_batch(self.run_id, metrics=batch)
                    for metric in batch:
                        sent.setdefault(metric.key, set()).add(metric.step)
                    total += len(batch)
                return total
        except ServiceError:
            self._sent = None
            raise

    def _history(self) -> dict[str, set[int]]:
        keys = self.client.get_run(self.run_id).data.metrics
        return {key: {metric.step for metric in self.client.get_metric_history(self.run_id, key)} for key in keys}

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Copy every file of ``folder`` into the run's artifacts under ``path``."""
        with tracker_errors(self.uri):
            self.client.log_artifacts(self.run_id, str(folder), path or None)

    def log_file(self, file: Path, path: str = "") -> None:
        """Copy one file into the run's artifacts, into the folder ``path``."""
        with tracker_errors(self.uri):
            self.client.log_artifact(self.run_id, str(file), path or None)

    def log_text(self, text: str, path: str) -> None:
        """Write ``text`` as the artifact ``path``."""
        with tracker_errors(self.uri):
            self.client.log_text(self.run_id, text, path)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Add or replace tags; keys get the prefix `cellplane.` when they lack it."""
        with tracker_errors(self.uri):
            _set_tags(self.client, self.run_id, tags)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; opening it again sets it running."""
        with tracker_errors(self.uri):
            self.client.set_terminated(self.run_id, status)


def _find_or_create(client: MlflowClient, spec: RunSpec, uri: str) -> Run:
    experiment_id = _experiment_id(client, spec.experiment, uri)
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{_checked_key(spec.run_key)}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0]
    return client.create_run(experiment_id, start_time=spec.started_ms, tags={RUN_KEY: spec.run_key}, run_name=spec.name)


def _checked_key(run_key: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:/@+-]{1,250}", run_key):
        raise ConfigError(f"run key {run_key!r} may only hold letters, digits and . _ : / @ + -, at most 250 of them")
    return run_key


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The experiment, made when absent; another process may make it at the same moment."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return _active(found)
    try:
        return str(client.create_experiment(name, artifact_location=_artifact_location(name, uri), tags=EXPERIMENT_TAGS))
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return _active(found)
        raise


def _active(experiment: Any) -> str:
    if experiment.lifecycle_stage != "active":
        raise ConfigError(f"experiment {experiment.name!r} was deleted in MLflow; restore it with `mlflow experiments restore`")
    return str(experiment.experiment_id)


def _artifact_location(name: str, uri: str) -> str | None:
    """Beside the sqlite file; a server decides itself (None)."""
    if not uri.startswith("sqlite:///"):
        return None
    root = Path(uri.removeprefix("sqlite:///")).absolute().parent / "artifacts"
    return f"{root.as_uri()}/{quote(name.replace('/', '-'))}"


def flatten(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}, lists as JSON, cut to the lengths MLflow takes."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
            continue
        text = json.dumps(value, default=str) if isinstance(value, list | tuple) else str(value)
        flat[_key(key)] = text[:MAX_PARAM]
    return flat


def _key(name: str) -> str:
    """A name MLflow accepts: other characters than letters, digits and _ - . / : or a space become _."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:MAX_KEY]


def _log_missing_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    if changed := [key for key, value in params.items() if run.data.params.get(key, value) != value]:
        logger.info("run %s keeps the first value of %d changed parameters, e.g. %s", run.info.run_id, len(changed), changed[0])
    missing = (Param(key, value) for key, value in params.items() if key not in run.data.params)
    while chunk := list(islice(missing, PARAMS_PER_CALL)):
        client.log_batch(run.info.run_id, params=chunk)


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, object]) -> None:
    from mlflow.entities import RunTag

    items = (RunTag(tag_key(key), str(value)[:MAX_TAG]) for key, value in tags.items())
    while chunk := list(islice(items, PARAMS_PER_CALL)):
        client.log_batch(run_id, tags=chunk)


def tag_key(name: str) -> str:
    """The name with the prefix all our tags carry; MLflow's own (`mlflow.parentRunId`) stay as they are."""
    return _key(name if name.startswith((TAG_PREFIX, MLFLOW_PREFIX)) else TAG_PREFIX + name)


def code_tags() -> dict[str, str]:
    """git_commit and git_dirty ("true", "false") of the running code; "unknown" for an installed wheel."""
    here = Path(__file__).resolve().parent
    ours = _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # not somebody else's repository around a venv
    commit = _git(here, "rev-parse", "HEAD") if ours else None
    status = _git(here, "status", "--porcelain")
    dirty = "unknown" if commit is None or status is None else str(bool(status)).lower()
    return {"git_commit": commit or "unknown", "git_dirty": dirty}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class MetricPump:
    """Replays a journal to the tracker from its own thread while the work goes on.

    The run is opened on first contact. A tracker that is down, slow or broken is tried again with growing pauses and
    never disturbs the caller. As a context manager it marks the run FAILED or KILLED when the block ends badly.
    """

    def __init__(self, spec: RunSpec, uri: str | None, journal: Journal, interval_s: float = 5.0) -> None:
        self.spec, self.uri, self.journal, self.interval_s = spec, resolve_uri(uri), journal, interval_s
        self.run: TrackedRun | None = None
        self._status: str | None = None
        self._deadline: float | None = None
        self._delivered = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metric-pump", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None before the first contact."""
        return self.run.run_id if self.run else None

    def start(self) -> MetricPump:
        """Begin; returns itself. Log lines carry the run's name and Ray's name of the job from here on."""
        note("run", self.spec.run_key)
        note("job", str(self.spec.tags["ray_job_id"]) if "ray_job_id" in self.spec.tags else None)
        self._thread.start()
        return self

    def close(self, status: str | None = None, timeout_s: float = 30.0) -> bool:
        """Replay the rest, end the run with ``status`` (None leaves it running) and stop; False when not all was delivered.

        Waits ``timeout_s`` at most, and hardly at all where nothing was measured and no run was opened, except for a database in
        a file: its tables may just be made, and half of them would be in the way of every later run. What is missing stays in
        the journal, and a later replay delivers it.
        """
        nothing = self.run is None and not any(True for _ in self.journal.rows())
        timeout_s = min(timeout_s, NOTHING_TO_TELL_S) if nothing and not self.uri.startswith("sqlite:") else timeout_s
        self._status, self._deadline = status, time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        if not self._delivered and not nothing:
            logger.warning("not all metrics reached the tracker %s; they are kept in %s", shown(self.uri), self.journal.path)
        return self._delivered

    def __enter__(self) -> MetricPump:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._closing.is_set():
            self.close(None if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def _work(self) -> None:
        failures = 0
        while True:
            last = self._closing.is_set()
            began = time.monotonic()
            failures = 0 if self._attempt(last, logging.DEBUG if failures else logging.WARNING) else failures + 1
            spent = time.monotonic() - began
            if last and (failures == 0 or time.monotonic() >= (self._deadline or 0.0)):
                self._delivered = failures == 0
                return
            # twice as long after each failure; a long journal is read back at most 2 % of the time
            self._pause(max(min(self.interval_s * 2**failures, 60.0), 50.0 * spent if failures == 0 else 0.0), last)

    def _pause(self, seconds: float, closing: bool) -> None:
        if closing:
            time.sleep(min(seconds, 0.5))
            return
        self._closing.wait(seconds)

    def _attempt(self, last: bool, level: int) -> bool:
        try:
            self.run = self.run or TrackedRun.open(self.spec, self.uri)
            self.run.replay(self.journal)
            if last and self._status:
                self.run.finish(self._status)
        except CellplaneError as error:
            logger.log(level, "metrics wait in the journal: %s", error)
            return False
        return True
