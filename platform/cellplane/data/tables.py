"""The tables of a source's cells (obs) and genes (var) beside its shards, as Parquet: not read in training, needed to export.

Parquet forgets which categories a column has and in which order, so these are kept in the metadata of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cellplane.errors import FileFormatError

ROWS_AT_ONCE = 131_072
CATEGORIES = b"cellplane_categories"
POSITION = "cellplane_position"  # a gene's place in the vocabulary of the shards, -1 = left out


def write_table(path: Path, parts: Iterable[pd.DataFrame]) -> None:
    """Write the parts below one another; all must have the columns and categories of the first."""
    writer: pq.ParquetWriter | None = None
    try:
        for part in parts:
            table = _plain(part)
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table.cast(writer.schema), row_group_size=ROWS_AT_ONCE)
    finally:
        if writer is not None:
            writer.close()


def _plain(frame: pd.DataFrame) -> pa.Table:
    """The frame for Arrow: mixed columns as text, categories noted."""
    notes: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for key, column in frame.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            categories = column.cat.categories
            notes[str(key)] = {"values": categories.tolist(), "dtype": str(categories.dtype), "ordered": bool(column.cat.ordered)}
            columns[str(key)] = column.astype(categories.dtype if categories.dtype == object else object)
        else:
            columns[str(key)] = column
        if columns[str(key)].dtype == object:
            columns[str(key)] = columns[str(key)].map(str, na_action="ignore").astype("string")
    table = pa.Table.from_pandas(pd.DataFrame(columns, index=frame.index.map(str)), preserve_index=True)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), CATEGORIES: json.dumps(notes, default=str).encode()})


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """The frame as it was written. Raises FileFormatError when it is not such a table."""
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise FileFormatError(f"{path} is not a whole Parquet file: {error}; convert again") from error
    frame: pd.DataFrame = table.to_pandas()
    for key, note in json.loads(table.schema.metadata[CATEGORIES]).items():
        if key in frame:
            categories = pd.Index(np.array(note["values"], dtype=note["dtype"]))
            codes = pd.Index([str(value) for value in note["values"]]).get_indexer(frame[key].astype(object))
            frame[key] = pd.Categorical.from_codes(codes, categories, ordered=note["ordered"])
    for key in frame:
        if isinstance(frame[key].dtype, pd.StringDtype):
            frame[key] = frame[key].astype(object)
    return frame
