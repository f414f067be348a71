"""The model registry: versions of model folders, the aliases that point at them, and the way back to a local folder.

A model folder (manifest.json, safetensors, README.md) is logged as artifacts of its run and registered by the run's
address; MLflow stores and names it but never loads it, so nothing of a model is ever unpickled. Aliases move in one
step: `champion` is what serves, `previous` is what served before.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellplane.config import home
from cellplane.errors import ConfigError, IntegrityError, StorageError
from cellplane.tracking.runs import connect, resolve_uri, tag_key, tracker_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, PREVIOUS = "champion", "previous"
SHA_TAG = "cellplane.model_sha256"
HISTORY_TAG = "cellplane.promotions"
ARTIFACT_PATH = "model"  # where in a run's artifacts its model folder lies
NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
MAX_DESCRIPTION = 5000  # width of the description column in MLflow's database
MAX_HISTORY = 100  # promotions kept in the history tag
ATTEMPTS = 8  # tries for the next version number when others register at the same moment


@dataclass(frozen=True)
class ModelVersion:
    """One registered version; ``created_ms`` in milliseconds since 1970, ``description`` is the model card."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str | None
    created_ms: int
    model_sha256: str | None
    description: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class ResolvedModel:
    """A model folder on this machine; ``version`` and ``run_id`` are None for a plain folder."""

    path: Path
    name: str
    version: int | None = None
    run_id: str | None = None


def register(folder: Path, run_id: str, name: str, uri: str | None = None, tags: Mapping[str, object] | None = None) -> int:
    """The version number of the model in ``folder``, which must already be logged as the run's artifacts "model".

    Registering the same model (by its sha256) under the same name again returns the version it has. The folder's
    README.md becomes the description. Raises ConfigError for a bad name or when the run lacks the folder,
    IntegrityError when the run's copy is incomplete or another model.
    """
    sha256 = _manifest(folder)["model_sha256"]
    address, client = _open(_checked(name, "model name"), uri)
    with tracker_errors(address):
        if known := _version_of(client, name, sha256):
            return known
        _check_logged(client, run_id, folder)
        _ensure_model(client, name)
        labels = {tag_key(key): str(value) for key, value in (tags or {}).items()} | {SHA_TAG: sha256}
        return _create_version(client, name, run_id, labels, _card(folder))


def set_alias(name: str, alias: str, version: int, uri: str | None = None) -> None:
    """Point ``alias`` at a version; ConfigError names the versions there are."""
    _checked(alias, "alias")
    if alias == "latest" or re.fullmatch(r"v\d+", alias):
        raise ConfigError(f"alias {alias!r} is reserved by MLflow; choose a word such as {CHAMPION}")
    address, client = _open(name, uri)
    with tracker_errors(address):
        _ready_version(client, name, version)
        client.set_registered_model_alias(name, alias, str(version))


def promote(name: str, version: int, uri: str | None = None, note: Mapping[str, object] | None = None) -> int | None:
    """Make ``version`` the champion and the champion until now `previous`; returns the latter, None when there was none.

    Promoting the champion again changes nothing. Every change is added to the model's history tag, with ``note`` (see
    `promotion` for who and why). A crash between the steps leaves the old champion in place.
    """
    address, client = _open(name, uri)
    with tracker_errors(address):
        _ready_version(client, name, version)
        model = client.get_registered_model(name)
        champion = model.aliases.get(CHAMPION)
        if champion is not None and int(champion) == version:
            return int(model.aliases[PREVIOUS]) if PREVIOUS in model.aliases else None
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, str(champion))
        client.set_registered_model_alias(name, CHAMPION, str(version))
        before = None if champion is None else int(champion)
        entry = {"version": version, "from": before, "time_ms": int(time.time() * 1000), **(note or {})}
        client.set_registered_model_tag(name, HISTORY_TAG, json.dumps([*promotions(model.tags), entry][-MAX_HISTORY:]))
        return before


def aliases_of(name: str, uri: str | None = None) -> dict[str, int]:
    """The version each alias of a model points at."""
    address, client = _open(name, uri)
    with tracker_errors(address):
        return {alias: int(version) for alias, version in _known_model(client, name).aliases.items()}


def history_of(name: str, uri: str | None = None) -> list[dict[str, Any]]:
    """Every promotion of a model, oldest first: version, from, time_ms, and who and why where that is known."""
    address, client = _open(name, uri)
    with tracker_errors(address):
        return promotions(_known_model(client, name).tags)


def scores_of(name: str, version: int, uri: str | None = None) -> dict[str, float]:
    """Held-out scores of the version's run by "method/metric", e.g. "cellplm/macro_f1"; empty when its run has none."""
    address, client = _open(name, uri)
    with tracker_errors(address):
        found = _ready_version(client, name, version)
        metrics = client.get_run(found.run_id).data.metrics if found.run_id else {}
    return {key.removeprefix("test/"): float(value) for key, value in metrics.items() if key.startswith("test/")}


