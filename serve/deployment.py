"""The configuration of an endpoint: which model, how many copies, and what one request may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellplane.config import Config

from .limits import MIB, Limits
from .routes import NAME


class ServeConfig(Config):
    """One endpoint serving one model."""

    kind: Literal["serve"] = "serve"
    """Which kind of configuration this is."""
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    """The model's name in paths: /v1/models/NAME."""
    model: str
    """What is served: a model folder, models:/NAME@ALIAS or models:/NAME/VERSION."""
    tracking_uri: str | None = None
    """Where models:/ names are looked up; None takes MLFLOW_TRACKING_URI or the local store."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs api_keys_file."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_keys_file: Path | None = None
    """Lines of `name sha256 scope[,scope]`; None = no key is asked for, on loopback only."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model; with two, one may die without a pause."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """With more than `replicas`, copies come under load and go when it is over; None = always as many as `replicas`."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 4
    """Autoscaling: requests that each copy should have in hand; more call for another copy."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5
    """Autoscaling: how long the load must last before a copy comes."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120
    """Autoscaling: how long it must be over before one goes."""
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """Processes that receive requests, read and write bodies; the last `serve` of an endpoint decides for all its models."""
    proxies: Literal["head", "every_node"] = "head"
    """Where HTTP is received: at the head's address alone, or also at that of every node with a process of this endpoint."""
    max_replicas_per_node: Annotated[int, Field(ge=1)] | None = None
    """Copies of the model that one node may hold: 1 sets them apart for certain, and those of a lost node then wait for another
    one; None = set apart as far as there is room, and back on what is left."""
    num_cpus: Annotated[float, Field(ge=0)] = 1
    """CPUs, and so threads, of each copy; 0 sets none aside, so that an endpoint never keeps training from starting."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each copy; 0.25 lets four share one. Without any the CPU computes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In what the network computes: bfloat16 is faster and half as large; embeddings keep their direction to three digits."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 64 * MIB
    """Largest request body."""
    max_json_bytes: Annotated[int, Field(ge=1)] = 16 * MIB
    """Largest JSON body: parsed, it takes tenfold its size."""
    max_decoded_bytes: Annotated[int, Field(ge=1)] = 256 * MIB
    """Largest Arrow body once decompressed."""
    max_cells: Annotated[int, Field(ge=1)] = 10_000
    """Most cells in one request."""
    max_genes: Annotated[int, Field(ge=1)] = 100_000
    """Most genes in one request."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Longest time for one answer, then 408."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Most requests of one API key in a minute, then 429; None = as many as are answered."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 16
    """Requests a copy takes on at once; those that wait together are computed together."""
    max_cells_per_forward: Annotated[int, Field(ge=1)] = 2048
    """Cells that are computed together, of however many requests; a larger request is computed in parts."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 64
    """Requests that may wait for a copy; more get 503 with Retry-After. Where several models are served, the one served last decides
    how many requests the endpoint holds in all."""
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 20
    """Time for requests in flight when the endpoint goes or changes its version."""
    startup_timeout_s: Annotated[float, Field(gt=0)] = 180
    """Longest time until the model answers; then starting it has failed."""
    registry_poll_s: Annotated[float, Field(gt=0)] = 0.25
    """How often the registry is asked whether models:/NAME@ALIAS has moved."""
    keep_previous: bool = True
    """Keep the version before the champion loaded, so that going back takes no time."""
    challenger_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the requests for NAME that the version with the alias `challenger` answers."""
    shadow: bool = False
    """Ask the challenger everything the champion is asked, compare, and show nobody its answers."""

    @model_validator(mode="after")
    def _copies(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        return self

    @property
    def most_replicas(self) -> int:
        """Copies there may be."""
        return self.max_replicas or self.replicas

    def limits(self) -> Limits:
        """What one request may cost, as each process that receives requests counts."""
        return Limits(
            max_body_bytes=self.max_body_bytes,
            max_json_bytes=self.max_json_bytes,
            max_decoded_bytes=self.max_decoded_bytes,
            max_cells=self.max_cells,
            max_genes=self.max_genes,
            request_timeout_s=self.request_timeout_s,
            requests_per_minute=None if self.requests_per_minute is None else -(-self.requests_per_minute // self.ingress_replicas),
            max_in_flight=-(-(self.most_replicas * self.max_ongoing_requests + self.max_queued_requests) // self.ingress_replicas),
        )
