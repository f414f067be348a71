"""Measurements on a Ray of their own: inside a worker of Ray Train, and a conversion watched from outside."""

from __future__ import annotations

import importlib
import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cellplane.benchmark.worker import resident_bytes, serve
from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import convert
from cellplane.processes import this_process, usage


def in_train_worker(module: str, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a function of a module answers in the one worker of a Ray of its own: something that JSON can hold."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with _own_ray() as temporary:
        answer = Path(temporary) / "answer.json"
        TorchTrainer(
            _worker,
            train_loop_config={"module": module, "function": function, "arguments": arguments, "answer": str(answer)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="read", storage_path=str(Path(temporary) / "runs")),
        ).fit()
        found: dict[str, Any] = json.loads(answer.read_bytes())
    return found


@contextmanager
def _own_ray() -> Iterator[str]:
    """A Ray of two CPUs that ends with the block, and its temporary folder."""
    with tempfile.TemporaryDirectory(prefix="cp-", ignore_cleanup_errors=True) as temporary:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=temporary, log_to_driver=False, logging_level=logging.ERROR
        )
        try:
            yield temporary
        finally:
            ray.shutdown()


def _worker(settings: dict[str, Any]) -> None:
    function = getattr(importlib.import_module(settings["module"]), settings["function"])
    Path(settings["answer"]).write_text(json.dumps(function(**settings["arguments"])))


def convert_watched(sources: list[str], out: str) -> dict[str, Any]:
    """A conversion with Ray's workers: ``shares`` [(seconds, part done)] and what its processes took.

    ``peaks`` [(seconds, bytes)] is the largest anonymous memory of a worker at that moment, ``cpu_s`` that of all workers
    and of this process.
    """
    config = ConvertConfig(inputs=tuple(sources), out=out, keys=DataKeys(batch_key="batch"))
    shares: list[tuple[float, float]] = []
    with _own_ray():
        began, cpu = time.perf_counter(), time.process_time()

        def heard(text: str) -> None:
            if told := re.search(r"(\d+) % done", text):
                shares.append((time.perf_counter() - began, int(told[1]) / 100))

        with _Workers(began) as workers:
            report = convert(config, heard)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "cells": report.cells,
        "wall_s": seconds,
        "cpu_s": cpu + workers.cpu_s,
        "shares": shares,
        "peaks": workers.peaks,
        "driver_bytes": resident_bytes("VmHWM"),
    }


class _Workers:
    """Looks every second at the workers that Ray started below this process."""

    def __init__(self, began: float) -> None:
        self.peaks: list[tuple[float, int]] = []
        self._began, self._seconds, self._done = began, dict[int, float](), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def cpu_s(self) -> float:
        """What they computed."""
        return sum(self._seconds.values())

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            found = usage(this_process().family(), "ray::")
            self._seconds |= {pid: seconds for pid, (seconds, _) in found.items()}
            self.peaks.append((time.perf_counter() - self._began, max((size for _, size in found.values()), default=0)))

    def __enter__(self) -> _Workers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    serve({"convert_watched": convert_watched})
