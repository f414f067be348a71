"""Imputation and perturbation over every protocol: the offline answer, and a clear word where there is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from cellplane.artifact.golden import Golden
from cellplane.client import ARROW_TYPE, JSON_TYPE, matrix, read_answer
from cellplane.data.sources import AnnData
from cellplane.pipelines.golden import check_golden
from serve.codec import decode
from serve.deployment import ServeConfig
from serve.front import Front
from serve.limits import Guard, Limits
from serve.native import NativePaths
from serve.options import Options
from serve.replica import ModelReplica
from serve.routes import Model, Table
from serve.tasks import Question
from tests.serve.specialists import Specialist, imputer, perturber

__all__ = ["imputer", "perturber"]

Ask = Callable[..., httpx.Response]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def replicas(imputer: Specialist, perturber: Specialist) -> dict[str, ModelReplica]:
    return {"imputer": imputer.replica("imputer"), "perturber": perturber.replica("perturber")}


@pytest.fixture(scope="module")
def ask(replicas: dict[str, ModelReplica]) -> Ask:
    """One request through guard, paths, codec and the real models, in this process."""

    async def call(model: str, label: str, method: str, *arguments: object) -> object:
        return await getattr(replicas[model], method)(*arguments)

    models = {name: Model(name, {"1": replica.version}, {"champion": "1"}) for name, replica in replicas.items()}
    table, limits = Table(models, epoch=1), ServeConfig(name="x", model="x").limits()
    app = Guard(NativePaths(Front(lambda: table, call), limits).app(), limits)

    def send(path: str, body: Any = None, accept: str = JSON_TYPE, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                if body is None:
                    return await client.get(path)
                headers = {"content-type": JSON_TYPE, "accept": accept}
                return await client.post(path, content=json.dumps(body).encode(), headers=headers, params=options or None)

        return asyncio.run(once())

    return send


def plain(cells: AnnData, places: bool = False) -> dict[str, Any]:
    """Cells as a JSON body."""
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist(), "batch": list(map(str, cells.obs["batch"]))}
    if places:
        body |= {name: cells.obsm["spatial"][:, axis].astype(float).tolist() for axis, name in enumerate(("x_um", "y_um"))}
    return body


def with_reference(query: AnnData, reference: AnnData) -> dict[str, Any]:
    """Both in one body over the reference's genes; the query shows 0 for those it lacks."""
    wide = np.zeros((query.n_obs, reference.n_vars))
    wide[:, [list(reference.var_names).index(gene) for gene in query.var_names]] = query.X.toarray()
    places = [[*query.obsm["spatial"][:, axis].astype(float).tolist(), *[None] * reference.n_obs] for axis in (0, 1)]
    return {
        "gene_ids": list(reference.var_names),
        "counts": [*wide.tolist(), *reference.X.toarray().tolist()],
        "batch": [*map(str, query.obs["batch"]), *map(str, reference.obs["batch"])],
        "role": ["query"] * query.n_obs + ["reference"] * reference.n_obs,
        "cell_id": [*query.obs_names, *reference.obs_names],
        **dict(zip(("x_um", "y_um"), places, strict=True)),
    }


def test_imputed_counts_are_the_offline_ones_in_json_and_arrow(ask: Ask, imputer: Specialist) -> None:
    expected = imputer.pipeline.predict(imputer.cells)
    answer = ask("/v1/models/imputer/impute", plain(imputer.cells, places=True)).json()
    np.testing.assert_allclose(answer["rate"], expected.X, **TOLERANCE)
    np.testing.assert_allclose(answer["sd"], expected.layers["sd"], **TOLERANCE)
    assert answer["genes"] == list(expected.var_names)
    np.testing.assert_allclose(answer["expected_r"], expected.var["expected_correlation"], atol=1e-6)
    assert (answer["reference"], answer["refused"], answer["context"]["sentences"]) == ("kept", {}, 4)
    options = {"genes": ",".join(answer["genes"][3:5])}
    some = ask("/v1/models/imputer/impute", plain(imputer.cells, places=True), accept=ARROW_TYPE, **options)
    table, about = read_answer(some.content)
    np.testing.assert_allclose(matrix(table["rate"]), expected.X[:, 3:5], **TOLERANCE)
    assert about["genes"] == answer["genes"][3:5]


