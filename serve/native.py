"""The native paths: what is served, and POST /v1/models/NAME/TASK with cells in Arrow or JSON.

FastAPI stands here for routing and for /openapi.json; bodies are read as bytes and checked by the codec, because a
framework's own JSON reader lets NaN, 1e999 and unknown keys pass.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cellplane import __version__
from cellplane.client import ARROW_TYPE, JSON_TYPE
from cellplane.data.config import DataKeys
from cellplane.errors import CellplaneError, ServiceError

from .codec import CellsBody, decode, encode
from .document import Live, Ready, documented, predicted
from .front import Front
from .limits import REQUEST_ID, Limits, content_type_of, error_body, error_headers, refuse, status_of
from .meters import TEXT_TYPE
from .options import read_options
from .protocols import ProtocolPaths
from .tasks import Question

log = logging.getLogger(__name__)

HINTS = {404: "there is no such path; /openapi.json lists those there are", 405: "this path does not take that method"}


class LimitsInfo(BaseModel):
    """What one request may bring."""

    max_cells: int
    max_genes: int
    max_body_bytes: int
    max_decoded_bytes: int


class ModelInfo(BaseModel):
    """A served model."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    version: str | None
    alias: str | None
    aliases: list[str]
    run_id: str | None
    task: str
    tasks: list[str]
    classes: list[str]
    panel_cells: int
    panel_origin: str | None
    imputed_genes: list[str]
    perturbations: list[str]
    batches: list[str]
    perturbation_key: str | None
    control: str | None
    keys: DataKeys | None
    n_genes: int
    latent_width: int
    max_cells: int
    dtype: str
    model_sha256: str
    vocabulary_fingerprint: str
    limits: LimitsInfo


class VersionInfo(BaseModel):
    """A version that answers, starts, or was refused, and why; ``share`` of the requests for NAME."""

    name: str
    version: str
    state: str
    reason: str | None
    aliases: list[str]
    share: float
    shadow: bool


class ModelList(BaseModel):
    """Every version that answers here, and every one that was tried."""

    models: list[ModelInfo]
    versions: list[VersionInfo]


class GeneList(BaseModel):
    """A model's genes in order."""

    gene_ids: list[str]
    namespace: str
    vocabulary_fingerprint: str


BODY = {
    "requestBody": {
        "required": True,
        "content": {ARROW_TYPE: {"schema": {"type": "string", "format": "binary"}}, JSON_TYPE: {"schema": CellsBody.model_json_schema()}},
    }
}


class Markdown(PlainTextResponse):
    """A text that says so."""

    media_type = "text/markdown"


class NativePaths:
    """The endpoints over the models that are served."""

    def __init__(self, served: Front, limits: Limits) -> None:
        self.served, self.limits = served, limits

    def app(self) -> FastAPI:
        """The FastAPI application with every path and one shape of error."""
        about = "Cell language models: annotate, embed, denoise and impute cells, foretell perturbations"
        app = FastAPI(title="cellplane", version=__version__, description=about, redirect_slashes=False)
        app.get("/v2/health/live", response_model=Live)(self.live)
        app.get("/v2/health/ready", response_model=Ready)(self.ready)
        app.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        app.get("/v1/models", response_model=ModelList)(self.models)
        app.get("/v1/models/{model}", response_model=ModelInfo)(self.model)
        app.get("/v1/models/{model}/card", response_class=Markdown)(self.card)
        app.get("/v1/models/{model}/genes", response_model=GeneList)(self.genes)
        app.post("/v1/models/{model}/{task}", response_class=Response, responses=predicted(), openapi_extra=BODY)(self.predict)
        ProtocolPaths(self.served, self.limits).add_to(app)
        app.openapi = documented(app)  # type: ignore[method-assign]
        for kind in (CellplaneError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, _on_error)
        return app

    async def live(self) -> dict[str, bool]:
        """The process is up."""
        return {"live": True}

    async def ready(self) -> dict[str, bool]:
        """Every model's champion answers."""
        await self.served.ready()
        return {"ready": True}

    async def models(self) -> dict[str, Any]:
        """What is served."""
        return {"models": await self.served.models(), "versions": self.served.versions()}

    async def metrics(self) -> PlainTextResponse:
        """Counts of this ingress replica, for Prometheus."""
        return PlainTextResponse(await self.served.metrics(), media_type=TEXT_TYPE)

    async def model(self, model: str, request: Request) -> dict[str, Any]:
        """One model, by NAME, NAME@ALIAS or NAME:VERSION."""
        return await self.served.describe(model, request.scope[REQUEST_ID])

    async def card(self, model: str) -> Markdown:
        """The model card, Markdown."""
        return Markdown(await self.served.card(model))

    async def genes(self, model: str) -> dict[str, Any]:
        """The genes the model knows, in its order."""
        return await self.served.genes(model)

    async def predict(self, model: str, task: str, request: Request) -> Response:
        """Cells in, one answer a cell out, in the same order. Cells of one request form sentences of their own."""
        options = read_options(task, request.query_params)
        sent = content_type_of(request.headers)
        media_type = _wanted(request.headers.get("accept", ""), sent)
        cells = await asyncio.to_thread(decode, await request.body(), sent, self.limits)
        answer = await self.served.predict(model, Question(task, cells, options), request.scope[REQUEST_ID])
        about = {**answer.about, "request_id": request.scope[REQUEST_ID]}
        body = await asyncio.to_thread(encode, answer.columns, about, media_type)
        log.info("request %s: %s, %d cells, %d entries", request.scope[REQUEST_ID], task, cells.n_cells, len(cells.gene))
        return Response(body, media_type=media_type)


def _wanted(accept: str, sent: str) -> str:
    """The format asked for, else the one that was sent; ServiceError 406 when neither can be given."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",") if part.strip()]
    if not kinds or sent in kinds or "*/*" in kinds or "application/*" in kinds:
        return sent
    for kind in kinds:
        if kind in (ARROW_TYPE, JSON_TYPE):
            return kind
    raise refuse(406, f"answers come as {ARROW_TYPE} or {JSON_TYPE}")


async def _on_error(request: Request, error: Exception) -> Response:
    """One shape for every error; what was not foreseen gives the request id and nothing else."""
    headers: dict[str, str] = {}
    request_id = request.scope.get(REQUEST_ID)
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, HINTS.get(error.status_code, str(error.detail)), dict(error.headers or {})
    elif isinstance(error, ClientDisconnect):
        status, message = 400, "the connection closed before the body was complete"
    elif (status := status_of(error)) != 500:
        message = error.message if isinstance(error, ServiceError) else str(error)
    else:
        log.error("request %s failed: %s", request_id, type(error).__name__)
        status, message = 500, f"something went wrong here; report request id {request_id}"
    return Response(error_body(status, message, request.scope["path"]), status, {**headers, **error_headers(status)}, media_type=JSON_TYPE)