def tag_version(name: str, version: int, key: str, value: str, uri: str | None = None) -> None:
    """Write one of our tags on a version, e.g. why it does not serve."""
    address, client = _open(name, uri)
    with tracker_errors(address):
        client.set_model_version_tag(name, str(version), tag_key(key), value[:MAX_DESCRIPTION])


def promotions(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """The history in a registered model's tags, oldest first: version, from, time_ms."""
    with suppress(ValueError):
        found = json.loads(tags.get(HISTORY_TAG, "[]"))
        if isinstance(found, list):
            return found
    return []


def list_models(uri: str | None = None) -> list[ModelVersion]:
    """Every version of every model, newest first within its name."""
    address, client = _open(None, uri)
    with tracker_errors(address):
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _pages(client.search_registered_models):
            for alias, version in model.aliases.items():
                aliases.setdefault((model.name, int(version)), []).append(alias)
        found = [_entry(item, aliases.get((item.name, int(item.version)), [])) for item in _pages(client.search_model_versions)]
    return sorted(found, key=lambda item: (item.name, -item.version))


def resolve_model(uri: str | Path, tracking_uri: str | None, cache: Path) -> ResolvedModel:
    """The local folder of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder path.

    A registered version is downloaded once into ``cache``, under its sha256, checked file by file and moved there in
    one step; a copy damaged since is fetched again. Raises ConfigError when there is no such folder, model, version
    or alias (naming those there are), ServiceError when the tracker is away, IntegrityError when the registry's own
    copy is damaged.
    """
    text = str(uri)
    if not text.startswith("models:"):
        return _plain_folder(Path(uri))
    name, alias, number = registered(text)
    address, client = _open(name, tracking_uri)
    with tracker_errors(address):
        version = int(number) if number else _version_by_alias(client, name, alias)
        found = _ready_version(client, name, version)
        sha256 = found.tags.get(SHA_TAG)
        target = cache / (sha256 if sha256 and re.fullmatch(r"[0-9a-f]{64}", sha256) else f"{name}-{version}")
        if not _is_intact(target, sha256):
            _download(found, address, target, sha256)
    return ResolvedModel(target, name, version, found.run_id or None)


def registered(text: str) -> tuple[str, str, str]:
    """Name, alias and version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, one of them empty; ConfigError for another form."""
    match = re.fullmatch(rf"models:/({NAME})(?:@({NAME})|/([1-9]\d{{0,8}}))", text)
    if match is None:
        raise ConfigError(f"model {text[:200]!r} is not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    return match[1], match[2] or "", match[3] or ""


def _plain_folder(path: Path) -> ResolvedModel:
    if not path.is_dir():
        example = f"models:/NAME@ALIAS or models:/NAME/VERSION, e.g. models:/{path.name}@champion"
        elsewhere = home().joinpath(*path.parts[1:]) if path.parts[:1] == (".cellplane",) else path
        if elsewhere.is_dir():
            raise ConfigError(f"no model folder at {path}: $CELLPLANE_HOME is {home()}, name {elsewhere}")
        raise ConfigError(f"no model folder at {path}; give a folder, or a registered model: {example}")
    inside, manifest = path / "model", "manifest.json"
    if (inside / manifest).is_file() and not (path / manifest).exists():
        raise ConfigError(f"{path} is the folder of a run and not a model; its model lies in it: name {inside}")
    return ResolvedModel(path.resolve(), path.resolve().name)


def _open(name: str | None, uri: str | None) -> tuple[str, MlflowClient]:
    if name is not None:
        _checked(name, "model name")
    address = resolve_uri(uri)
    return address, connect(address)


def _checked(name: str, what: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{what} {name[:80]!r} must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit")
    return name


def _pages(search: Any) -> Iterator[Any]:
    """Every result of a paged search."""
    token = None
    while True:
        page = search(page_token=token) if token else search()
        yield from page
        token = page.token
        if not token:
            return


def _entry(item: Any, aliases: list[str]) -> ModelVersion:
    return ModelVersion(
        name=item.name,
        version=int(item.version),
        aliases=tuple(sorted(aliases)),
        run_id=item.run_id or None,
        created_ms=int(item.creation_timestamp),
        model_sha256=item.tags.get(SHA_TAG),
        description=item.description or "",
        tags=dict(item.tags),
    )


def _version_of(client: MlflowClient, name: str, sha256: str) -> int | None:
    """The lowest version of this name that is this very model."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{SHA_TAG}` = '{sha256}'")
    return min((int(item.version) for item in found if item.status == "READY"), default=None)


def _check_logged(client: MlflowClient, run_id: str, folder: Path) -> None:
    """The run must hold every file of the folder at its full size before a version may point at it."""
    with _unknown_as(f"the tracker has no run {run_id!r}; log the model folder to the run first"):
        logged = {item.path: item.file_size for item in _walk(client, run_id, ARTIFACT_PATH)}
    wanted = {f"{ARTIFACT_PATH}/{path.relative_to(folder).as_posix()}": path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if not logged:
        raise ConfigError(f"run {run_id} has no artifacts under {ARTIFACT_PATH!r}; log the model folder there first")
    if wrong := sorted(path for path, size in wanted.items() if logged.get(path) not in (size, None) or path not in logged):
        raise IntegrityError(f"run {run_id} holds {wrong[0]!r} incompletely or not at all ({len(wrong)} such files); log the folder again")


def _walk(client: MlflowClient, run_id: str, path: str) -> Iterator[Any]:
    for item in client.list_artifacts(run_id, path):
        if item.is_dir:
            yield from _walk(client, run_id, item.path)
        else:
            yield item


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create_version(client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str], description: str) -> int:
    """Create the next version; the database picks the number, and two that pick the same one try again."""
    from mlflow.exceptions import MlflowException

    source = f"runs:/{run_id}/{ARTIFACT_PATH}"
    for attempt in range(ATTEMPTS):
        try:
            made = client.create_model_version(name, source, run_id, dict(tags), description=description, await_creation_for=0)
            return int(made.version)
        except MlflowException as error:
            if "Model Version creation error" not in str(error) or attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.05 * (attempt + 1))
    raise AssertionError("unreachable")


def _card(folder: Path) -> str:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 40] + "\n\n(shortened; see README.md)"


@contextmanager
def _unknown_as(message: str) -> Iterator[None]:
    """Turn "no such thing" of MLflow into a ConfigError; MLflow calls an unknown alias an invalid parameter."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ConfigError(message) from error
        raise


def _version_by_alias(client: MlflowClient, name: str, alias: str) -> int:
    known = _known_model(client, name).aliases
    if alias not in known:
        have = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"model {name!r} has no alias {alias!r}, its aliases: {have}; set one: cellplane models promote {name} VERSION")
    return int(known[alias])


def _known_model(client: MlflowClient, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(model.name for model in _pages(client.search_registered_models))
        raise ConfigError(f"no registered model {name!r}; there are: {', '.join(names) or 'none'}") from error


def _ready_version(client: MlflowClient, name: str, version: int) -> Any:
    _known_model(client, name)
    found = {int(item.version): item for item in client.search_model_versions(f"name = '{name}'")}
    if version not in found:
        have = ", ".join(str(number) for number in sorted(found)) or "none"
        raise ConfigError(f"model {name!r} has no version {version}; its versions: {have}")
    if found[version].status != "READY":
        raise ConfigError(f"version {version} of {name!r} is {found[version].status}, not READY; register it again")
    return found[version]


def _download(version: Any, address: str, target: Path, sha256: str | None) -> None:
    """Fetch into a neighbouring folder, check, then move into place; another process may win the race."""
    from mlflow.artifacts import download_artifacts

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
    try:
        fetched = download_artifacts(artifact_uri=version.source, dst_path=str(work), tracking_uri=address, registry_uri=address)
        _verify(Path(fetched), sha256, f"models:/{version.name}/{version.version}")
        _put(Path(fetched), target, sha256)
    except OSError as error:
        raise StorageError(f"cannot keep the model in {target.parent}: {error.strerror or error}; free some space") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(fetched: Path, target: Path, sha256: str | None) -> None:
    for _ in range(2):
        try:
            fetched.rename(target)
            return
        except OSError:
            if _is_intact(target, sha256):
                return
            shutil.rmtree(target, ignore_errors=True)  # a damaged copy
    fetched.rename(target)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(loaded, dict) or not re.fullmatch(r"[0-9a-f]{64}", str(loaded.get("model_sha256"))):
            raise ValueError("no model_sha256 of 64 hexadecimal digits")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder} is not a model folder: its manifest.json is missing or unreadable ({error})") from error
    return loaded


def _verify(folder: Path, sha256: str | None, where: str) -> None:
    """Raise IntegrityError naming the first file that is not what the manifest says."""
    manifest = _manifest(folder)
    if sha256 and manifest["model_sha256"] != sha256:
        raise IntegrityError(f"{where} holds another model than it was registered with; register the model again")
    for name, wanted in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != wanted["bytes"] or _sha256(path) != wanted["sha256"]:
            raise IntegrityError(f"{where}: {name} is missing or damaged; restore that artifact or register the model again")


def _is_intact(folder: Path, sha256: str | None) -> bool:
    if not folder.is_dir():
        return False
    try:
        _verify(folder, sha256, str(folder))
    except IntegrityError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
