"""A typed client of the endpoints, and the wire format it shares with the server.

Cells travel as an Arrow stream: one row a cell, genes as positions into the request's own ``gene_ids``. The client
reads counts as the offline pipelines do, forms the same sentences and sends whole sentences, so that a served answer
is the offline one. Metadata values (schema metadata in Arrow, plain fields in JSON) are JSON texts.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable, memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError, DataError, ServiceError
from cellplane.genes import GeneVocabulary

log = logging.getLogger(__name__)

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
}
GENE_IDS, N_ROWS = "gene_ids", "n_rows"  # metadata keys of a request; an answer has N_ROWS too

RETRIED = (
    429,
    500,
    502,
    503,
)  # asked too often or too many at once; a dying ingress replica answers 500; predictions may be repeated safely
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
CELLS_PER_REQUEST = 2048  # answers come steadily and a lost request costs little
ENTRIES_PER_REQUEST = 4_000_000  # 32 MB of genes and counts before compression
LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    """What is sent of some cells: a table over the model's vocabulary, the rows of each sentence, what was found in the AnnData."""

    table: CellTable
    vocabulary: GeneVocabulary
    sentences: Sequence[NDArray[np.int64]]
    report: Mapping[str, object]

    @classmethod
    def of(cls, adata: AnnData, keys: DataKeys, vocabulary: GeneVocabulary, max_cells: int) -> WireCells:
        """Counts and sentences of an AnnData, read and formed as the offline pipelines do."""
        table, report = cell_table(adata, vocabulary, keys)
        return cls(table, vocabulary, memory_store(table, max_cells).sentences, report)

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
        """These sentences as a request body over the genes that were measured, and the rows it holds in order."""
        chosen = [self.sentences[index] for index in part]
        rows = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        cells, measured = self.table.rows(rows), np.flatnonzero(self.table.panel)
        local = (np.cumsum(self.table.panel) - 1).astype(np.int32)
        offsets = pa.array(cells.crow, pa.int32())
        columns = {
            "gene": pa.ListArray.from_arrays(offsets, local[cells.gene]),
            "count": pa.ListArray.from_arrays(offsets, cells.value),
            "sentence": np.repeat(np.arange(len(chosen), dtype=np.int32), [len(rows) for rows in chosen]),
        }
        if cells.coordinates is not None:
            columns["x_um"], columns["y_um"] = cells.coordinates.T.copy()
        return write_stream(pa.table(columns), {GENE_IDS: [self.vocabulary.gene_ids[position] for position in measured]}), rows


@dataclass(frozen=True)
class ServedAnnotation:
    """Cell types of n cells: ``labels`` [n] str, ``confidence`` [n], ``proba`` [n, K] over ``classes``; ``about`` names who answered."""

    labels: NDArray[np.object_]
    confidence: NDArray[np.float32]
    proba: NDArray[np.float32]
    classes: tuple[str, ...]
    about: dict[str, Any]


