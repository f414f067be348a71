"""An endpoint as Ray Serve applications: the guarded ingress in front, one application per model version behind.

    HTTP -> Guard (keys, sizes, time) -> FastAPI (paths) -> codec -> Front (which version) -> handle -> ModelReplica

Which version answers is the router's decision (see `router`). A prediction may be repeated safely, so the ingress asks
once more when a replica dies under a request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cellplane.client import Client
from cellplane.errors import CellplaneError, ConfigError, PortInUseError, ServiceError
from cellplane.tracking.registry import registered
from cellplane.tracking.runs import resolve_uri

from .deployment import ServeConfig
from .front import Front
from .limits import Guard, Limits, refuse
from .meters import Meters
from .native import NativePaths
from .router import REGISTERED, get_router, start_router, told
from .routes import Table
from .security import LOOPBACK, ApiKeys
from .stage import MODEL, POLL_S, VERSION_APPLICATION, application_name, lifetimes, wait_until_running

log = logging.getLogger(__name__)

APP, INGRESS = "cellplane", "ingress"
PROXIES = {"head": "HeadOnly", "every_node": "EveryNode"}  # in Serve's words
KEYS_VARIABLE = "CELLPLANE_API_KEYS_FILE"
ATTEMPTS = 4  # of one call: after a replica died; all copies may die at once, and each is found dead by a call
INGRESS_ONGOING = 256  # requests being read or waiting, at least; the guard's own limit is the narrower one
TABLE_WAIT_S = 10.0  # one question to the router about a newer table
ROUTER_RETRY_S = 0.5


@dataclass(frozen=True)
class Deployed:
    """A running endpoint: its address, and which version of which model answers there."""

    url: str
    model: str
    version: str


class RouterTable:
    """The newest table an ingress has heard of; a thread waits for newer ones, so a request never asks the router."""

    def __init__(self) -> None:
        self._table: Table = told(get_router().table.remote(), TABLE_WAIT_S)
        threading.Thread(target=self._wait_for_newer, daemon=True).start()

    def __call__(self) -> Table:
        """The table."""
        return self._table

    def _wait_for_newer(self) -> None:
        while True:
            try:
                newer: Table = told(get_router().changed.remote(self._table.epoch, TABLE_WAIT_S), 2 * TABLE_WAIT_S)
            except (ServiceError, RayError) as error:
                log.warning("the router does not answer (%s); going on with what it said last", type(error).__name__)
                time.sleep(ROUTER_RETRY_S)
                continue
            if newer.epoch > self._table.epoch:
                self._table = newer


class Handles:
    """Asks the replicas of a version through Serve; their errors arrive as they were raised."""

    def __init__(self, meters: Meters) -> None:
        self._handles: dict[str, DeploymentHandle] = {}
        self._meters = meters

    async def __call__(self, model: str, label: str, method: str, *arguments: object) -> Any:
        """See front.Ask: once more after a replica died, ServiceError 503 when none is free."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                handle = await self._handle(application_name(model, label))
                return await getattr(handle, method).remote(*arguments)
            except (RayActorError, ReplicaUnavailableError) as error:
                log.warning("a replica of %s:%s died under a call (%s, attempt %d)", model, label, method, attempt)
                self._meters.add("cellplane_replica_deaths_total", {"model": model, "version": label})
                died = error
            except RayServeException as error:
                log.warning("%s:%s took no call (%s, %s)", model, label, method, type(error).__name__)
                raise refuse(503, "every copy of the model is busy or starting; try again soon") from error
            except RayTaskError as error:
                if isinstance(error.cause, CellplaneError):
                    raise error.cause from None
                raise
        raise refuse(503, "copies of the model keep dying; try again soon") from died

    async def _handle(self, application: str) -> DeploymentHandle:
        if application not in self._handles:
            self._handles[application] = await asyncio.to_thread(serve.get_deployment_handle, MODEL, application, _check_exists=False)
        return self._handles[application]


