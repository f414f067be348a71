"""The wire format of cells and answers, which the client and the endpoints share.

Cells travel as an Arrow stream: one row a cell, genes as positions into the request's own ``gene_ids``. A request holds
whole sentences. Metadata values (schema metadata in Arrow, plain fields in JSON) are JSON texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellplane.data.company import PANEL_TOLD, context_for, joined_tables, store_in
from cellplane.data.config import DataKeys
from cellplane.data.patches import patches
from cellplane.data.sentences import CellTable, memory_store
from cellplane.data.sources import AnnData, cell_table, column
from cellplane.errors import DataError, ServiceError
from cellplane.genes import GeneVocabulary

ARROW_TYPE = "application/vnd.apache.arrow.stream"
JSON_TYPE = "application/json"
REQUEST_COLUMNS: dict[str, pa.DataType] = {
    "gene": pa.list_(pa.int32()),  # positions into gene_ids
    "count": pa.list_(pa.float32()),  # raw counts of these genes
    "counts": pa.list_(pa.float32()),  # or dense: one count for each of gene_ids
    "batch": pa.string(),  # cells of two batches never share a sentence
    "sentence": pa.int32(),  # equal values form one sentence, as they are
    "x_um": pa.float32(),
    "y_um": pa.float32(),
    "cell_id": pa.string(),  # echoed
    "role": pa.string(),  # query, or reference: what an imputation reads beside them
}
GENE_IDS, N_ROWS = "gene_ids", "n_rows"  # metadata keys of a request; an answer has N_ROWS too
CELLS_PER_REQUEST = 2048  # answers come steadily and a lost request costs little
ENTRIES_PER_REQUEST = 4_000_000  # 32 MB of genes and counts before compression
NAMES_PER_REQUEST = 50  # perturbations, which stand in the URL
FORWARD_CELLS = 200_000  # control cells x perturbations of a request: seconds of a small network


def write_stream(table: pa.Table, metadata: Mapping[str, object]) -> bytes:
    """The table as an Arrow stream, zstd, with ``metadata`` as JSON texts and its row count.

    A stream cut at a batch boundary is valid Arrow; only the row count tells.
    """
    texts = {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in {**metadata, N_ROWS: table.num_rows}.items()}
    table = table.replace_schema_metadata(texts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def read_metadata(schema: pa.Schema, key: str) -> object:
    """The value under ``key`` of the schema's metadata, None when absent; ValueError when it is not JSON."""
    text = (schema.metadata or {}).get(key.encode())
    if text is None:
        return None
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"metadata {key!r} is nested too deeply") from error


