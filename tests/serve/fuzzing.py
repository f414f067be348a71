"""Spoiled requests without end, the same ones for the same seed, and a run that says what became of them.

    python -m tests.serve.fuzzing MODEL_FOLDER 10000 0

Every request begins as one the endpoint answers; then its bytes, its JSON tree or its Arrow columns are changed, so
that each layer is reached by what the layers before let pass. The last line printed is the report, JSON.
"""

from __future__ import annotations

import asyncio
import copy
import faulthandler
import json
import logging
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from cellplane.client import ARROW_TYPE, GENE_IDS, JSON_TYPE, N_ROWS, REQUEST_COLUMNS
from serve.limits import HEADER_LENGTH, OCTETS
from tests.serve.wire import GENE_NAMES, MLFLOW, OIP, Answered, Ask, application, arrow_table, exchange, good_asks, oip_binary

TASKS = ("annotate", "embed", "denoise", "impute", "perturb", "")
EDITS = (1, 1, 1, 2, 3)  # at once
Tasks = Sequence[str]
HANG_S = 30.0  # then the process ends itself with every thread's stack
EDGES = (0, 1, -1, 2, 2**15, 2**24, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**40, 2**63 - 1, -(2**63))
MARKS = {"@deep": "[" * 3000 + "]" * 3000, "@cut": '{"a":' * 2000, "@huge": "1" * 5000, "@inf": "1e999", "@surrogate": '"\\ud800"'}
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "a" * 3000,
    "\x00",
    [],
    {},
    [[]],
    [[[1]]],
    0.5,
    -0.0,
    1e308,
    1e-320,
    10**30,
    *EDGES,
    *MARKS,
)
VALUES += (math.nan, math.inf, -math.inf, "GENE0001", "NaN", "../../x", [None], {"a": {"b": [1]}}, list(range(300)))
TYPES = (pa.int8(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.bool_(), pa.binary(), pa.list_(pa.int32()))
TYPES += (pa.list_(pa.float32()), pa.large_list(pa.int32()), pa.list_(pa.float32(), 2), pa.dictionary(pa.int32(), pa.string()), pa.null())
NAMES = ("gene", "count", "counts", "batch", "sentence", "x_um", "y_um", "cell_id", "role", "surprise")
ACCEPTS = ("", "*/*", ARROW_TYPE, JSON_TYPE, "text/html", "application/*;q=x", ",,,", "\xff")
QUERIES = (
    *[""] * 12,
    "?context=self",
    "?context=panel",
    "?genes=GENE0050,GENE0051",
    "?genes=,",
    "?min_correlation=1",
    "?reference=x",
    "?by_group=true",
)
QUERIES += (
    "?perturbation=GENE0013",
    "?perturbation=GENE0013%2BGENE0058,GENE0001",
    "?kind=crispri",
    "?fallback=",
    "?threshold=nan",
    "?threshold=1e400",
    "?top_k=" + "9" * 400,
    "?top_k=2",
    "?dtype=float16",
    "?dtype=",
    "?%ff=%00",
)


def spoiled(seed: int, index: int, tasks: Tasks = ("annotate", "embed")) -> tuple[str, Ask]:
    """(kind, request) number ``index`` of a seed, mostly about tasks the model has."""
    rng = Random(f"{seed}/{index}")
    kind = rng.choice(tuple(KINDS))
    return kind, KINDS[kind](rng, tasks)


def _bytes(rng: Random, tasks: Tasks) -> Ask:
    """A good body of any format with its bytes changed."""
    asks = good_asks(tasks)
    ask = asks[rng.choice(tuple(asks))]
    body = ask.chunks[0]
    for _ in range(rng.choice(EDITS)):
        body = rng.choice(BYTE_EDITS)(rng, bytearray(body), rng.choice(list(asks.values())).chunks[0])
    return _sent(rng, tasks, ask, body)


def _noise(rng: Random, tasks: Tasks) -> Ask:
    """Anything at all, at any door."""
    ask = rng.choice(list(good_asks(tasks).values()))
    return _sent(rng, tasks, ask, rng.randbytes(rng.choice((1, 7, 64, 1000, 50_000))))


def _tree(rng: Random, tasks: Tasks) -> Ask:
    """JSON that is well formed and says something else."""
    asks = [ask for ask in good_asks(tasks).values() if ask.kind == JSON_TYPE]
    ask = rng.choice(asks)
    return _sent(rng, tasks, ask, _written(_edited(rng, json.loads(ask.chunks[0]))))


def _tensors(rng: Random, tasks: Tasks) -> Ask:
    """Binary tensors whose JSON part was edited, whose bytes were changed, or whose length is told wrongly."""
    body, header = oip_binary({"parameters": {"task": _task(rng, tasks), "binary_data_output": True}})
    length = int(header[HEADER_LENGTH])
    text, blob = body[:length], body[length:]
    if rng.random() < 0.7:
        text = _written(_edited(rng, json.loads(text)))
    if rng.random() < 0.5:
        blob = rng.choice(BYTE_EDITS)(rng, bytearray(blob), text)
    told = (
        str(len(text))
        if rng.random() < 0.9
        else rng.choice(("0", "-1", "9" * 30, "0" * 5000, "x", "1e3", str(len(text) - 1), str(len(text) + 4)))
    )
    return Ask(OIP, (text + blob,), rng.choice((OCTETS, OCTETS, "", JSON_TYPE)), {HEADER_LENGTH: told})


def _columns(rng: Random, tasks: Tasks) -> Ask:
    """A whole Arrow stream with other columns, types, rows, batches or metadata than it should have."""
    columns = {name: column for name, column in zip(arrow_table().column_names, arrow_table().columns, strict=True)}
    for _ in range(rng.randint(0, 2)):
        name = rng.choice(NAMES)
        columns[name] = _random_column(rng, name, rng.choice((3, 3, 3, 3, 1, 0)))
    rows = len(next(iter(columns.values())))
    table = pa.table({name: column for name, column in columns.items() if len(column) == rows})
    metadata: dict[str, str] = {GENE_IDS: json.dumps(GENE_NAMES), N_ROWS: str(table.num_rows)}
    if rng.random() < 0.3:
        metadata[rng.choice((GENE_IDS, N_ROWS, "more"))] = _written(rng.choice(VALUES)).decode()
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression=rng.choice((None, "zstd", "lz4")))
    with pa.ipc.new_stream(sink, table.schema.with_metadata(metadata), options=options) as writer:
        for batch in table.to_batches(max_chunksize=rng.choice((1, 2, 100))):
            writer.write_batch(batch.replace_schema_metadata(metadata))
    body = bytes(sink.getvalue().to_pybytes())
    if rng.random() < 0.5:
        body = rng.choice(BYTE_EDITS)(rng, bytearray(body), body)
    return _sent(rng, tasks, good_asks(tasks)["arrow"], body)