class Client:
    """Asks a cellplane endpoint at ``url``.

    Every call raises ServiceError: ``status`` 0 when the endpoint cannot be reached, else the HTTP status with the
    server's own message. Lost connections and 429, 500, 502, 503 are tried ``retries`` times more with the same request id.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0, retries: int = 3) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the endpoint's address {url!r} is not of the form http://host:port")
        self.url, self.retries = url.rstrip("/"), retries
        self._vocabularies: dict[str, GeneVocabulary] = {}
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=parts.hostname not in LOOPBACK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ready(self) -> bool:
        """Whether the model answers now; ServiceError when nothing listens at all."""
        try:
            return self._once(self._http.build_request("GET", "/v2/health/ready")).status_code == 200
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def models(self) -> list[dict[str, Any]]:
        """What is served: name, version, tasks and limits of each model."""
        found: list[dict[str, Any]] = self._get("/v1/models")["models"]
        return found

    def versions(self, name: str) -> list[dict[str, Any]]:
        """Every version of a model that answers, starts or was refused: state, reason, aliases, share of the requests."""
        return [row for row in self._get("/v1/models")["versions"] if row["name"] == name]

    def metrics(self) -> str:
        """What the endpoint counts, in Prometheus' text format."""
        return self._call(self._http.build_request("GET", "/metrics")).text

    def model(self, name: str) -> dict[str, Any]:
        """What is served under ``name``, ``name@alias`` or ``name:version``."""
        return self._get(f"/v1/models/{quote(name, safe='@:')}")

    def annotate(self, adata: AnnData, model: str, keys: DataKeys | None = None) -> ServedAnnotation:
        """The cell type of every cell, also written into ``adata``.

        Writes obs cellplm_cell_type and cellplm_confidence, obsm cellplm_cell_type_proba and uns cellplm, as the
        offline pipeline does.
        """
        columns, about = self._ask(adata, model, "annotate", keys or DataKeys())
        classes = tuple(str(name) for name in about["classes"])
        answer = ServedAnnotation(columns["cell_type"], columns["confidence"], columns["proba"], classes, about)
        extra = sorted(set(answer.labels) - set(classes))
        adata.obs["cellplm_cell_type"] = pd.Categorical(answer.labels, categories=[*classes, *extra])
        adata.obs["cellplm_confidence"] = answer.confidence
        adata.obsm["cellplm_cell_type_proba"] = answer.proba
        adata.uns["cellplm"] = _storable(about)
        return answer

    def embed(self, adata: AnnData, model: str, keys: DataKeys | None = None) -> NDArray[np.float32]:
        """The embedding of every cell, [n, Z]; also written to obsm X_cellplm, with uns cellplm."""
        columns, about = self._ask(adata, model, "embed", keys or DataKeys())
        embedding: NDArray[np.float32] = columns["embedding"]
        adata.obsm["X_cellplm"] = embedding
        adata.uns["cellplm"] = _storable(about)
        return embedding

    def _ask(self, adata: AnnData, model: str, task: str, keys: DataKeys) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Answer columns in the caller's row order, and the metadata of the answer."""
        served = self.model(model)
        cells = WireCells.of(adata, keys, self._vocabulary(model, served["vocabulary_fingerprint"]), int(served["max_cells"]))
        columns: dict[str, NDArray[Any]] = {}
        about: dict[str, Any] = {}
        version = served.get("version")  # all parts of one AnnData go to one version, whatever is promoted meanwhile
        exact = f"{served['name']}:{version}" if version else quote(model, safe="@:")
        for part in cells.parts(int(served["limits"]["max_cells"])):
            body, rows = cells.body(part)
            table, said = self._post(f"/v1/models/{exact}/{task}", body)
            if table.num_rows != len(rows):
                raise ServiceError(f"{len(rows)} cells were sent and {table.num_rows} came back; is this a cellplane endpoint?")
            if about and said["model_sha256"] != about["model_sha256"]:
                raise ServiceError("another model version was put in place while the cells were being answered; ask again")
            about = {**said, "alias": served.get("alias"), "warnings": sorted({*about.get("warnings", ()), *said["warnings"]})}
            for name in table.column_names:
                _scatter(columns, name, rows, table[name], adata.n_obs)
        log.info("%d cells answered by %s version %s", adata.n_obs, about["model"], about["version"])
        return columns, {**about, **cells.report}

    def _vocabulary(self, model: str, fingerprint: str) -> GeneVocabulary:
        """The genes of the served model, asked for once for each fingerprint."""
        if fingerprint not in self._vocabularies:
            genes = self._get(f"/v1/models/{quote(model, safe='@:')}/genes")
            vocabulary = GeneVocabulary(tuple(genes[GENE_IDS]), genes["namespace"])
            if vocabulary.fingerprint != fingerprint:
                raise ServiceError("the served genes do not match their fingerprint: another version was just put in place; ask again")
            self._vocabularies[fingerprint] = vocabulary
        return self._vocabularies[fingerprint]

    def _get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._call(self._http.build_request("GET", path)).json()
        return answer

    def _post(self, path: str, body: bytes) -> tuple[pa.Table, dict[str, Any]]:
        headers = {"Content-Type": ARROW_TYPE, "Accept": ARROW_TYPE, "X-Request-Id": uuid.uuid4().hex}
        return read_answer(self._call(self._http.build_request("POST", path, content=body, headers=headers)).content)

    def _call(self, request: httpx.Request) -> httpx.Response:
        for attempt in range(self.retries + 1):
            wait_s = FIRST_WAIT_S * 2**attempt
            try:
                response = self._once(request)
            except httpx.TransportError as error:
                if attempt == self.retries:
                    raise self._unreachable(error) from error
                log.info("%s did not answer (%s), trying again", self.url, type(error).__name__)
            else:
                if response.status_code not in RETRIED or attempt == self.retries:
                    return _accepted(response)
                wait_s = _retry_after(response, wait_s)
                log.info("%s answered %d, trying again", self.url, response.status_code)
            time.sleep(wait_s)
        raise AssertionError("the loop returns or raises")

    def _once(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._http.send(request)
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
            raise ServiceError(f"{self.url} did not answer in time; send fewer cells or raise timeout_s") from error

    def _unreachable(self, error: httpx.TransportError) -> ServiceError:
        return ServiceError(f"nothing answers at {self.url} ({type(error).__name__}); is the endpoint up? start one with `cellplane serve`")


def _accepted(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        said = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        said = response.text[:200] or response.reason_phrase
    raise ServiceError(f"the endpoint answered {response.status_code}: {said}", response.status_code)


def _retry_after(response: httpx.Response, default_s: float) -> float:
    try:
        return min(max(float(response.headers["retry-after"]), 0.0), LONGEST_WAIT_S)
    except (KeyError, ValueError):
        return default_s


def _scatter(columns: dict[str, NDArray[Any]], name: str, rows: NDArray[np.int64], values: pa.ChunkedArray, n: int) -> None:
    """Put one answer's column into its rows of the whole."""
    part = matrix(values) if pa.types.is_fixed_size_list(values.type) else values.to_numpy()
    if name not in columns:
        columns[name] = np.empty((n, *part.shape[1:]), dtype=part.dtype)
    columns[name][rows] = part


def _storable(about: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata an h5ad file can hold: without None, and without what differs from call to call."""
    kept = {key: _storable(value) if isinstance(value, Mapping) else value for key, value in about.items()}
    return {key: value for key, value in kept.items() if value is not None and key not in (N_ROWS, "request_id")}
