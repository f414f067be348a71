"""Held-out sentences are chosen by the seed alone, never trained on, asked the same at every look, and looked at without a trace."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.data.inputs import SOURCE_DIGITS
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import StepPlan
from cellplane.errors import ConfigError, DataError, TrainingError
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.noise import Noise
from cellplane.pipelines.pretraining import network_means
from cellplane.tracking.journal import Journal
from cellplane.train.baselines import hidden_nb
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import PretrainConfig
from cellplane.train.engine import Engine, TorchEngine
from cellplane.train.identity import full_model_config, run_identity
from cellplane.train.launch import _model_folder
from cellplane.train.loop import train
from cellplane.train.objective import MaskedObjective
from cellplane.train.run_folder import RunFolder
from cellplane.train.validation import (
    Validation,
    evaluating,
    held_out,
    looked_at,
    micro_batches,
    new_validation,
    prepare,
    split_of,
    training_plan,
    training_weights,
)
from cellplane.train.worker import run_worker
from tests.train.conftest import STEPS

SHARE = {"validation": {"share": 0.25, "every_steps": 2}}
LOOK = Path(__file__).with_name("look.py")


@pytest.fixture(scope="module")
def store(shards: Path) -> ShardStore:
    return ShardStore(shards)


@pytest.fixture
def config(run_config: Callable[..., PretrainConfig]) -> PretrainConfig:
    return run_config("v", SHARE)


def network_of(config: PretrainConfig) -> CellPLM:
    return new_model(full_model_config(config), config.plan.seed)


def look_of(config: PretrainConfig, store: ShardStore, network: torch.nn.Module | None = None) -> Validation:
    look = new_validation(config, store, network_of(config) if network is None else network)
    assert look is not None
    return look


GROUPS = np.repeat(np.arange(4), [2, 10, 50, 1])


def test_about_the_share_is_held_out_and_the_seed_alone_chooses_which():
    held = held_out(GROUPS, 0.2, seed=3)
    assert held.sum() == round(0.2 * len(GROUPS))
    assert np.array_equal(held, held_out(GROUPS.copy(), 0.2, seed=3))
    assert not np.array_equal(held, held_out(GROUPS, 0.2, seed=4))


def test_every_data_set_that_can_spare_a_sentence_gives_one_and_keeps_one():
    for seed in range(20):
        held = held_out(GROUPS, 0.1, seed)
        assert np.bincount(GROUPS, held, 4).tolist() == [1, 1, 4, 0]


def test_a_large_share_leaves_every_data_set_a_sentence_to_train_on():
    held = held_out(GROUPS, 0.99, seed=0)
    assert np.bincount(GROUPS, ~held, 4).tolist() == [1, 1, 1, 1]


def test_data_sets_of_one_sentence_each_give_some_of_themselves():
    held = held_out(np.arange(5), 0.1, seed=0)
    assert held.sum() == 1
    assert held_out(np.arange(2), 0.9, seed=0).sum() == 1


def test_nothing_is_held_out_at_a_share_of_0():
    assert not held_out(GROUPS, 0.0, seed=0).any()
    assert training_weights(held_out(GROUPS, 0.0, seed=0), None) is None


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_sentences_to_share_out_are_refused_with_a_way_out(count):
    with pytest.raises(DataError, match=r"cannot be shared out.*smaller max_cells.*validation\.share=0"):
        held_out(np.zeros(count, dtype=np.int64), 0.5, seed=0)


def test_weights_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(DataError, match="every sentence with a weight above 0 is held out"):
        training_weights(np.array([True, False]), np.array([1.0, 0.0]))


def test_training_draws_every_other_sentence_once_an_epoch_and_never_one_held_out(config, store):
    split, plan = split_of(store, 0.25, config.plan.seed), training_plan(config, store)
    assert sorted([*split.training, *split.held_out]) == list(range(len(store.sizes)))
    assert len(split.held_out) == round(0.25 * len(store.sizes))
    for epoch in range(3):
        first = sum(plan.steps_of_epoch(earlier) for earlier in range(epoch))
        steps = range(first, first + plan.steps_of_epoch(epoch))
        drawn = [sentence for step in steps for micro_batch in plan.at(step) for sentence in micro_batch.sentences]
        assert sorted(drawn) == split.training.tolist()


def test_what_is_held_out_stays_so_where_sentences_are_drawn_by_weight(run_config, store):
    values = {store.manifest.batch_names[0]: 3.0}
    config = run_config("w", {**SHARE, "plan": {"weights": {"column": "batch", "values": values}}})
    split, plan = split_of(store, 0.25, config.plan.seed), training_plan(config, store)
    drawn = [sentence for step in range(30) for micro_batch in plan.at(step) for sentence in micro_batch.sentences]
    assert set(drawn) == set(split.training.tolist())
    of_first = np.array([row.batch == 0 for row in store.manifest.sentences])[drawn]
    assert of_first.mean() > 0.6


def test_without_a_share_the_plan_is_the_one_it_always_was(run_config, store):
    config = run_config("n")
    plan, before = training_plan(config, store), StepPlan(store.sizes, config.plan)
    assert [plan.at(step) for step in range(12)] == [before.at(step) for step in range(12)]
    assert new_validation(config, store, network_of(config)) is None


def test_a_look_takes_whole_sentences_up_to_the_limit_always_the_same_ones(store):
    everything = np.arange(len(store.sizes))
    some = looked_at(store, everything, 50)
    assert store.sizes[some].sum() <= 50 < store.sizes[looked_at(store, everything, 70)].sum()
    assert np.array_equal(some, looked_at(store, everything[::-1], 50))
    assert len(looked_at(store, everything, 1)) == 1
    assert np.array_equal(looked_at(store, everything, 10**6), everything)


def test_what_is_hidden_depends_on_the_sentence_alone_and_no_cell_is_dropped(config, store):
    alone = {}
    for sentence in range(4):
        (part,) = micro_batches(store, np.array([sentence]), 10)
        alone[sentence] = prepare(store, part, config.masking)
    (packed,) = micro_batches(store, np.arange(4), 1000)
    batch, mask = prepare(store, packed, replace(config.masking, panel_rate=1.0, panel_min_genes=2))
    assert batch.n_cells == store.sizes[:4].sum()
    assert torch.equal(mask.bits, torch.cat([mask.bits for _, mask in alone.values()]))
    assert 0 < (mask.hidden_C > 0).sum() < batch.n_cells


def test_a_look_reports_the_loss_and_the_nats_of_a_hidden_value(config, store):
    look = look_of(config, store)
    seen = look(2)
    cells = loss = nats = values = 0.0
    for sentence in look.split.held_out:
        (part,) = micro_batches(store, np.array([sentence]), 10)
        batch, mask = prepare(store, part, config.masking)
        with torch.no_grad():
            found = look.network(batch, mask).loss
        asked = int((mask.hidden_C > 0).sum())
        cells, loss = cells + asked, loss + float(found.total) * asked
        nats, values = (
            nats + float(hidden_nb(batch, mask, network_means(look.network, batch, mask)).own_total.sum()),
            values + int(mask.hidden_C.sum()),
        )
    assert seen["val/loss"] == pytest.approx(loss / cells, rel=1e-5)
    assert seen["val/nb"] == pytest.approx(nats / values, rel=1e-5)


def test_the_gene_mean_is_told_at_the_first_look_alone(config, store):
    look = look_of(config, store)
    assert set(look(2)) == {"val/loss", "val/nb", "val/nb_gene_mean"}
    assert set(look(4)) == {"val/loss", "val/nb"}


def test_gene_means_beat_an_untrained_network(config, store):
    seen = look_of(config, store)(1)
    assert 0 < seen["val/nb_gene_mean"] < seen["val/nb"]


def test_a_network_without_noise_sees_the_same_at_every_look(config, store):
    look = look_of(config, store)
    torch.manual_seed(1)
    first = look(4)
    torch.manual_seed(2)
    assert look(6) == first


def test_a_look_changes_neither_modes_nor_gradients_nor_random_states(config, store):
    network = network_of(config)
    network.train()
    network.encoder.eval()  # as somebody may want it who freezes a part
    modes = [module.training for module in network.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    look_of(config, store, network)(2)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert all(parameter.grad is None for parameter in network.parameters())


def failing(network: torch.nn.Module) -> None:
    with evaluating(network):
        assert not network.training
        raise ZeroDivisionError


def test_modes_are_restored_when_a_look_fails():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))
    network[1].eval()
    with pytest.raises(ZeroDivisionError):
        failing(network)
    assert [module.training for module in network.modules()] == [True, True, False]


def curve(config: PretrainConfig, store: ShardStore, engine: Engine, looking: bool) -> list[float]:
    """The losses of a run, with a look after every second step or with none."""
    losses: list[float] = []
    look = look_of(config, store, engine.model)  # type: ignore[attr-defined]

    def after(done: int, result: Any) -> bool:
        losses.append(result.loss)
        if looking and done % config.validation.every_steps == 0:
            look(done)
        return False

    train(engine, MaskedObjective(store, config.masking), training_plan(config, store), range(config.optimizer.steps), after_step=after)
    return losses


def test_a_run_that_is_looked_at_takes_the_same_steps_as_one_that_is_not(config, store):
    with_looks, without = (curve(config, store, TorchEngine(network_of(config), config.optimizer), looking) for looking in (True, False))
    assert with_looks == without
    assert len(with_looks) == config.optimizer.steps


def test_looks_of_two_workers_leave_a_sharded_run_as_it_was(run_config, run_workers, tmp_path, losses):
    """ZeRO 3, where a look gathers the weights of every layer."""
    often, seldom = (run_config("z", {"engine": {"zero_stage": 3}, "validation": {"share": 0.25, "every_steps": n}}) for n in (2, 1000))
    for name, config in (("often", often), ("seldom", seldom)):
        assert run_workers(config, tmp_path / name, 2) == [0, 0]
    assert losses(tmp_path / "often", "z") == losses(tmp_path / "seldom", "z")


def test_a_run_writes_down_what_it_saw_at_its_steps_and_the_last_one(run_config, tmp_path, cellplane_home, losses):
    config = run_config("j", {"engine": {"name": "torch"}, "validation": {"share": 0.25, "every_steps": 3}})
    run_worker(config, 1, 0, lambda metrics: None)
    rows = {row.step: row.metrics for row in Journal(RunFolder.of("j").journal).rows()}
    seen = {step: {name for name in metrics if name.startswith("val/")} for step, metrics in rows.items()}
    usual = {"val/loss", "val/nb"}
    assert {step: names for step, names in seen.items() if names} == {3: {*usual, "val/nb_gene_mean"}, 6: usual, STEPS: usual}
    assert rows[STEPS]["val/nb"] < rows[3]["val/nb"]


def test_three_workers_see_what_one_sees(config, store, tmp_path):
    (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    alone = look_of(config, store)(1)
    assert looked(tmp_path, 3) == pytest.approx(alone, rel=1e-6)


def looked(folder: Path, world_size: int) -> dict[str, float]:
    """What a group of workers saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"CELLPLANE_HOME": str(folder)}
    command = [sys.executable, str(LOOK), str(folder / "config.json")]
    workers = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    try:
        answers = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world_size
    return dict(json.loads(answers[0]))


