"""Small simulated cells, as an AnnData and as a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, write_h5ad


@pytest.fixture
def cells() -> AnnData:
    return simulate(SimulateConfig(n_cells=120, n_genes=40, spatial=True))


@pytest.fixture
def h5ad(cells: AnnData, tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    write_h5ad(cells, path)
    return path


@pytest.fixture(scope="session")
def pbmc68k() -> Path:
    """The 700 cells that scanpy's package carries, found without importing it."""
    spec = importlib.util.find_spec("scanpy")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
