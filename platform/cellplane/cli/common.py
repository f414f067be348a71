"""What verbs share: their common options, printing results, and showing progress: a bar to a person, a line now and then to a log."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from cellplane.logs import duration

ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="YAML file, or the name of a shipped one.")]
LINE_EVERY_S = 30.0  # of progress, where standard error is no terminal
OVERRIDE_HELP = "Change one key of the config: -o KEY=VALUE, a.b=c for one in a section. May be repeated."
Overrides = Annotated[list[str] | None, typer.Option("--override", "-o", help=OVERRIDE_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def given(values: Mapping[str, object]) -> list[str]:
    """Overrides for the options that were given, {"a.b": value}, quoted so that any path survives."""
    chosen = {key: value for key, value in values.items() if value is not None and value is not False and value != []}  # 0 is a choice
    return [f"{key}={json.dumps(_plain(value))}" for key, value in chosen.items()]


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float) else str(value)


def use_running_stack() -> None:
    """Records runs at the MLflow of the running local stack, unless the environment names another."""
    if "MLFLOW_TRACKING_URI" in os.environ:
        return
    from cellplane.cluster import running

    stack = running()
    if stack is not None:
        os.environ["MLFLOW_TRACKING_URI"] = stack.mlflow_uri


def answer(values: Mapping[str, Any], as_json: bool) -> None:
    """Prints a result: `key  value` lines, or one JSON object."""
    if as_json:
        typer.echo(json.dumps(values, default=str))
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        typer.echo(f"{key.replace('_', ' '):<{width}}  {value}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints aligned columns."""
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        typer.echo("  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip())


def report_of(report: Any) -> dict[str, Any]:
    """What to print of a job's report."""
    return {
        "model": report.model,
        "steps": report.steps,
        "reused": report.reused,
        "seconds": round(report.seconds, 1),
        "run_id": report.run_id or "not tracked",
        "version": report.version or "not registered",
    }


def scores_table(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Prints scores by method."""
    metrics = list(next(iter(scores.values())))
    table(["method", *metrics], [[method, *(f"{row[metric]:.3f}" for metric in metrics)] for method, row in scores.items()])


def say(text: str) -> None:
    """A line about what goes on, kept out of the result on standard output."""
    typer.echo(text, err=True)


@contextmanager
def progress(title: str, then: str = "") -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """A progress bar with the newest loss on a terminal, and what comes ``then``; elsewhere, as in a job's log, a line now and then."""
    if not sys.stderr.isatty():
        yield _now_and_then(title, then)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note_column = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note_column, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="starting")

        def show(done: int, total: int, metrics: Mapping[str, float]) -> None:
            note = _newest(metrics)
            bar.update(task, completed=done, total=total, note=f"{note}  {then}" if done >= total else note)

        yield show


def _now_and_then(title: str, then: str) -> Callable[[int, int, Mapping[str, float]], None]:
    began = said = time.monotonic()

    def show(done: int, total: int, metrics: Mapping[str, float]) -> None:
        nonlocal said
        now = time.monotonic()
        last = done >= total and said > began
        if now - said < LINE_EVERY_S and not last:
            return
        said = now
        left = f"about {duration((now - began) / done * (total - done))} left" if 0 < done < total else then
        say("  ".join(filter(None, (f"{title}: {done} of {total}", _newest(metrics), left))))

    return show


def _newest(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{key.split('/')[-1]} {metrics[key]:.4g}" for key in ("train/loss", "val/macro_f1") if key in metrics)


@contextmanager
def live() -> Iterator[Callable[[str], None]]:
    """`say`, on a terminal in one line that changes."""
    if not sys.stderr.isatty():
        yield say
        return
    from rich.console import Console

    console = Console(stderr=True)
    last = ""
    with console.status("") as status:

        def tell(text: str) -> None:
            nonlocal last
            last = text
            status.update(text)

        yield tell
    say(last)


def human_bytes(size: float) -> str:
    """`812 B`, `3.4 KiB`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def seconds_since(began: float) -> str:
    """`12.3 s` since a time.monotonic() moment."""
    return f"{time.monotonic() - began:.1f} s"
