"""A run's newest figures for Prometheus, read from its journal by a thread beside the training.

The journal stays the truth and training does not wait: a thread looks at the journal's end every few seconds. Whoever has
Ray's door (train/launch.py) hands in how a gauge is set.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

Set = Callable[[str, float], None]
GAUGES = {  # exported by Ray under ray_NAME, with the label `run`
    "cellplane_train_step": "Optimizer steps done.",
    "cellplane_train_loss": "Loss of the newest step, nats a cell.",
    "cellplane_train_grad_norm": "Norm of the gradient before clipping.",
    "cellplane_train_nan_skips": "Steps skipped so far because their numbers could not be trusted.",
    "cellplane_train_cells_per_s": "Planned cells of all workers a second.",
    "cellplane_train_mfu": "Share of the devices' peak that products with a purpose took.",
    "cellplane_train_data_wait_s": "Seconds the newest step waited for its cells.",
    "cellplane_val_loss": "Loss on held-out sentences, nats a cell.",
}
EVERY_S = 10.0
TAIL_BYTES = 64 * 1024  # some hundred rows, an evaluation among them


def newest(journal: Path) -> dict[str, float]:
    """The newest value of every gauge that the end of a journal tells; empty before the first step."""
    try:
        with journal.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
            lines = file.read().split(b"\n")[:-1]  # behind the last newline is nothing, or a torn line
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        try:
            row = json.loads(line)
            found["cellplane_train_step"] = max(found.get("cellplane_train_step", 0.0), float(row["step"]))
            found |= {f"cellplane_{key.replace('/', '_')}": float(value) for key, value in row["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the first line of the tail may have been cut
    return {name: value for name, value in found.items() if name in GAUGES}


@contextmanager
def exported(journal: Path, set_gauge: Set, every_s: float = EVERY_S) -> Iterator[None]:
    """Sets gauges from the journal while the block runs, and once at its end. Trouble with them is told and ends nothing."""
    ended = threading.Event()

    def look() -> None:
        try:
            for name, value in newest(journal).items():
                set_gauge(name, value)
        except Exception as error:  # of figures that are shown: training goes on
            log.warning("figures of %s could not be exported: %s", journal, error)

    def follow() -> None:
        while not ended.wait(every_s):
            look()

    thread = threading.Thread(target=follow, name="gauges", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
