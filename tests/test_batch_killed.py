"""A batch job killed at any named point and run again: the files of one that was left alone, every cell once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cellplane import batch
from cellplane.artifact.folder import save_model
from cellplane.batch import PredictConfig, PredictReport, answer_task, predict_with
from cellplane.data.answer_tables import is_table, read_answers
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from tests.tiny import ANNOTATOR, tiny_folder

POINTS = ("before_answer:1", "cells_read:0", "cells_answered:1", "before_rename:1", "after_answer:0")  # the visit of the point, from 0
FORMATS = ("h5ad", "parquet")
CELLS = (90, 70)

KILLER = """if True:
    import json, os, sys
    import torch
    from cellplane import inference
    from cellplane.batch import PredictConfig, answer_task, predict_with
    from cellplane.config import validate
    inference.CELLS_PER_FORWARD = 32
    torch.set_num_threads(1)
    warm = validate(PredictConfig, json.loads(sys.argv[1]), "")
    predict_with(warm, lambda tasks: list(map(answer_task, tasks)))  # whatever is imported late is there for all
    ends = {}
    for fault, text in json.loads(sys.stdin.read()).items():
        if (child := os.fork()) == 0:
            os.environ["FAULT_AT"] = fault.partition("/")[0]
            predict_with(validate(PredictConfig, json.loads(text), ""), lambda tasks: list(map(answer_task, tasks)))
            os._exit(0)
        ends[fault] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ends))
    """


def run(config: PredictConfig) -> PredictReport:
    torch.set_num_threads(1)

    def here(tasks: list[batch.Task]) -> Iterable[batch.Task]:
        return [answer_task(task) for task in tasks]

    return predict_with(config, here)


def read(path: Path) -> AnnData:
    return read_answers(path) if is_table(path) else read_h5ad(path)


def assert_alike(found: Path, expected: Path) -> None:
    """The same files with the same answers, and nothing else visible or hidden."""
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.iterdir():
        one, other = read(found / path.name), read(path)
        assert one.obs_names.is_unique
        pd.testing.assert_frame_equal(one.obs, other.obs)
        np.testing.assert_array_equal(one.obsm["cellplm_cell_type_proba"], other.obsm["cellplm_cell_type_proba"])
        assert one.uns["cellplm"] == other.uns["cellplm"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PredictConfig:
    """An annotation of two files in two batches each."""
    folder = tmp_path_factory.mktemp("job")
    inputs = [folder / f"{name}.h5ad" for name in ("one", "two")]
    for number, (path, cells) in enumerate(zip(inputs, CELLS, strict=True)):
        write_h5ad(simulate(SimulateConfig(n_cells=cells, n_genes=24, n_batches=2, seed=number)), path)
    model = save_model(tiny_folder(ANNOTATOR), folder / "model")
    return PredictConfig(model=str(model), inputs=tuple(map(str, inputs)), out="", keys=DataKeys(batch_key="batch"))


def left_alone(job: PredictConfig, folder: Path) -> dict[str, Path]:
    """The answers of a job that nobody killed, by format."""
    for kind in FORMATS:
        assert run(job.model_copy(update={"out": str(folder / kind), "format": kind})).cells == sum(CELLS)
    return {kind: folder / kind for kind in FORMATS}


@pytest.fixture(scope="module")
def uninterrupted(job: PredictConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellplane.inference.CELLS_PER_FORWARD", 32)  # several steps to a file
        return left_alone(job, tmp_path_factory.mktemp("never"))


@pytest.fixture(scope="module")
def killed(job: PredictConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, PredictConfig]]:
    """One job killed at each point in each format: how it ended, and its configuration."""
    folder = tmp_path_factory.mktemp("killed")
    names = [f"{point}/{kind}" for point in POINTS for kind in FORMATS]
    changes = {name: {"out": str(folder / name.replace(":", "_").replace("/", "_")), "format": name.split("/")[1]} for name in names}
    configs = {name: job.model_copy(update=changed) for name, changed in changes.items()}
    texts = json.dumps({name: config.model_dump_json() for name, config in configs.items()})
    warm = job.model_copy(update={"out": str(folder / "warm")}).model_dump_json()
    done = subprocess.run([sys.executable, "-c", KILLER, warm], input=texts, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), configs


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_job_run_again_gives_the_same_answers(killed, uninterrupted, monkeypatch, point: str, kind: str) -> None:
    monkeypatch.setattr("cellplane.inference.CELLS_PER_FORWARD", 32)
    ends, configs = killed
    config = configs[f"{point}/{kind}"]
    assert ends[f"{point}/{kind}"] == -signal.SIGKILL
    visible = [path.name for path in Path(config.out).glob("[!.]*")] if Path(config.out).exists() else []
    report = run(config)
    assert sorted(path.name for path in report.reused) == sorted(visible), "what was there was whole, and is not done twice"
    assert len(report.written) == 2 - len(visible)
    assert_alike(Path(config.out), uninterrupted[kind])
    assert len(run(config).reused) == 2


def test_the_points_are_those_in_the_code() -> None:
    source = "".join((Path(batch.__file__).parent / name).read_text() for name in ("batch.py", "data/files.py"))
    named = {part.split('"')[0] for part in source.split('fault("')[1:]}
    assert named == {point.split(":")[0] for point in POINTS}
