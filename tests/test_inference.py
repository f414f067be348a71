"""The predictor: the caller's order, the same answer however cells are packed, and never a pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane import inference
from cellplane.artifact.folder import save_model
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.sentences import CellTable, MemoryStore, SentenceStore, memory_store
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import ColumnError, DataError, IntegrityError, VocabularyError
from cellplane.inference import BatchedStore, Predictor, build_network, packs, query_keys, read_cells, record, write_annotation
from tests.tiny import ANNOTATOR, CLASSES, N_GENES, TINY, random_counts, tiny_folder

KEYS = DataKeys(batch_key="batch")


def table_of(n_cells: int, n_genes: int = N_GENES, batch: list[str] | None = None) -> CellTable:
    counts = random_counts(n_cells, n_genes).numpy()
    cell, gene = np.nonzero(counts)
    crow = np.concatenate([[0], np.cumsum((counts != 0).sum(1))]).astype(np.int64)
    names = None if batch is None else np.array(batch, dtype=object)
    return CellTable(crow, gene.astype(np.int64), counts[cell, gene], np.ones(n_genes, dtype=bool), names)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_folder())


@pytest.fixture
def store() -> MemoryStore:
    """Forty cells of three interleaved batches in sentences of at most eight."""
    return memory_store(table_of(40, batch=[f"b{cell % 3}" for cell in range(40)]), 8)


@pytest.fixture
def cells() -> AnnData:
    """Thirty cells of two batches; a fifth of their genes is unknown to the model."""
    return simulate(SimulateConfig(n_cells=30, n_genes=30, n_types=3, spatial=True))


def test_answers_come_back_in_the_callers_order(predictor, store):
    expected = np.full((40, TINY.latent_width), np.nan, dtype=np.float32)
    for rows in store.sentences:  # each sentence on its own, as a caller's only cells
        alone = MemoryStore(store.table.rows(rows), [np.arange(len(rows))])
        expected[rows] = predictor.embed(alone)
    np.testing.assert_allclose(predictor.embed(store), expected, atol=1e-5)


def test_the_order_of_the_sentences_changes_nothing(predictor, store):
    turned = MemoryStore(store.table, list(store.sentences)[::-1])
    np.testing.assert_allclose(predictor.embed(turned), predictor.embed(store), atol=1e-5)
    np.testing.assert_allclose(predictor.annotate(turned).proba, predictor.annotate(store).proba, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 8, 13, 20, 10_000])
def test_the_packing_budget_changes_nothing(predictor, store, monkeypatch, budget):
    expected, annotation = predictor.embed(store), predictor.annotate(store)
    monkeypatch.setattr(inference, "CELLS_PER_FORWARD", budget)
    np.testing.assert_allclose(predictor.embed(store), expected, atol=1e-5)
    again = predictor.annotate(store)
    np.testing.assert_allclose(again.proba, annotation.proba, atol=1e-5)
    assert again.labels.tolist() == annotation.labels.tolist()


@pytest.mark.parametrize("budget", [1, 5, 8, 100])
def test_packs_hold_every_sentence_in_order_within_the_budget(budget):
    sizes = np.array([3, 5, 9, 0, 1, 1, 8])
    packed = list(packs(sizes, budget))
    assert [sentence for pack in packed for sentence in pack] == list(range(7))
    assert all(sizes[pack].sum() <= budget or len([s for s in pack if sizes[s]]) == 1 for pack in packed)


def test_no_sentences_are_no_packs():
    assert list(packs(np.zeros(0, dtype=np.int64), 10)) == []


def test_probabilities_labels_and_confidence_fit_together(predictor, store):
    answer = predictor.annotate(store)
    assert answer.classes == predictor.classes == CLASSES
    assert (answer.proba.shape, answer.proba.dtype) == ((40, 3), np.float32)
    np.testing.assert_allclose(answer.proba.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(answer.confidence, answer.proba.max(1))
    assert answer.labels.tolist() == [CLASSES[index] for index in answer.proba.argmax(1)]


def test_the_same_cells_give_the_same_answer_twice(predictor, store):
    assert np.array_equal(predictor.embed(store), predictor.embed(store))
    predictor.model.train()  # whatever mode the network is in: nothing is random without noise
    first = predictor.embed(store)
    predictor.model.eval()
    assert np.array_equal(predictor.embed(store), first)


@pytest.mark.parametrize("max_cells", [8, 1])
def test_no_cells_give_empty_answers_of_the_right_shape(predictor, max_cells):
    nothing = memory_store(table_of(0), max_cells)
    answer = predictor.annotate(nothing)
    assert predictor.embed(nothing).shape == (0, TINY.latent_width)
    assert (answer.labels.shape, answer.confidence.shape, answer.proba.shape) == ((0,), (0,), (0, 3))


def test_an_empty_sentence_among_others_does_no_harm(predictor, store):
    more = MemoryStore(store.table, [np.zeros(0, dtype=np.int64), *store.sentences, np.zeros(0, dtype=np.int64)])
    np.testing.assert_allclose(predictor.embed(more), predictor.embed(store), atol=1e-5)


def test_one_cell_and_a_cell_without_counts_are_answered(predictor):
    one = memory_store(table_of(1), 8)
    empty = CellTable(np.array([0, 0]), np.zeros(0, np.int64), np.zeros(0, np.float32), np.ones(N_GENES, dtype=bool))
    for store in (one, memory_store(empty, 8)):
        answer = predictor.annotate(store)
        assert np.isfinite(predictor.embed(store)).all()
        assert np.isfinite(answer.proba).all()
        assert (answer.labels[0], answer.confidence[0]) == (
            ("unknown", 0.0) if len(store.table.value) == 0 else (CLASSES[answer.proba[0].argmax()], answer.proba.max())
        )


def test_cells_over_another_vocabulary_are_refused(predictor):
    with pytest.raises(DataError, match="25 gene positions, the model 24"):
        predictor.embed(memory_store(table_of(3, n_genes=25), 8))


def test_a_model_without_classes_says_what_it_can(store):
    embedder = Predictor(tiny_folder(TINY))
    assert (embedder.tasks, embedder.classes, embedder.task) == (("embed",), (), "pretrain")
    assert embedder.embed(store).shape == (40, TINY.latent_width)
    with pytest.raises(DataError, match="can embed; fine-tune"):
        embedder.annotate(store)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("encoder.norm.weight"), r"missing \['encoder\.norm\.weight'\]"),
        (lambda weights: weights.update(extra=torch.zeros(1)), r"not expected \['extra'\]"),
        (
            lambda weights: weights.update({"encoder.norm.bias": torch.zeros(3)}),
            r"misshapen \['encoder\.norm\.bias: \(3,\) instead of \(16,\)",
        ),
        (lambda weights: weights.update({"encoder.norm.bias": torch.zeros(16, 1)}), "misshapen"),
    ],
    ids=["missing", "extra", "shorter", "broadcastable"],
)
def test_weights_that_do_not_belong_are_named(change, says):
    folder = tiny_folder()
    weights = dict(folder.weights)
    change(weights)
    with pytest.raises(IntegrityError, match=says):
        build_network(replace(folder, weights=weights))


def test_a_network_has_the_weights_of_its_folder_for_itself_and_leaves_chance_alone():
    folder, state = tiny_folder(replace(tiny_folder().config, positions="continuous")), torch.get_rng_state()
    network, again = build_network(folder), build_network(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert {tensor.device.type for tensor in (*network.parameters(), *network.buffers())} == {"cpu"}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, folder.weights[name], rtol=0, atol=0)
        assert tensor.data_ptr() != folder.weights[name].data_ptr()


def test_loading_verifies_and_describes_ready_for_json(tmp_path):
    path = save_model(tiny_folder(), tmp_path / "model")
    info = json.loads(json.dumps(Predictor.load(path).info()))
    assert (info["task"], info["tasks"], info["dtype"]) == ("annotate", ["annotate", "embed"], "float32")
    assert len(info["model_sha256"]) == 64
    (path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match="weights"):
        Predictor.load(path)


def test_a_loaded_model_answers_as_the_one_that_was_saved(predictor, store, tmp_path):
    again = Predictor.load(save_model(tiny_folder(), tmp_path / "model"))
    assert np.array_equal(again.embed(store), predictor.embed(store))


GUARDED = """
import sys
from pathlib import Path
import numpy as np
from cellplane.data.sentences import memory_store
from cellplane.inference import Predictor
from tests.test_inference import table_of

