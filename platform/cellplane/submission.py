"""Jobs on a cluster somewhere else, through Ray's job API: hand one in, follow it, list them, stop one.

The address is that of Ray's dashboard. A job has an identity, the hash of what it is told: handing in what runs already
follows it instead of starting it twice, and handing in what ended starts it again, which goes on where it was. Secrets
are never sent: what a job is given stands in Ray's dashboard for whoever may open it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from cellplane.cluster import QUIET_THREADS, running
from cellplane.errors import ConfigError, ServiceError
from cellplane.package import Package

ANSWER_S = 10.0  # for a first answer of the dashboard
STOP_S = 45  # between a polite stop and a kill: a tracker that is away is waited for 30 s; Ray's own 3 s end no step
POLL_S = 0.5
MOST_LOST = 5  # connections in a row that showed nothing new
RUNNING, SUCCEEDED, STOPPED = ("PENDING", "RUNNING"), "SUCCEEDED", "STOPPED"
INTERRUPTED, UNREACHABLE = 130, 4
IDENTITY, RUN = "cellplane.identity", "cellplane.run"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in the order in which Ray asks them
RAY_TALKS = "ray.dashboard.modules.dashboard_sdk"
WORKING_DIR = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"  # filled in by Ray, on each node
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A cluster's dashboard, and the token it is asked with."""

    address: str
    token: str | None = field(repr=False)


