"""`cellplane submit JOB` and `cellplane jobs`: the verbs, run on a cluster that is somewhere else.

Everything that can be known here is checked before the cluster is asked, and Ray is not even imported before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from cellplane.cli import finetune, predict, train, tune
from cellplane.cli.common import ConfigOption, Json, Overrides, answer, say, table
from cellplane.cli.ops import SCHEMAS, schema_of
from cellplane.errors import ConfigError

if TYPE_CHECKING:
    from cellplane.config import Config
    from cellplane.package import Package
    from cellplane.submission import Job, Order

jobs_app = typer.Typer(help="Jobs on a cluster: list them, read their lines, stop one.", no_args_is_help=True)

Address = Annotated[str | None, typer.Option("--address", help="Ray's dashboard, http(s)://HOST:8265; else RAY_API_SERVER_ADDRESS.")]
JobId = Annotated[str, typer.Argument(help="Its id, as `cellplane jobs list` shows it.")]
ARRIVAL = "cellplane.cli.arrival"
TRACKER = "MLFLOW_TRACKING_URI"
STAY_HERE = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
READ = (
    "inputs",
    "vocabulary",
    "shards",
    "data",
    "train",
    "test",
    "reference",
    "base_model",
    "model",
    "hierarchy_file",
    "path",
    "base",
    "bases",
)
WRITTEN = ("out", "folder")


@dataclass(frozen=True)
class Kind:
    """A job: the kind of its configuration, the one used when none is named, its verb, and CPUs of the entry point.

    ``tasks`` has the verb's second words, where it has any; the task of the configuration says which.
    """

    kind: str
    config: str | None
    verb: tuple[str, ...]
    tasks: typer.Typer | None = None
    cpus: float = 0.0


JOBS = {  # jobs/*.py, but for the benchmark: what it measures is the machine somebody sits at
    "convert": Kind("data", None, ("data", "convert")),
    "pretrain": Kind("pretrain", "demo", ("pretrain",)),
    "finetune": Kind("finetune", "annotate", ("finetune",), finetune.finetune_app, cpus=1.0),
    "evaluate": Kind("evaluate", "annotate", ("evaluate",), train.evaluate_app, cpus=1.0),
    "predict": Kind("predict", "annotate", ("predict",), predict.predict_app),
    "tune": Kind("tune", "annotate", ("tune",), tune.tune_app),
}


def submit(
    job: Annotated[str, typer.Argument(help=f"One of: {', '.join(JOBS)}.")],
    config: ConfigOption = None,
    override: Overrides = None,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Hand it in and end, instead of showing its lines.")] = False,
    home: Annotated[str | None, typer.Option("--home", help="CELLPLANE_HOME of the job: a folder that every node sees.")] = None,
    secrets: Annotated[str | None, typer.Option("--secrets", help="File ON THE CLUSTER with lines of NAME=VALUE for the job.")] = None,
    working_dir: Annotated[Path, typer.Option("--working-dir", help="Folder that goes along, without data.")] = Path(),
    cpus: Annotated[float | None, typer.Option(min=0, help="CPUs of the entry point: fine-tuning computes there.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of the entry point.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Run a job on a cluster elsewhere. Ends with the job's exit code; Ctrl-C leaves it running.

    The same job that runs already is followed, not started twice; one that ended goes on where it was.
    """
    from cellplane.submission import Jobs, Order, target_of

    loaded = load_job(job, config, override or [])
    package = _package(working_dir, loaded)
    kept_here, environment = _environment(home, secrets)
    named = getattr(loaded, "run", None) or getattr(loaded, "out", None) or getattr(loaded, "task", None) or job
    order = Order(job, named, command_of(job, loaded), package, environment, JOBS[job].cpus if cpus is None else cpus, gpus)
    for line in kept_here:
        say(line)
    jobs = Jobs(target_of(address))
    job_id = _handed_in(jobs, order)
    if detach:
        answer({"job": job_id, "address": jobs.target.address, "follow": f"cellplane jobs logs {job_id} --follow"}, as_json)
        return
    _follow(jobs, job_id, as_json)


def load_job(job: str, config: str | None, overrides: list[str]) -> Config:
    """The checked configuration of a job; ConfigError as everywhere, without Ray."""
    from cellplane.config import find_config, load_config, read_yaml

    if job not in JOBS:
        raise ConfigError(f"no job {job!r}; there are: {', '.join(JOBS)}")
    kind = JOBS[job].kind
    name = config or JOBS[job].config
    raw = {} if name is None else read_yaml(find_config(name, kind))
    if (told := raw.get("kind", kind)) != kind:
        which = next((other for other, entry in JOBS.items() if entry.kind == told), None)
        hint = f"cellplane submit {which}" if which else f"{kind} is wanted"
        raise ConfigError(f"{name} configures {told if told in SCHEMAS else repr(told)}, not what {job} does: {hint}")
    loaded = load_config(schema_of(kind, raw), name, kind, overrides)
    command_of(job, loaded)
    return loaded


def command_of(job: str, loaded: Config) -> tuple[str, ...]:
    """What runs on the cluster, after `python -m`."""
    from cellplane.package import CONFIG

    entry = JOBS[job]
    words = entry.verb
    if entry.tasks is not None:
        known = [command.name for command in entry.tasks.registered_commands]
        if (task := getattr(loaded, "task", None)) not in known:
            raise ConfigError(f"{job} does not know the task {task!r}; it knows: {', '.join(map(str, known))}")
        words = (*words, str(task))
    return (ARRIVAL, *words, "--protocol" if hasattr(loaded, "protocol") else "--config", CONFIG)


