"""Serve brings up what a RayService declares, follows a changed list, and refuses an open address without keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cellplane.artifact.folder import load_model, save_model
from cellplane.errors import ConfigError
from cellplane.kubernetes import KubernetesConfig, render
from serve.app import undeploy
from serve.declared import build

PORT = 18431


def test_the_shipped_declaration_is_one_that_serve_accepts() -> None:
    from ray.serve.schema import ServeDeploySchema

    manifest = next(iter(yaml.safe_load_all(render(KubernetesConfig())["rayservice"])))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert [application.name for application in schema.applications] == ["cellplane"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "models"),
        ({"models": []}, "models"),
        ({"models": [{"name": "tiny", "model": "folder", "replica": 2}]}, "replica"),
        ({"models": [{"name": "tiny", "model": "folder", "host": "0.0.0.0"}]}, "api_keys_file"),
    ],
)
def test_a_wrong_declaration_is_refused_before_anything_starts(args: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELLPLANE_API_KEYS_FILE", raising=False)
    with pytest.raises(ConfigError, match=told):
        build(args)


@pytest.fixture
def declare(ray_cluster: None) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Deploys a declaration as the operator does, and waits for it."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})

    def deploy(models: list[dict[str, Any]]) -> None:
        application = {"name": "cellplane", "import_path": "serve.declared:build", "route_prefix": "/", "args": {"models": models}}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        deadline = time.monotonic() + 240
        while True:
            status = serve.status().applications["cellplane"]
            if status.status == "RUNNING":
                return
            assert status.status != "DEPLOY_FAILED", status.message
            assert time.monotonic() < deadline, status
            time.sleep(0.2)

    yield deploy
    undeploy()


def served() -> set[str]:
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60, trust_env=False) as http:
        return {model["name"] for model in http.get("/v1/models").json()["models"]}


@pytest.mark.cluster
def test_a_declared_list_is_served_and_a_new_one_followed(
    declare: Callable[[list[dict[str, Any]]], None], model_path: Path, tmp_path: Path
) -> None:
    first = {"name": "tiny", "model": str(model_path), "num_cpus": 0, "port": PORT}
    second = {**first, "name": "other", "model": str(save_model(load_model(model_path), tmp_path / "other"))}
    declare([first])
    assert served() == {"tiny"}
    declare([first, second])
    assert served() == {"tiny", "other"}
    declare([second])
    assert served() == {"other"}
