"""Answers as Parquet: one row a cell, the columns of `obs` and the answer itself under the names they have in an h5ad.

Written some cells at a time, whole or not at all. The schema's metadata hold what an h5ad has in uns["cellplm"], the genes
of denoised rates and the classes of probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellplane.data.files import atomic_file
from cellplane.data.sources import AnnData
from cellplane.data.stored import DiskRows
from cellplane.errors import DataError, FileFormatError

SUFFIX = ".parquet"
CELL, RECORD, NAMES, PLACE = "cell_id", "cellplm", "names", "place"  # the cells' names; keys of the metadata
ROWS = 10_000  # of a row group


def is_table(path: Path) -> bool:
    """Whether a file is named as one of these."""
    return path.suffix == SUFFIX


def write_answers(
    path: Path,
    cells: Sequence[str] | NDArray[np.object_],
    columns: Mapping[str, Any],
    matrix: tuple[str, DiskRows],
    metadata: Mapping[str, Any],
) -> None:
    """Writes the file in one move: ``columns`` [n] (None: left out) and the answer ``matrix`` [n, width]; see `read_answers`."""
    name, rows = matrix
    kept = {key: values for key, values in columns.items() if values is not None}
    schema: pa.Schema | None = None
    with atomic_file(path) as temporary:
        writer: pq.ParquetWriter | None = None
        try:
            for start, block in _blocks(rows):
                part = slice(start, start + len(block))
                table = pa.table(
                    {
                        CELL: pa.array([str(cell) for cell in cells[part]], pa.string()),
                        **{key: _arrow(values[part]) for key, values in kept.items()},
                        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(block).reshape(-1)), rows.shape[1]),
                    }
                )
                if writer is None:
                    schema = table.schema.with_metadata({key: json.dumps(value, default=_native) for key, value in metadata.items()})
                    writer = pq.ParquetWriter(temporary, schema, compression="zstd")
                writer.write_table(table.cast(schema))
        finally:
            if writer is not None:
                writer.close()


def _blocks(rows: DiskRows) -> Iterable[tuple[int, NDArray[Any]]]:
    """(first row, rows), once with none of them where there are none, so that the file has its columns."""
    if len(rows) == 0:
        yield 0, np.empty(rows.shape, dtype=rows.dtype)
        return
    for start in range(0, len(rows), ROWS):
        block = np.empty((min(ROWS, len(rows) - start), *rows.shape[1:]), dtype=rows.dtype)
        rows.read(start, block)
        yield start, block


def _native(value: Any) -> Any:
    """A number of numpy as Python's."""
    return value.item()


def _arrow(values: Any) -> pa.Array:
    """A column; Categoricals as text, missing as null."""
    if isinstance(values, pd.Categorical):
        return pa.array([None if value is np.nan else str(value) for value in np.asarray(values, dtype=object)], pa.string())
    return pa.array(values)


def read_record(path: Path) -> dict[str, Any]:
    """What a file says of itself: the metadata, JSON values by key; FileFormatError when it is not one of ours."""
    try:
        found = pq.read_schema(path).metadata or {}
        return {key.decode(): json.loads(value) for key, value in found.items() if key != b"ARROW:schema"}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise FileFormatError(f"{path} is not a readable Parquet file of answers: {type(error).__name__}") from error


def read_answers(path: Path) -> AnnData:
    """The same as an AnnData without counts, so that what reads one reads the other."""
    about = read_record(path)
    if RECORD not in about or PLACE not in about:
        raise DataError(f"{path} holds no answers of a model: cellplane predict writes them")
    table = pq.read_table(path)
    place, names = about[PLACE]["in"], about[PLACE]["as"]
    flat = table[names].combine_chunks()
    matrix = flat.flatten().to_numpy(zero_copy_only=False).reshape(len(flat), flat.type.list_size)
    obs = table.drop_columns([names, CELL]).to_pandas().set_axis(pd.Index(table[CELL].to_pylist()), axis=0)
    data = _holding(place, names, matrix, obs, about.get(NAMES))
    data.uns["cellplm"] = about[RECORD]
    return data


def _holding(place: Literal["obsm", "layers"], name: str, matrix: NDArray[Any], obs: pd.DataFrame, genes: Sequence[str] | None) -> AnnData:
    if place == "obsm":
        return AnnData(obs=obs, obsm={name: matrix})
    return AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(list(genes or ()))), layers={name: matrix})
