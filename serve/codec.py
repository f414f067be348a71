"""Bodies to cells, answers to bodies: Arrow streams and JSON, both checked before anything is computed from them.

A body comes from anywhere. Sizes are summed from the messages' own metadata before decompression (30 kB of zstd can
hold a gigabyte), structure is validated before any native operation, and every refusal names the column or row.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from cellplane.client import ARROW_TYPE, GENE_IDS, N_ROWS, REQUEST_COLUMNS, read_metadata, write_stream
from cellplane.data.naming import to_vocabulary
from cellplane.data.sentences import CellTable, MemoryStore, contexts
from cellplane.data.sources import count_share
from cellplane.genes import GeneAlignment

from .bodies import MOST_TOLD, NumberRows, Strict, Strings, refuse_crowded
from .limits import BATCH_JOB, Limits, refuse, refuse_unreadable

NO_GENE_IDS = f"the schema metadata lacks {GENE_IDS}, a JSON list of the gene names that column 'gene' points into"
LISTS_REMEMBERED, LONGEST_REMEMBERED = 8, 2 * 1024 * 1024  # of gene names, in bytes of JSON: a whole genome has a quarter of it
MAX_EXACT_COUNT = 2**24  # float32 holds every integer up to here
MAX_COORDINATE_UM = 1e9  # a kilometre: no slide is larger, and float32 holds it
MAX_MESSAGES = 1024  # record batches in one stream: a million tiny ones would cost minutes
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
NULLABLE = ("x_um", "y_um")
REFERENCE_ROLE = "reference"
ROLES = ("query", REFERENCE_ROLE)  # of a cell in an imputation
MESSAGE_HEADER, RECORD_ROWS, RECORD_BUFFERS, RECORD_COMPRESSION = 2, 0, 2, 3  # field numbers in Arrow's Message.fbs

Positions = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Coordinates = Annotated[list[float | None], Field(fail_fast=True)]


class CellsBody(Strict):
    """Cells as JSON: one list entry a cell, genes as positions into gene_ids (or dense counts, one for each gene)."""

    gene_ids: Strings
    gene: Annotated[list[Positions], Field(fail_fast=True)] | None = None
    count: NumberRows | None = None
    counts: NumberRows | None = None
    batch: Strings | None = None
    sentence: Annotated[list[Annotated[int, Field(ge=-(2**31), lt=2**31)]], Field(fail_fast=True)] | None = None
    x_um: Coordinates | None = None
    y_um: Coordinates | None = None
    cell_id: Strings | None = None
    role: Strings | None = None


@dataclass(frozen=True)
class Cells:
    """n cells as sent and found well formed: CSR over ``gene_ids``, and the optional columns, [n] each."""

    gene_ids: Sequence[str]
    crow: NDArray[np.int64]
    gene: NDArray[np.int64]
    value: NDArray[np.float32]
    batch: NDArray[np.object_] | None = None
    sentence: NDArray[np.int64] | None = None
    coordinates: NDArray[np.float32] | None = None
    cell_id: NDArray[np.object_] | None = None
    role: NDArray[np.object_] | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.crow) - 1


Columns = dict[str, Any]  # numpy by name; list columns as (lengths, flat values)
Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]  # lengths [n], gene positions and counts [nnz]


def decode(body: bytes, content_type: str, limits: Limits) -> Cells:
    """The cells of a body; ServiceError 400 for what cannot be read, 413 for too much, 422 for cells that make no sense."""
    refuse_unreadable(body, "cells")
    gene_ids, columns = _decode_arrow(body, limits) if content_type == ARROW_TYPE else _decode_json(body, limits)
    return checked(gene_ids, columns, limits)


def _decode_arrow(body: bytes, limits: Limits) -> tuple[Sequence[str], Columns]:
    try:
        table = _read_stream(body, limits)
        table.validate(full=True)
    except (pa.ArrowException, OSError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise refuse(400, "the body is not a readable Arrow stream (damaged, cut, or another format)") from error
    return _gene_ids(table.schema), {name: _column(name, table[name]) for name in table.column_names}


def _read_stream(body: bytes, limits: Limits) -> pa.Table:
    """The table of a stream, decompressed only after its declared rows and bytes were found within limits."""
    source = pa.BufferReader(body)
    messages = list(islice(_messages(pa.ipc.MessageReader.open_stream(source)), MAX_MESSAGES + 1))
    if len(messages) > MAX_MESSAGES:
        raise refuse(413, f"the Arrow stream has more than {MAX_MESSAGES - 1} record batches; send fewer and larger ones")
    if not messages or messages[0].type != "schema":
        raise refuse(400, "the body is not an Arrow stream: it does not begin with a schema")
    schema = pa.ipc.read_schema(messages[0])
    _check_schema(schema)
    if any(message.type != "record batch" for message in messages[1:]):
        raise refuse(422, "the Arrow stream holds dictionaries or tensors; send plain columns")
    declared = [declared_size(message) for message in messages[1:]]
    rows, size = sum(pair[0] for pair in declared), sum(pair[1] for pair in declared)
    if size > limits.max_decoded_bytes:
        raise refuse(413, f"the body declares {size} bytes once decompressed, the limit is {limits.max_decoded_bytes}; {BATCH_JOB}")
    if rows > limits.max_cells:
        raise refuse(413, f"{rows} cells in one call, the limit is {limits.max_cells}; {BATCH_JOB}")
    expected = _metadata(schema, N_ROWS)
    if not isinstance(expected, int) or isinstance(expected, bool):
        raise refuse(400, f"the schema metadata lacks {N_ROWS}, the number of cells: without it a cut stream looks whole")
    if rows != expected:
        raise refuse(400, f"the stream was cut: {rows} cells arrived, {N_ROWS} says {expected}; send it again")
    if source.tell() != len(body) or not body.endswith(END_OF_STREAM):
        raise refuse(400, "the Arrow stream does not stop at its end mark: it was cut there, or bytes follow; send it again")
    return pa.Table.from_batches([pa.ipc.read_record_batch(message, schema) for message in messages[1:]], schema)


def _messages(reader: Any) -> Iterator[Any]:
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def declared_size(message: Any) -> tuple[int, int]:
    """(rows, bytes after decompression) that a record batch message declares, read from its metadata alone.

    A compressed buffer begins with its uncompressed length, -1 = stored as it is (Arrow columnar format, IPC).
    Raises struct.error when the metadata points outside the message.
    """
    meta, body = memoryview(message.metadata), memoryview(message.body or b"")
    batch = _follow(meta, _slot(meta, _follow(meta, 0), MESSAGE_HEADER))
    rows_at, buffers_at = _slot(meta, batch, RECORD_ROWS), _slot(meta, batch, RECORD_BUFFERS)
    rows = _read("<q", meta, rows_at) if rows_at else 0
    if rows < 0:
        raise struct.error("negative row count")
    if not buffers_at:
        return rows, 0
    compressed, vector, size = bool(_slot(meta, batch, RECORD_COMPRESSION)), _follow(meta, buffers_at), 0
    for index in range(_read("<I", meta, vector)):
        offset, length = _read("<q", meta, vector + 4 + 16 * index), _read("<q", meta, vector + 12 + 16 * index)
        plain = _read("<q", body, offset) if compressed and length else length
        size += length if plain == -1 else plain
        if length < 0 or plain < -1:
            raise struct.error("negative length")
    return rows, size


def _read(kind: str, buffer: memoryview, at: int) -> int:
    if at < 0:
        raise struct.error("offset before the message")
    number: int = struct.unpack_from(kind, buffer, at)[0]
    return number


def _follow(meta: memoryview, at: int) -> int:
    """Where the flatbuffer offset stored at ``at`` points."""
    return at + _read("<I", meta, at)


def _slot(meta: memoryview, table: int, field: int) -> int:
    """Where a flatbuffer table keeps this field, 0 when it does not have it."""
    vtable = table - _read("<i", meta, table)
    if 4 + 2 * field >= _read("<H", meta, vtable):
        return 0
    offset = _read("<H", meta, vtable + 4 + 2 * field)
    return table + offset if offset else 0


def _check_schema(schema: pa.Schema) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise refuse(422, "a column stands in the stream more than once")
    for field in schema:
        expected = REQUEST_COLUMNS.get(field.name)
        if expected is None:
            raise refuse(422, f"unknown column {field.name[:80]!r}; columns are {', '.join(REQUEST_COLUMNS)}")
        if pa.types.is_list(expected) and pa.types.is_list(field.type):
            same = field.type.value_type == expected.value_type  # whatever the writer calls the list's item
        else:
            same = field.type == expected
        if not same:
            raise refuse(422, f"column {field.name!r} is {str(field.type)[:80]}, expected {expected}; cast it before sending")


def _metadata(schema: pa.Schema, key: str) -> object:
    try:
        return read_metadata(schema, key)
    except ValueError as error:
        raise refuse(400, f"the schema metadata {key!r} is not JSON") from error


class GeneIds(tuple[str, ...]):
    """Gene names of an Arrow request. They travel to a copy of the model as the text they came as, and are read there once."""

    text: bytes

    def __reduce__(self) -> tuple[Callable[[bytes], GeneIds], tuple[bytes]]:
        return gene_ids_of, (self.text,)


def gene_ids_of(text: bytes) -> GeneIds:
    """The names in a JSON list; a list that comes again is not read again. ServiceError 400 or 422 for anything else."""
    return _remembered(text) if len(text) <= LONGEST_REMEMBERED else _read_gene_ids(text)


def _read_gene_ids(text: bytes) -> GeneIds:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(400, f"the schema metadata {GENE_IDS!r} is not JSON") from error
    if not isinstance(found, list) or not all(isinstance(gene, str) for gene in found):
        raise refuse(422, NO_GENE_IDS)
    names = GeneIds(found)
    names.text = text
    return names


_remembered = lru_cache(LISTS_REMEMBERED)(_read_gene_ids)


def _gene_ids(schema: pa.Schema) -> GeneIds:
    text = (schema.metadata or {}).get(GENE_IDS.encode())
    if text is None:
        raise refuse(422, NO_GENE_IDS)
    return gene_ids_of(text)


def _column(name: str, values: pa.ChunkedArray) -> Any:
    """A column as numpy; list columns as (lengths, flat values). Nulls only where they mean missing."""
    array = values.combine_chunks()
    is_list = pa.types.is_list(array.type)
    flat = array.flatten() if is_list else array
    if name not in NULLABLE and (array.null_count or flat.null_count):
        raise refuse(422, f"column {name!r} has missing values; every cell needs one")
    if is_list:
        return array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64), flat.to_numpy(zero_copy_only=False)
    return array.to_numpy(zero_copy_only=False)


def _decode_json(body: bytes, limits: Limits) -> tuple[list[str], Columns]:
    refuse_crowded(body, limits)
    try:
        parsed = CellsBody.model_validate_json(body)
    except ValidationError as error:
        raise _json_refusal(error) from None
    return columns_of(parsed)


def columns_of(parsed: CellsBody) -> tuple[list[str], Columns]:
    """Gene names and columns of a JSON body that was found well formed."""
    columns: Columns = {}
    for name, kind in REQUEST_COLUMNS.items():
        if (values := getattr(parsed, name)) is None:
            continue
        if pa.types.is_list(kind):
            lengths = np.array([len(row) for row in values], dtype=np.int64)
            dtype = np.int64 if name == "gene" else np.float64  # narrowed once the values are known to fit
            columns[name] = lengths, np.fromiter(chain.from_iterable(values), dtype=dtype, count=int(lengths.sum()))
        elif kind == pa.string():
            columns[name] = np.array(values, dtype=object)
        else:
            columns[name] = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return parsed.gene_ids, columns


def _json_refusal(error: ValidationError) -> Exception:
    """What is wrong and where, without quoting what was sent."""
    if error.error_count() > MOST_TOLD:
        return refuse(422, f"{error.error_count()} unknown keys or wrong values; keys are {', '.join(CellsBody.model_fields)}")
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part)[:80] for part in first["loc"]]
    if not place:
        return refuse(400, f"the body is not JSON of the expected form: {first['msg']}"[:300])
    if first["type"] == "extra_forbidden":
        return refuse(422, f"unknown key {place[0]!r}; keys are {', '.join(CellsBody.model_fields)}")
    row = f", row {place[1]}" if len(place) > 1 else ""
    return refuse(422, f"{place[0]!r}{row}: {first['msg']}"[:300])


def checked(gene_ids: Sequence[str], columns: Columns, limits: Limits) -> Cells:
    """The cells of decoded columns; 422 naming column and row for whatever cannot be counts of cells."""
    if not gene_ids:
        raise refuse(422, f"{GENE_IDS} is empty; name the genes")
    if len(gene_ids) > limits.max_genes:
        raise refuse(413, f"{len(gene_ids)} genes in one call, the limit is {limits.max_genes}; send those the model knows: GET .../genes")
    lengths, gene, value = _dense(columns, len(gene_ids)) if "counts" in columns else _sparse(columns)
    n_cells = len(lengths)
    if n_cells > limits.max_cells:
        raise refuse(413, f"{n_cells} cells in one call, the limit is {limits.max_cells}; {BATCH_JOB}")
    for name, found in columns.items():
        if (rows := len(found[0]) if isinstance(found, tuple) else len(found)) != n_cells:
            raise refuse(422, f"{name!r} has {rows} entries for {n_cells} cells")
    crow = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    _check_counts(crow, gene, value, len(gene_ids))
    return Cells(
        gene_ids=gene_ids,
        crow=crow,
        gene=gene,
        value=value.astype(np.float32),
        batch=columns.get("batch"),
        sentence=_sentence(columns),
        coordinates=_coordinates(columns),
        cell_id=columns.get("cell_id"),
        role=_role(columns),
    )


def _sparse(columns: Columns) -> Rows:
    if "gene" not in columns or "count" not in columns:
        raise refuse(422, "counts are missing: send 'gene' and 'count', a list for each cell, or dense 'counts'")
    (lengths, gene), (others, value) = columns["gene"], columns["count"]
    if len(lengths) != len(others):
        raise refuse(422, f"'gene' has {len(lengths)} rows and 'count' has {len(others)}")
    if (ragged := np.flatnonzero(lengths != others)).size:
        row = int(ragged[0])
        raise refuse(422, f"row {row}: {lengths[row]} genes and {others[row]} counts")
    return lengths, gene.astype(np.int64), value


def _dense(columns: Columns, n_genes: int) -> Rows:
    if "gene" in columns or "count" in columns:
        raise refuse(422, "send either 'gene' and 'count' or dense 'counts', not both")
    lengths, value = columns["counts"]
    if (ragged := np.flatnonzero(lengths != n_genes)).size:
        row = int(ragged[0])
        raise refuse(422, f"row {row}: {lengths[row]} counts for {n_genes} genes")
    return lengths, np.tile(np.arange(n_genes, dtype=np.int64), len(lengths)), value


def _check_counts(crow: NDArray[np.int64], gene: NDArray[np.int64], value: NDArray[Any], n_genes: int) -> None:
    for wrong, what in (
        ((gene < 0) | (gene >= n_genes), f"a gene position outside 0 to {n_genes - 1}"),
        (~np.isfinite(value), "a count that is NaN or infinite"),
        (value < 0, "a negative count; send raw counts, not scaled values"),
        (value > MAX_EXACT_COUNT, f"a count above {MAX_EXACT_COUNT}"),
        (value != np.rint(value), "a count that is not an integer; send raw counts, not normalised values"),
    ):
        if wrong.any():
            row = int(np.searchsorted(crow, np.flatnonzero(wrong)[0], side="right")) - 1
            raise refuse(422, f"row {row} has {what} ({int(wrong.sum())} such entries)")


def _sentence(columns: Columns) -> NDArray[np.int64] | None:
    if "sentence" not in columns:
        return None
    sentence: NDArray[np.int64] = columns["sentence"].astype(np.int64)
    if "batch" in columns and len(set(zip(sentence.tolist(), columns["batch"], strict=True))) > len(set(sentence.tolist())):
        raise refuse(422, "a sentence holds cells of two batches; cells of different batches never attend to one another")
    return sentence


def _role(columns: Columns) -> NDArray[np.object_] | None:
    if "role" not in columns:
        return None
    role: NDArray[np.object_] = columns["role"].astype(object)
    if (wrong := ~np.isin(role, ROLES)).any():
        raise refuse(422, f"row {int(np.argmax(wrong))} has a role that is none; roles are {', '.join(ROLES)}")
    return role


def _coordinates(columns: Columns) -> NDArray[np.float32] | None:
    if ("x_um" in columns) != ("y_um" in columns):
        raise refuse(422, "'x_um' and 'y_um' come together")
    if "x_um" not in columns:
        return None
    coordinates = np.stack([columns["x_um"], columns["y_um"]], axis=1)
    if (wrong := (np.abs(coordinates) > MAX_COORDINATE_UM).any(axis=1)).any():
        raise refuse(422, f"row {int(np.argmax(wrong))} has a coordinate beyond {MAX_COORDINATE_UM:g} micrometres")
    return coordinates.astype(np.float32)


Align = Callable[[tuple[str, ...]], GeneAlignment]


def to_store(cells: Cells, align: Align, max_cells: int) -> tuple[MemoryStore, dict[str, int | float | None], list[str]]:
    """The cells over the model's vocabulary as sentences of their own, the gene report, and warnings worth reading.

    ``align`` finds genes in the vocabulary and may remember them. Entries of one gene in one cell are summed. Raises
    VocabularyError when too few genes are shared.
    """
    alignment = align(tuple(cells.gene_ids))
    shape = (cells.n_cells, len(cells.gene_ids))
    matrix = sp.csr_matrix((cells.value, cells.gene, cells.crow), shape=shape, copy=True)  # Ray hands arrays out read-only
    matrix.sum_duplicates()
    rows = to_vocabulary(matrix, alignment)
    rows.eliminate_zeros()
    crow = rows.indptr.astype(np.int64)
    table = CellTable(crow, rows.indices.astype(np.int64), rows.data, alignment.panel(), cells.batch, cells.coordinates)
    if cells.sentence is None:
        keys = None if cells.batch is None else [str(key) for key in cells.batch]
        sentences = contexts(keys, cells.n_cells, max_cells)
    else:
        order, sizes = np.argsort(cells.sentence, kind="stable"), np.unique(cells.sentence, return_counts=True)[1]
        sentences = np.split(order, np.cumsum(sizes)[:-1]) if cells.n_cells else []
    warnings = []
    if empty := int((np.diff(crow) == 0).sum()):
        warnings.append(f"{empty} cells have no counts in the model's genes; their answers rest on the cells around them alone")
    if largest := max((len(rows) for rows in sentences if len(rows) > max_cells), default=0):
        warnings.append(f"a sentence has {largest} cells, the model was trained with up to {max_cells}")
    carried = count_share(float(rows.data.sum(dtype=np.float64)), float(matrix.data.sum(dtype=np.float64)))
    return MemoryStore(table, sentences), {**alignment.report(), "count_share": carried}, warnings


Values = NDArray[Any]


def encode(columns: Mapping[str, Values], about: Mapping[str, object], media_type: str) -> bytes:
    """An answer: columns [n] or [n, width], and what it says about itself, as Arrow metadata or JSON fields."""
    if media_type == ARROW_TYPE:
        return write_stream(pa.table({name: _arrow(values) for name, values in columns.items()}), about)
    n_rows = {N_ROWS: len(next(iter(columns.values())))}
    return json.dumps({**about, **n_rows, **{name: values.tolist() for name, values in columns.items()}}, allow_nan=False).encode()


def _arrow(values: Values) -> pa.Array:
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
    return pa.array(values, pa.string()) if values.dtype == object else pa.array(values)