def _package(working_dir: Path, loaded: Config) -> Package:
    """What goes along; ConfigError for paths that would mean nothing on the cluster."""
    from cellplane.config import to_plain, to_yaml
    from cellplane.package import pack

    package = pack(working_dir, to_yaml(loaded))
    package.check()
    for place, value in _paths(to_plain(loaded)):
        _check_path(place, value, working_dir, package)
    return package


def _paths(plain: Any, place: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of everything in a configuration that is a path, empty ones included."""
    if isinstance(plain, dict):
        for name, value in plain.items():
            yield from _paths(value, f"{place}.{name}" if place else name, "bases" if key == "bases" else name)
    elif isinstance(plain, list) and key in READ:
        yield from ((place, value) for value in plain or [""] if isinstance(value, str))
    elif isinstance(plain, str) and key in (*READ, *WRITTEN):
        yield place, plain


def _check_path(place: str, value: str, working_dir: Path, package: Package) -> None:
    key = place.rpartition(".")[2]
    if not value:
        raise ConfigError(f"{place} is empty: set it in the config or with -o {place}=...")
    if Path(value).is_absolute() or "://" in value or value.startswith("models:/"):
        return
    there = f"name its path on storage that every node sees, -o {place}=/..."
    if key in WRITTEN:
        raise ConfigError(f"{place} {value!r} is relative: it would be written into the job's folder and go with it; {there}")
    if package.holds(value) or (key == "base" and os.sep not in value):
        return
    if (working_dir / value).exists():
        raise ConfigError(f"{place} {value!r} lies here, and data stay here; bring it to the cluster and {there}")
    raise ConfigError(f"{place} {value!r} is relative and nothing of that name goes along; {there}")


def _environment(home: str | None, secrets: str | None) -> tuple[list[str], dict[str, str]]:
    """(what to tell the person, variables of the job). Nothing secret is among them: they stand in Ray's dashboard."""
    for option, value in (("--home", home), ("--secrets", secrets)):
        if value is not None and not Path(value).is_absolute():
            raise ConfigError(f"{option} {value!r} is a path on the cluster, so it begins with /")
    from cellplane.package import HOME, SECRETS_FILE

    given = {HOME: home, SECRETS_FILE: secrets}
    kept = [name for name in STAY_HERE if name in os.environ and secrets is None]
    told = [f"{name} stays here: put it into a file on the cluster, --secrets PATH" for name in kept]
    if tracker := os.environ.get(TRACKER):
        if _may_travel(tracker):
            given[TRACKER] = tracker
        else:
            told.append(f"{TRACKER} stays here, as the cluster cannot see what it names: the cluster's own is used")
    return told, {name: value for name, value in given.items() if value}


def _may_travel(uri: str) -> bool:
    """Whether a tracker's address means the same elsewhere, and holds no password."""
    parts = urlsplit(uri)
    here = parts.hostname in (None, "localhost", "::1") or str(parts.hostname).startswith("127.")
    return parts.scheme in ("http", "https") and not here and "@" not in parts.netloc


def _handed_in(jobs: Any, order: Order) -> str:
    job_id, began = jobs.submit(order)
    said = f"job {job_id} at {jobs.target.address}" if began else f"job {job_id} runs already; it is not started again"
    say(said)
    return str(job_id)


def _follow(jobs: Any, job_id: str, as_json: bool) -> None:
    """Shows a job's lines until it ends, and ends as it ended."""
    show: Callable[[str], None] = lambda text: typer.echo(text, nl=False, err=as_json)  # noqa: E731
    try:
        job: Job = jobs.follow(job_id, show)
    except KeyboardInterrupt:
        say(f"\njob {job_id} goes on; its lines: cellplane jobs logs {job_id} --follow, its end: cellplane jobs stop {job_id}")
        raise
    if as_json:
        answer(_plain(job), True)
    if job.exit_code and job.code is None:
        say(f"job {job_id} {job.status}: {job.message}")
    else:
        say(f"job {job_id} {job.status}, exit code {job.exit_code}")
    if job.exit_code:
        raise typer.Exit(job.exit_code)


def _plain(job: Job) -> dict[str, Any]:
    seconds = None if job.began is None or job.ended is None else round(job.ended - job.began, 1)
    began = None if job.began is None else datetime.fromtimestamp(job.began).astimezone().isoformat(timespec="seconds")
    exit_code = None if job.runs else job.exit_code
    return {"job": job.id, "status": job.status, "exit_code": exit_code, "began": began, "seconds": seconds}


@jobs_app.command("list")
def jobs_list(address: Address = None, as_json: Json = False) -> None:
    """Jobs that were handed in, the newest first."""
    from cellplane.submission import Jobs, target_of

    rows = [_plain(job) for job in Jobs(target_of(address)).all()]
    if as_json:
        answer({"jobs": rows}, True)
    elif rows:
        table(list(rows[0]), [["-" if value is None else value for value in row.values()] for row in rows])
    else:
        typer.echo("no jobs; hand one in with `cellplane submit`")


@jobs_app.command("logs")
def jobs_logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends, with its exit code.")] = False,
    as_json: Json = False,
) -> None:
    """The lines of a job."""
    from cellplane.submission import Jobs, target_of

    jobs = Jobs(target_of(address))
    if follow:
        jobs.one(job_id)
        _follow(jobs, job_id, as_json)
        return
    text = jobs.logs(job_id)
    if as_json:
        answer({"job": job_id, "logs": text}, True)
    else:
        typer.echo(text, nl=False)


@jobs_app.command("stop")
def jobs_stop(job_id: JobId, address: Address = None, as_json: Json = False) -> None:
    """Stop a job and wait until it ended. Politely first, so that it can be handed in again and goes on."""
    from cellplane.submission import Jobs, target_of

    job, now = Jobs(target_of(address)).stop(job_id)
    answer({"job": job.id, "status": job.status, "stopped": "now" if now else "had ended before"}, as_json)