store, unpickled = memory_store(table_of(20), 8), []
sys.addaudithook(lambda event, given: unpickled.append(given) if event in ("pickle.find_class", "marshal.loads") else None)
predictor = Predictor.load(Path(sys.argv[1]))
predictor.annotate(store)
predictor.embed(store)
seen, armed = [given for given in unpickled if given and isinstance(given[0], str)], len(unpickled)
import pickle
pickle.loads(pickle.dumps(Path))
print(seen, len(unpickled) > armed)
"""


def test_nothing_is_unpickled_between_the_folder_and_the_answer(tmp_path):
    path = save_model(tiny_folder(), tmp_path / "model")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", GUARDED, str(path)], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[] True"


def test_reading_cells_keeps_batches_apart_and_the_callers_data_as_they_are(cells):
    before = cells.copy()
    read = read_cells(cells, tiny_folder().vocabulary, KEYS, 8)
    for rows in read.store.sentences:
        assert len(set(cells.obs["batch"].iloc[rows])) == 1
        assert len(rows) <= 8
    assert (read.report["n_shared"], read.report["n_dropped"], read.report["count_source"]) == (24, 6, "X")
    assert read.store.table.labels is None
    assert cells.obs.equals(before.obs)
    assert cells.var.equals(before.var)
    assert (cells.X != before.X).nnz == 0
    assert dict(cells.uns) == dict(before.uns)
    assert list(cells.obsm) == list(before.obsm)


def test_labels_are_read_as_positions_among_the_models_classes(cells):
    keys = DataKeys(batch_key="batch", labels_key="cell_type")
    table = read_cells(cells, tiny_folder().vocabulary, keys, 8, classes=("type_2", "type_0")).store.table
    expected = [{"type_2": 0, "type_0": 1}.get(label, -1) for label in cells.obs["cell_type"]]
    assert table.labels is not None
    assert table.labels.tolist() == expected


@pytest.mark.parametrize(("keys", "error"), [(DataKeys(batch_key="patient"), ColumnError), (DataKeys(spatial_key="where"), ColumnError)])
def test_a_column_that_is_not_there_is_named(cells, keys, error):
    with pytest.raises(error, match=r"patient|where"):
        read_cells(cells, tiny_folder().vocabulary, keys, 8)


def test_cells_of_other_genes_are_refused(cells):
    cells.var_names = [f"OTHER{gene}" for gene in range(cells.n_vars)]
    with pytest.raises(VocabularyError, match="0 of 30"):
        read_cells(cells, tiny_folder().vocabulary, KEYS, 8)


def test_the_order_of_the_genes_in_a_file_changes_nothing(predictor, cells):
    turned = cells[:, ::-1].copy()
    answers = [predictor.embed(read_cells(data, predictor.vocabulary, KEYS, 8).store) for data in (cells, turned)]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


def test_training_keys_fit_other_data(cells):
    keys = DataKeys(layer="counts", batch_key="batch", labels_key="cell_type", spatial_key="spatial")
    assert query_keys(cells, keys) == DataKeys(layer="counts", batch_key="batch", spatial_key="spatial")
    del cells.obs["batch"], cells.obsm["spatial"]
    assert query_keys(cells, keys) == DataKeys(layer="counts")
    assert query_keys(cells, DataKeys()) == DataKeys()


@pytest.mark.parametrize("prefix", ["cellplm", "mine"])
def test_answers_are_written_under_the_documented_keys_and_nothing_else_is(predictor, cells, prefix):
    before = (list(cells.obs), list(cells.obsm), list(cells.uns))
    answer = predictor.annotate(read_cells(cells, predictor.vocabulary, KEYS, 8).store)
    write_annotation(cells, answer, prefix)
    assert list(cells.obs)[len(before[0]) :] == [f"{prefix}_cell_type", f"{prefix}_confidence"]
    assert list(cells.obsm)[len(before[1]) :] == [f"{prefix}_cell_type_proba"]
    assert list(cells.uns) == before[2]
    assert cells.obs[f"{prefix}_cell_type"].tolist() == answer.labels.tolist()
    assert list(cells.obs[f"{prefix}_cell_type"].cat.categories) == list(CLASSES)
    np.testing.assert_array_equal(cells.obs[f"{prefix}_confidence"].to_numpy(), answer.confidence)
    np.testing.assert_array_equal(cells.obsm[f"{prefix}_cell_type_proba"], answer.proba)


def test_answers_for_no_cells_can_be_written(predictor, cells):
    nobody = cells[:0].copy()
    write_annotation(nobody, predictor.annotate(memory_store(table_of(0), 8)))
    assert list(nobody.obs["cellplm_cell_type"].cat.categories) == list(CLASSES)


def test_the_record_says_which_model_and_which_cells_without_missing_values(tmp_path):
    folder = Predictor.load(save_model(tiny_folder(), tmp_path / "model")).folder
    told = record(folder, {"count_source": "X", "overlap": 0.5, "largest_deviation": None})
    assert (told["model_sha256"], told["count_source"], told["dtype"]) == (folder.model_sha256, "X", "float32")
    assert "at most 8 cells" in told["context"]
    assert None not in told.values()


def test_an_annotator_whose_head_is_gone_is_refused(store):
    predictor = Predictor(tiny_folder(ANNOTATOR))
    predictor.model.head = None
    with pytest.raises(IntegrityError, match="no annotation head"):
        predictor.annotate(store)


@pytest.mark.parametrize("config", [ANNOTATOR, TINY], ids=["annotator", "embedder"])
def test_half_precision_answers_nearly_the_same_says_so_and_holds_half_the_weights(store, config):
    exact, half = Predictor(tiny_folder(config)), Predictor(tiny_folder(config), precision="bfloat16")
    one, other = torch.from_numpy(exact.embed(store)), torch.from_numpy(half.embed(store))
    assert float(torch.nn.functional.cosine_similarity(one, other).min()) > 0.99
    assert (exact.info()["dtype"], half.info()["dtype"]) == ("float32", "bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in half.model.named_parameters()}
    assert dtypes["embedder.genes_GD"] == dtypes["encoder.blocks.0.query.weight"] == torch.bfloat16
    assert dtypes["encoder.blocks.0.norm1.weight"] == torch.float32
    assert exact.folder.model_sha256 == half.folder.model_sha256


DECODING = replace(TINY, n_batches=3)


def all_shares(predictor: Predictor, store: SentenceStore, batches: tuple[int, ...] | None = None) -> np.ndarray:
    found = np.full((int(store.sizes.sum()), len(predictor.vocabulary)), np.nan, dtype=np.float32)
    for rows, shares in predictor.rates(store, batches):
        assert np.isnan(found[rows]).all()  # every cell once
        found[rows] = shares
    return found


@pytest.fixture
def counted() -> MemoryStore:
    """Twenty cells of five sentences that measured all genes but the last."""
    table = table_of(20)
    panel = np.arange(N_GENES) < N_GENES - 1
    kept = panel[table.gene]
    crow = np.concatenate([[0], np.cumsum(kept)])[table.crow]
    return memory_store(replace(table, crow=crow, gene=table.gene[kept], value=table.value[kept], panel=panel), 4)


def test_rates_add_up_to_one_over_the_measured_genes(counted):
    shares = all_shares(Predictor(tiny_folder(TINY)), counted)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert (shares[:, -1] == 0).all()
    assert (shares[:, :-1] > 0).all()


def test_rates_do_not_depend_on_how_many_cells_are_decoded_together(counted, monkeypatch):
    predictor = Predictor(tiny_folder(TINY))
    whole = all_shares(predictor, counted)
    monkeypatch.setattr(inference, "CELLS_PER_DECODE", 3)
    np.testing.assert_allclose(all_shares(predictor, counted), whole, rtol=1e-5)


def test_rates_of_several_batches_are_averaged_as_rates(counted):
    predictor = Predictor(tiny_folder(DECODING))
    each = [all_shares(predictor, counted, (batch,)) for batch in range(3)]
    np.testing.assert_allclose(all_shares(predictor, counted, (0, 1, 2)), np.mean(each, axis=0), rtol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 1e-6
    assert np.abs(all_shares(predictor, counted) - np.mean(each, axis=0)).max() > 1e-7  # the mean of the rows is another thing


def test_a_store_that_knows_batches_decodes_each_cell_in_its_own(counted):
    predictor = Predictor(tiny_folder(DECODING))
    place = np.arange(20) % 3
    own = all_shares(predictor, BatchedStore(counted, place))
    each = np.stack([all_shares(predictor, counted, (batch,)) for batch in range(3)])
    np.testing.assert_allclose(own, each[place, np.arange(20)], rtol=1e-5)


def test_a_model_that_decodes_no_counts_has_no_rates(counted):
    with pytest.raises(DataError, match="decodes no counts"):
        all_shares(Predictor(tiny_folder()), counted)
