"""Where the released model's arrays lie."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Path:
    """Official checkpoints and the arrays the released package computed with them."""
    return shared / "oracle"
