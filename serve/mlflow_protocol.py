"""MLflow's scoring protocol: a drop-in for its clients. Rows are cells, columns are genes, values are raw counts.

``dataframe_split`` and ``dataframe_records`` are what its clients send of a table; ``inputs`` takes named lists, the
native JSON body's. ``params`` may name the ``model`` (needed when several are served), the ``task`` and its options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from .bodies import NumberByName, NumberRows, Parameters, Strict, Strings, read_json
from .codec import Cells, CellsBody, Columns, checked, columns_of
from .document import About
from .limits import Limits, refuse, refuse_unreadable


class SplitFrame(Strict):
    """A table as pandas' orient "split"."""

    columns: Strings
    data: NumberRows
    index: Annotated[list[int | str], Field(fail_fast=True)] | None = None


class Invocation(Strict):
    """Body of /invocations: exactly one of the three forms, and parameters."""

    dataframe_split: SplitFrame | None = None
    dataframe_records: Annotated[list[NumberByName], Field(fail_fast=True)] | None = None
    inputs: CellsBody | None = None
    params: Parameters | None = None


class Predictions(BaseModel):
    """One record a cell, and who answered."""

    predictions: list[dict[str, float | str | bool | list[float] | list[str]]]
    about: About


@dataclass(frozen=True)
class Scoring:
    """A decoded request."""

    cells: Cells
    params: Mapping[str, str | int | float | bool]


def decode_invocation(body: bytes, limits: Limits) -> Scoring:
    """The cells of a body; ServiceError 400 for what is not JSON, 413 for too much, 422 for cells that make no sense."""
    refuse_unreadable(body, "a table of cells")
    asked = read_json(Invocation, body, limits)
    forms = [name for name in ("dataframe_split", "dataframe_records", "inputs") if getattr(asked, name) is not None]
    if len(forms) != 1:
        raise refuse(422, "send exactly one of dataframe_split, dataframe_records, inputs")
    gene_ids, columns = FORMS[forms[0]](getattr(asked, forms[0]))
    return Scoring(checked(gene_ids, columns, limits), asked.params or {})


def encode_predictions(columns: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> bytes:
    """One record a cell."""
    plain = {name: values.tolist() for name, values in columns.items()}
    rows = [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]
    return json.dumps({"predictions": rows, "about": dict(about)}, allow_nan=False).encode()


def _split(frame: SplitFrame) -> tuple[list[str], Columns]:
    lengths = np.array([len(row) for row in frame.data], dtype=np.int64)
    flat = np.array([value for row in frame.data for value in row], dtype=np.float64)
    return frame.columns, {"counts": (lengths, flat)}


def _records(records: list[dict[str, float]]) -> tuple[list[str], Columns]:
    genes = list(dict.fromkeys(gene for record in records for gene in record))
    place = {gene: index for index, gene in enumerate(genes)}
    lengths = np.array([len(record) for record in records], dtype=np.int64)
    gene = np.array([place[name] for record in records for name in record], dtype=np.int64)
    count = np.array([value for record in records for value in record.values()], dtype=np.float64)
    return genes, {"gene": (lengths, gene), "count": (lengths, count)}


FORMS: dict[str, Callable[[Any], tuple[list[str], Columns]]] = {
    "dataframe_split": _split,
    "dataframe_records": _records,
    "inputs": columns_of,
}
