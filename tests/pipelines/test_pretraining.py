"""A pre-trained model is scored on sentences it never saw, in every context, beside the genes' means, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.loader import ShardStore
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import ConfigError, DataError, VocabularyError
from cellplane.inference import build_network
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.pipelines.pretraining import (
    PretrainingEvaluation,
    evaluate_pretraining,
    held_out_split,
    network_means,
    run_evaluate_pretraining,
)
from cellplane.train.baselines import hidden_nb
from cellplane.train.contexts import CONTEXTS
from cellplane.train.validation import micro_batches, prepare, split_of

METHODS = ["gene_mean", "gene_mean_by_sample", *CONTEXTS]
SMALL = ModelConfig(
    width=16, n_blocks=1, n_heads=2, local_blocks=1, latent="ae", latent_width=8, decoder_width=16, decoder_bottleneck=8, n_genes=20
)
LINEAGE = {"validation_share": "0.25", "plan_seed": "3"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 cells of a tissue, two donors as two data sets, in sentences of at most 25 cells."""
    folder = tmp_path_factory.mktemp("pretraining")
    cells = simulate(SimulateConfig(n_cells=400, n_genes=20, n_types=3, spatial=True))
    files = []
    for donor in ("donor_0", "donor_1"):
        files.append(str(folder / f"{donor}.h5ad"))
        write_h5ad(cells[cells.obs["donor"] == donor].copy(), Path(files[-1]))
    config = ConvertConfig(
        inputs=tuple(files), out=str(folder / "shards"), keys=DataKeys(batch_key="batch", spatial_key="spatial"), max_cells=25
    )
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return folder / "shards"


@pytest.fixture(scope="module")
def store(shards: Path) -> ShardStore:
    return ShardStore(shards)


@pytest.fixture(scope="module")
def model(store: ShardStore) -> ModelFolder:
    """An untrained model that says it was trained on three quarters of the shards; its local block is open."""
    network = new_model(SMALL, 0)
    torch.nn.init.ones_(network.encoder.local[0].gate_D)
    lineage = {**LINEAGE, "data_fingerprint": store.manifest.fingerprint}
    return ModelFolder(
        config=SMALL, weights=network.state_dict(), vocabulary=store.vocabulary, task="pretrain", max_cells=25, lineage=lineage
    )


Ask = Callable[..., PretrainingEvaluation]


@pytest.fixture
def ask(shards: Path, tmp_path: Path) -> Ask:
    return lambda **changes: PretrainingEvaluation(
        **{"model": str(tmp_path / "model"), "shards": str(shards), "out": str(tmp_path / "out"), **changes}
    )


def test_every_method_is_asked_for_the_same_values_of_the_held_out_sentences(model, store, ask):
    found = evaluate_pretraining(model, store, ask())
    split = split_of(store, 0.25, 3)
    values = cells = 0
    for part in micro_batches(store, split.held_out, 100):
        mask = prepare(store, part, ask().masking)[1]
        values, cells = values + int(mask.hidden_C.sum()), cells + int((mask.hidden_C > 0).sum())
    assert found.size() == {"sentences": len(split.held_out), "cells": cells, "hidden_values": values}
    assert list(found.scores()) == METHODS
    assert {len(nats) for nats in (*found.nb.values(), *found.nb_visible.values())} == {cells}


def test_a_context_is_the_network_asked_in_it_whatever_order_the_cells_are_in(model, store, ask, monkeypatch):
    found = evaluate_pretraining(model, store, ask())
    network = build_network(model).eval()
    (part,) = micro_batches(store, split_of(store, 0.25, 3).held_out, 10**6)
    batch, mask = prepare(store, part, ask().masking)
    for name, context in CONTEXTS.items():
        placed = context(batch, mask, 0)
        nats = hidden_nb(*placed, network_means(network, *placed)).own_total.numpy()
        by_row = dict(zip(placed[0].row.tolist(), nats, strict=True))
        expected = [by_row[row] for row, hidden in zip(batch.row.tolist(), mask.hidden_C.tolist(), strict=True) if hidden]
        np.testing.assert_allclose(found.nb[name], expected, rtol=1e-6)
    with_and_without = [found.nb[name] for name in ("own", "shuffled_coordinates", "shuffled_neighbours", "self")]
    assert all(not np.allclose(with_and_without[0], other) for other in with_and_without[1:])


