"""`cellplane serve`: put a model behind HTTP on the running stack."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, say


def serve(
    model: Annotated[str | None, typer.Argument(help="Model folder or models:/NAME@ALIAS.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the paths; default: the registered or the folder's name.")] = None,
    config: ConfigOption = "local",
    override: Overrides = None,
    stop: Annotated[bool, typer.Option("--stop", help="Take the endpoint down instead; with --name only that model.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a model on the stack that `cellplane up` started (or at $RAY_ADDRESS)."""
    from cellplane.cluster import local_ray, running
    from cellplane.config import load_config
    from cellplane.errors import ServiceError
    from cellplane.serve.app import deploy, undeploy
    from cellplane.serve.deployment import ServeConfig

    changes = list(override or [])
    if model is not None:
        guess = re.sub(r"[^a-z0-9._-]", "-", model.removeprefix("models:/").split("@")[0].rstrip("/").split("/")[-1].lower())
        changes = [*given({"model": model, "name": name or guess}), *changes]
    stack = running()
    if stack is not None:
        changes = [*given({"port": stack.serve_port, "tracking_uri": stack.mlflow_uri}), *changes]
    elif "RAY_ADDRESS" not in os.environ:
        raise ServiceError("there is no Ray to serve on: start the local stack with `cellplane up`, or set RAY_ADDRESS")
    with local_ray(log_to_driver=False):
        if stop:
            undeploy(name)
            answer({name or "endpoint": "stopped"}, as_json)
            return
        loaded = load_config(ServeConfig, config, "serve", changes)
        say(f"starting {loaded.model} ...")
        deployed = deploy(loaded)
    answer({"url": deployed.url, "model": deployed.model, "version": deployed.version, "docs": f"{deployed.url}/docs"}, as_json)
