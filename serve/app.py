"""An endpoint as a Ray Serve application: the guarded ingress in front, the model's replicas behind, up and down.

    HTTP -> Guard (keys, sizes, time) -> FastAPI (paths) -> codec -> handle -> ModelReplica

A prediction may be repeated safely, so the ingress asks once more when a replica dies under a request.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cellplane.client import Client
from cellplane.config import home
from cellplane.errors import CellplaneError, ConfigError, PortInUseError, ServiceError
from cellplane.tracking.registry import resolve_model

from .codec import Cells
from .deployment import Answer, ModelReplica, ServeConfig, ServedVersion, load_warm
from .limits import Guard, refuse
from .native import NativePaths
from .security import LOOPBACK, ApiKeys

log = logging.getLogger(__name__)

APP, INGRESS, MODEL = "cellplane", "ingress", "model"
KEYS_VARIABLE = "CELLPLANE_API_KEYS_FILE"
ATTEMPTS = 2  # of one call: the second after a replica died
INGRESS_ONGOING = 256  # requests being read or waiting; the model's own queue is the narrower limit
START_ATTEMPTS = 2  # a damaged model fails every time: say so soon
HEALTH_CHECK_S = 2.0  # how soon a dead replica is noticed and replaced
POLL_S = 0.1


@dataclass(frozen=True)
class Deployed:
    """A running endpoint: its address, and which version of which model answers there."""

    url: str
    model: str
    version: str | None


class RemoteModel:
    """The model behind a Serve handle; its errors arrive as they were raised."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def describe(self, reference: str | None = None) -> dict[str, Any]:
        """What is served."""
        described: dict[str, Any] = await self._call("describe", reference)
        return described

    async def card(self, reference: str) -> str:
        """The model card."""
        return str(await self._call("card", reference))

    async def genes(self, reference: str) -> dict[str, Any]:
        """The model's genes."""
        genes: dict[str, Any] = await self._call("genes", reference)
        return genes

    async def predict(self, reference: str, task: str, cells: Cells) -> Answer:
        """The answer to one request."""
        answer: Answer = await self._call("predict", reference, task, cells)
        return answer

    async def _call(self, method: str, *arguments: object) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await getattr(self.handle, method).remote(*arguments)
            except (RayActorError, ReplicaUnavailableError) as error:
                log.warning("a model replica died under a call (%s, attempt %d)", method, attempt)
                died = error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise refuse(503, "every copy of the model is busy or starting; try again soon") from error
            except RayTaskError as error:
                if isinstance(error.cause, CellplaneError):
                    raise error.cause from None
                raise
        raise refuse(503, "copies of the model keep dying; try again soon") from died


@serve.ingress()
class Ingress:
    """Receives HTTP and asks the model by handle; holds no state, so any number of copies may run."""

    def __init__(self, config: ServeConfig, model: DeploymentHandle) -> None:
        keys = None if config.api_keys_file is None else ApiKeys.load(config.api_keys_file)
        self.guarded = Guard(NativePaths(RemoteModel(model), config.limits()).app(), config.limits(), keys)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application Serve runs in each replica."""
        return self.guarded


def build(config: ServeConfig, version: ServedVersion) -> serve.Application:
    """The Serve application of one model version: an ingress bound to ``config.replicas`` copies of the model."""
    shared = {
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
        "health_check_period_s": HEALTH_CHECK_S,
        "max_constructor_retry_count": START_ATTEMPTS,
    }
    model = serve.deployment(ModelReplica).options(
        name=MODEL,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus},
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        **shared,
    )
    ingress = serve.deployment(Ingress).options(
        name=INGRESS, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=INGRESS_ONGOING, **shared
    )
    return ingress.bind(config, model.bind(config, version))


def deploy(config: ServeConfig) -> Deployed:
    """Serve the configured model on the Ray cluster this process is connected to, and wait until it answers.

    A second call replaces what is served without a pause. Raises ConfigError for an open address without keys or an
    unknown model, IntegrityError for a damaged one, PortInUseError, and ServiceError when it does not come up, with
    the reason.
    """
    if not ray.is_initialized():
        raise ServiceError("serving needs a Ray cluster and this process is not connected to one; start one with `cellplane up`")
    config = _with_keys(config)
    version = served_version(config)
    expected = load_warm(version.path).folder.model_sha256  # a model that cannot answer must not displace one that can
    before = serve.status()
    config = _with_port(config, running=bool(before.proxies))
    url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
    target = serve.RunTarget(target=build(config, version), name=APP, route_prefix="/")
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait(config, url, expected)
    except BaseException:
        if APP not in before.applications:
            undeploy()
        raise
    log.info("model %s version %s answers at %s", version.name, version.version, url)
    return Deployed(url, version.name, version.version)


def undeploy() -> None:
    """Take the endpoint down; Serve itself too when nothing else runs on it, so that the port is free again."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if APP in serve.status().applications:
        serve.delete(APP)
    if not serve.status().applications:
        serve.shutdown()


