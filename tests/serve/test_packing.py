"""Requests packed into one forward get the answers they would get alone."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from cellplane.data.sentences import CellTable, MemoryStore, memory_store
from cellplane.errors import IntegrityError
from cellplane.inference import Predictor
from serve.packing import Answers, PackedStore, Packer

N_GENES = 60


def request(seed: int, like: CellTable | None = None) -> MemoryStore:
    """Random cells of a random panel; with ``like`` the same cells with one count changed, the most tempting neighbour there is."""
    rng = np.random.default_rng(seed)
    if like is not None:
        value = like.value.copy()
        value[rng.integers(len(value))] += 1
        return memory_store(CellTable(like.crow, like.gene, value, like.panel), 16)
    panel = rng.random(N_GENES) < 0.8
    genes, cells = np.flatnonzero(panel), int(rng.integers(1, 40))
    rows = [np.sort(rng.choice(genes, rng.integers(1, len(genes)), replace=False)) for _ in range(cells)]
    crow = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    value = rng.integers(1, 9, crow[-1]).astype(np.float32)
    batch = np.array([f"b{index}" for index in rng.integers(0, 3, cells)], dtype=object)
    return memory_store(CellTable(crow, np.concatenate(rows), value, panel, batch), 16)


@pytest.fixture(scope="module")
def requests() -> list[MemoryStore]:
    first = [request(seed) for seed in range(8)]
    return [*first, *(request(100 + index, store.table) for index, store in enumerate(first))]


def test_packed_requests_with_different_panels_and_near_twins_get_their_lone_answers(
    predictor: Predictor, requests: list[MemoryStore]
) -> None:
    packed = PackedStore(requests)
    embeddings = packed.split({"embedding": predictor.embed(packed)})
    answers = packed.split({"proba": predictor.annotate(packed).proba})
    for store, embedding, answer in zip(requests, embeddings, answers, strict=True):
        np.testing.assert_allclose(embedding["embedding"], predictor.embed(store), atol=1e-5)
        np.testing.assert_allclose(answer["proba"], predictor.annotate(store).proba, atol=1e-5)
    twins = np.abs(embeddings[0]["embedding"] - embeddings[8]["embedding"]).max()
    assert twins > 1e-4, "the twins must differ, or a leak would not show"


class Counting:
    """Asks the predictor, one call at a time, and waits for the first until others have queued up."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.cells, self.go = predictor, [], threading.Event()

    def __call__(self, task: str, store: PackedStore) -> Answers:
        assert self.go.wait(10)
        self.cells.append(int(store.sizes.sum()))
        return {"embedding": self.predictor.embed(store)}


def test_what_waits_together_is_asked_together_within_the_budget(predictor: Predictor, requests: list[MemoryStore]) -> None:
    counting = Counting(predictor)

    async def crowd() -> list[Answers]:
        packer = Packer(counting, max_cells=100)
        waiting = [asyncio.create_task(packer("embed", store)) for store in requests]
        await asyncio.sleep(0.05)
        counting.go.set()
        answers = await asyncio.gather(*waiting)
        assert (packer.requests, packer.forwards) == (len(requests), len(counting.cells))
        return answers

    answers = asyncio.run(crowd())
    assert max(counting.cells) <= 100
    assert len(counting.cells) < len(requests) / 2
    for store, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer["embedding"], predictor.embed(store), atol=1e-5)


def test_one_request_that_fails_does_not_take_the_others_along(predictor: Predictor, requests: list[MemoryStore]) -> None:
    bad = requests[3]

    def ask(task: str, store: PackedStore) -> Answers:
        if bad in store.parts:
            raise IntegrityError("these cells give NaN")
        return {"embedding": predictor.embed(store)}

    async def crowd() -> list[Answers | BaseException]:
        packer = Packer(ask, max_cells=10_000)
        return await asyncio.gather(*(packer("embed", store) for store in requests), return_exceptions=True)

    outcomes = asyncio.run(crowd())
    assert [index for index, outcome in enumerate(outcomes) if isinstance(outcome, IntegrityError)] == [3]


def test_tasks_are_not_mixed_and_callers_who_left_are_forgotten(predictor: Predictor, requests: list[MemoryStore]) -> None:
    asked: list[tuple[str, int]] = []

    def ask(task: str, store: PackedStore) -> Answers:
        asked.append((task, len(store.parts)))
        return {"embedding": np.zeros((int(store.sizes.sum()), 1), dtype=np.float32)}

    async def crowd() -> None:
        packer = Packer(ask, max_cells=10_000)
        tasks = [asyncio.create_task(packer(task, requests[0])) for task in ("embed", "annotate", "embed", "annotate")]
        gone = asyncio.create_task(packer("embed", requests[1]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(*tasks)

    asyncio.run(crowd())
    assert sorted(asked) == [("annotate", 2), ("embed", 2)]
