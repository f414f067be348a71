"""Versions are distinct and complete, aliases move in one step, and a model comes back byte for byte."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cellplane.errors import ConfigError, IntegrityError, ServiceError
from cellplane.tracking import registry
from cellplane.tracking.registry import list_models, promote, register, resolve_model, set_alias
from cellplane.tracking.runs import RunSpec, TrackedRun, connect

Folder = Callable[[str], Path]
Logger = Callable[[str, Path], str]
NAME = "cellplm-annotate-toy"


@pytest.fixture
def registered(tracker: str, model_folder: Folder, logged_run: Logger) -> Callable[[str], int]:
    """Makes, logs and registers a model of this content."""

    def make(content: str) -> int:
        folder = model_folder(content)
        return register(folder, logged_run(tracker, folder), NAME, tracker)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_registered_model_comes_back_byte_for_byte(tracker: str, tmp_path: Path, model_folder: Folder, logged_run: Logger) -> None:
    folder = model_folder("a")
    run_id = logged_run(tracker, folder)
    version = register(folder, run_id, NAME, tracker, tags={"data": "toy"})
    set_alias(NAME, "champion", version, tracker)
    for uri in (f"models:/{NAME}@champion", f"models:/{NAME}/{version}"):
        found = resolve_model(uri, tracker, tmp_path / "cache")
        assert contents(found.path) == contents(folder)
        assert (found.name, found.version, found.run_id) == (NAME, 1, run_id)
    entry = list_models(tracker)[0]
    assert (entry.version, entry.aliases, entry.run_id) == (1, ("champion",), run_id)
    assert entry.description == "# Card of a\n"
    assert entry.tags["cellplane.data"] == "toy"


def test_the_same_model_is_registered_once(tracker: str, model_folder: Folder, logged_run: Logger) -> None:
    folder = model_folder("a")
    run_id = logged_run(tracker, folder)
    assert [register(folder, run_id, NAME, tracker) for _ in range(3)] == [1, 1, 1]
    assert register(folder, run_id, "another-name", tracker) == 1
    assert len(list_models(tracker)) == 2


def test_registering_at_once_from_six_threads_gives_distinct_versions(tracker: str, model_folder: Folder, logged_run: Logger) -> None:
    folders = [[model_folder(f"t{thread}-{number}") for number in range(5)] for thread in range(6)]
    versions: list[int] = []
    errors: list[BaseException] = []

    def work(mine: list[Path]) -> None:
        try:
            for folder in mine:
                versions.append(register(folder, logged_run(tracker, folder), NAME, tracker))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(mine,)) for mine in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert errors == []
    assert sorted(versions) == list(range(1, 31))


def test_promotion_moves_the_champion_and_remembers_it(tracker: str, registered: Callable[[str], int]) -> None:
    one, two = registered("a"), registered("b")
    assert promote(NAME, one, tracker) is None
    assert promote(NAME, two, tracker) == one
    assert promote(NAME, two, tracker) == one
    model = connect(tracker).get_registered_model(NAME)
    assert {alias: int(version) for alias, version in model.aliases.items()} == {"champion": two, "previous": one}
    history = registry.promotions(model.tags)
    assert [(entry["from"], entry["version"]) for entry in history] == [(None, one), (one, two)]
    assert promote(NAME, one, tracker) == two


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "-a", "%2e%2e", "x" * 65, "a b", "a\n"])
def test_bad_names_are_refused(tracker: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        set_alias(name, "champion", 1, tracker)
    with pytest.raises(ConfigError):
        resolve_model(f"models:/{name}/1", tracker, tmp_path)


@pytest.mark.parametrize("rest", ["", "/0", "/-1", "/latest", "/1e9", "@", "@../x", "/1/2", "/" + "9" * 40])
def test_bad_versions_and_aliases_are_refused(tracker: str, tmp_path: Path, rest: str) -> None:
    with pytest.raises(ConfigError, match="models:/NAME"):
        resolve_model(f"models:/{NAME}{rest}", tracker, tmp_path)


def test_an_unknown_model_version_or_alias_names_those_there_are(tracker: str, tmp_path: Path, registered: Callable[[str], int]) -> None:
    promote(NAME, registered("a"), tracker)
    cases = {"nobody/1": NAME, f"{NAME}/7": "its versions: 1", f"{NAME}@best": "its aliases: champion"}
    for name, expected in cases.items():
        with pytest.raises(ConfigError, match=expected):
            resolve_model(f"models:/{name}", tracker, tmp_path / "cache")
    with pytest.raises(ConfigError, match="its versions: 1"):
        promote(NAME, 9, tracker)
    with pytest.raises(ConfigError, match="reserved"):
        set_alias(NAME, "latest", 1, tracker)


def test_a_plain_folder_is_its_own_answer(tmp_path: Path, model_folder: Folder) -> None:
    folder = model_folder("a")
    found = resolve_model(folder, None, tmp_path / "cache")
    assert (found.path, found.version, found.run_id) == (folder.resolve(), None, None)
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS"):
        resolve_model(tmp_path / "nothing", None, tmp_path / "cache")


def test_a_second_resolve_downloads_nothing(tracker: str, tmp_path: Path, registered: Callable[[str], int]) -> None:
    registered("a")
    first = resolve_model(f"models:/{NAME}/1", tracker, tmp_path / "cache")
    shutil.rmtree(tmp_path / "artifacts")
    assert resolve_model(f"models:/{NAME}/1", tracker, tmp_path / "cache") == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.path.name]


def test_a_damaged_cached_copy_is_fetched_again(tracker: str, tmp_path: Path, registered: Callable[[str], int]) -> None:
    registered("a")
    first = resolve_model(f"models:/{NAME}/1", tracker, tmp_path / "cache")
    good = contents(first.path)
    weights = bytearray((first.path / "model.safetensors").read_bytes())
    weights[17] ^= 1
    (first.path / "model.safetensors").write_bytes(weights)
    assert contents(resolve_model(f"models:/{NAME}/1", tracker, tmp_path / "cache").path) == good


def test_a_model_damaged_in_the_registry_is_refused_by_file_name(tracker: str, tmp_path: Path, registered: Callable[[str], int]) -> None:
    registered("a")
    stored = next((tmp_path / "artifacts").rglob("model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        resolve_model(f"models:/{NAME}/1", tracker, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_run_without_the_whole_folder_is_not_registered(tracker: str, tmp_path: Path, model_folder: Folder, logged_run: Logger) -> None:
    folder = model_folder("a")
    empty = TrackedRun.open(RunSpec(run_key="empty", experiment="cellplane/finetune/annotate", name="empty"), tracker)
    with pytest.raises(ConfigError, match="no artifacts"):
        register(folder, empty.run_id, NAME, tracker)
    run_id = logged_run(tracker, folder)
    next((tmp_path / "artifacts").rglob("model.safetensors")).write_bytes(b"cut")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        register(folder, run_id, NAME, tracker)
    with pytest.raises(ConfigError, match="no run"):
        register(folder, "0" * 32, NAME, tracker)
    assert list_models(tracker) == []


def test_a_folder_without_a_manifest_is_not_a_model(tracker: str, tmp_path: Path) -> None:
    (tmp_path / "junk").mkdir()
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        register(tmp_path / "junk", "0" * 32, NAME, tracker)


def test_a_long_card_is_shortened_not_refused(tracker: str, model_folder: Folder, logged_run: Logger) -> None:
    folder = model_folder("a")
    (folder / "README.md").write_text("word " * 5000, encoding="utf-8")
    register(folder, logged_run(tracker, folder), NAME, tracker)
    assert len(list_models(tracker)[0].description) <= registry.MAX_DESCRIPTION


def test_a_dead_tracker_is_a_service_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        resolve_model(f"models:/{NAME}@champion", "http://127.0.0.1:1", tmp_path / "cache")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "cache").exists()


def test_everything_works_through_a_server_too(server, tmp_path: Path, model_folder: Folder, logged_run: Logger) -> None:  # type: ignore[no-untyped-def]
    server.start()
    folder = model_folder("a")
    version = register(folder, logged_run(server.uri, folder), NAME, server.uri)
    promote(NAME, version, server.uri)
    found = resolve_model(f"models:/{NAME}@champion", server.uri, tmp_path / "cache")
    assert contents(found.path) == contents(folder)
    with pytest.raises(ConfigError, match="its aliases: champion"):
        resolve_model(f"models:/{NAME}@best", server.uri, tmp_path / "cache")
    with pytest.raises(ConfigError, match="there are: " + NAME):
        resolve_model("models:/nobody@best", server.uri, tmp_path / "cache")


def test_a_run_folder_is_told_from_the_model_in_it(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"folder of a run and not a model.*name .*run/model"):
        resolve_model(tmp_path / "run", None, tmp_path / "cache")
    assert resolve_model(tmp_path / "run" / "model", None, tmp_path / "cache").path == tmp_path / "run" / "model"