def _random_column(rng: Random, name: str, rows: int) -> pa.Array:
    """Of the right type with odd values, or of any other."""
    kind = REQUEST_COLUMNS.get(name, pa.string()) if rng.random() < 0.7 else rng.choice(TYPES)
    values = [rng.choice((None, [], [1], [0, 1], [4], [19, 19], "a", "b", 1, 0.5, 2**31 - 1)) for _ in range(rows)]
    fitting = [value for value in values if isinstance(value, list) == pa.types.is_nested(kind)] or [None]
    try:
        return pa.array([rng.choice(fitting) for _ in range(rows)], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.nulls(rows, kind)


def _sent(rng: Random, tasks: Tasks, ask: Ask, body: bytes) -> Ask:
    """The body in one piece or several, to any task, with any options."""
    target = ask.target
    if target not in (OIP, MLFLOW):
        target = f"/v1/models/tiny{rng.choice(('', ':3', '@champion'))}/{_task(rng, tasks)}{rng.choice(QUERIES)}"
    cut = rng.randint(0, len(body))
    chunks = (body,) if rng.random() < 0.8 else (body[:cut], body[cut:])
    headers = {**ask.headers, "accept": rng.choice(ACCEPTS)} if rng.random() < 0.2 else ask.headers
    return replace(ask, target=target, chunks=chunks, headers=headers)


def _task(rng: Random, tasks: Tasks) -> str:
    return rng.choice(tasks if rng.random() < 0.8 else TASKS)


KINDS: dict[str, Callable[[Random, Tasks], Ask]] = {
    "bytes": _bytes,
    "noise": _noise,
    "tree": _tree,
    "tensors": _tensors,
    "columns": _columns,
}


def _place(rng: Random, body: bytearray, width: int = 1) -> int:
    return rng.randint(0, max(0, len(body) - width))


def _flip(rng: Random, body: bytearray, _: bytes) -> bytes:
    for _ in range(rng.randint(1, 8)):
        if body:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body)


def _cut(rng: Random, body: bytearray, _: bytes) -> bytes:
    return bytes(body[: _place(rng, body)])


