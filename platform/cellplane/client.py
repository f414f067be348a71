"""A typed client of the endpoints: all tasks, on AnnData, with the keys that the offline pipelines write.

The client reads counts as the offline pipelines do, forms the same sentences and sends whole sentences, so that a served
answer is the offline one. What is sent and how is in `wire`, what becomes of the answers in `served`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellplane.config import validate
from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData, cell_table, query_keys
from cellplane.errors import ConfigError, ServiceError
from cellplane.genes import GeneVocabulary, gene_warnings
from cellplane.results import WARNINGS, with_warnings, write_embedding
from cellplane.served import Columns, served_imputation, served_perturbation, storable, write_served_annotation, write_served_rates
from cellplane.served import ServedAnnotation as ServedAnnotation
from cellplane.wire import ARROW_TYPE as ARROW_TYPE
from cellplane.wire import GENE_IDS as GENE_IDS
from cellplane.wire import JSON_TYPE as JSON_TYPE
from cellplane.wire import N_ROWS as N_ROWS
from cellplane.wire import REQUEST_COLUMNS as REQUEST_COLUMNS
from cellplane.wire import WireCells as WireCells
from cellplane.wire import controls_by_group, perturbation_parts, plain, sentences_for
from cellplane.wire import matrix as matrix
from cellplane.wire import read_answer as read_answer
from cellplane.wire import read_metadata as read_metadata
from cellplane.wire import write_stream as write_stream

log = logging.getLogger(__name__)

# Asked too often, or too many at once; a dying ingress replica answers 500. Predictions may be repeated safely.
RETRIED = (429, 500, 502, 503)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")

FOREIGN = (403, 404, 405, 501)  # what another web server says, as a page, of paths that it does not know
Keys = DataKeys | Mapping[str, Any]  # where counts and columns lie
Options = Mapping[str, str | int | float | bool]  # parameters of a task, as docs/serving.md lists them
Progress = Callable[[int, int], None]  # (done, in all; 0: nobody knows)


def quiet(done: int, total: int) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class _Asked:
    """Cells on their way to a model: ``exact`` NAME:VERSION, what the endpoint says of it, and the task's parameters."""

    exact: str
    served: Mapping[str, Any]
    cells: WireCells
    options: Options
    keys: DataKeys

    @property
    def limits(self) -> Mapping[str, int]:
        """What one request may bring, by name."""
        found: Mapping[str, int] = self.served["limits"]
        return found

    def cells_per_request(self, task: str) -> int:
        """Cells whose answer, too, the endpoint gives in one piece."""
        width = {"denoise": 4 * len(self.cells.vocabulary), "impute": 8 * len(self.served.get("imputed_genes", ()))}.get(task, 0)
        most = int(self.limits["max_cells"]) - self.cells.n_beside
        return min(most, int(self.limits["max_decoded_bytes"]) // width) if width and "max_decoded_bytes" in self.limits else most


class Client:
    """Asks a cellplane endpoint at ``url``. Without ``keys`` a call reads cells as those that the model learned.

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

    def annotate(
        self,
        adata: AnnData,
        model: str,
        keys: Keys | None = None,
        options: Options | None = None,
        progress: Progress = quiet,
    ) -> ServedAnnotation:
        """The cell type of every cell, also written into ``adata``: see `served.write_served_annotation`.

        ``options`` are the task's parameters (docs/serving.md), and `context` as offline: own, section, self or panel.
        """
        if options and "top_k" in options:
            raise ConfigError("the client writes all probabilities; top_k is for callers of the wire")
        asked = self._asked(adata, model, keys, options)
        columns, about = self._ask(asked, "annotate", progress)
        return write_served_annotation(adata, columns, about, asked.cells.table)

    def embed(
        self, adata: AnnData, model: str, keys: Keys | None = None, options: Options | None = None, progress: Progress = quiet
    ) -> NDArray[np.float32]:
        """The embedding of every cell, [n, Z]; also written to obsm X_cellplm, with uns cellplm and obs cellplm_flag."""
        asked = self._asked(adata, model, keys, options)
        columns, about = self._ask(asked, "embed", progress)
        embedding: NDArray[np.float32] = columns["embedding"]
        write_embedding(adata, embedding, asked.cells.table)
        adata.uns["cellplm"] = storable(about)
        return embedding

    def denoise(
        self, adata: AnnData, model: str, keys: Keys | None = None, options: Options | None = None, progress: Progress = quiet
    ) -> NDArray[np.float32]:
        """Rates per 10,000, [n, n_vars], also written to layers cellplm_denoised: see `served.write_served_rates`."""
        asked = self._asked(adata, model, keys, options)
        if asked.served["batches"]:  # each cell is decoded in its own
            asked = replace(asked, cells=replace(asked.cells, names_batch=True))
        columns, about = self._ask(asked, "denoise", progress)
        return write_served_rates(adata, columns, about, asked.cells, asked.keys)

    def impute(
        self,
        adata: AnnData,
        model: str,
        keys: Keys | None = None,
        options: Options | None = None,
        progress: Progress = quiet,
        reference: AnnData | None = None,
    ) -> AnnData:
        """Genes that the cells lack, as a new AnnData (cells x genes), read beside the model's reference or another one."""
        asked = self._asked(adata, model, keys, options)
        if reference is not None:
            reading = query_keys(reference, DataKeys.model_validate(asked.served.get("reference_keys") or {}))
            others, _ = cell_table(reference, asked.cells.vocabulary, reading)
            asked = replace(asked, cells=replace(asked.cells, reference=others))
        columns, about = self._ask(asked, "impute", progress)
        return served_imputation(adata, columns, about, asked.served["imputed_genes"])

    def perturb(
        self,
        adata: AnnData,
        model: str,
        perturbations: Sequence[str] | None = None,
        keys: Keys | None = None,
        options: Options | None = None,
        progress: Progress = quiet,
    ) -> AnnData:
        """What the control cells of ``adata`` become, as a new AnnData (perturbations x genes); None: all that were learned.

        Cells are controls unless the column that the model was fitted with says otherwise; groups are predicted apart.
        """
        asked = self._asked(adata, model, keys, {key: value for key, value in (options or {}).items() if key != "by_group"})
        names = list(asked.served["perturbations"] if perturbations is None else perturbations)
        if not names:
            raise ConfigError("name at least one perturbation")
        if listed := [name for name in names if "," in name]:
            raise ConfigError(f"{listed[0]!r} holds a comma, which stands between perturbations on the wire; rename it")
        answers = []
        for cells, own in perturbation_parts(asked.cells, names, asked.limits):
            part = replace(asked, cells=cells, options={**asked.options, "perturbation": ",".join(own), "by_group": "true"})
            answers.append(self._ask_once(part, "perturb", list(range(len(cells.sentences))))[:2])
            progress(len(answers), 0)
        return served_perturbation(answers, asked.cells, bool((options or {}).get("by_group")))

    def _asked(self, adata: AnnData, model: str, keys: Keys | None, options: Options | None) -> _Asked:
        """The cells as the model's task reads them."""
        served, keys = self.model(model), _read_keys(keys)
        vocabulary = self._vocabulary(model, served["vocabulary_fingerprint"])
        given = dict(options or {})
        context = str(given.pop("context", "own"))
        wanted = DataKeys.model_validate(served["keys"]) if keys is None and served.get("keys") else keys or DataKeys()
        reading = query_keys(adata, wanted) if keys is None else wanted.model_copy(update={"labels_key": None})
        table, report = cell_table(adata, vocabulary, reading)
        if served["task"] == "perturb":
            cells = controls_by_group(adata, served, wanted, WireCells(table, vocabulary, [], report))
        else:
            sentences, told = sentences_for(served, table, context)
            cells = WireCells(table, vocabulary, sentences, {**report, "context": told})
        if context == "panel":
            given["context"] = context
        version = served.get("version")  # all parts of one AnnData go to one version, whatever is promoted meanwhile
        exact = f"{served['name']}:{version}" if version else quote(model, safe="@:")
        return _Asked(exact, served, cells, given, reading)

    def _ask(self, asked: _Asked, task: str, progress: Progress) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Answer columns in the caller's row order, and the metadata of the answer."""
        columns: dict[str, NDArray[Any]] = {}
        about: dict[str, Any] = {}
        n, done = asked.cells.table.n_cells, 0
        for part in asked.cells.parts(asked.cells_per_request(task)):
            found, said, rows = self._ask_once(asked, task, part)
            if any(len(values) != len(rows) for values in found.values()):
                raise ServiceError(f"{len(rows)} cells were sent and another number came back; is this a cellplane endpoint?")
            if about and said["model_sha256"] != about["model_sha256"]:
                raise ServiceError("another model version was put in place while the cells were being answered; ask again")
            about = {**said, "warnings": sorted({*about.get("warnings", ()), *said["warnings"]})}
            for name, values in found.items():
                columns.setdefault(name, np.empty((n, *values.shape[1:]), dtype=values.dtype))[rows] = values
            done += len(rows)
            progress(done, n)
        log.info("%d cells answered by %s version %s", n, about["model"], about["version"])
        if task != "impute":  # whose query never measured all genes of the model
            few = gene_warnings(asked.cells.report, len(asked.cells.vocabulary))
            about = with_warnings(about, [sentence for sentence in few if sentence not in about[WARNINGS]])
        return columns, about

    def _ask_once(self, asked: _Asked, task: str, part: Sequence[int]) -> tuple[Columns, dict[str, Any], NDArray[np.int64]]:
        """One request: its columns, what they say of themselves, and the rows they are of."""
        body, rows = asked.cells.body(part)
        table, said = self._post(f"/v1/models/{asked.exact}/{task}", body, asked.options)
        about = {**said, "alias": asked.served.get("alias"), **asked.cells.report}
        return {name: plain(table[name]) for name in table.column_names}, about, rows

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

    def _post(self, path: str, body: bytes, options: Options | None = None) -> tuple[pa.Table, dict[str, Any]]:
        headers = {"Content-Type": ARROW_TYPE, "Accept": ARROW_TYPE, "X-Request-Id": uuid.uuid4().hex}
        told = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in (options or {}).items()}
        request = self._http.build_request("POST", path, content=body, headers=headers, params=told or None)
        return read_answer(self._call(request).content)

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
                if not _may_pass(response) or attempt == self.retries:
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


def _read_keys(keys: Keys | None) -> DataKeys | None:
    """Where counts and columns lie, given as DataKeys or as their entries; ConfigError for others."""
    return keys if keys is None or isinstance(keys, DataKeys) else validate(DataKeys, dict(keys), "keys")


def _may_pass(response: httpx.Response) -> bool:
    """Whether asking again may help; a proxy that was just replaced knows no paths yet, and says so in plain text."""
    nobody_there = response.status_code == 404 and not response.headers.get("content-type", "").startswith("application/json")
    return response.status_code in RETRIED or nobody_there


def _accepted(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    if response.status_code in FOREIGN and "html" in response.headers.get("content-type", ""):
        told = f"{response.url} is a web page ({response.status_code}): something else than cellplane answers there"
        raise ServiceError(told, response.status_code)
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