def test_given_sentences_are_the_patches(ask: Ask, imputer: Specialist) -> None:
    body = plain(imputer.cells, places=True)
    whole = np.array(ask("/v1/models/imputer/impute", body).json()["rate"])
    halves = ask("/v1/models/imputer/impute", {**body, "batch": None, "sentence": [row // 25 for row in range(imputer.cells.n_obs)]}).json()
    assert halves["context"]["sentences"] == 4
    assert np.abs(np.array(halves["rate"]) - whole).max() > 1e-4, "other neighbours, other answers"


def test_a_reference_in_the_body_replaces_the_kept_one(ask: Ask, imputer: Specialist) -> None:
    expected = imputer.pipeline.predict(imputer.cells, reference=imputer.reference)
    answer = ask("/v1/models/imputer/impute", with_reference(imputer.cells, imputer.reference)).json()
    np.testing.assert_allclose(answer["rate"], expected.X, **TOLERANCE)
    assert answer["cell_id"] == list(imputer.cells.obs_names)
    assert answer["reference"] == "body"
    assert answer["context"]["policy"].endswith("100 given reference cells")
    assert np.abs(expected.X - imputer.pipeline.predict(imputer.cells).X).max() > 1e-3


def test_genes_that_cannot_be_trusted_are_named_and_left_out(ask: Ask, imputer: Specialist) -> None:
    least = float(np.median(imputer.pipeline.expected_correlation_))
    answer = ask(f"/v1/models/imputer/impute?min_correlation={least}", plain(imputer.cells)).json()
    offline = imputer.pipeline.predict(imputer.cells, {"min_correlation": least})
    assert set(answer["refused"]) == set(offline.uns["cellplm"]["refused"]) != set()
    assert answer["genes"] == [gene for gene in offline.var_names if gene not in answer["refused"]]


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("imputer/impute?genes=GENE0001", {}, "not imputed"),
        ("imputer/impute?genes=,", {}, "genes"),
        ("imputer/impute?reference=atlas", {}, "kept"),
        ("imputer/impute?reference=body", {}, "role"),
        ("imputer/impute?min_correlation=2", {}, "-1 to 1"),
        ("imputer/impute?min_correlation=1", {}, "lower min_correlation"),
        ("imputer/impute", {"role": ["querry"] * 100}, "row 0"),
        ("perturber/perturb?perturbation=NOGENE", {}, "NOGENE"),
        ("perturber/perturb?kind=magic", {}, "crispri"),
        ("perturber/perturb?by_group=maybe", {}, "true or false"),
        ("perturber/perturb", {"role": ["query"] * 100}, "role"),
    ],
)
def test_questions_that_make_no_sense_are_refused(ask: Ask, imputer: Specialist, path: str, changes: dict[str, Any], words: str) -> None:
    answer = ask(f"/v1/models/{path}", {**plain(imputer.cells), **changes})
    assert (answer.status_code, words in answer.json()["error"]) == (422, True), answer.text


def test_a_task_the_model_has_not_is_409_and_says_what_it_has(ask: Ask, imputer: Specialist) -> None:
    for model, task, words in (("imputer", "embed", "impute"), ("perturber", "impute", "perturb")):
        answer = ask(f"/v1/models/{model}/{task}", plain(imputer.cells))
        assert (answer.status_code, answer.json()["error"].endswith(f"it can {words}")) == (409, True), answer.text


def test_populations_are_the_offline_ones(ask: Ask, perturber: Specialist) -> None:
    expected = perturber.pipeline.predict(perturber.cells)
    answer = ask("/v1/models/perturber/perturb", plain(perturber.cells)).json()
    assert answer["perturbation"] == list(expected.obs["perturbation"])
    assert answer["kind"] == list(expected.obs["kind"]) == ["crispri"] * len(answer["kind"]), "as it was fitted"
    np.testing.assert_allclose(answer["log_fold_change"], expected.layers["delta"], **TOLERANCE)
    np.testing.assert_allclose(answer["mean_log"], expected.X, **TOLERANCE)
    np.testing.assert_allclose(answer["rate_perturbed"], expected.layers["rates"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.sum(answer["rate_control"], axis=1), 10_000, rtol=1e-4)
    assert answer["genes"] == list(expected.var_names)
    assert all(answer["seen"])


def test_combinations_kinds_and_groups_can_be_asked_for(ask: Ask, perturber: Specialist) -> None:
    single = [name for name in perturber.pipeline.perturbations_ if "+" not in name]
    names = [f"{single[0]}+{single[3]}", single[1]]
    expected = perturber.pipeline.predict(perturber.cells, names, {"kind": "knockout"}, by_group=True)
    options = {"perturbation": ",".join(names), "kind": "knockout", "by_group": "true"}
    answer = ask("/v1/models/perturber/perturb", plain(perturber.cells), **options).json()
    assert list(zip(answer["perturbation"], answer["group"], strict=True)) == list(
        zip(expected.obs["perturbation"], expected.obs["group"], strict=True)
    )
    assert answer["control_cells"] == expected.obs["control_cells"].tolist()
    assert answer["seen"] == [False] * 4  # one gene was learned, but as CRISPRi
    np.testing.assert_allclose(answer["log_fold_change"], expected.layers["delta"], **TOLERANCE)


def test_an_unknown_perturbation_can_have_the_fallback(ask: Ask, perturber: Specialist) -> None:
    expected = perturber.pipeline.predict(perturber.cells, ["NOGENE"], {"fallback": "mean_of_training"})
    options = {"perturbation": "NOGENE", "fallback": "mean_of_training"}
    answer = ask("/v1/models/perturber/perturb", plain(perturber.cells), **options).json()
    assert answer["fallback"] == [True]
    np.testing.assert_allclose(answer["log_fold_change"], expected.layers["delta"], **TOLERANCE)


def tensors(cells: AnnData, **parameters: Any) -> dict[str, Any]:
    """The cells for the Open Inference Protocol."""
    counts, batch = cells.X.toarray(), list(map(str, cells.obs["batch"]))
    inputs = [
        {"name": "genes", "shape": [cells.n_vars], "datatype": "BYTES", "data": list(cells.var_names)},
        {"name": "counts", "shape": list(counts.shape), "datatype": "FP32", "data": counts.tolist()},
        {"name": "batch", "shape": [len(batch)], "datatype": "BYTES", "data": batch},
    ]
    if "spatial" in cells.obsm:
        places = cells.obsm["spatial"].astype(float)
        inputs.append({"name": "coordinates", "shape": list(places.shape), "datatype": "FP32", "data": places.tolist()})
    return {"inputs": inputs, "parameters": parameters}


def outputs(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer.json()["outputs"]}


def test_other_protocols_get_the_same_answers(ask: Ask, imputer: Specialist, perturber: Specialist) -> None:
    imputed, genes = imputer.pipeline.predict(imputer.cells), ",".join(imputer.pipeline.genes_[:2])
    tensor = outputs(ask("/v2/models/imputer/infer", tensors(imputer.cells, genes=genes)))
    np.testing.assert_allclose(tensor["rate"], imputed.X[:, :2], **TOLERANCE)
    name = perturber.pipeline.perturbations_[0]
    changed = perturber.pipeline.predict(perturber.cells, [name])
    answer = ask("/v2/models/perturber/infer", tensors(perturber.cells, perturbation=name))
    np.testing.assert_allclose(outputs(answer)["log_fold_change"], changed.layers["delta"], **TOLERANCE)
    kinds = {output["name"]: output["datatype"] for output in answer.json()["outputs"]}
    assert (kinds["seen"], kinds["control_cells"], kinds["kind"]) == ("BOOL", "INT64", "BYTES")
    frame = {"columns": list(perturber.cells.var_names), "data": perturber.cells.X.toarray().tolist()}
    alone = perturber.cells.copy()
    alone.obs["batch"] = "one"
    told = ask("/invocations", {"dataframe_split": frame, "params": {"model": "perturber", "perturbation": name}}).json()["predictions"]
    np.testing.assert_allclose(told[0]["log_fold_change"], perturber.pipeline.predict(alone, [name]).layers["delta"][0], **TOLERANCE)
    described = ask("/v2/models/imputer").json()
    assert {output["name"] for output in described["outputs"]} == {"rate", "sd"}


def test_discovery_lists_what_can_be_asked_for(ask: Ask, imputer: Specialist, perturber: Specialist) -> None:
    known = {model["name"]: model for model in ask("/v1/models").json()["models"]}
    assert known["imputer"]["imputed_genes"] == list(imputer.pipeline.genes_)
    assert (known["imputer"]["tasks"], known["imputer"]["max_cells"]) == (["impute"], 32)
    assert known["perturber"]["perturbations"] == list(perturber.pipeline.perturbations_)


def test_requests_at_the_same_time_keep_their_own_answers(replicas: dict[str, ModelReplica], ask: Ask, imputer: Specialist) -> None:
    genes = imputer.pipeline.genes_
    cells = decode(json.dumps(plain(imputer.cells, places=True)).encode(), JSON_TYPE, Limits())
    asked = [Question("impute", cells, Options(genes=(gene,))) for gene in genes[:4]]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(replicas["imputer"].predict(question) for question in asked))

    expected = imputer.pipeline.predict(imputer.cells)
    for column, answer in enumerate(asyncio.run(all_at_once())):
        np.testing.assert_allclose(answer.columns["rate"][:, 0], expected.X[:, column], **TOLERANCE)


def test_no_cells_and_cells_without_counts_are_answered(ask: Ask, imputer: Specialist, perturber: Specialist) -> None:
    genes = list(imputer.cells.var_names)
    none = ask("/v1/models/imputer/impute", {"gene_ids": genes, "gene": [], "count": []})
    assert (none.status_code, none.json()["rate"]) == (200, []), none.text
    empty = ask("/v1/models/imputer/impute", {"gene_ids": genes, "gene": [[]], "count": [[]]}).json()
    assert np.array(empty["rate"]).max() == 0
    assert "no counts" in empty["warnings"][0]
    refused = ask("/v1/models/perturber/perturb", {"gene_ids": list(perturber.cells.var_names), "gene": [[]], "count": [[]]})
    assert (refused.status_code, "control" in refused.json()["error"]) == (422, True)


def test_these_models_have_golden_answers_too(replicas: dict[str, ModelReplica]) -> None:
    for name, answers in (("imputer", {"counts", "sd"}), ("perturber", {"change", "rates"})):
        predictor = replicas[name].predictor
        assert set(Golden.of(predictor.folder.attachments).answers) == answers
        assert check_golden(predictor) <= 1e-5
