"""The page on fine-tuning names only keys, metrics and experiments that exist."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cellplane.config import load_config, to_plain
from cellplane.pipelines.finetuning import TASKS
from cellplane.pipelines.tune_config import TuneConfig
from tests.house.source import ROOT, sources

PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
SECTIONS = ("transfer", "optimizer", "guard", "masking", "keys")
KEYS = sorted({word for text in QUOTED for word in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z0-9_]+", text)})
SCORES = sorted({text for text in QUOTED if text.startswith(("mask_", "split_"))})


def test_the_page_names_keys_and_scores():
    assert {"transfer.learn", "transfer.block_lr_decay", "guard.max_skips"} <= set(KEYS)
    assert len(SCORES) == 4


@pytest.mark.parametrize("key", KEYS)
def test_a_key_on_the_page_is_one_of_every_task_that_has_the_section(key):
    section, _, name = key.partition(".")
    found: list[Any] = [to_plain(load_config(task.config, name, "finetune")) for name, task in TASKS.items()]
    assert any(section in plain and name in plain[section] for plain in found)


@pytest.mark.parametrize("name", ["patience", "validate_every", "device", "hidden_weight", "seen_weight"])
def test_a_plain_key_on_the_page_is_one_of_a_recipe(name):
    assert f"`{name}" in PAGE
    assert any(name in task.config.model_fields for task in TASKS.values())


@pytest.mark.parametrize("name", ["space", "grace_steps", "reduction", "trials"])
def test_a_key_of_a_search_is_one(name):
    assert f"`{name}`" in PAGE
    assert name in TuneConfig.model_fields


@pytest.mark.parametrize("name", SCORES)
def test_a_score_on_the_page_is_one_that_is_computed(name):
    assert any(f'"{name}"' in source.text for source in sources() if source.module.endswith("denoising_scores"))


def test_every_task_on_the_page_can_be_learned_and_every_one_has_a_shipped_recipe():
    assert {name for name in TASKS if f"finetune {name}" in PAGE} >= {"annotate", "denoise", "impute"}
    for name, task in TASKS.items():
        assert load_config(task.config, name, "finetune").task == name
