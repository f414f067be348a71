"""The endpoint as others declare it: `serve deploy` and KubeRay's RayService name `cellplane.serve.declared:build`.

What is declared is the list of models; which version of each answers stays the registry's decision (see `router`). So a
promotion changes nothing here, and a new list takes models up and down beside those that go on.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from ray import serve

from cellplane.config import Config, validate

from .app import checked, ingress_of
from .deployment import ServeConfig
from .router import start_router, told


class Declared(Config):
    """Everything that is to be served."""

    models: Annotated[tuple[ServeConfig, ...], Field(min_length=1)]
    """One entry a model; the first decides about limits, keys and receiving processes."""


def build(args: dict[str, Any]) -> serve.Application:
    """Brings up what is declared, takes down what is not, and returns the receiving application.

    Serve calls it on the cluster, at every deployment. Raises ConfigError for wrong keys of a model or an open address
    without API keys, and what `Router.put` raises; then Serve says DEPLOY_FAILED with the reason, and what answered goes on.
    """
    declared = validate(Declared, args, "args of the application")
    configs = [checked(config) for config in declared.models]
    router = start_router()
    for config in configs:
        told(router.put.remote(config), None)
    for name in set(told(router.table.remote(), None).models) - {config.name for config in configs}:
        told(router.remove.remote(name), None)
    return ingress_of(configs[0])