def read_answer(body: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """Columns and metadata of an Arrow answer; ServiceError when it is not one or rows are missing."""
    try:
        table = pa.ipc.open_stream(body).read_all()
        about = {key.decode(): json.loads(text) for key, text in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ServiceError("the answer is not a readable Arrow stream; is this a cellplane endpoint?") from error
    if about.get(N_ROWS) != table.num_rows:
        raise ServiceError(f"the answer was cut: {table.num_rows} rows arrived, {about.get(N_ROWS)} were sent; try again")
    return table, about


def matrix(values: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of equally long float lists as [n, width]."""
    flat = values.combine_chunks()
    numbers: NDArray[np.float32] = flat.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(flat), flat.type.list_size)


@dataclass(frozen=True)
class WireCells:
    """What is sent of some cells: a table over the model's vocabulary, the rows of each sentence, what was found in the AnnData.

    ``reference`` are cells that go along with every request, for an imputation to read beside; ``names_batch``: the
    batches' names go along too, for a denoiser that learned them.
    """

    table: CellTable
    vocabulary: GeneVocabulary
    sentences: Sequence[NDArray[np.int64]]
    report: Mapping[str, object]
    reference: CellTable | None = None
    names_batch: bool = False

    @classmethod
    def of(cls, adata: AnnData, keys: DataKeys, vocabulary: GeneVocabulary, max_cells: int) -> WireCells:
        """Counts and sentences of an AnnData, read and formed as the offline pipelines do."""
        table, report = cell_table(adata, vocabulary, keys)
        return cls(table, vocabulary, memory_store(table, max_cells).sentences, report)

    @property
    def n_beside(self) -> int:
        """Reference cells that go along."""
        return 0 if self.reference is None else self.reference.n_cells

    @property
    def measured(self) -> NDArray[np.int64]:
        """Vocabulary positions of the genes that are sent, [n]."""
        panel = self.table.panel if self.reference is None else self.table.panel | self.reference.panel
        return np.flatnonzero(panel)

    def parts(self, max_cells: int) -> Iterator[list[int]]:
        """Sentences of each request, whole and in order, within ``max_cells`` and the entries a request should hold.

        DataError when a single sentence exceeds ``max_cells``.
        """
        lengths = np.diff(self.table.crow)
        part: list[int] = []
        cells = entries = 0
        for index, rows in enumerate(self.sentences):
            if len(rows) > max_cells:
                raise DataError(f"a sentence has {len(rows)} cells, a request may have {max_cells}; use the batch job: cellplane predict")
            size = int(lengths[rows].sum())
            if part and (cells + len(rows) > min(max_cells, CELLS_PER_REQUEST) or entries + size > ENTRIES_PER_REQUEST):
                yield part
                part, cells, entries = [], 0, 0
            part.append(index)
            cells, entries = cells + len(rows), entries + size
        if part or not self.sentences:
            yield part

    def body(self, part: Sequence[int]) -> tuple[bytes, NDArray[np.int64]]:
        """These sentences as a request body over the genes that were measured, and the rows that are asked about, in order."""
        chosen = [self.sentences[index] for index in part]
        rows = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        sentence = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(own) for own in chosen])
        cells, measured = self.table.rows(rows), self.measured
        columns: dict[str, Any] = {}
        if self.names_batch and cells.batch is not None:
            columns["batch"] = pa.array([str(name) for name in cells.batch], pa.string())
        if self.reference is not None:
            cells = joined_tables(cells, self.reference)
            columns["role"] = ["query"] * len(rows) + ["reference"] * self.n_beside
            longest = max((len(own) for own in chosen), default=1)
            beside = -1 - np.arange(self.n_beside, dtype=np.int32) // longest  # no longer than theirs, so that nobody warns of them
            sentence = np.concatenate([sentence, beside.astype(np.int32)])
        local = np.zeros(len(self.table.panel), dtype=np.int32)
        local[measured] = np.arange(len(measured), dtype=np.int32)
        offsets = pa.array(cells.crow, pa.int32())
        columns |= {
            "gene": pa.ListArray.from_arrays(offsets, local[cells.gene]),
            "count": pa.ListArray.from_arrays(offsets, cells.value),
            "sentence": sentence,
        }
        if cells.coordinates is not None:
            columns["x_um"], columns["y_um"] = cells.coordinates.T.copy()
        return write_stream(pa.table(columns), {GENE_IDS: [self.vocabulary.gene_ids[position] for position in measured]}), rows


def plain(values: pa.ChunkedArray) -> NDArray[Any]:
    """A column of an answer as numpy, [n] or [n, width]."""
    return matrix(values) if pa.types.is_fixed_size_list(values.type) else values.to_numpy()


def sentences_for(served: Mapping[str, Any], table: CellTable, context: str) -> tuple[Sequence[NDArray[np.int64]], str]:
    """The rows of each sentence that a served model reads cells in, and what to record of it; ConfigError for no such context."""
    max_cells = int(served["max_cells"])
    if served["task"] == "impute":
        return patches(table, max_cells), f"own + reference: patches of at most {max_cells} cells"
    if context == "panel":
        room = max_cells - int(served["panel_cells"])
        return memory_store(table, max(room, 1)).sentences, PANEL_TOLD.format(room, served["panel_cells"])
    store, told = store_in(context_for(context, bool(served.get("reads_places"))), table, max_cells)
    return store.sentences, told


def controls_by_group(adata: AnnData, served: Mapping[str, Any], keys: DataKeys, cells: WireCells) -> WireCells:
    """The control cells of an AnnData, one sentence a group (batch x cell type), their group as the batch that is sent."""
    used = [key for key in (keys.batch_key, keys.labels_key) if key is not None and key in adata.obs]
    columns = [column(adata, key) for key in used]
    group = np.array([" | ".join(str(part[row]) for part in columns) or "all" for row in range(adata.n_obs)], dtype=object)
    key = served["perturbation_key"]
    control = np.ones(adata.n_obs, dtype=bool) if key not in adata.obs else column(adata, key) == served["control"]
    shown = control & (cells.table.totals() > 0)
    if not shown.any():
        raise DataError("no control cell has counts in genes the model knows: a prediction starts from control cells")
    sentences = [np.flatnonzero(shown & (group == name)) for name in sorted(set(group[shown]))]
    return replace(cells, table=replace(cells.table, batch=group, coordinates=None), sentences=sentences, names_batch=True)


def perturbation_parts(cells: WireCells, names: Sequence[str], limits: Mapping[str, int]) -> Iterator[tuple[WireCells, list[str]]]:
    """Requests for perturbations: whole groups, and as many names as their answer and the work allow.

    DataError when a single group exceeds what a request may have.
    """
    for part in cells.parts(int(limits["max_cells"])):
        own = replace(cells, sentences=[cells.sentences[index] for index in part])
        n = sum(len(rows) for rows in own.sentences)
        of_one = 16 * len(cells.vocabulary) * len(part)  # bytes of four tables
        most = max(1, min(NAMES_PER_REQUEST, FORWARD_CELLS // max(n, 1), int(limits.get("max_decoded_bytes", 1 << 28)) // of_one))
        for start in range(0, len(names), most):
            yield own, list(names[start : start + most])
