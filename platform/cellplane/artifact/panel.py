"""A reference panel: a few hundred cells a model carries, so that a lone cell can be read in company.

By default they are nobody's: drawn from the averages of clusters of training cells. Real cells are an opt-in, and the
model card says that they are in the folder.
"""

# N cells of the panel, G genes

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import PANEL, PANEL_CELLS, pack_tensors, unpack_tensors
from cellplane.errors import FileFormatError

Origin = Literal["centroids", "cells"]
ORIGINS: tuple[str, ...] = get_args(Origin)
COLUMNS = ("crow", "gene", "value", "measured")


@dataclass(frozen=True, eq=False)
class Panel:
    """N cells: CSR counts ``crow`` [N+1], ``gene`` positions, ``value``; ``measured`` [G] bool; whose they are."""

    crow: NDArray[np.int64]
    gene: NDArray[np.int64]
    value: NDArray[np.float32]
    measured: NDArray[np.bool_]
    origin: Origin

    @property
    def n_cells(self) -> int:
        """N."""
        return len(self.crow) - 1

    @property
    def told(self) -> str:
        """In words."""
        return f"{self.n_cells} {'synthetic centroids of training cells' if self.origin == 'centroids' else 'REAL training cells'}"

    @classmethod
    def of(cls, attachments: Mapping[str, bytes]) -> Panel | None:
        """That of a model folder, None where it has none; FileFormatError when it is not readable."""
        if PANEL not in attachments:
            return None
        try:
            origin = json.loads(attachments[PANEL])["origin"]
            columns = {name: tensor.numpy() for name, tensor in unpack_tensors(attachments[PANEL_CELLS]).items()}
            if origin not in ORIGINS or set(columns) != set(COLUMNS):
                raise ValueError("not the panel of this version")
            return cls(**{**columns, "gene": columns["gene"].astype(np.int64)}, origin=origin)
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{PANEL} is not readable: {error!r}; restore the model folder from where it came") from error

    def attachments(self) -> dict[str, bytes]:
        """The same as files of a model folder."""
        columns = {name: getattr(self, name) for name in COLUMNS} | {"gene": self.gene.astype(np.int32)}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        text = json.dumps({"origin": self.origin, "cells": self.n_cells}, indent=1, sort_keys=True) + "\n"
        return {PANEL: text.encode(), PANEL_CELLS: pack_tensors(tensors)}