def test_a_loss_that_is_not_finite_is_an_error(config, store):
    network = network_of(config)
    with torch.no_grad():
        network.embedder.linear.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="validation loss is not finite after 4 steps"):
        look_of(config, store, network)(4)


def test_a_masking_that_hides_nothing_is_refused(config, store):
    look = look_of(config, store)
    with pytest.raises(ConfigError, match="cell_mask_rate is 0"):
        replace(look, masking=replace(look.masking, cell_mask_rate=0.0))


def test_a_look_needs_something_held_out(config, store):
    look = look_of(config, store)
    with pytest.raises(DataError, match="no sentence is held out"):
        replace(look, split=replace(look.split, held_out=look.split.held_out[:0]))


def test_a_network_that_decodes_nothing_has_nothing_to_validate(config, store):
    plain = new_model(replace(full_model_config(config), decoder="none"), 0)
    with pytest.raises(TrainingError, match="no decoder"):
        look_of(config, store, plain)(2)


def test_a_gaussian_decoder_is_named_as_such_and_has_no_counts_baseline(config, store):
    network = new_model(replace(full_model_config(config), decoder="gaussian"), 0)
    assert set(look_of(config, store, network)(1)) == {"val/loss", "val/gaussian"}


def test_training_on_the_rest_lowers_what_is_seen(run_config, store):
    config = run_config("l", {**SHARE, "optimizer": {"steps": 60, "lr": 1e-2}})
    network = network_of(config)
    look = look_of(config, store, network)
    before = look(4)
    train(TorchEngine(network, config.optimizer), MaskedObjective(store, config.masking), training_plan(config, store), range(60))
    after = look(4)
    assert after["val/nb"] < 0.95 * before["val/nb"]
    assert after["val/loss"] < before["val/loss"]


