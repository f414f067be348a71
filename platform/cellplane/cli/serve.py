"""`cellplane serve`: put a model behind HTTP on the running stack."""

from __future__ import annotations

import os
import re
from pathlib import Path
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
    """Put a model behind HTTP. On the stack that `cellplane up` started, or at $RAY_ADDRESS."""
    from cellplane.cluster import local_ray, running
    from cellplane.config import load_config
    from cellplane.errors import ServiceError
    from cellplane.serve.app import deploy, undeploy
    from cellplane.serve.deployment import ServeConfig

    changes = list(override or [])
    if model is not None:
        changes = [*given({"model": model, "name": name or usual_name(model)}), *changes]
    loaded = load_config(ServeConfig, config, "serve", changes)  # a wrong key is told before anything is started
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
        loaded = load_config(ServeConfig, config, "serve", changes)  # now with the stack's addresses
        say(f"starting {loaded.model} ...")
        deployed = deploy(loaded)
    answer({"url": deployed.url, "model": deployed.model, "version": deployed.version, "docs": f"{deployed.url}/docs"}, as_json)


def usual_name(model: str) -> str:
    """What a model is called in the paths: its name in the registry, or its folder's (the run's, for RUN/model)."""
    if model.startswith("models:/"):
        said = model.removeprefix("models:/").partition("@")[0].partition("/")[0]
    else:
        folder = Path(model).absolute()
        said = folder.parent.name if folder.name == "model" else folder.name
    return re.sub(r"[^a-z0-9._-]", "-", said.lower())