@serve.ingress()
class Ingress:
    """Receives HTTP and asks models by handle; all it keeps is a copy of the router's table, so any number may run."""

    def __init__(self, limits: Limits, api_keys_file: Path | None) -> None:
        keys = None if api_keys_file is None else ApiKeys.load(api_keys_file)
        meters = Meters()
        self.guarded = Guard(NativePaths(Front(RouterTable(), Handles(meters), meters), limits).app(), limits, keys, meters)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application Serve runs in each replica."""
        return self.guarded


def deploy(config: ServeConfig) -> Deployed:
    """Serve the configured model on the Ray cluster this process is connected to, and wait until it answers.

    A model of another name is served beside those that are; another version of the same name takes over without a
    pause, and the one before stays loaded as `previous`. models:/NAME@ALIAS is followed from then on. Raises
    ConfigError for an open address without keys or an unknown model, IntegrityError for a damaged one, PortInUseError,
    and ServiceError when it does not come up, with the reason; then whatever answered before goes on.
    """
    if not ray.is_initialized():
        raise ServiceError("serving needs a Ray cluster and this process is not connected to one; start one with `cellplane up`")
    config = checked(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    before = serve.status()
    config = _with_port(config, running=bool(before.proxies))
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    serve.start(proxy_location=PROXIES[config.proxies], http_options={"host": config.host, "port": config.port})
    try:
        router = start_router()
        if APP not in before.applications:
            _run_ingress(config)  # it starts while the model loads
        version = told(router.put.remote(config), None)
        if APP in before.applications:
            _run_ingress(config)  # only now: a model that is refused changes nobody's limits or keys
        wait_until_running(APP, config.startup_timeout_s, "is the machine very busy?")
        _wait_for_answer(config, url, version)
    except BaseException:
        if APP not in before.applications:
            undeploy()
        raise
    log.info("model %s version %s answers at %s", config.name, version, url)
    return Deployed(url, config.name, version)


def _run_ingress(config: ServeConfig) -> None:
    target = serve.RunTarget(target=ingress_of(config), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def ingress_of(config: ServeConfig) -> serve.Application:
    """The processes that receive, as this configuration wants them."""
    ingress = serve.deployment(Ingress).options(
        name=INGRESS,
        num_replicas=config.ingress_replicas,
        max_replicas_per_node=_even_share(config),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=max(INGRESS_ONGOING, 2 * (config.limits().max_in_flight or 0)),
        **lifetimes(config),
    )
    return ingress.bind(config.limits(), config.api_keys_file)


def _even_share(config: ServeConfig) -> int | None:
    """How many of the processes that receive one node may hold, so that no node has all of them; they take no CPU that would tell."""
    if config.proxies == "head" or not ray.is_initialized():
        return None
    return -(-config.ingress_replicas // sum(node["Alive"] for node in ray.nodes()))


def checked(config: ServeConfig) -> ServeConfig:
    """The configuration as it means the same in another process; ConfigError for an open address without keys."""
    return _with_keys(_absolute(config))


def undeploy(name: str | None = None) -> None:
    """Take one model down, or the whole endpoint; Serve itself too when nothing else runs on it, so that the port is free again."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if name is not None:
        told(get_router().remove.remote(name), None)
        return
    with suppress(ServiceError, RayError):  # it may be gone already
        ray.kill(get_router())
    for application in serve.status().applications:
        if application == APP or VERSION_APPLICATION.fullmatch(application):
            serve.delete(application)
    if not serve.status().applications:
        serve.shutdown()


def _absolute(config: ServeConfig) -> ServeConfig:
    """The configuration as it means the same in another process: the tracker's address, the folder's full path."""
    if config.model.startswith(REGISTERED):
        registered(config.model)  # a wrong form is told before anything starts
        return config.model_copy(update={"tracking_uri": resolve_uri(config.tracking_uri)})
    return config.model_copy(update={"model": str(Path(config.model).absolute())})


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
        with closing(_socket_for(config)) as probe:
            if config.port == 0 or probe.connect_ex((config.host, config.port)) != 0:
                elsewhere = "Serve already runs on this cluster at another address, which `cellplane status` shows"
                raise ServiceError(f"{elsewhere}; name its port, or end it: cellplane serve --stop")
        return config
    with closing(_socket_for(config)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            reason = f"cannot listen on {config.host}:{config.port} ({error.strerror})"
            raise PortInUseError(f"{reason}; choose another port, or 0 for a free one") from error
        return config.model_copy(update={"port": probe.getsockname()[1]})


def _socket_for(config: ServeConfig) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)


def _wait_for_answer(config: ServeConfig, url: str, version: str) -> None:
    """Until this version answers over HTTP to the model's name; ServiceError when it does not."""
    deadline = time.monotonic() + config.startup_timeout_s
    with Client(url, retries=0) as client:
        while not client.ready():
            if time.monotonic() > deadline:
                raise ServiceError(f"{url} does not answer within {config.startup_timeout_s:g} s although version {version} runs")
            time.sleep(POLL_S)
