"""The router against a real registry, with a stage that starts anything at once: what it does when aliases move."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cellplane.artifact.folder import load_model, save_model
from cellplane.errors import ConfigError, IntegrityError, ServiceError
from cellplane.tracking.registry import list_models, promote, register, set_alias
from cellplane.tracking.runs import RunSpec, TrackedRun, connect, local_uri
from serve import router as router_module
from serve.deployment import ServeConfig
from serve.router import Router
from serve.routes import Table, Version
from tests.serve.test_rollout import Diary

NAME, SERVED = "registered", "m"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """A folder with a registry of four versions; the fourth has a flipped bit."""
    folder = tmp_path_factory.mktemp("router-registry")
    good = load_model(model_path)
    for number in range(1, 5):
        weights = {name: tensor + 0.01 * number for name, tensor in good.weights.items() if tensor.is_floating_point()}
        path = save_model(replace(good, weights={**good.weights, **weights}), folder / f"v{number}")
        run = TrackedRun.open(RunSpec(run_key=f"v{number}", experiment="tests", name=f"v{number}"), local_uri(folder))
        run.log_artifacts(path, "model")
        assert register(path, run.run_id, NAME, local_uri(folder)) == number
        run.finish()
    stored = next(file for file in folder.rglob("weights.safetensors") if run.run_id in str(file))
    content = bytearray(stored.read_bytes())
    content[-5] ^= 1
    stored.write_bytes(content)
    return folder


@pytest.fixture
def uri(filled: Path, tmp_path: Path) -> str:
    """A copy of the registry in which nothing was promoted yet."""
    (tmp_path / "mlflow.db").write_bytes((filled / "mlflow.db").read_bytes())
    return local_uri(tmp_path)


@pytest.fixture
def diary() -> Diary:
    return Diary()


@pytest.fixture
def router(tmp_path: Path, diary: Diary) -> Router:
    return Router(tmp_path, tmp_path / "cache", diary)


@pytest.fixture
def config(uri: str) -> Callable[..., ServeConfig]:
    return lambda model=f"models:/{NAME}@champion", **changes: ServeConfig(
        name=SERVED, model=model, tracking_uri=uri, **{"registry_poll_s": 0.05, **changes}
    )


def pointing(router: Router) -> dict[str, str]:
    model = router.table().models.get(SERVED)
    return dict(model.aliases) if model else {}


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_champion_is_served_and_every_move_of_the_alias_is_followed(
    router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary
) -> None:
    promote(NAME, 1, uri)
    assert router.put(config()) == "1"
    promote(NAME, 2, uri)
    until(lambda: pointing(router) == {"champion": "2", "previous": "1"})
    before = [event for event in diary.events if event.startswith("start")]
    promote(NAME, 1, uri)
    until(lambda: pointing(router) == {"champion": "1", "previous": "2"})
    assert [event for event in diary.events if event.startswith("start")] == before, "going back starts nothing"
    set_alias(NAME, "challenger", 3, uri)
    until(lambda: pointing(router).get("challenger") == "3")
    connect(uri).delete_registered_model_alias(NAME, "challenger")
    until(lambda: "challenger" not in pointing(router))
    until(lambda: "stop 3" in diary.events)


def test_a_broken_version_is_told_about_in_the_registry_and_not_tried_again(
    router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary
) -> None:
    promote(NAME, 1, uri)
    router.put(config())
    diary.broken = {"2": "check"}
    for broken, words in ((2, "other answers"), (4, "weights.safetensors")):
        promote(NAME, broken, uri)
        until(lambda version=broken: router.table().models[SERVED].versions.get(str(version), Version("", "")).state == "failed")
        until(
            lambda version=broken: any(
                m.tags.get("cellplane.serving", "").startswith("failed") for m in list_models(uri) if m.version == version
            )
        )
        (tag,) = [model.tags["cellplane.serving"] for model in list_models(uri) if model.version == broken]
        assert tag.startswith("failed")
        assert words in tag
        assert words in router.table().models[SERVED].versions[str(broken)].reason
        assert pointing(router)["champion"] == "1"
    time.sleep(0.3)
    assert diary.events.count("start 2") == 1


def test_a_broken_version_is_not_tried_again_when_it_becomes_the_previous_one(
    router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary
) -> None:
    promote(NAME, 1, uri)
    router.put(config())
    diary.broken = {"2": "check"}
    promote(NAME, 2, uri)
    until(lambda: router.table().models[SERVED].versions.get("2", Version("", "")).state == "failed")
    set_alias(NAME, "previous", 2, uri)  # the first of a promotion's two steps
    time.sleep(0.3)
    set_alias(NAME, "champion", 3, uri)
    until(lambda: pointing(router).get("champion") == "3")
    time.sleep(0.3)
    assert diary.events.count("start 2") == 1
    assert "start 3" in diary.events
    diary.broken = {}
    promote(NAME, 2, uri)  # mended, and asked for by name
    until(lambda: pointing(router).get("champion") == "2")


def test_a_broken_challenger_is_tried_once(router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary) -> None:
    promote(NAME, 1, uri)
    set_alias(NAME, "challenger", 2, uri)
    diary.broken = {"2": "check"}
    assert router.put(config()) == "1"
    time.sleep(0.3)
    assert diary.events.count("start 2") == 1


def test_between_the_two_steps_of_a_promotion_nothing_is_lost(
    router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary
) -> None:
    """`previous` is set to the champion first: who looks then must not forget the version that going back would need."""
    promote(NAME, 1, uri)
    router.put(config())
    promote(NAME, 2, uri)
    until(lambda: pointing(router) == {"champion": "2", "previous": "1"})
    set_alias(NAME, "previous", 2, uri)
    time.sleep(0.3)
    assert pointing(router) == {"champion": "2", "previous": "1"}
    assert "stop 1" not in diary.events
    set_alias(NAME, "champion", 1, uri)
    until(lambda: pointing(router) == {"champion": "1", "previous": "2"})
    assert diary.events.count("start 1") == 1


def test_a_challenger_that_is_promoted_leaves_nothing_loaded_that_nobody_asks(
    router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary
) -> None:
    promote(NAME, 1, uri)
    promote(NAME, 2, uri)
    set_alias(NAME, "challenger", 3, uri)
    router.put(config())
    assert pointing(router) == {"champion": "2", "previous": "1", "challenger": "3"}
    promote(NAME, 3, uri)
    until(lambda: pointing(router).get("champion") == "3")
    until(lambda: "stop 1" in diary.events)


def test_the_previous_version_is_loaded_too_unless_memory_is_dear(
    tmp_path: Path, config: Callable[..., ServeConfig], uri: str, diary: Diary
) -> None:
    promote(NAME, 1, uri)
    promote(NAME, 2, uri)
    (tmp_path / "poor").mkdir()
    rich, poor = Router(tmp_path, tmp_path / "cache", diary), Router(tmp_path / "poor", tmp_path / "cache", Diary())
    rich.put(config())
    assert pointing(rich) == {"champion": "2", "previous": "1"}
    assert diary.events[:2] == ["start 2", "check 2"], "the champion comes first"
    poor.put(config(keep_previous=False))
    assert pointing(poor) == {"champion": "2"}


def test_shares_and_shadows_come_from_the_configuration(router: Router, config: Callable[..., ServeConfig], uri: str) -> None:
    promote(NAME, 1, uri)
    set_alias(NAME, "challenger", 2, uri)
    router.put(config(challenger_share=0.25, shadow=True))
    model = router.table().models[SERVED]
    assert (model.challenger_share, model.shadow, model.aliases["challenger"]) == (0.25, "2", "2")
    router.put(config())
    model = router.table().models[SERVED]
    assert (model.challenger_share, model.shadow) == (0.0, None)


def test_a_fixed_version_a_folder_and_another_alias_are_served_as_they_are(
    router: Router, config: Callable[..., ServeConfig], uri: str, model_path: Path
) -> None:
    assert router.put(config(f"models:/{NAME}/3")) == "3"
    promote(NAME, 1, uri)
    time.sleep(0.2)
    assert pointing(router)["champion"] == "3", "a fixed version does not follow"
    label = router.put(config(str(model_path)))
    assert label == load_model(model_path).model_sha256[:12]
    assert pointing(router) == {"champion": label, "previous": "3"}
    set_alias(NAME, "staging", 2, uri)
    assert router.put(config(f"models:/{NAME}@staging")) == "2"
    assert pointing(router)["staging"] == "2"
    set_alias(NAME, "staging", 1, uri)
    until(lambda: pointing(router)["staging"] == pointing(router)["champion"] == "1")


def test_what_cannot_be_served_leaves_no_trace(router: Router, config: Callable[..., ServeConfig], uri: str, diary: Diary) -> None:
    with pytest.raises(ConfigError, match="models promote"):
        router.put(config())
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        router.put(config(f"models:/{NAME}/4"))
    diary.broken = {"1": "start"}
    with pytest.raises(IntegrityError, match="damaged"):
        router.put(config(f"models:/{NAME}/1"))
    assert router.table().models == {}
    diary.broken = {}
    assert router.put(config(f"models:/{NAME}/1")) == "1"
    diary.broken = {"2": "check"}
    with pytest.raises(IntegrityError):
        router.put(config(f"models:/{NAME}/2"))
    assert pointing(router) == {"champion": "1"}
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS"):
        router.put(config(f"models:/{NAME}"))
    with pytest.raises(ConfigError, match="no version 99"):
        router.put(config(f"models:/{NAME}/99"))
    assert "99" not in router.table().models[SERVED].versions
    router.remove(SERVED)
    with pytest.raises(ConfigError, match="not served"):
        router.remove(SERVED)


def test_an_ingress_hears_of_a_change_at_once(router: Router, config: Callable[..., ServeConfig], uri: str) -> None:
    promote(NAME, 1, uri)
    epoch, heard = router.table().epoch, list[float]()

    def wait() -> None:
        assert router.changed(epoch, 10).epoch > epoch
        heard.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    waiting.start()
    began = time.monotonic()
    router.put(config())
    waiting.join()
    assert heard[0] <= time.monotonic()
    assert heard[0] - began < 9
    assert router.changed(router.table().epoch, 0.01) == router.table()


def written(path: Path) -> dict[str, str]:
    """The aliases of the one model in a router's own file."""
    (model,) = Table.from_json(json.loads(path.read_text(encoding="utf-8"))["table"]).models.values()
    return dict(model.aliases)


