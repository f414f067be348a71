"""A version as a Ray Serve application of its own, `NAME--vLABEL`: started beside the others, tried, taken down.

A version that does not come up costs the others nothing: it is another application with other replicas.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException

from cellplane.errors import CellplaneError, IntegrityError, ServiceError

from .deployment import ServeConfig
from .routes import LABEL, NAME, Version
from .turn import ModelCopy

log = logging.getLogger(__name__)

MODEL = "model"  # the deployment inside a version's application
START_ATTEMPTS = 2  # a damaged model fails every time: say so soon
HEALTH_CHECK_S = 2.0  # how soon a dead replica is noticed and replaced
DRAIN_S = 1.0  # until every ingress has the table without a version that goes
POLL_S = 0.1
LOOK_BACK_S = 12.0  # whose mean load decides about copies; Ray hears of it every ten seconds
VERSION_APPLICATION = re.compile(rf"^{NAME}--v(?:{LABEL})$")  # whatever `application_name` gives


def application_name(model: str, label: str) -> str:
    """The Serve application that holds this version."""
    return f"{model}--v{label}"


def lifetimes(config: ServeConfig) -> dict[str, Any]:
    """What the ingress and the models have in common."""
    return {
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
        "health_check_period_s": HEALTH_CHECK_S,
        "max_constructor_retry_count": START_ATTEMPTS,
    }


def copies(config: ServeConfig) -> dict[str, Any]:
    """How many copies of a model there are: a number, or as many as the load calls for."""
    if config.most_replicas == config.replicas:
        return {"num_replicas": config.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.most_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            look_back_period_s=LOOK_BACK_S,
        )
    }


class ServeStage:
    """The stage of real roll-outs (see `rollout.Stage`); ``config_of`` says how a model is to be run."""

    def __init__(self, config_of: Callable[[str], ServeConfig]) -> None:
        self._config_of = config_of
        self._going: dict[str, threading.Timer] = {}

    def start(self, model: str, version: Version) -> None:
        """See Stage: returns once every replica is up; ServiceError, or IntegrityError for a damaged model, with the reason."""
        try:
            self._start(model, version)
        except (ray.exceptions.RayError, RayServeException) as error:
            name = application_name(model, version.label)
            raise ServiceError(f"the cluster did not start {name}: {type(error).__name__}") from error

    def _start(self, model: str, version: Version) -> None:
        config, name = self._config_of(model), application_name(model, version.label)
        if going := self._going.pop(name, None):
            going.cancel()
        self._wait_until_gone(name, config.startup_timeout_s)
        application = serve.deployment(ModelCopy).options(
            name=MODEL,
            **copies(config),
            max_replicas_per_node=config.max_replicas_per_node,
            ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
            max_ongoing_requests=config.max_ongoing_requests,
            max_queued_requests=config.max_queued_requests,
            **lifetimes(config),
        )
        target = serve.RunTarget(target=application.bind(config.model_dump(mode="json"), asdict(version)), name=name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        needed = f"{config.num_cpus * config.replicas:g} CPUs" + (
            f" and {config.num_gpus * config.replicas:g} GPUs" if config.num_gpus else ""
        )
        wait_until_running(name, config.startup_timeout_s, f"are {needed} free?")

    def check(self, model: str, version: Version) -> Version:
        """See Stage: through the handle that requests will take."""
        handle = serve.get_deployment_handle(MODEL, application_name(model, version.label))
        try:
            checked: Version = handle.check.remote().result(timeout_s=self._config_of(model).startup_timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, CellplaneError):
                raise error.cause from None
            what = " ".join(str(error.cause).split()) or type(error.cause).__name__
            raise ServiceError(f"version {version.label} of {model!r} failed its check: {what[:300]}") from error
        except (TimeoutError, RayActorError, RayServeException) as error:
            raise ServiceError(f"version {version.label} of {model!r} did not answer its check: {type(error).__name__}") from error
        return checked

    def stop(self, model: str, version: Version) -> None:
        """See Stage: the application goes in the background, once every ingress knows and its requests are answered."""
        name = application_name(model, version.label)
        self._going[name] = threading.Timer(DRAIN_S, self._delete, (name,))
        self._going[name].start()

    def _delete(self, name: str) -> None:
        self._going.pop(name, None)
        with suppress(RayServeException, ray.exceptions.RayError):  # Serve itself may be going down
            serve.delete(name, _blocking=False)

    def _wait_until_gone(self, name: str, timeout_s: float) -> None:
        """A version that was just let go and is wanted again starts anew."""
        deadline = time.monotonic() + timeout_s
        while (status := serve.status().applications.get(name)) is not None and status.status != "RUNNING":
            if time.monotonic() > deadline:
                raise ServiceError(f"the application {name} does not go away ({status.status}); try again")
            serve.delete(name, _blocking=False)
            time.sleep(POLL_S)


def wait_until_running(name: str, timeout_s: float, advice: str) -> None:
    """Until every replica of an application is up; the reason as ServiceError, or IntegrityError for a damaged model."""
    deadline = time.monotonic() + timeout_s
    while (status := serve.status().applications.get(name)) is None or status.status != "RUNNING":
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reason = _reason(status)
            raise IntegrityError(reason) if IntegrityError.__name__ in reason else ServiceError(f"the model did not start: {reason}")
        if time.monotonic() > deadline:
            raise ServiceError(f"{name} did not start within {timeout_s:g} s ({_reason(status)}); {advice}")
        time.sleep(POLL_S)


def _reason(status: Any) -> str:
    """The last line of what Serve says about the deployment that is not well: the exception itself, without its traceback."""
    if status is None:
        return "Serve does not know the application"
    messages = [item.message for item in status.deployments.values() if item.message and item.status != "HEALTHY"] or [status.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else str(status.status.value))
