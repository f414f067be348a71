"""Every shipped serving configuration means what it says, and what cannot be meant is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellplane.config import configs_root, load_config
from cellplane.errors import ConfigError
from serve.app import _even_share, _with_keys
from serve.deployment import ServeConfig
from serve.security import new_key
from serve.stage import copies

SHIPPED = sorted(path.stem for path in (configs_root() / "serve").glob("*.yaml"))


def test_these_are_shipped() -> None:
    assert SHIPPED == ["autoscaling", "gpu", "local", "team"]


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads_and_serves_a_folder_as_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CELLPLANE_API_KEYS_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    config = load_config(ServeConfig, name, "serve", ["model=folder"])
    assert config.model == "folder"
    most = config.most_replicas * config.max_ongoing_requests + config.max_queued_requests
    assert config.limits().max_in_flight == -(-most // config.ingress_replicas), "each process counts its part"


def test_copies_come_and_go_between_two_numbers() -> None:
    config = load_config(ServeConfig, "autoscaling", "serve", [])
    scaling = copies(config)["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 4)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (5, 120)
    assert copies(load_config(ServeConfig, "local", "serve", [])) == {"num_replicas": 1}


def test_a_gpu_is_shared_and_computes_in_bfloat16() -> None:
    config = load_config(ServeConfig, "gpu", "serve", [])
    assert (config.num_gpus * config.replicas, config.dtype) == (1, "bfloat16")


def test_a_team_is_open_only_with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELLPLANE_API_KEYS_FILE", raising=False)
    with pytest.raises(ConfigError, match="api_keys_file"):
        _with_keys(load_config(ServeConfig, "team", "serve", []))
    (tmp_path / "keys").write_text(new_key("lab")[1])
    monkeypatch.setenv("CELLPLANE_API_KEYS_FILE", str(tmp_path / "keys"))
    config = _with_keys(load_config(ServeConfig, "team", "serve", []))
    assert config.api_keys_file == tmp_path / "keys"
    assert (config.ingress_replicas, config.limits().requests_per_minute) == (2, 300), "each of two counts half"


def test_no_node_has_all_processes_that_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    team, lost = load_config(ServeConfig, "team", "serve", []), {"Alive": False}
    assert (team.proxies, team.ingress_replicas) == ("every_node", 2)
    monkeypatch.setattr("serve.app.ray.is_initialized", lambda: True)
    for nodes, share in ((1, 2), (2, 1), (3, 1)):
        monkeypatch.setattr("serve.app.ray.nodes", lambda living=nodes: [*[{"Alive": True}] * living, lost])
        assert _even_share(team) == share
    assert _even_share(load_config(ServeConfig, "local", "serve", [])) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("max_replicas=1", "less than replicas"),
        ("num_gpus=-1", "num_gpus"),
        ("dtype=float16", "bfloat16"),
        ("ingress_replicas=0", "ingress"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(ServeConfig, "local", "serve", ["replicas=2", change])
