"""What the tracker still refers to: the models that are registered and the runs that a person wants to keep.

A run is kept by a tag: `cellplane.keep`, with any value, set in MLflow's user interface or by a script.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.tracking.registry import list_models
from cellplane.tracking.runs import RUN_KEY, connect, resolve_uri, tracker_errors

KEEP_TAG = "cellplane.keep"
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class References:
    """sha256 of every registered model; names of the runs (second part of their key) whose tag says to keep them."""

    model_sha256: frozenset[str]
    run_names: frozenset[str]


def references(uri: str | None = None) -> References:
    """What the tracker refers to; nothing when its database was never made. ServiceError when it cannot be reached."""
    address = resolve_uri(uri)
    if address.startswith(SQLITE) and not Path(address.removeprefix(SQLITE)).is_file():
        return References(frozenset(), frozenset())
    client = connect(address)
    with tracker_errors(address):
        experiments = [experiment.experiment_id for experiment in _pages(client, None)]
        kept = [run.data.tags.get(RUN_KEY, "") for run in _pages(client, experiments)] if experiments else []
    registered = frozenset(model.model_sha256 for model in list_models(address) if model.model_sha256)
    return References(registered, frozenset(key.split(":")[1] for key in kept if key.count(":") >= 1))


def _pages(client: Any, experiments: list[str] | None) -> Iterator[Any]:
    """All experiments, or all runs of these that are to be kept."""
    token = None
    while True:
        if experiments is None:
            page = client.search_experiments(page_token=token)
        else:
            page = client.search_runs(experiments, f"tags.`{KEEP_TAG}` LIKE '%'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return