@dataclass(frozen=True)
class Order:
    """What is to be done: the words after `python -m`, the package, and what the entry point needs."""

    job: str
    run: str
    command: tuple[str, ...]
    package: Package
    environment: Mapping[str, str]
    cpus: float = 0.0
    gpus: float = 0.0

    @property
    def identity(self) -> str:
        """Hash of command, configuration and environment; the code is left out, as a job that runs has its own."""
        told = [self.command, self.package.config, sorted(self.environment.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def work(self) -> str:
        """What two jobs must not do at the same time."""
        return f"{self.job}:{self.run}"


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it; times in seconds since 1970, ``code`` None while there is none."""

    id: str
    status: str
    code: int | None
    began: float | None
    ended: float | None
    message: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether it waits or works."""
        return self.status in RUNNING

    @property
    def exit_code(self) -> int:
        """What a command that waited for it ends with: the job's own code where it had one."""
        if self.status == SUCCEEDED:
            return 0
        if self.status == STOPPED:
            return INTERRUPTED
        if self.code is None:  # the cluster could not start it, or lost it
            return UNREACHABLE
        return self.code if self.code > 0 else 128 - self.code


def target_of(address: str | None, folder: Path | None = None) -> Target:
    """The cluster meant by an address, else by the environment, else the running local stack.

    ConfigError when what is named is no dashboard, ServiceError when nothing is named and no stack runs.
    """
    stack = running(folder)
    named = address or next((value for name in ADDRESSES if (value := os.environ.get(name))), None)
    if named is None and stack is None:
        raise ServiceError("no cluster is named: give --address http://HEAD:8265, set RAY_API_SERVER_ADDRESS, or start one: cellplane up")
    url = (named or (stack.dashboard_url if stack else "")).rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"{url!r} is not the address of Ray's dashboard, which jobs are handed to: --address http://HEAD:8265")
    local = stack is not None and url == stack.dashboard_url
    return Target(url, _read_token(stack.token_path) if local and stack else _token())


def _token() -> str | None:
    """The token as Ray looks for it: the variable, the file that one names, the file in the home folder."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read_token(Path(path))
    usual = Path.home() / ".ray" / "auth_token"
    return _read_token(usual) if usual.is_file() else None


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ServiceError(f"cannot read Ray's token from {path} (RAY_AUTH_TOKEN_PATH): {error.strerror or error}") from error


def greet(target: Target) -> None:
    """Whether the cluster answers, takes the token and has our version of Ray; ServiceError says which of these it is not."""
    try:
        version = json.loads(_get(target, "/api/version"))["ray_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"what answers at {target.address} is not Ray's dashboard") from error
    ours = metadata.version("ray")
    if str(version).split(".")[:2] != ours.split(".")[:2]:
        raise ServiceError(f"the cluster at {target.address} runs Ray {version}, this is Ray {ours}: install {version} here, or update it")
    _get(target, "/api/jobs/")


def _get(target: Target, path: str) -> bytes:
    headers = {"Authorization": f"Bearer {target.token}"} if target.token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(target.address + path, headers=headers), timeout=ANSWER_S) as answer:
            body: bytes = answer.read()
            return body
    except urllib.error.HTTPError as error:
        raise _refused(target, error.code) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ServiceError(f"no Ray dashboard answers at {target.address} ({reason}); is the address right, and the cluster up?") from error


def _refused(target: Target, status: int) -> ServiceError:
    if status not in (401, 403):
        return ServiceError(f"{target.address} answered with status {status}, which Ray's dashboard does not", status)
    found = "asks for a token and none was found" if target.token is None else "refused the token"
    advice = "put the cluster's token into a file that only you can read, and its path into RAY_AUTH_TOKEN_PATH"
    return ServiceError(f"the Ray at {target.address} {found}: {advice}", status)


@contextmanager
def _preferred(address: str) -> Iterator[None]:
    """Ray prefers what stands in the environment to what it is told, so for the block the same stands there."""
    name = ADDRESSES[0]
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass
class _Log:
    """What was shown of a log, so that it goes on where it was after a connection broke."""

    show: Say
    shown: int = 0

    def take(self, text: str, begins: int) -> None:
        """Shows what is new of a piece of the log that begins at so many characters."""
        if new := text[max(0, self.shown - begins) :]:
            self.show(new)
        self.shown = max(self.shown, begins + len(text))


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, target: Target) -> None:
        """Connects; ServiceError as `greet`."""
        greet(target)
        self.target = target
        headers = {"Authorization": f"Bearer {target.token}"} if target.token else None
        with self._asking(), _preferred(target.address):
            from ray.job_submission import JobSubmissionClient

            logging.getLogger(RAY_TALKS).setLevel(logging.WARNING)  # it tells of every upload
            self._client = JobSubmissionClient(target.address, headers=headers)

    def all(self) -> list[Job]:
        """Every job that was handed in, the newest first."""
        with self._asking():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.began or 0.0, reverse=True)

    def one(self, job_id: str) -> Job:
        """A job; ConfigError names the nearest when there is none of this id."""
        known = {job.id: job for job in self.all()}
        if job_id not in known:
            nearest = get_close_matches(job_id, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "see cellplane jobs list"
            raise ConfigError(f"no job {job_id!r} at {self.target.address}; {hint}")
        return known[job_id]

    def submit(self, order: Order) -> tuple[str, bool]:
        """(id, whether it was started now): a job with this identity that runs is not started again.

        ServiceError when another job works on the same run.
        """
        known = self.all()
        if running_one := _same(known, order):
            return running_one.id, False
        for job in known:
            if job.runs and job.tags.get(RUN) == order.work:
                raise ServiceError(
                    f"job {job.id} works on run {order.run!r} with other settings; stop it first: cellplane jobs stop {job.id}"
                )
        attempt = 1 + sum(job.tags.get(IDENTITY) == order.identity for job in known)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(order.run).name)
        job_id = f"{order.job}-{name}-{order.identity[:8]}-{attempt}"
        try:
            self._hand_in(order, job_id)
        except ServiceError:
            if other := _same(self.all(), order):  # somebody else was faster by a moment
                return other.id, False
            raise
        return job_id, True

    def _hand_in(self, order: Order, job_id: str) -> None:
        with TemporaryDirectory(prefix="cellplane-") as folder:
            package = order.package.write(Path(folder) / "job.zip")
            with self._asking():
                self._client.submit_job(
                    entrypoint=" ".join(["python", "-m", *order.command]),
                    submission_id=job_id,
                    runtime_env={"working_dir": str(package), "env_vars": _environment(order.environment)},
                    metadata={IDENTITY: order.identity, RUN: order.work, "job_name": job_id},
                    entrypoint_num_cpus=order.cpus or None,
                    entrypoint_num_gpus=order.gpus or None,
                )

    def follow(self, job_id: str, show: Say) -> Job:
        """Shows the lines of a job as they come, and gives the job when it has ended; a lost connection is taken up again."""
        log, lost = _Log(show), 0
        while (job := self.one(job_id)).runs:
            before = log.shown
            try:
                asyncio.run(self._tail(job_id, log))
                lost = 0
            except Exception as error:  # whatever the libraries below raise for a connection that broke
                lost = 1 if log.shown > before else lost + 1
                if lost > MOST_LOST:
                    raise ServiceError(f"lost the log of {job_id} at {self.target.address}: {type(error).__name__}: {error}") from error
            time.sleep(POLL_S)
        log.take(self.logs(job_id), 0)  # a tail may miss the end
        return job

    async def _tail(self, job_id: str, log: _Log) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(job_id):
            log.take(text, seen)
            seen += len(text)

    def logs(self, job_id: str) -> str:
        """All lines of a job so far."""
        self.one(job_id)
        with self._asking():
            text: str = self._client.get_job_logs(job_id)
        return text

    def stop(self, job_id: str, patience_s: float = 3.0 * STOP_S) -> tuple[Job, bool]:
        """(the job once it has ended, whether it was stopped now). ServiceError when it does not end in time."""
        if not (job := self.one(job_id)).runs:
            return job, False
        with self._asking():
            self._client.stop_job(job_id)
        until = time.monotonic() + patience_s
        while (job := self.one(job_id)).runs:
            if time.monotonic() > until:
                raise ServiceError(f"job {job_id} did not end within {patience_s:.0f} s; look at its node, or ask again")
            time.sleep(POLL_S)
        return job, True

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What Ray's client raises becomes a ServiceError."""
        from ray.exceptions import RayError

        try:
            yield
        except (OSError, RuntimeError, RayError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ServiceError(f"the cluster at {self.target.address} said: {first}") from error


def _same(known: Sequence[Job], order: Order) -> Job | None:
    return next((job for job in known if job.runs and job.tags.get(IDENTITY) == order.identity), None)


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """Variables of a job, for its entry point and its workers; they stand in the dashboard, so nothing secret is among them."""
    ours = {"PYTHONPATH": f"{WORKING_DIR}/platform:${{PYTHONPATH}}", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    return {**QUIET_THREADS, **ours, **given}


def _job(details: Any) -> Job:
    began, ended = (None if value is None else value / 1000 for value in (details.start_time, details.end_time))
    status = str(getattr(details.status, "value", details.status))
    return Job(details.submission_id, status, details.driver_exit_code, began, ended, details.message or "", details.metadata or {})
