"""A measurement inside a worker of Ray Train: the process, environment and thread count that training has."""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import ray


def in_train_worker(module: str, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a function of a module answers in the one worker of a Ray of its own: something that JSON can hold."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="cp-", ignore_cleanup_errors=True) as temporary:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=temporary, log_to_driver=False, logging_level=logging.ERROR
        )
        try:
            answer = Path(temporary) / "answer.json"
            TorchTrainer(
                _worker,
                train_loop_config={"module": module, "function": function, "arguments": arguments, "answer": str(answer)},
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(name="read", storage_path=str(Path(temporary) / "runs")),
            ).fit()
            found: dict[str, Any] = json.loads(answer.read_bytes())
        finally:
            ray.shutdown()
    return found


def _worker(settings: dict[str, Any]) -> None:
    function = getattr(importlib.import_module(settings["module"]), settings["function"])
    Path(settings["answer"]).write_text(json.dumps(function(**settings["arguments"])))
