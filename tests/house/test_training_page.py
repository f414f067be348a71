"""The page on training names only keys, metrics and tags that exist."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cellplane.config import load_config, to_plain
from cellplane.model.losses import PARTS
from cellplane.pipelines.plots import COURSE, LOSS_TERMS
from cellplane.tracking.system import SystemMeter
from cellplane.train.config import PretrainConfig
from tests.house.source import ROOT, sources

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
SECTIONS = ("engine", "plan", "guard", "validation", "workers", "checkpoint", "model", "optimizer")
KEYS = sorted({word for text in QUOTED for word in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z0-9_]+", text)})
SYSTEM = sorted({text for text in QUOTED if text.startswith("system/")})
TRAIN = sorted({text for text in QUOTED if text.startswith("train/")})


def test_the_page_names_keys_metrics_and_tags():
    assert len(KEYS) > 12
    assert len(SYSTEM) == 10
    assert len(TRAIN) > 8


@pytest.mark.parametrize("key", KEYS)
def test_a_key_on_the_page_is_a_key_of_the_configuration(key):
    node: Any = to_plain(load_config(PretrainConfig, "demo", "pretrain"))
    for part in key.split("."):
        assert part in node
        node = node[part]


@pytest.mark.parametrize("name", TRAIN)
def test_a_training_metric_on_the_page_is_one_that_is_journalled(name):
    term = name.removeprefix("train/")
    written = "".join(source.text for source in sources() if source.module.startswith("cellplane.train."))
    assert term in PARTS["negative_binomial"] or f'"{name}"' in written
    assert term in LOSS_TERMS or name in COURSE


def test_the_system_metrics_on_the_page_are_those_that_are_sampled():
    sampled = set(SystemMeter().sample()) | {"system/gpu_peak_bytes", "system/gpu_used_share"}
    assert set(SYSTEM) == sampled


@pytest.mark.parametrize("tag", ["data_fingerprint", "vocabulary_fingerprint", "config_sha256", "ray_job_id", "base_model", "world_sizes"])
def test_a_tag_on_the_page_is_written_by_somebody(tag):
    assert f"`{tag}`" in PAGE
    assert any(
        f'"{tag}"' in source.text for source in sources() if source.module.startswith(("cellplane.pipelines.", "cellplane.tracking."))
    )
