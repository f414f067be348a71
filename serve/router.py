"""The router: one detached actor that owns which version answers, and follows the registry's aliases.

    registry alias moves -> roll out beside (see `rollout`) -> new table -> every ingress has it within milliseconds

Promoting in the registry is deploying. Each ingress waits for the next table (`changed`); what the router knows is
written down after every change, so that a router that is restarted goes on where it was, and requests never need it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cellplane.artifact.folder import verify_model
from cellplane.config import home
from cellplane.errors import CellplaneError, ConfigError, ServiceError, StorageError
from cellplane.processes import write_private
from cellplane.tracking.registry import aliases_of, registered, resolve_model, tag_version

from .deployment import ServeConfig
from .rollout import Rollouts, Stage
from .routes import CHALLENGER, CHAMPION, PREVIOUS, Table, Version
from .stage import ServeStage

log = logging.getLogger(__name__)

ROUTER, NAMESPACE = "cellplane-router", "cellplane"
CALLS_AT_ONCE = 64  # every ingress keeps one open
LABEL_DIGITS = 12  # of a plain folder's checksum
REGISTERED = "models:/"
SERVING_TAG = "serving"
IDLE_S = 0.5  # between looks while nothing follows the registry
RETRY_S = 30.0  # after the registry or the cluster failed us
ON_THE_HEAD = {"node:__internal_head__": 0.001}  # with the head everything is lost, with another node the router must not be


@dataclass(frozen=True)
class Handled:
    """What a model was last brought in line with: the address of the model of each alias, by the registry or as named."""

    config: ServeConfig
    addresses: Mapping[str, str]


class Router:
    """Answers calls in threads; `put` takes as long as a version takes to start, everything else no time."""

    def __init__(self, folder: Path, cache: Path, stage: Stage | None = None) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._state, self._cache, self._changed = folder / "routes.json", cache, threading.Condition()
        self._configs: dict[str, ServeConfig] = {}
        self._busy: dict[str, threading.Lock] = {}
        self._handled: dict[str, Handled] = {}
        self._damaged: set[tuple[str, str]] = set()  # models and addresses that failed for good: not tried again as somebody's `previous`
        self._rollouts = Rollouts(stage or ServeStage(lambda name: self._configs[name]), self._publish, self._first_table())
        threading.Thread(target=self._follow, daemon=True).start()

    def put(self, config: ServeConfig) -> str:
        """Serve what a configuration means, beside everything else; the label that answers to its name now.

        Raises what `resolve_model` raises, IntegrityError for a damaged model and ServiceError for one that does not
        start; then whatever answered before goes on.
        """
        name = config.name
        wanted = self._wanted(config)
        with self._lock_of(name):
            before = self._configs.get(name)
            self._configs[name], self._handled[name] = config, Handled(config, wanted)
            self._damaged -= {(name, address) for address in wanted.values()}
            try:
                self._bring(config, wanted)
            except CellplaneError:
                self._handled.pop(name, None)
                self._restore(name, before)
                raise
        return self.table().models[name].aliases[CHAMPION]

    def table(self) -> Table:
        """Who answers now."""
        return self._rollouts.table

    def changed(self, epoch: int, timeout_s: float) -> Table:
        """The table as soon as it is newer than ``epoch``, or as it is after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._rollouts.table.epoch > epoch, timeout_s)
            return self._rollouts.table

    def remove(self, name: str) -> None:
        """Take a model down, after the roll-out that may be in progress; ConfigError when it is not served."""
        with self._lock_of(name):
            config = self._configs.pop(name, None)  # nobody follows the registry for it any more
            try:
                self._rollouts.remove(name)
            except ConfigError:
                if config is not None:
                    self._configs[name] = config
                raise
            self._handled.pop(name, None)
            self._save()

    def _restore(self, name: str, before: ServeConfig | None) -> None:
        """After a failure: the configuration of before, and no trace of a model that never answered."""
        if before is not None:
            self._configs[name] = before
        elif (model := self.table().models.get(name)) is None or not model.aliases:
            if model is not None:
                self._rollouts.remove(name)
            self._configs.pop(name)
        self._save()

    def _bring(self, config: ServeConfig, wanted: Mapping[str, str]) -> None:
        """Make the table point at the models of these addresses by alias, the champion first, starting what does not run."""
        labels = {alias: self._put(config, alias, wanted[alias]) for alias in sorted(wanted, key=lambda alias: alias != CHAMPION)}
        self._point(config, labels)

    def _put(self, config: ServeConfig, alias: str, address: str) -> str:
        """Start one version and return its label; only the champion's failure is the caller's."""
        label = address.rpartition("/")[2] if address.startswith(REGISTERED) else ""
        if alias != CHAMPION and (config.name, address) in self._damaged:
            return label
        try:
            version = self._version(config, address)
            label = version.label
            self._rollouts.put(config.name, version, alias, lambda: self._still_wanted(config, alias, version.label))
        except CellplaneError as error:
            if label and not isinstance(error, ConfigError):  # a version that the registry does not have is no part of the model
                self._rollouts.refuse(config.name, label, str(error))
            self._tag(config, address, f"failed: {error}")
            if not isinstance(error, ServiceError):
                self._damaged.add((config.name, address))
            if alias == CHAMPION:
                raise
            return label
        self._damaged.discard((config.name, address))
        self._tag(config, address, "ready")
        return label

    def _point(self, config: ServeConfig, labels: Mapping[str, str]) -> None:
        """Move aliases to those versions that run, drop others, and set the challenger's part."""
        name = config.name
        self._rollouts.point(name, {alias: label for alias, label in labels.items() if label in self._ready(name)})
        for alias in self.table().models[name].aliases:
            if alias not in labels and (alias != PREVIOUS or not config.keep_previous):
                self._rollouts.drop(name, alias)
        challenger = self.table().models[name].aliases.get(CHALLENGER)
        self._rollouts.split(name, config.challenger_share if challenger else 0.0, challenger if config.shadow else None)
        self._rollouts.tidy(name)

    def _ready(self, name: str) -> set[str]:
        model = self.table().models.get(name)
        return {label for label, version in model.versions.items() if version.state == "ready"} if model else set()

    def _wanted(self, config: ServeConfig) -> dict[str, str]:
        """The address of the model each alias should point at: by the registry's aliases, or the one that was named."""
        name, alias = _followed(config)
        if name is None:
            return {CHAMPION: config.model}
        known = aliases_of(name, config.tracking_uri)
        numbers = _wanted_numbers(config, known)
        if not numbers:
            have = ", ".join(sorted(known)) or "none"
            hint = f"set it: cellplane models promote {name} VERSION" if alias == CHAMPION else "name one of them, or set it in MLflow"
            raise ConfigError(f"model {name!r} has no alias {alias!r}, its aliases: {have}; {hint}")
        return _addresses(name, numbers)

    def _version(self, config: ServeConfig, model: str) -> Version:
        """The version of a model address, downloaded and every file checked against its sha256."""
        resolved = resolve_model(model, config.tracking_uri, self._cache)
        sha256 = str(verify_model(resolved.path)["model_sha256"])
        label = sha256[:LABEL_DIGITS] if resolved.version is None else str(resolved.version)
        return Version(label, str(resolved.path), resolved.run_id, sha256)

    def _still_wanted(self, config: ServeConfig, alias: str, label: str) -> bool:
        """Whether the registry's alias is where it was when the version began to start; yes when nobody can tell."""
        name, followed = _followed(config)
        if name is None:
            return True
        try:
            target = aliases_of(name, config.tracking_uri).get(followed if alias == CHAMPION else alias)
        except ServiceError:
            return True
        return str(target) == label

    def _follow(self) -> None:
        """Ask the registry again and again where its aliases point."""
        while True:
            time.sleep(min((config.registry_poll_s for config in self._configs.values()), default=IDLE_S))
            for config in list(self._configs.values()):
                name, _ = _followed(config)
                if name is None:
                    continue
                try:
                    self._look(config, name)
                except Exception as error:  # of one model, at one time: the next look may do better, and nobody else follows
                    log.error("model %s stays as it is: %s", config.name, error, exc_info=not isinstance(error, CellplaneError))

    def _look(self, config: ServeConfig, registered: str) -> None:
        """Follow one model: at once where the versions run, else in a thread, one at a time."""
        try:
            numbers = _wanted_numbers(config, aliases_of(registered, config.tracking_uri))
        except CellplaneError as error:
            log.warning("the registry does not answer, so %s stays as it is: %s", config.name, error)
            return
        addresses = _addresses(registered, numbers)
        now = Handled(config, addresses)
        if not numbers or self._is_handled(now) or config.name not in self.table().models:
            return
        labels = {alias: str(number) for alias, number in numbers.items()}
        if set(labels.values()) <= self._ready(config.name):
            self._handled[config.name] = now
            self._point(config, labels)
        elif (turn := self._lock_of(config.name)).acquire(blocking=False):
            self._handled[config.name] = now
            threading.Thread(target=self._bring_in_turn, args=(config, addresses, turn), daemon=True).start()

    def _is_handled(self, now: Handled) -> bool:
        """Whether nothing has changed, or only `previous` beside a champion that is damaged: promoting sets the one before the other."""
        before = self._handled.get(now.config.name)
        if before is None or before.config != now.config or (now.config.name, now.addresses.get(CHAMPION, "")) not in self._damaged:
            return before == now
        return {**before.addresses, PREVIOUS: ""} == {**now.addresses, PREVIOUS: ""}

    def _bring_in_turn(self, config: ServeConfig, addresses: Mapping[str, str], turn: threading.Lock) -> None:
        try:
            if self._configs.get(config.name) is config:  # it may have been taken down meanwhile
                self._bring(config, addresses)
        except CellplaneError as error:
            log.error("model %s stays as it is: %s", config.name, error)
            if isinstance(error, ServiceError):  # the registry or the cluster may do better later; a damaged model will not
                threading.Timer(RETRY_S, self._handled.pop, (config.name, None)).start()
        finally:
            turn.release()

    def _lock_of(self, name: str) -> threading.Lock:
        return self._busy.setdefault(name, threading.Lock())

    def _tag(self, config: ServeConfig, address: str, text: str) -> None:
        """Say in the registry what became of a version."""
        if not address.startswith(REGISTERED):
            return
        name, _, number = registered(address)
        try:
            tag_version(name, int(number), SERVING_TAG, text, config.tracking_uri)
        except CellplaneError as error:
            log.warning("%s could not be tagged: %s", address, error)

    def _publish(self, table: Table) -> None:
        with self._changed:
            self._changed.notify_all()
            self._save(table)

    def _save(self, table: Table | None = None) -> None:
        """Write down what a restart needs; a full disk must not keep a version from being rolled back."""
        with self._changed:
            configs = {name: config.model_dump(mode="json") for name, config in self._configs.items()}
            try:
                write_private(self._state, json.dumps({"table": (table or self.table()).to_json(), "configs": configs}))
            except StorageError as error:
                log.error("a router that restarts would not know what is served: %s", error)

    def _first_table(self) -> Table:
        """Empty; or, when this actor died and came back, the table of before without what was only starting."""
        if not _came_back() or not self._state.is_file():
            return Table(epoch=time.time_ns())  # newer than whatever an ingress may have kept of an earlier router
        plain = json.loads(self._state.read_text(encoding="utf-8"))
        self._configs = {name: ServeConfig.model_validate(config) for name, config in plain["configs"].items()}
        table = Table.from_json(plain["table"])
        log.warning("the router came back and goes on with %s", ", ".join(table.models) or "nothing")
        for model in table.models.values():
            started = {label: version for label, version in model.versions.items() if version.state != "starting"}
            table = table.with_model(replace(model, versions=started))
        return table