def test_the_noise_of_training_is_not_that_of_a_look(config, store):
    """A look is deterministic: it is not one draw of the noisy training loss."""
    look = look_of(config, store)
    batch, mask = prepare(store, look.batches[0], config.masking)
    with torch.no_grad():
        quiet, again, noisy = (look.network(batch, mask, noise).loss.total for noise in (None, None, Noise(1)))
    assert torch.equal(quiet, again)
    assert not torch.allclose(quiet, noisy)


def test_another_seed_holds_out_other_sentences_but_asks_a_sentence_for_the_same_values(run_config, store):
    seeds = []
    for seed in (0, 1):
        look = look_of(run_config("s", {"validation": {"share": 0.5}, "plan": {"seed": seed}}), store)
        seeds.append({sentence: key for part in look.batches for sentence, key in zip(part.sentences, part.seeds, strict=True)})
    common = seeds[0].keys() & seeds[1].keys()
    assert common
    assert seeds[0].keys() != seeds[1].keys()
    assert [seeds[0][sentence] for sentence in common] == [seeds[1][sentence] for sentence in common]


def test_a_finished_model_tells_which_sentences_it_never_saw(config, run_config, cellplane_home):
    for asked, share in ((config, 0.25), (run_config("v"), 0.0)):
        lineage = _model_folder(asked, TrainingState(1, network_of(asked).state_dict(), {}, "identity")).lineage
        assert float(lineage.get("validation_share", 0)) == share
        assert share == 0 or int(lineage["plan_seed"]) == asked.plan.seed
        assert lineage["sources"].split() == [entry.sha256[:SOURCE_DIGITS] for entry in ShardStore(Path(asked.shards)).manifest.datasets]


def test_what_is_held_out_is_part_of_a_run_s_identity_and_how_often_it_is_looked_at_is_not(run_config):
    plain, often, more = (run_config("i", changes) for changes in ({}, SHARE, {"validation": {"share": 0.5}}))
    seldom = run_config("i", {"validation": {"share": 0.25, "every_steps": 500, "max_cells": 10}})
    assert len({run_identity(config) for config in (plain, often, more)}) == 3
    assert run_identity(seldom) == run_identity(often)
    assert run_identity(run_config("i", {"validation": {"every_steps": 7}})) == run_identity(plain)
