"""The paths of other people's clients: the Open Inference Protocol under /v2, MLflow's scoring protocol beside it.

Both end in the same question to the same models as the native paths, so their answers are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from cellplane import __version__
from cellplane.client import JSON_TYPE

from .codec import Cells
from .document import BYTES_SCHEMA, ModelReady
from .front import Front
from .limits import HEADER_LENGTH, OCTETS, REQUEST_ID, Limits
from .mlflow_protocol import Invocation, Predictions, decode_invocation, encode_predictions
from .oip import InferRequest, InferResponse, ModelMetadata, ServerMetadata, decode_inference, encode_inference, metadata
from .options import Scalar, read_options
from .replica import Answer
from .tasks import Question

NAMES = Mapping[str, Scalar]


class ProtocolPaths:
    """The endpoints of both protocols over the models that are served."""

    def __init__(self, served: Front, limits: Limits) -> None:
        self.served, self.limits = served, limits

    def add_to(self, app: FastAPI) -> None:
        """Put the paths into an application."""
        for place in ("/v2", "/v2/"):  # the protocol's text has the first, its OpenAPI the second
            app.get(place, response_model=ServerMetadata)(self.server)
        infer = {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": _schema(InferRequest)}, OCTETS: BYTES_SCHEMA}}}
        for place in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            versioned = "version" in place
            app.get(place, response_model=ModelMetadata)(self.versioned_model if versioned else self.model)
            app.get(f"{place}/ready", response_model=ModelReady)(self.versioned_model_ready if versioned else self.model_ready)
            answers: dict[int | str, dict[str, Any]] = {200: {"model": InferResponse, "content": {OCTETS: BYTES_SCHEMA}}}
            post = app.post(f"{place}/infer", response_class=Response, responses=answers, openapi_extra=infer)
            post(self.versioned_infer if versioned else self.infer)
        scored = {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": _schema(Invocation)}}}}
        told: dict[int | str, dict[str, Any]] = {200: {"model": Predictions}}
        app.post("/invocations", response_class=Response, responses=told, openapi_extra=scored)(self.invocations)
        app.get("/ping", response_class=PlainTextResponse)(self.ping)
        app.get("/health", response_class=PlainTextResponse)(self.ping)
        app.get("/version", response_class=PlainTextResponse)(self.version)

    async def server(self) -> ServerMetadata:
        """Which server this is, and which extensions of the protocol it has."""
        return ServerMetadata(name="cellplane", version=__version__, extensions=["binary_tensor_data", "model_versions"])

    async def model(self, model: str, request: Request) -> ModelMetadata:
        """The tensors a model takes and gives, by NAME or NAME@ALIAS."""
        described = await self.served.describe(model, request.scope[REQUEST_ID])
        return metadata(
            described, [row["version"] for row in self.served.versions() if row["name"] == described["name"] and row["state"] == "ready"]
        )

    async def versioned_model(self, model: str, version: str, request: Request) -> ModelMetadata:
        """The tensors a version takes and gives."""
        return await self.model(f"{model}:{version}", request)

    async def model_ready(self, model: str, request: Request) -> dict[str, Any]:
        """Whether a model answers; 404 for one that is not served."""
        described = await self.served.describe(model, request.scope[REQUEST_ID])
        return {"name": described["name"], "ready": True}

    async def versioned_model_ready(self, model: str, version: str, request: Request) -> dict[str, Any]:
        """Whether a version answers; 404 for one that is not served."""
        return await self.model_ready(f"{model}:{version}", request)

    async def infer(self, model: str, request: Request) -> Response:
        """Cells as tensors in, answers as tensors out; the parameter `task` chooses, the model's own task is the default."""
        header_length = request.headers.get(HEADER_LENGTH)
        inference = await asyncio.to_thread(decode_inference, await request.body(), header_length, self.limits)
        answer = await self._ask(model, inference.cells, inference.parameters, request.scope[REQUEST_ID])
        body, headers = await asyncio.to_thread(encode_inference, inference, answer.columns, answer.about)
        return Response(body, headers=headers)

    async def versioned_infer(self, model: str, version: str, request: Request) -> Response:
        """The same, of one version."""
        return await self.infer(f"{model}:{version}", request)

    async def invocations(self, request: Request) -> Response:
        """A table of cells in, one record a cell out."""
        scoring = await asyncio.to_thread(decode_invocation, await request.body(), self.limits)
        params = dict(scoring.params)
        model = str(params.pop("model", None) or self.served.only())
        answer = await self._ask(model, scoring.cells, params, request.scope[REQUEST_ID])
        return Response(await asyncio.to_thread(encode_predictions, answer.columns, answer.about), media_type=JSON_TYPE)

    async def ping(self) -> PlainTextResponse:
        """Whether every model answers."""
        await self.served.ready()
        return PlainTextResponse("\n")

    async def version(self) -> PlainTextResponse:
        """The version of cellplane."""
        return PlainTextResponse(__version__)

    async def _ask(self, model: str, cells: Cells, parameters: NAMES, request_id: str) -> Answer:
        options = dict(parameters)
        task = options.pop("task", None)
        if task is None:
            task = (await self.served.describe(model, request_id))["tasks"][0]
        answer = await self.served.predict(model, Question(str(task), cells, read_options(str(task), options)), request_id)
        return Answer(answer.columns, {**answer.about, "task": str(task), "request_id": request_id})


def _schema(model: Any) -> dict[str, Any]:
    """A body's JSON schema with its parts inlined where they are used, as OpenAPI wants it outside its components."""
    schema: dict[str, Any] = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, dict) and "$ref" in node:
            return inlined(parts[node["$ref"].rpartition("/")[2]])
        if isinstance(node, dict):
            return {key: inlined(value) for key, value in node.items()}
        return [inlined(value) for value in node] if isinstance(node, list) else node

    found: dict[str, Any] = inlined(schema)
    return found