def _drop(rng: Random, body: bytearray, _: bytes) -> bytes:
    at = _place(rng, body)
    return bytes(body[:at] + body[at + rng.randint(1, 40) :])


def _insert(rng: Random, body: bytearray, _: bytes) -> bytes:
    at = _place(rng, body)
    return bytes(body[:at] + rng.randbytes(rng.randint(1, 40)) + body[at:])


def _repeat(rng: Random, body: bytearray, _: bytes) -> bytes:
    at, width = _place(rng, body), rng.randint(1, 200)
    return bytes(body[:at] + body[at : at + width] * rng.choice((2, 3, 50)) + body[at + width :])


def _splice(rng: Random, body: bytearray, other: bytes) -> bytes:
    return bytes(body[: _place(rng, body)]) + other[rng.randint(0, len(other)) :]


def _number(rng: Random, body: bytearray, _: bytes) -> bytes:
    """A length, an offset or a count becomes another one: any aligned word, 4 or 8 bytes."""
    width = rng.choice((4, 8))
    at = _place(rng, body, width) // 4 * 4
    body[at : at + width] = (rng.choice((*EDGES, len(body), rng.randrange(5000))) % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(body)


def _swap(rng: Random, body: bytearray, _: bytes) -> bytes:
    """Two words change places."""
    one, two = (_place(rng, body, 4) // 4 * 4 for _ in range(2))
    body[one : one + 4], body[two : two + 4] = body[two : two + 4], body[one : one + 4]
    return bytes(body)


BYTE_EDITS = (_flip, _flip, _cut, _drop, _insert, _repeat, _splice, _number, _number, _number, _swap)


def _edited(rng: Random, tree: Any) -> Any:
    """The tree with one to three nodes replaced, renamed, doubled or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice(EDITS)):
        nodes = list(_nodes(tree))
        if not nodes:
            return rng.choice(VALUES)
        parent, key = rng.choice(nodes)
        move = rng.random()
        if move < 0.6:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif move < 0.75:
            del parent[key]
        elif isinstance(parent, list):
            parent[key:key] = [parent[key]] * rng.choice((1, 2, 120))
        else:
            parent[rng.choice(("surprise", "parameters", "binary_data_size", "", "task", "shape"))] = parent.pop(key)
    return tree


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found += [(tree, key), *_nodes(tree[key])]
    return found


def _written(tree: Any) -> bytes:
    text = json.dumps(tree)
    for mark, meant in MARKS.items():
        text = text.replace(f'"{mark}"', meant)
    return text.encode()


def judged(answer: Answered) -> str:
    """What is wrong with an answer to a spoiled request, empty when nothing is."""
    if answer.status >= 500:
        return f"status {answer.status}: {answer.body[:200]!r}"
    if answer.status == 200:
        return ""
    try:
        said = answer.json()
    except ValueError:
        return f"a refusal that is not JSON: {answer.body[:200]!r}"
    plain = set(said) <= {"error", "code"} and isinstance(said.get("error"), str)
    return "" if plain and answer.status in (400, 404, 406, 409, 413, 415, 422) else f"status {answer.status}: {said}"


def run(model: Path, n_requests: int, seed: int) -> dict[str, Any]:
    """The report over so many requests: statuses by kind, what was wrong, the slowest, how much memory more it took at the most."""
    app, faults, statuses, slowest = application(model), list[str](), Counter[str](), (0.0, -1)

    async def everything() -> None:
        nonlocal slowest
        tasks = (await exchange(app, Ask("/v1/models/tiny", kind="", method="GET"))).json()["tasks"]
        for ask in good_asks(tasks).values():
            assert (await exchange(app, ask)).status == 200
        for index in range(n_requests):
            kind, ask = spoiled(seed, index, tasks)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            began = time.perf_counter()
            answer = await exchange(app, ask)
            slowest = max(slowest, (time.perf_counter() - began, index))
            statuses[f"{kind} {answer.status}"] += 1
            if fault := judged(answer):
                faults.append(f"seed {seed} index {index} ({kind}): {fault}")
        faulthandler.cancel_dump_traceback_later()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    asyncio.run(everything())
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    told = {"requests": n_requests, "seconds": round(time.perf_counter() - began, 1), "faults": faults[:20], "n_faults": len(faults)}
    return told | {
        "slowest_s": round(slowest[0], 3),
        "slowest_index": slowest[1],
        "grown_mib": grown_mib,
        "statuses": dict(sorted(statuses.items())),
    }


if __name__ == "__main__":
    logging.disable()
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
