"""The released CellPLM's arrays and checkpoints in ../shared/oracle, and what reading them takes.

They were computed by the released package (0.1.0.post2) on one thread in float32; a released model's answers must be
ours to rtol 1e-4, atol 1e-5.
"""

# C cells, G genes

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellplane.artifact.official import read_official
from cellplane.cells import CellBatch, single_panel_batch
from cellplane.model import encoder
from cellplane.model.cellplm import CellPLM
from cellplane.model.noise import Noise


class GivenNoise(Noise):
    """The uniforms and normals the original drew."""

    def __init__(self, uniform: Tensor | None, normal: Tensor, step: int = 0) -> None:
        super().__init__(0, step)
        self.given_uniform, self.given_normal = uniform, normal

    def uniform(self, like: Tensor, site: str) -> Tensor:
        return self.given_uniform

    def normal(self, like: Tensor, site: str) -> Tensor:
        return self.given_normal


def near(ours: Any, theirs: np.ndarray) -> None:
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.from_numpy(np.asarray(theirs)).double()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def batch_of(x: np.ndarray, positions: np.ndarray | None = None, n_genes: int = 200) -> CellBatch:
    """The cells as one sentence; ``positions`` are the columns' places in the vocabulary."""
    cell, column = np.nonzero(x)
    gene = column if positions is None else positions[column]
    panel = torch.zeros(n_genes, dtype=torch.bool)
    panel[torch.from_numpy(np.unique(positions)) if positions is not None else slice(None)] = True
    crow = torch.from_numpy(np.concatenate([[0], np.cumsum((x != 0).sum(1))]))
    return single_panel_batch(crow, torch.from_numpy(gene), torch.from_numpy(x[cell, column]), panel)


def sentences_of(x: np.ndarray, samples: list[np.ndarray], n_genes: int) -> tuple[CellBatch, np.ndarray]:
    """The rows of each sample as a sentence of one packed batch, and the row each of its cells came from."""
    order = np.concatenate(samples)
    edges = torch.tensor([0, *np.cumsum([len(rows) for rows in samples])])
    seeds = torch.zeros(len(samples), dtype=torch.int64)
    return replace(batch_of(x[order], n_genes=n_genes), cu_seqlens=edges, sentence_seed=seeds), order


def by_sample(names: np.ndarray) -> list[np.ndarray]:
    """The rows of each sample, in the order of their names."""
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def load(oracle: Path, prefix: str, **changes: Any) -> CellPLM:
    """The released checkpoint as our network."""
    positions = changes.pop("positions", "none")
    config, _, weights = read_official(oracle, prefix, positions)
    model = CellPLM(replace(config, **changes))
    model.load_state_dict(weights, strict=True)
    return model


@contextmanager
def no_attention_dropout() -> Iterator[None]:
    """The original's arrays of training were computed with every dropout at 0."""
    before, encoder.ATTENTION_DROPOUT = encoder.ATTENTION_DROPOUT, 0.0
    try:
        yield
    finally:
        encoder.ATTENTION_DROPOUT = before
