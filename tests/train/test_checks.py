"""What cannot work is said before a cluster is asked, in seconds, with the exit code that fits."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cellplane.cli.main import main
from cellplane.config import to_yaml
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.shards import read_manifest
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import CheckpointError, ConfigError, DataError, TrainingError, VocabularyError
from cellplane.pipelines.jobs import check_pretrain, run_pretrain
from cellplane.train.checks import USUAL_CELLS, check_run, origin_of, resumed_config, warn_about
from cellplane.train.launch import pretrain
from cellplane.train.run_folder import RunFolder
from cellplane.train.worker import run_worker
from tests.train.conftest import STEPS

TORCH = {"engine": {"name": "torch"}}


def converted(folder: Path, n_cells: int, n_genes: int, max_cells: int) -> str:
    write_h5ad(simulate(SimulateConfig(n_cells=n_cells, n_genes=n_genes, n_types=2, n_batches=1)), folder / "cells.h5ad")
    keys = DataKeys(labels_key="cell_type")
    config = ConvertConfig(inputs=(str(folder / "cells.h5ad"),), out=str(folder / "shards"), keys=keys, max_cells=max_cells)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return str(folder / "shards")


def begun(config) -> None:
    """A finished run with everything a launch remembers of it."""
    run_worker(config, 1, 0, lambda metrics: None)
    RunFolder.of(config.run).remember(config, origin_of(config))


def test_a_run_that_can_work_passes(run_config, cellplane_home):
    assert check_run(run_config("r")).n_genes == 24


def test_shards_of_other_genes_than_the_run_was_begun_with_are_refused(run_config, cellplane_home, tmp_path):
    begun(run_config("r", TORCH))
    other = run_config("r", {**TORCH, "shards": converted(tmp_path, 40, 30, 20)})
    with pytest.raises(VocabularyError, match=r"begun with a vocabulary of 24 genes .* has 30 .*another run name"):
        check_run(other)


def test_other_settings_than_the_run_was_begun_with_are_named(run_config, cellplane_home):
    begun(run_config("r", TORCH))
    changed = run_config("r", {**TORCH, "optimizer": {"lr": 0.5}})
    with pytest.raises(CheckpointError, match=r"optimizer.lr is 0.003 there and 0.5 here"):
        check_run(changed)
    with pytest.raises(CheckpointError, match=r"optimizer.lr is 0.003 there and 0.5 here"):
        pretrain(changed)
    check_run(run_config("r", {"workers": {"count": 1}, "engine": {"zero_stage": 3}}))  # these do not change the numbers


def test_a_run_that_kept_nothing_may_be_begun_differently(run_config, cellplane_home):
    config = run_config("r", TORCH)
    RunFolder.of("r").remember(config, origin_of(config))
    check_run(run_config("r", {"optimizer": {"lr": 0.5}}))


def test_more_workers_than_micro_batches_are_refused(run_config, cellplane_home):
    for workers in ({"count": 4}, {"count": 2, "min": 1, "max": 4}):
        with pytest.raises(ConfigError, match=r"4 workers, but a step has 3 micro-batches.*workers.count=3"):
            check_run(run_config("r", {"workers": workers}))


def test_a_sentence_above_the_budget_stands_alone_and_an_unusually_long_one_is_told(run_config, cellplane_home, caplog):
    config = run_config("r", {**TORCH, "plan": {"cells_per_micro_batch": 5}, "workers": {"count": 1}})
    with caplog.at_level(logging.WARNING):
        manifest = check_run(config)
        warn_about(config, manifest)  # sentences of 12 cells: no memory worth a word
        assert not caplog.text
        long = replace(manifest.sentences[0], cells=USUAL_CELLS + 1)
        warn_about(config, replace(manifest, sentences=(long, *manifest.sentences[1:])))
    assert "sentences of up to 2049 cells exceed plan.cells_per_micro_batch = 5" in caplog.text
    run_worker(config, 1, 0, lambda metrics: None)


def test_what_may_be_regretted_is_told_once_and_not_by_the_look_before(run_config, cellplane_home, tmp_path, caplog, monkeypatch):
    config = run_config("r", {**TORCH, "shards": converted(tmp_path, 10, 24, 10)})

    def stop(config: object) -> None:
        raise TrainingError("far enough")

    monkeypatch.setattr("cellplane.pipelines.jobs.pretrain", stop)
    with caplog.at_level(logging.WARNING):
        check_pretrain(config)  # as the command line does before it starts a cluster
        with pytest.raises(TrainingError, match="far enough"):
            run_pretrain(config)
    assert caplog.text.count("will do nothing") == 1


def test_one_sentence_is_trained_on_and_idle_workers_are_named(run_config, cellplane_home, tmp_path, caplog):
    config = run_config("r", {**TORCH, "shards": converted(tmp_path, 10, 24, 10)})
    with caplog.at_level(logging.WARNING):
        manifest = check_run(config)
        assert len(manifest.sentences) == 1
        warn_about(config, manifest)
    assert "will do nothing" in caplog.text
    reached = []
    run_worker(config, 1, 0, lambda metrics: reached.append(metrics["step"]))
    assert reached == [STEPS]


def test_shards_without_sentences_are_refused(run_config, cellplane_home, monkeypatch):
    empty = replace(read_manifest(Path(run_config("r").shards)), sentences=())
    monkeypatch.setattr("cellplane.train.checks.read_manifest", lambda path: empty)
    with pytest.raises(DataError, match="holds no sentences"):
        check_run(run_config("r"))


def test_a_run_goes_on_with_the_configuration_it_was_started_with(run_config, cellplane_home):
    config = run_config("r", {**TORCH, "optimizer": {"lr": 0.004}})
    begun(config)
    assert resumed_config("r", None, []) == config
    assert resumed_config("r", None, ["workers.count=1"]).workers.count == 1


def test_there_must_be_something_to_go_on_from(run_config, cellplane_home):
    with pytest.raises(CheckpointError, match=r"no run 'r' with a stored configuration.*holds none"):
        resumed_config("r", None, [])
    config = run_config("r", TORCH)
    RunFolder.of("r").remember(config, origin_of(config))
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        resumed_config("r", None, [])
    with pytest.raises(CheckpointError, match=r"no run 's'.*there are r"):
        resumed_config("s", None, [])


def test_a_fine_tuning_is_not_resumed_as_a_pre_training(run_config, cellplane_home):
    folder = RunFolder.of("tuned")
    folder.path.mkdir(parents=True)
    folder.config.write_text("kind: finetune\ntask: annotate\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no pre-training .*cellplane finetune"):
        resumed_config("tuned", None, [])
    with pytest.raises(CheckpointError, match="holds none"):
        resumed_config("other", None, [])


BAD = [
    (["-o", "workers.count=4"], 2, "micro-batches"),
    (["-o", "workers.min=3", "-o", "workers.max=2"], 2, "min = 3 workers is more than max = 2"),
    (["-o", "workers.min=3"], 2, "min = 3 workers is more than count = 2"),
    (["-o", "workers.max=1"], 2, "count = 2 workers is more than max = 1"),
    (["-o", "shards=/nowhere"], 3, "/nowhere"),
    (["-o", 'shards=""'], 2, "shards is empty"),
    (["--resume", "never"], 1, "nothing to resume"),
]


@pytest.mark.parametrize(("options", "code", "said"), BAD)
def test_the_command_line_says_so_before_any_cluster_is_asked(options, code, said, run_config, cellplane_home, monkeypatch, capsys):
    def no_cluster(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was asked")

    monkeypatch.setattr("cellplane.cluster.local_ray", no_cluster)
    path = cellplane_home / "run.yaml"
    path.write_text(to_yaml(run_config("r")))
    given = [] if "--resume" in options else ["--config", str(path)]
    began = time.process_time()
    assert main(["pretrain", *given, *options]) == code
    assert said in capsys.readouterr().err
    assert time.process_time() - began < 5  # of this process: the machine may be busy
