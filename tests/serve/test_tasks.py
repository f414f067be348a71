"""Denoising over the wire, from a model that learned two batches: the offline rates, whoever else asks at the time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData
from cellplane.errors import ServiceError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor, denoise
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import ModelConfig
from serve.codec import Cells, decode
from serve.deployment import ServeConfig
from serve.limits import Limits
from serve.options import Options, read_options
from serve.replica import ModelReplica
from serve.routes import Version
from serve.tasks import Question
from tests.serve.conftest import GENES, MAX_CELLS

BATCHES = ("batch_0", "batch_1")


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    config = ModelConfig(n_genes=len(GENES), width=32, n_blocks=1, n_heads=2, latent="ae", latent_width=8, n_batches=2, gene_init_sd=0.5)
    model = ModelFolder(
        config=config,
        weights=CellPLM(config).state_dict(),
        vocabulary=GeneVocabulary.from_ids(GENES),
        task="denoise",
        max_cells=MAX_CELLS,
        lineage={"batches": json.dumps(BATCHES)},
    )
    return save_model(model, tmp_path_factory.mktemp("model") / "denoiser")


@pytest.fixture(scope="module")
def replica(denoiser: Path) -> ModelReplica:
    return ModelReplica(ServeConfig(name="denoiser", model=str(denoiser)), Version("1", str(denoiser)))


def cells_of(cells: AnnData) -> Cells:
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist(), "batch": [str(batch) for batch in cells.obs["batch"]]}
    return decode(json.dumps(body).encode(), "application/json", Limits())


@pytest.mark.parametrize("target", [None, "batch_1"])
def test_denoised_rates_are_the_offline_ones(replica: ModelReplica, denoiser: Path, cells: AnnData, target: str | None) -> None:
    expected = denoise(Predictor.load(denoiser), cells, DataKeys(batch_key="batch"), target)
    answer = asyncio.run(replica.predict(Question("denoise", cells_of(cells), Options(target_batch=target))))
    known = ~np.isnan(expected.rates[0])
    np.testing.assert_allclose(answer.columns["rate"], expected.rates[:, known], rtol=1e-4, atol=1e-3)
    assert answer.about["rate_genes"] == [gene for gene, there in zip(cells.var_names, known, strict=True) if there]
    np.testing.assert_allclose(answer.columns["size_factor"], expected.table.totals())


def test_requests_into_different_batches_do_not_meet(replica: ModelReplica, cells: AnnData) -> None:
    options = [Options(), Options(target_batch="batch_0"), Options(target_batch="batch_1")]

    async def ask(chosen: list[Options]) -> list[np.ndarray]:
        questions = [Question("denoise", cells_of(cells), one) for one in chosen]
        return [answer.columns["rate"] for answer in await asyncio.gather(*(replica.predict(question) for question in questions))]

    together = asyncio.run(ask(options * 2))
    for index, option in enumerate(options):
        (alone,) = asyncio.run(ask([option]))
        for rates in (together[index], together[index + 3]):
            np.testing.assert_allclose(rates, alone, rtol=1e-4, atol=1e-3)
    assert np.abs(together[1] - together[2]).max() > 1e-2


def test_a_batch_that_was_not_learned_is_refused_by_name(replica: ModelReplica, cells: AnnData) -> None:
    with pytest.raises(ServiceError, match="batch_0, batch_1") as refused:
        asyncio.run(replica.predict(Question("denoise", cells_of(cells), Options(target_batch="batch_9"))))
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("annotate", {"threshold": "x"}, "threshold"),
        ("annotate", {"threshold": True}, "0 to 1"),
        ("annotate", {"threshold": float("nan")}, "0 to 1"),
        ("annotate", {"top_k": -1}, "from 1"),
        ("embed", {"top_k": 1}, "dtype"),
        ("denoise", {"target_batch": 3}, "text"),
    ],
)
def test_wrong_options_are_refused_by_name(task: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(ServiceError, match=words) as refused:
        read_options(task, given)
    assert refused.value.status == 422


def test_a_list_of_genes_that_is_sent_again_is_not_looked_up_again(replica: ModelReplica) -> None:
    names = tuple(reversed(GENES))
    assert replica.loaded.align(names) is replica.loaded.align(tuple(list(names)))
    assert replica.loaded.align(names).positions.tolist() == list(reversed(range(len(GENES))))
    assert replica.loaded.align(tuple(GENES[:20])).n_shared == 20
