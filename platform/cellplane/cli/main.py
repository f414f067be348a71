"""The `cellplane` command: its verbs, and how errors end.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 data invalid, 4 cluster or service unreachable. Heavy libraries
are imported by the verb that needs them, so that `cellplane --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

import cellplane
from cellplane.cli import annotate, data, diff, finetune, gc, k8s, models, ops, plan, predict, serve, submit, train, try_, tune
from cellplane.errors import CellplaneError
from cellplane.logs import FORMAT_VARIABLE, start_logging

log = logging.getLogger(__name__)

INTERRUPTED = 130  # the shell's code for Ctrl-C

app = typer.Typer(
    name="cellplane",
    help="Pre-train, fine-tune, version and serve cell language models, from AnnData to endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(ops.config_app, name="config")
app.add_typer(finetune.finetune_app, name="finetune")
app.add_typer(tune.tune_app, name="tune")
app.add_typer(try_.try_app, name="try")
app.add_typer(train.evaluate_app, name="evaluate")
app.add_typer(predict.predict_app, name="predict")
app.add_typer(k8s.k8s_app, name="k8s")
app.add_typer(submit.jobs_app, name="jobs")
app.command("annotate")(annotate.annotate)
app.command("pretrain")(train.pretrain)
app.command("plan")(plan.plan)
app.command("diff")(diff.diff)
app.command("serve")(serve.serve)
app.command("submit")(submit.submit)
app.command("demo")(ops.demo)
app.command("doctor")(ops.doctor)
app.command("up")(ops.up)
app.command("down")(ops.down)
app.command("status")(ops.status)
app.command("gc")(gc.gc)
app.command("inventory")(ops.inventory)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cellplane {cellplane.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")] = False,  # noqa: ARG001
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what goes on inside.")] = False,
) -> None:
    """Options of every verb."""
    start_logging(logging.INFO if verbose else logging.WARNING)


def main(arguments: list[str] | None = None, command: typer.Typer = app) -> int:
    """Runs one command; every error we know becomes one message and its exit code."""
    debug = os.environ.get("CELLPLANE_DEBUG") == "1"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # a polite kill ends what was started, as Ctrl-C does
    try:
        if command is not app:  # a job has no options of ours before its verb
            start_logging(logging.WARNING)
        code = command(args=arguments, standalone_mode=False)
    except CellplaneError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            if debug:
                raise
            code = _fault(error, arguments, command is app)  # not a usage error of the command line: a defect, shown whole
        else:
            error.show()
            code = error.exit_code
    if code == INTERRUPTED:  # typer itself turns Ctrl-C inside a verb into this code, in silence
        typer.echo("stopped; run the same command again to go on from here", err=True)
    return code if isinstance(code, int) else 0


def _fault(error: Exception, arguments: list[str] | None, is_verb: bool) -> int:
    """Shows an error that nobody foresaw, and what to tell whoever can mend it; the exit code."""
    if os.environ.get(FORMAT_VARIABLE) == "json":
        log.error("an unexpected error ended the command", exc_info=error)
    else:
        traceback.print_exception(error)
    called = ["cellplane"] if is_verb else ["python", "-m", f"jobs.{Path(sys.argv[0]).stem}"]
    told = shlex.join([*called, *(sys.argv[1:] if arguments is None else arguments)])
    machine = f"cellplane {cellplane.__version__}, Python {platform.python_version()}, {platform.platform()}"
    typer.echo(
        f"error: {type(error).__name__}: nobody foresaw this, it is a fault of cellplane and not yours. Please report it with all lines "
        f"above and these two, private names left out:\n  command  {told}\n  version  {machine}\n"
        "To go on: the same command again, with --verbose for more about what it does; finished parts of the work are kept.",
        err=True,
    )
    return CellplaneError.exit_code


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def run_job(verb: Callable[..., None], tasks: typer.Typer | None = None) -> None:
    """Entry point of `python -m jobs.NAME`: the same function, options and exit codes as the verb of the command line.

    The first word may name another of ``tasks``: `python -m jobs.finetune denoise ...`.
    """
    if tasks is not None and {*sys.argv[1:2]} & {command.name for command in tasks.registered_commands}:
        sys.exit(main(sys.argv[1:], tasks))
    job = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    job.command()(verb)
    sys.exit(main(None, job))


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