def test_gene_means_are_fitted_to_the_training_sentences_and_beat_an_untrained_model(model, store, ask):
    scores = evaluate_pretraining(model, store, ask()).scores()
    for figure in ("nb", "nb_visible"):
        assert 0 < scores["gene_mean"][figure] < 0.9 * scores["own"][figure]
    gains = evaluate_pretraining(model, store, ask(contexts=("self", "own"))).gains()
    assert set(gains) == {"self over gene_mean", "self over gene_mean_by_sample", "self over own"}
    assert gains["self over gene_mean"].high < 0


def test_figures_by_data_set_are_parts_of_the_whole(model, store, ask):
    found = evaluate_pretraining(model, store, ask())
    by_dataset = found.by_dataset(store)
    assert list(by_dataset) == ["donor_0", "donor_1"]
    shares = [found.values[found.dataset == index].sum() / found.values.sum() for index in (0, 1)]
    for method in METHODS:
        whole = sum(share * row[method] for share, row in zip(shares, by_dataset.values(), strict=True))
        assert whole == pytest.approx(found.scores()[method]["nb"])


def test_a_limit_on_cells_takes_fewer_sentences(model, store, ask):
    few = evaluate_pretraining(model, store, ask(max_cells=30, contexts=("own",)))
    assert few.sentences == 1
    assert list(few.scores()) == ["gene_mean", "gene_mean_by_sample", "own"]


def test_other_shards_are_split_by_what_is_asked(model, store, ask):
    stranger = replace(model, lineage={"data_fingerprint": "another"})
    split = held_out_split(stranger, store, ask(share=0.5, seed=9))
    assert split.held_out.tolist() == split_of(store, 0.5, 9).held_out.tolist()
    own = held_out_split(model, store, ask(share=0.5, seed=9))
    assert own.held_out.tolist() == split_of(store, 0.25, 3).held_out.tolist()


def test_a_model_that_saw_every_sentence_is_not_scored_on_them(model, store, ask):
    saw_all = replace(model, lineage={"data_fingerprint": store.manifest.fingerprint})
    with pytest.raises(DataError, match=r"trained on every sentence of these shards.*validation\.share"):
        evaluate_pretraining(saw_all, store, ask())


def test_shards_of_other_genes_are_refused(model, store, ask):
    vocabulary = type(model.vocabulary).from_ids(list(model.vocabulary.gene_ids)[::-1])
    with pytest.raises(VocabularyError, match="another order"):
        evaluate_pretraining(replace(model, vocabulary=vocabulary), store, ask())


@pytest.mark.parametrize("decoder", ["gaussian", "none"])
def test_a_model_that_gives_counts_no_likelihood_is_refused(model, store, ask, decoder):
    config = replace(SMALL, decoder=decoder)
    with pytest.raises(DataError, match=f"decoder is {decoder}"):
        evaluate_pretraining(replace(model, config=config, weights=new_model(config, 0).state_dict()), store, ask())


def test_an_unknown_context_is_refused_before_anything_is_read(ask):
    with pytest.raises(ConfigError, match="no context 'theirs'; there are own, self"):
        run_evaluate_pretraining(ask(contexts=("own", "theirs"), model="nowhere"))


def test_a_job_leaves_its_figures_in_a_file(model, ask, tmp_path):
    save_model(model, tmp_path / "model")
    result = run_evaluate_pretraining(ask(contexts=("own", "self")))
    written = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert written["config"]["contexts"] == ["own", "self"]
    assert {name: written[name] for name in ("scores", "gains", "datasets", "cells")} == {
        name: result[name] for name in ("scores", "gains", "datasets", "cells")
    }
    assert load_model(tmp_path / "model").lineage["plan_seed"] == "3"


def test_the_verb_shows_scores_and_gains(model, shards, tmp_path, monkeypatch):
    from cellplane.cli.main import app

    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    save_model(model, tmp_path / "model")
    words = ["evaluate", "pretraining", "--model", str(tmp_path / "model"), "--shards", str(shards)]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "own over self" in said.stdout
    assert "gene_mean" in said.stdout
    plain = CliRunner().invoke(app, [*words, "--json", "--context", "self"])
    assert list(json.loads(plain.stdout)["scores"]) == ["gene_mean", "gene_mean_by_sample", "self"]
