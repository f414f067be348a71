"""`cellplane gc`: what may go from CELLPLANE_HOME, listed first, removed when asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellplane.cli.common import Json, answer, say, table

if TYPE_CHECKING:
    from cellplane.cleanup import Item, Survey

UNITS = ("B", "kB", "MB", "GB", "TB")


def gc(
    runs: Annotated[
        float | None, typer.Option(help="Also finished runs untouched for so many days that no registered model, tag or model refers to.")
    ] = None,
    unfinished: Annotated[float | None, typer.Option(help="Also runs that never wrote a model, untouched for so many days.")] = None,
    caches: Annotated[float, typer.Option(help="Caches not read for so many days.")] = 30.0,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is listed, after asking.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove what is listed without asking.")] = False,
    tracking_uri: Annotated[str | None, typer.Option(help="Default: $MLFLOW_TRACKING_URI, the running stack or the local one.")] = None,
    as_json: Json = False,
) -> None:
    """List what nothing needs any more. Surplus checkpoints, leftovers, old caches under CELLPLANE_HOME; --remove removes it."""
    from cellplane.cleanup import Wanted, survey
    from cellplane.cleanup import remove as remove_items
    from cellplane.cli.common import use_running_stack
    from cellplane.errors import ConfigError, StorageError

    _check_days(runs, unfinished, caches)
    if remove and not yes and not sys.stdin.isatty():
        raise ConfigError("--remove asks before it removes, and nobody is here to answer: add --yes, or leave it out to only list")
    use_running_stack()
    found = survey(Wanted(runs_days=runs, unfinished_days=unfinished, caches_days=caches), tracking_uri)
    if not as_json:
        _show(found)
    asked = yes or (remove and bool(found.items) and typer.confirm(f"Remove {len(found.items)} items, {size(found.bytes)}?", err=True))
    removed, kept = remove_items(found.items) if asked else ([], [])
    if as_json:
        answer(_plain(found, removed), True)
    elif asked:
        typer.echo(f"removed {len(removed)} items, {size(sum(item.bytes for item in removed))}")
    elif found.items:
        typer.echo("nothing was removed; `cellplane gc --remove` removes what is listed")
    if kept:
        raise StorageError("; ".join(f"{item.path} stays: {why}" for item, why in kept))


def _check_days(*options: float | None) -> None:
    from cellplane.errors import ConfigError

    if any(days is not None and not days >= 0 for days in options):
        raise ConfigError("--runs, --unfinished and --caches are days: 0 or more")


def _show(found: Survey) -> None:
    if found.items:
        table(["kind", "size", "path", "why"], [[item.kind, size(item.bytes), item.path, item.why] for item in found.items])
        typer.echo(f"{len(found.items)} items, {size(found.bytes)}")
    else:
        typer.echo("nothing to remove")
    for path in found.in_use:
        say(f"in use, or changed within the hour: {path}")
    for note in found.notes:
        say(note)


def _plain(found: Survey, removed: Sequence[Item]) -> dict[str, Any]:
    gone = {item.path for item in removed}
    items = [
        {"kind": item.kind, "path": str(item.path), "bytes": item.bytes, "why": item.why, "removed": item.path in gone}
        for item in found.items
    ]
    return {"items": items, "bytes": found.bytes, "in_use": [str(path) for path in found.in_use], "notes": list(found.notes)}


def size(number: float) -> str:
    """A number of bytes for people, 1 kB = 1,000 bytes."""
    for unit in UNITS[:-1]:
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} {UNITS[-1]}"