def _came_back() -> bool:
    """Whether this process is an actor that Ray started again."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:  # a driver: Ray complains when asked further
        return False
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def get_router() -> Any:
    """The router's handle; ServiceError when nothing is served on this cluster."""
    try:
        return ray.get_actor(ROUTER, NAMESPACE)
    except ValueError as error:
        raise ServiceError("nothing is served on this cluster; start with `cellplane serve MODEL`") from error


def start_router() -> Any:
    """The router's handle, after starting it if need be."""
    folder = (home() / "serve").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    named = {"name": ROUTER, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    actor = ray.remote(Router).options(num_cpus=0, resources=ON_THE_HEAD, max_restarts=-1, max_concurrency=CALLS_AT_ONCE, **named)
    return actor.remote(folder, (home() / "cache" / "models").absolute())


def told(call: Any, timeout_s: float | None) -> Any:
    """The answer of a call to the router; its errors as they were raised."""
    try:
        return ray.get(call, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, CellplaneError):
            raise error.cause from None
        raise


def _followed(config: ServeConfig) -> tuple[str | None, str]:
    """The registered model and the alias that a configuration follows; (None, "") for a folder or a fixed version.

    ConfigError for an address that is neither.
    """
    if not config.model.startswith(REGISTERED):
        return None, ""
    name, alias, _ = registered(config.model)
    return (name, alias) if alias else (None, "")


def _wanted_numbers(config: ServeConfig, aliases: Mapping[str, int]) -> dict[str, int]:
    """The registered version that each of our aliases should point at; empty when the followed alias is not set."""
    _, followed = _followed(config)
    if followed not in aliases:
        return {}
    if followed != CHAMPION:
        return {CHAMPION: aliases[followed], followed: aliases[followed]}
    kept = [alias for alias in (CHAMPION, CHALLENGER, PREVIOUS) if alias != PREVIOUS or config.keep_previous]
    found = {alias: aliases[alias] for alias in kept if alias in aliases}
    if found.get(PREVIOUS) == found[CHAMPION]:  # the registry stands between the two steps of a promotion
        del found[PREVIOUS]  # the table's own stays as it is
    return found


def _addresses(registered: str, numbers: Mapping[str, int]) -> dict[str, str]:
    """The address of the model each alias should point at."""
    return {alias: f"{REGISTERED}{registered}/{number}" for alias, number in numbers.items()}
