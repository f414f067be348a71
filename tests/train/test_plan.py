"""A plan counts what can be counted, says what it assumed, and lies near what a short run really takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cellplane.benchmark.sides import Side
from cellplane.config import load_config
from cellplane.data.sentences import StepPlan
from cellplane.data.shards import read_manifest
from cellplane.errors import ConfigError, DataError
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.train.config import EngineConfig, PretrainConfig
from cellplane.train.devices import GIB, GPUS
from cellplane.train.identity import full_model_config
from cellplane.train.plan import ADAM_BYTES, Hardware, activation_bytes, plan_run, state_bytes
from cellplane.train.throughput import CellShape

OURS = "cellplane.benchmark.train_ours"
P = 1_000_000
FULL, HALF = EngineConfig(), EngineConfig(bf16=True)


def on_device(stage: int, devices: int, engine: EngineConfig = FULL) -> int:
    return state_bytes(P, stage, engine.model_copy(update={"zero_stage": stage}), devices)[0]


def test_state_of_one_process_is_weights_gradients_and_two_moments():
    assert on_device(0, 1) == on_device(0, 8) == 16 * P
    assert state_bytes(P, 2, EngineConfig(name="torch"), 4) == (16 * P, 0)


def test_zero_1_shares_the_optimizer_out_and_more_devices_need_less_each():
    assert on_device(1, 4) == 8 * P + 12 * P // 4
    assert on_device(1, 8) < on_device(1, 4) < on_device(1, 2) < on_device(1, 1)


def test_higher_stages_share_gradients_and_weights_out_where_there_are_more_of_them_than_are_gathered():
    huge, devices = 20_000_000_000, 64
    sizes = [state_bytes(huge, stage, HALF, devices)[0] for stage in (0, 1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < sizes[1] / 5


def test_bfloat16_halves_weights_and_gradients_but_not_the_optimizer():
    assert on_device(1, 4, HALF) == on_device(1, 4) - 4 * P


def test_what_is_offloaded_lies_on_the_host_and_nothing_is_lost():
    resident = on_device(2, 4)
    device, host = state_bytes(P, 2, EngineConfig(offload="optimizer"), 4)
    assert (device + host, host) == (resident, 12 * P // 4)
    both = EngineConfig(zero_stage=3, offload="parameters")
    device, host = state_bytes(P, 3, both, 4)
    assert device + host == on_device(3, 4)
    assert host == 12 * P // 4 + 4 * P // 4


MODEL = ModelConfig(n_genes=5000, width=256, n_heads=4)
CELL = CellShape(1000, 200)


def test_activations_grow_with_the_cells_of_a_micro_batch_and_shrink_with_precision_and_recomputing():
    last = activation_bytes(MODEL, CELL, 0, 4)
    one, two = (activation_bytes(MODEL, CELL, cells, 4) - last for cells in (1000, 2000))
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert activation_bytes(MODEL, CELL, 1000, 2) < activation_bytes(MODEL, CELL, 1000, 4)
    assert activation_bytes(replace(MODEL, precision="bfloat16"), CELL, 1000, 4) == activation_bytes(MODEL, CELL, 1000, 2)
    again = [activation_bytes(replace(MODEL, recompute=flag, n_blocks=12), CELL, 1000, 4) for flag in (False, True)]
    assert again[1] < 0.6 * again[0]


def test_without_shards_the_assumptions_are_stated():
    plan = plan_run(load_config(PretrainConfig, "cellplm_85m", "pretrain"))
    assert {"19374 genes", "1350 non-zero counts a cell", "device h100"} <= set(plan.assumed)
    assert plan.cells_per_step == 8 * 4096
    assert (plan.hardware.devices, plan.hardware.device, plan.zero_stage) == (8, GPUS["h100"], 2)
    assert plan.fits
    assert plan.data_cells is None


def test_with_shards_sizes_are_those_of_the_data(run_config, shards):
    config = run_config("a")
    plan, manifest = plan_run(config, "h100"), read_manifest(shards)
    assert plan.assumed == ()
    network = new_model(full_model_config(config), 0)
    assert sum(plan.parameters.values()) == network.n_parameters()
    sizes = [row.cells for row in manifest.sentences]
    steps = StepPlan(torch.tensor(sizes).numpy(), config.plan)
    real = [sum(sizes[index] for part in steps.at(step) for index in part.sentences) for step in range(steps.steps_of_epoch(0))]
    assert plan.cells_per_step == round(sum(real) / len(real))
    assert plan.as_dict()["epochs"] == pytest.approx(plan.cells_per_step * 8 / 120)


def test_a_checkpoint_on_disk_has_the_planned_size(run_config, cellplane_home):
    from cellplane.train.worker import run_worker

    config = run_config("a", {"engine": {"name": "torch"}})
    run_worker(config, 1, 0, lambda metrics: None)
    newest = max((cellplane_home / "runs" / "a" / "checkpoints").glob("step-*"))
    weights = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    header = 20_000  # names and places of the tensors
    assert plan_run(config).checkpoint_bytes <= weights <= plan_run(config).checkpoint_bytes + header


def test_more_devices_are_faster_but_not_more_than_their_number_and_never_beyond_the_micro_batches():
    config = load_config(PretrainConfig, "cellplm_85m", "pretrain")
    one, four, eight, sixteen = (plan_run(config, "h100", devices).step_s for devices in (1, 4, 8, 16))
    assert one / 4 < four < one
    assert eight < four
    assert sixteen >= eight  # eight micro-batches: eight devices would wait


def test_a_newer_device_is_faster_and_bfloat16_too():
    config = load_config(PretrainConfig, "cellplm_85m", "pretrain")
    half = load_config(PretrainConfig, "cellplm_85m", "pretrain", ["engine.bf16=true"])
    assert plan_run(config, "h200").step_s <= plan_run(config, "h100").step_s < plan_run(config, "a100").step_s
    assert plan_run(half, "h100").step_s < plan_run(config, "h100").step_s


def test_the_cost_is_that_of_all_devices_for_the_whole_time():
    config = load_config(PretrainConfig, "cellplm_85m", "pretrain")
    plan = plan_run(config, "h100", 8, 2.5)
    assert plan.cost == pytest.approx(2.5 * 8 * plan.seconds / 3600)
    assert plan.seconds == plan.step_s * 100_000
    assert plan_run(config, "h100", 8).cost is None


def test_a_model_too_large_for_a_device_is_seen():
    config = load_config(PretrainConfig, "cellplm_85m", "pretrain", ["model=300m", "plan.cells_per_micro_batch=60000"])
    assert not plan_run(config, "l4").fits
    again = load_config(PretrainConfig, "cellplm_85m", "pretrain", ["model=300m", "plan.cells_per_micro_batch=2000"])
    assert plan_run(again, "l4").fits


def test_the_optimizer_and_the_exchange_are_paid_once_a_step():
    few = load_config(PretrainConfig, "cellplm_85m", "pretrain", ["plan.cells_per_micro_batch=1"])
    assert plan_run(few, "h100", 8).step_s > ADAM_BYTES * 58e6 / GPUS["h100"].bytes_per_s


def test_the_answer_is_json():
    found = json.loads(json.dumps(plan_run(load_config(PretrainConfig, "demo", "pretrain"), "a100", 2, 1.0).as_dict()))
    assert found["memory_bytes"]["zero_2"]["device"] > found["parameters"]["all"] * 4
    assert found["device"] == "a100"


def test_what_cannot_be_planned_is_an_error(run_config):
    config = load_config(PretrainConfig, "demo", "pretrain")
    with pytest.raises(ConfigError, match="is not known; choose one of cpu"):
        plan_run(config, "abacus")
    with pytest.raises(DataError, match="no such folder"):
        plan_run(config.model_copy(update={"shards": "/nowhere"}))


def test_hardware_knows_processors_from_gpus():
    assert Hardware(GPUS["l4"], 1).kind == "gpu"


@pytest.mark.parametrize(("model", "genes", "cells"), [("tiny", 765, 512), ("10m", 4000, 512)])
def test_memory_and_time_are_near_those_of_a_short_run(model, genes, cells, tmp_path):
    """Of a process that did nothing else; time is the processor's, which other processes disturb least."""
    from cellplane.benchmark.train import Case, TrainBenchmark

    case = Case(model, genes, cells, 2, 128, steps=4)
    with Side("maker", OURS, None, 1) as maker:
        TrainBenchmark(nonzeros=200).make(case, tmp_path, maker)
    with Side("measured", OURS, None, 1) as side:
        plain = case.config(tmp_path)
        side.ask("setup", dict(config=plain, home=str(tmp_path), threads=1))
        side.ask("bare", dict(steps=2))
        seconds = min(side.ask("bare", dict(steps=case.steps))["cpu_s"] for _ in range(3))
        peak = side.ask("memory")["peak_bytes"]
    plan = plan_with_threads(PretrainConfig.model_validate(plain), 1)
    assert plan.memory[0].device == pytest.approx(peak, rel=0.5), f"planned {plan.memory[0]}, measured {peak / GIB:.2f} GiB"
    assert seconds / 3 < plan.step_s < seconds * 3, f"planned {plan.step_s:.3f} s, measured {seconds:.3f} s"


def plan_with_threads(config: PretrainConfig, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return plan_run(config, "cpu", 1)
    finally:
        torch.set_num_threads(before)


def test_a_path_of_shards_may_be_relative(run_config, shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    config = run_config("a").model_copy(update={"shards": shards.name})
    assert plan_run(config, "h100").data_cells == read_manifest(Path(shards.name)).cells
