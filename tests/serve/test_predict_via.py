"""`cellplane predict --via`: the files that the offline predict writes, from an endpoint, each once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellplane.batch import predict_file
from cellplane.cli.main import main
from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ConfigError, DataError, ServiceError
from cellplane.remote import Remote, predict_remote
from serve.deployment import ServeConfig
from serve.front import Front
from serve.limits import Guard
from serve.native import NativePaths
from serve.replica import ModelReplica
from serve.routes import Model, Table, Version
from serve.security import ApiKeys, new_key
from tests.serve.specialists import Specialist, imputer, perturber
from tests.serve.wire import listening

__all__ = ["imputer", "perturber"]

KEY, KEY_LINE = new_key("tests")


@pytest.fixture(scope="module")
def url(model_path: Path, imputer: Specialist, perturber: Specialist, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint that wants a key and serves three models."""
    paths = {"tiny": model_path, "imputer": imputer.path, "perturber": perturber.path}
    version = {name: Version("1", str(path), run_id="r1", state="ready") for name, path in paths.items()}
    replicas = {name: ModelReplica(ServeConfig(name=name, model=str(path)), version[name]) for name, path in paths.items()}

    async def call(model: str, label: str, method: str, *arguments: object) -> object:
        return await getattr(replicas[model], method)(*arguments)

    table = Table({name: Model(name, {"1": version[name]}, {"champion": "1"}) for name in paths}, epoch=1)
    limits, file = ServeConfig(name="x", model="x").limits(), tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY_LINE)
    app = Guard(NativePaths(Front(lambda: table, call), limits).app(), limits, ApiKeys.load(file))
    with listening(app) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPLANE_API_KEY", KEY)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def two(cells: AnnData, tmp_path: Path) -> list[Path]:
    for number, name in enumerate(("one", "two")):
        write_h5ad(cells[number * 20 : number * 20 + 20].copy(), tmp_path / f"{name}.h5ad")
    return [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]


def test_the_command_writes_what_it_writes_offline(url: str, model_path: Path, two: list[Path], tmp_path: Path, capsys) -> None:
    asked = ["predict", "annotate", *map(str, two), "--model", "tiny", "--out", str(tmp_path / "out"), "--via", url, "--json"]
    keys = ["-o", "keys.batch_key=batch"]
    assert main([*asked, *keys]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["new"], told["reused"], told["cells"]) == (2, 0, 40)
    for path in two:
        predict_file("annotate", model_path, DataKeys(batch_key="batch"), (path, tmp_path / "offline.h5ad"))
        expected, found = read_h5ad(tmp_path / "offline.h5ad"), read_h5ad(tmp_path / "out" / path.name)
        pd.testing.assert_frame_equal(found.obs, expected.obs, check_dtype=False, atol=1e-5)
        np.testing.assert_allclose(found.obsm["cellplm_cell_type_proba"], expected.obsm["cellplm_cell_type_proba"], atol=1e-5)
        np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
        assert found.uns["cellplm"]["context"] == expected.uns["cellplm"]["context"]
    assert main([*asked, *keys]) == 0
    assert json.loads(capsys.readouterr().out)["reused"] == 2


def test_new_tables_too(url: str, imputer: Specialist, perturber: Specialist, tmp_path: Path) -> None:
    one = ["--perturbation", perturber.pipeline.perturbations_[0]]
    for task, specialist, extra in (("impute", imputer, []), ("perturb", perturber, one)):
        write_h5ad(specialist.cells, tmp_path / f"{task}.h5ad")
        model = {"impute": "imputer", "perturb": "perturber"}[task]
        command = ["predict", task, str(tmp_path / f"{task}.h5ad"), "--model", model, "--out", str(tmp_path / "out"), "--via", url, *extra]
        assert main(command) == 0
        expected = specialist.pipeline.predict(specialist.cells, *([extra[1:]] if extra else []))
        np.testing.assert_allclose(read_h5ad(tmp_path / "out" / f"{task}.h5ad").X, expected.X, rtol=1e-4, atol=1e-5)


def test_a_file_the_endpoint_refuses_does_not_stop_the_others(url: str, two: list[Path], cells: AnnData, tmp_path: Path) -> None:
    foreign = cells.copy()
    foreign.var_names = [f"other{gene}" for gene in range(foreign.n_vars)]
    write_h5ad(foreign, tmp_path / "bad.h5ad")
    report = predict_remote(Remote(url, "embed", "tiny"), [two[0], tmp_path / "bad.h5ad", two[1]], tmp_path / "out")
    assert [path.name for path in report.written] == ["one.h5ad", "two.h5ad"]
    assert list(report.failed) == [str(tmp_path / "bad.h5ad")]
    assert read_h5ad(tmp_path / "out" / "one.h5ad").obsm["X_cellplm"].shape == (20, 8)


def test_what_cannot_be_asked_is_said(url: str, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot denoise, it can annotate, embed"):
        predict_remote(Remote(url, "denoise", "tiny"), two, tmp_path / "out")
    with pytest.raises(ConfigError, match="imputer, perturber, tiny"):
        predict_remote(Remote(url, "embed"), two, tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        predict_remote(Remote(url, "embed", "tiny"), [tmp_path / "nowhere.h5ad"], tmp_path / "out")
    monkeypatch.delenv("CELLPLANE_API_KEY")
    with pytest.raises(ServiceError, match="API key") as refused:
        predict_remote(Remote(url, "embed", "tiny"), two, tmp_path / "out")
    assert (refused.value.status, refused.value.exit_code) == (401, 4)
