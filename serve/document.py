"""What /openapi.json says beyond what FastAPI sees: answers of each task, options, and every refusal with its one shape.

Bodies are read by the codec and refused by the guard, outside of what a framework can describe by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from cellplane.client import ARROW_TYPE, JSON_TYPE

from .limits import HEADER_LENGTH, OCTETS, OPEN_PATHS
from .options import CONTEXTS, DTYPES, OPTIONS
from .perturbing import FALLBACKS, KINDS
from .routes import LABEL, REFERENCE

Document = dict[str, Any]


class ErrorBody(BaseModel):
    """What went wrong, and a code that programs can read."""

    error: str
    code: str


class ProtocolError(BaseModel):
    """What went wrong, as the Open Inference Protocol has it."""

    error: str


class Live(BaseModel):
    """The process is up."""

    live: bool


class Ready(BaseModel):
    """Every model's champion answers."""

    ready: bool


class ModelReady(BaseModel):
    """A model answers."""

    name: str
    ready: bool


class Context(BaseModel):
    """Which cells each cell was read with."""

    model_config = ConfigDict(extra="allow")

    policy: str
    sentences: int
    max_cells: int
    seed: int


class About(BaseModel):
    """Who answered, what of the cells it knew, and what is worth reading; tasks add what their columns are of."""

    model_config = ConfigDict(protected_namespaces=(), extra="allow")

    model: str
    version: str
    alias: str | None
    run_id: str | None
    model_sha256: str
    vocabulary_fingerprint: str
    dtype: str
    context: Context
    gene_overlap: float
    n_shared: int
    n_dropped: int
    warnings: list[str]
    request_id: str
    classes: list[str] | None = None
    rate_genes: list[str] | None = None
    genes: list[str] | None = None
    expected_r: list[float | None] | None = None


class Prediction(About):
    """An answer in JSON: what it says about itself, and its columns, one entry a cell (or a population, for perturb)."""

    n_rows: int
    cell_id: list[str] | None = None
    cell_type: list[str] | None = None
    confidence: list[float] | None = None
    unknown_score: list[float] | None = None
    proba: list[list[float]] | None = None
    top_cell_type: list[list[str]] | None = None
    top_proba: list[list[float]] | None = None
    embedding: list[list[float]] | None = None
    rate: list[list[float]] | None = None
    size_factor: list[float] | None = None
    sd: list[list[float]] | None = None
    perturbation: list[str] | None = None
    group: list[str] | None = None
    kind: list[str] | None = None
    seen: list[bool] | None = None
    fallback: list[bool] | None = None
    control_cells: list[int] | None = None
    log_fold_change: list[list[float]] | None = None
    mean_log: list[list[float]] | None = None
    rate_control: list[list[float]] | None = None
    rate_perturbed: list[list[float]] | None = None


BYTES_SCHEMA: Document = {"schema": {"type": "string", "format": "binary"}}
REASONS = {
    400: "The request cannot be read",
    401: "No valid key",
    403: "The key may not do this",
    404: "No such model, version, alias or task",
    406: "No such format of answers",
    408: "No answer in time",
    409: "The model does not support the task",
    413: "Too many bytes, cells or genes",
    415: "The content type is not understood",
    422: "The cells or options make no sense",
    429: "Too many requests with this key",
    431: "The headers are too long",
    500: "Something went wrong here",
    503: "No model answers now; try again soon",
}
EVERYWHERE, WITH_KEY, WITH_BODY = (408, 431, 500), (400, 401, 403), (404, 409, 413, 415, 422, 429, 503)
PATH_SCHEMAS: dict[str, Document] = {
    "model": {"type": "string", "pattern": REFERENCE.pattern},
    "version": {"type": "string", "pattern": f"^(?:{LABEL})$"},
    "task": {"type": "string", "enum": list(OPTIONS)},
}
OPTION_SCHEMAS: dict[str, Document] = {
    "threshold": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 1},
    "context": {"type": "string", "enum": list(CONTEXTS)},
    "dtype": {"type": "string", "enum": list(DTYPES)},
    "target_batch": {"type": "string", "minLength": 1},
    "genes": {"type": "string", "minLength": 1},
    "reference": {"type": "string", "minLength": 1},
    "min_correlation": {"type": "number", "minimum": -1, "maximum": 1},
    "perturbation": {"type": "string", "minLength": 1},
    "kind": {"type": "string", "enum": list(KINDS)},
    "by_group": {"type": "string", "enum": ["true", "false"]},
    "fallback": {"type": "string", "enum": list(FALLBACKS)},
}


def predicted() -> dict[int | str, Document]:
    """The answer of a native prediction: Arrow columns with `About` as JSON texts in the metadata, or `Prediction` in JSON."""
    return {200: {"model": Prediction, "content": {ARROW_TYPE: BYTES_SCHEMA}}}


def documented(app: FastAPI) -> Callable[[], Document]:
    """What replaces ``app.openapi``: the same, with parameters and refusals told."""
    plain = app.openapi

    def openapi() -> Document:
        if app.openapi_schema is None:
            _complete(plain())
        return plain()

    return openapi


def _complete(document: Document) -> None:
    parts = document.setdefault("components", {}).setdefault("schemas", {})
    parts |= {kind.__name__: kind.model_json_schema() for kind in (ErrorBody, ProtocolError)}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; nothing here answers so
        parts.pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shape = "ProtocolError" if path.startswith("/v2") else "ErrorBody"
            content = {JSON_TYPE: {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
            refusals = {str(status): {"description": REASONS[status], "content": content} for status in sorted(_statuses(method, path))}
            operation["responses"] = {"200": operation["responses"]["200"], **refusals}
            operation["parameters"] = [*map(_precise, operation.get("parameters", [])), *_more_parameters(method, path)]
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}, {}]


def _statuses(method: str, path: str) -> set[int]:
    """Whatever a request to a path may be refused with."""
    found = {*EVERYWHERE, *(() if path in OPEN_PATHS else WITH_KEY)}
    if method == "post":
        found |= {*WITH_BODY, *((406,) if path.startswith("/v1/") else ())}
    if "{model}" in path:
        found |= {404, 503}
    if path in ("/v2/health/ready", "/ping", "/health", "/v1/models"):
        found.add(503)
    return found


def _precise(parameter: Document) -> Document:
    """A path's parameter with the form it must have."""
    return {**parameter, "schema": PATH_SCHEMAS.get(parameter["name"], parameter["schema"])}


def _more_parameters(method: str, path: str) -> Iterator[Document]:
    if method == "post":
        told = "Comes back with the answer; the same id again asks the same version"
        yield {"name": "X-Request-Id", "in": "header", "required": False, "description": told, "schema": {"type": "string"}}
    if path.endswith("/infer"):
        told = f"Bytes of the JSON part of a body of {OCTETS}"
        yield {"name": HEADER_LENGTH, "in": "header", "required": False, "description": told, "schema": {"type": "integer", "minimum": 0}}
    if path == "/v1/models/{model}/{task}":
        for name, schema in OPTION_SCHEMAS.items():
            told = f"Of {', '.join(task for task, options in OPTIONS.items() if name in options)}"
            yield {"name": name, "in": "query", "required": False, "description": told, "schema": schema}