def test_a_router_that_comes_back_goes_on_where_it_was(
    router: Router, config: Callable[..., ServeConfig], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(NAME, 1, uri)
    router.put(config())
    promote(NAME, 2, uri)
    until(lambda: pointing(router) == {"champion": "2", "previous": "1"})
    until(lambda: written(tmp_path / "routes.json") == {"champion": "2", "previous": "1"})
    assert (tmp_path / "routes.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "routes.json").write_bytes((tmp_path / "routes.json").read_bytes())
    assert Router(tmp_path / "again", tmp_path / "cache", Diary()).table().models == {}, "a new endpoint begins with nothing"
    monkeypatch.setattr(router_module, "_came_back", lambda: True)
    diary = Diary()
    again = Router(tmp_path / "again", tmp_path / "cache", diary)
    assert pointing(again) == {"champion": "2", "previous": "1"}
    promote(NAME, 3, uri)
    until(lambda: pointing(again) == {"champion": "3", "previous": "2"})
    assert [event for event in diary.events if event.startswith("start")] == ["start 3"]


def test_a_registry_that_is_away_changes_nothing_until_it_is_back(
    router: Router, config: Callable[..., ServeConfig], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(NAME, 1, uri)
    router.put(config())

    def away(*_: object) -> dict[str, int]:
        raise ServiceError("the tracker cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(router_module, "aliases_of", away)
        promote(NAME, 2, uri)
        time.sleep(0.3)
        assert pointing(router) == {"champion": "1"}
        with pytest.raises(ServiceError, match="cannot be reached"):
            router.put(config())
        assert pointing(router) == {"champion": "1"}
    until(lambda: pointing(router) == {"champion": "2", "previous": "1"})
