"""Every tutorial runs as it stands, block after block, and draws the pictures it shows.

CELLPLANE_PICTURES=docs/pictures keeps what was drawn: how the pictures of the pages are made.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.house.source import ROOT
from tests.pipelines.conftest import cells, official  # noqa: F401  (fixtures)

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PREFIX = "20231027_85M"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]+\]\((\.\./pictures/([a-z_0-9]+\.png))\)")
SMALLEST_PICTURE_BYTES = 5000


@pytest.fixture
def checkpoints(official: Path, tmp_path: Path) -> None:  # noqa: F811
    """A checkpoint in the released format and under its name, where the first page expects it."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.json", "best.ckpt"):
        shutil.copy(official / f"tiny.{name}", tmp_path / "checkpoints" / f"{PREFIX}.{name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_draws_its_pictures(page, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    text = page.read_text(encoding="utf-8")
    blocks, names = BLOCK.findall(text), {}
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)
    shown = [name for _, name in PICTURE.findall(text)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(shown)
    for name in shown:
        assert (tmp_path / name).stat().st_size > SMALLEST_PICTURE_BYTES
        if folder := os.environ.get("CELLPLANE_PICTURES"):
            shutil.copy(tmp_path / name, ROOT / folder / name)


def test_there_is_a_page_for_every_task_and_every_picture_is_there():
    assert {page.stem.partition("_")[2] for page in PAGES} == {"official_checkpoint", "annotate", "embed", "impute", "denoise", "perturb"}
    for page in PAGES:
        for place, _ in PICTURE.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / place).is_file(), place
