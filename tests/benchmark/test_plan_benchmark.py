"""The simulated control plane is that of a real conversion in small: sizes add up, the manifest reads back, all sentences are dealt."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.benchmark import plan
from cellplane.benchmark.plan import PlanBenchmark
from cellplane.config import load_config
from cellplane.data.config import ConvertConfig
from cellplane.train.config import PretrainConfig
from cellplane.train.plan import plan_run
from jobs import benchmark

SMALL = PlanBenchmark(cells=200_000, shards=8, sentence=500, workers=4, steps=50)


def test_the_made_manifest_holds_what_was_asked_for() -> None:
    made = SMALL.manifest()
    assert made.cells == SMALL.cells == sum(row.cells for row in made.sentences)
    assert len(made.shards) == 8
    assert [row.first_cell for row in made.sentences[:3]] == np.cumsum([0, *(row.cells for row in made.sentences[:2])]).tolist()
    for shard in range(8):
        own = [row for row in made.sentences if row.shard == shard]
        assert [row.index for row in own] == list(range(len(own)))
        assert sum(row.cells for row in own) == made.shards[shard].cells


def test_every_part_tells_figures_and_every_gate_holds_in_small() -> None:
    figures = list(PlanBenchmark(**{**vars(SMALL), "only": ("manifest", "steps", "resume")}).run())
    assert len(figures) == 11
    assert not [figure.name for figure in figures if figure.holds is False]
    assert {figure.name: figure.value for figure in figures}["plan, every sentence once over 4 workers"] == 1.0


def test_a_plan_that_loses_a_sentence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan.deal
    monkeypatch.setattr(plan, "deal", lambda batches, rank, size: whole(batches, rank, size)[: -1 if rank == 1 else None])
    found = {figure.name: figure.holds for figure in PlanBenchmark(**{**vars(SMALL), "only": ("steps",)}).run()}
    assert found["plan, every sentence once over 4 workers"] is False


def test_its_constants_are_those_of_the_platform() -> None:
    assert ConvertConfig.model_fields["shard_bytes"].default == plan.SHARD_BYTES
    config = load_config(PretrainConfig, "cellplm_85m", "pretrain", ["workers.count=64", "plan.micro_batches_per_step=64"])
    found = plan_run(config, "h100", 64).as_dict()
    assert found["step_s"] == pytest.approx(plan.STEP_S, rel=0.02)
    assert config.optimizer.steps == plan.STEPS
    assert config.plan.cells_per_micro_batch == PlanBenchmark().config.cells_per_micro_batch


def test_the_command_knows_it() -> None:
    assert set(benchmark.PARTS["plan"]) == {"manifest", "steps", "resume", "verify"}
