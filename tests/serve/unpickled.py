"""Everything a served model reads, with an ear at the interpreter: loads a folder, decodes every format, answers every task.

    python -m tests.serve.unpickled MODEL_FOLDER ...

A process of its own without Ray, whose replicas unpickle their metadata. The last line printed is the report, JSON.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from pathlib import Path
from typing import Any

from tests.serve.wire import MLFLOW, OIP, Ask, application, exchange, good_asks, mlflow_body, oip_body

HEARD: list[str] = []


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook; it cannot be taken away again."""
    if event == "pickle.find_class":
        HEARD.append(".".join(map(str, arguments)))


def run(models: list[Path]) -> dict[str, Any]:
    """Statuses by request, what was unpickled by then, and what is heard of a pickle that is read on purpose."""
    sys.addaudithook(listen)
    statuses = {f"{model.name} {name}": status for model in models for name, status in asked(model).items()}
    before = list(HEARD)
    pickle.loads(pickle.dumps(Path("x")))
    return {"statuses": statuses, "heard": before, "control": HEARD[len(before) :]}


def asked(model: Path) -> dict[str, int]:
    """The status of a request of every format for every task the model has."""
    app = application(model)

    async def everything() -> dict[str, int]:
        tasks = (await exchange(app, Ask("/v1/models/tiny", kind="", method="GET"))).json()["tasks"]
        asks = {f"{task} {name}": ask for task in tasks for name, ask in good_asks((task,)).items()}
        asks |= {f"{task} oip": Ask(OIP, (oip_body({"parameters": {"task": task}}),)) for task in tasks}
        asks |= {f"{task} mlflow": Ask(MLFLOW, (mlflow_body(params={"task": task}),)) for task in tasks}
        asks |= {f"get {path}": Ask(path, kind="", method="GET") for path in ("/v1/models/tiny/card", "/v1/models/tiny/genes", "/metrics")}
        asks |= {"a pickle": Ask(chunks=(pickle.dumps(Path("x")),))}
        return {name: (await exchange(app, ask)).status for name, ask in asks.items()}

    return asyncio.run(everything())


if __name__ == "__main__":
    print(json.dumps(run([Path(folder) for folder in sys.argv[1:]])))
