"""`cellplane plan` says in a few lines, or as JSON, what a run would take."""

from __future__ import annotations

import pytest

from cellplane.config import load_config
from cellplane.train.config import PretrainConfig
from cellplane.train.plan import plan_run

WHERE = ("--device", "h100", "--devices", 8)


def test_a_plan_is_what_the_platform_computes(run):
    said = run("plan", "--config", "cellplm_85m", *WHERE, "--price-per-hour", 2.5, "--json")
    assert said.code == 0
    expected = plan_run(load_config(PretrainConfig, "cellplm_85m", "pretrain"), "h100", 8, 2.5).as_dict()
    assert said.json == expected
    assert said.json["memory_bytes"].keys() == {"zero_0", "zero_1", "zero_2", "zero_3"}


def test_a_person_gets_the_essentials(run):
    out = run("plan", "-c", "cellplm_85m", *WHERE, "--price-per-hour", 2).out
    for word in (
        "parameters",
        "operations a cell",
        "8 x h100, ZeRO 2: fits",
        "hours",
        "cost",
        "GiB a checkpoint",
        "assumed",
        "19374 genes",
    ):
        assert word in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("ZeRO")] == ["0", "1", "2", "3"]
    assert "ZeRO 2 (configured)" in out


def test_without_a_price_there_is_no_cost(run):
    assert "give --price-per-hour" in run("plan", *WHERE).out
    assert run("plan", *WHERE, "--json").json["cost"] is None


def test_overrides_change_the_plan(run):
    few, many = (run("plan", *WHERE, "--json", "-o", f"optimizer.steps={steps}").json for steps in (10, 1000))
    assert many["hours"] == pytest.approx(100 * few["hours"])


def test_a_run_that_does_not_fit_is_said_with_the_ways_out(run):
    large = ("-o", "model=300m", "-o", "plan.cells_per_micro_batch=60000", "--device", "l4")
    assert "DOES NOT FIT: a higher zero_stage" in run("plan", "-c", "cellplm_85m", *large).out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--device", "abacus"), 2, "device 'abacus' is not known; choose one of cpu"),
        (("--devices", 0, "--device", "h100"), 2, "--devices"),
        (("--config", "nothing"), 2, "no config file"),
        (("--shards", "nowhere", "--device", "h100"), 3, "nowhere"),
        (("-o", "model.widht=3"), 2, "did you mean 'model.width'"),
    ],
)
def test_what_cannot_be_planned_is_said(run, arguments, code, said):
    answer = run("plan", *arguments)
    assert answer.code == code
    assert said in answer.err