def served_version(config: ServeConfig) -> ServedVersion:
    """The folder and registry entry that the configuration's model means; raises what `resolve_model` raises."""
    resolved = resolve_model(config.model, config.tracking_uri, home() / "cache" / "models")
    alias = config.model.rpartition("@")[2] if config.model.startswith("models:/") and "@" in config.model else None
    return ServedVersion(config.name, resolved.path, None if resolved.version is None else str(resolved.version), alias, resolved.run_id)


def _with_keys(config: ServeConfig) -> ServeConfig:
    """The configuration with its key file, checked; ConfigError for an open address without one."""
    file = config.api_keys_file or (Path(os.environ[KEYS_VARIABLE]) if os.environ.get(KEYS_VARIABLE) else None)
    if file is None:
        if config.host not in LOOPBACK:
            raise ConfigError(f"host {config.host} can be reached by others: set api_keys_file (or {KEYS_VARIABLE}), or serve on 127.0.0.1")
        return config
    ApiKeys.load(file)
    return config.model_copy(update={"api_keys_file": file.absolute()})


def _with_port(config: ServeConfig, running: bool) -> ServeConfig:
    """The configuration with a port that is free, or on which this cluster's Serve already listens."""
    if running:
        with closing(socket.socket()) as probe:
            if config.port == 0 or probe.connect_ex((config.host, config.port)) != 0:
                raise ServiceError("Serve already runs on this cluster at another address; name that port, or undeploy first")
        return config
    with closing(socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            reason = f"cannot listen on {config.host}:{config.port} ({error.strerror})"
            raise PortInUseError(f"{reason}; choose another port, or 0 for a free one") from error
        return config.model_copy(update={"port": probe.getsockname()[1]})


def _wait(config: ServeConfig, url: str, model_sha256: str) -> None:
    """Until the model of this checksum answers over HTTP; ServiceError with the reason when it does not."""
    deadline = time.monotonic() + config.startup_timeout_s
    while (status := serve.status().applications.get(APP)) is None or status.status != "RUNNING":
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServiceError(f"the model did not start: {_reason(status)}")
        if time.monotonic() > deadline:
            waited = f"the model did not start within {config.startup_timeout_s:g} s"
            raise ServiceError(f"{waited} ({_reason(status)}); are {config.num_cpus * config.replicas:g} CPUs free?")
        time.sleep(POLL_S)
    described = serve.get_deployment_handle(MODEL, APP).describe.remote().result(timeout_s=max(deadline - time.monotonic(), 1.0))
    if described["model_sha256"] != model_sha256:
        raise ServiceError("another version answers than the one that was put in place; deploy again")
    with Client(url, retries=0) as client:
        while not client.ready():
            if time.monotonic() > deadline:
                raise ServiceError(f"{url} does not answer within {config.startup_timeout_s:g} s although the model runs")
            time.sleep(POLL_S)


def _reason(status: Any) -> str:
    """The last line of what Serve says about the deployment that is not well: the exception itself, without its traceback."""
    if status is None:
        return "Serve does not know the application"
    messages = [item.message for item in status.deployments.values() if item.message and item.status != "HEALTHY"] or [status.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else str(status.status.value))
