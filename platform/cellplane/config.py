"""From YAML to a checked, frozen configuration, with one clear error when a key or value is wrong.

Each room owns the classes of its own section; this module only knows how to find a file, merge overrides and turn
pydantic's findings into a sentence that names the nearest valid key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cellplane.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration section: frozen, no unknown keys.

    ``references`` names the sections that may be given as the name of a shipped file: {"model": "model"} lets
    `model: tiny` stand for the content of configs/model/tiny.yaml.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    references: ClassVar[Mapping[str, str]] = {}


ConfigT = TypeVar("ConfigT", bound=Config)
ALIKE, VERY_ALIKE = 0.6, 0.8  # share of matching letters from which a key is taken for a misspelt one


def home() -> Path:
    """The folder everything is written to: $CELLPLANE_HOME, else ./.cellplane (absolute)."""
    return Path(os.environ.get("CELLPLANE_HOME", ".cellplane")).absolute()


def configs_root() -> Path:
    """The shipped configs/: in the installed package, else at the repository's root (editable installs skip data folders)."""
    installed = Path(__file__).resolve().parent / "configs"
    if (installed / "model").is_dir():
        return installed
    return Path(__file__).resolve().parents[2] / "configs"


def find_config(name: str | Path, kind: str) -> Path:
    """The file meant by a path or by the name of a shipped config of this kind; ConfigError lists the shipped ones."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = configs_root() / kind
    if (candidate := shipped / f"{path.name.removesuffix('.yaml')}.yaml").is_file() and path.parent.name in ("", kind):
        return candidate
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ConfigError(f"no config file {str(name)!r}, and none of that name is shipped for {kind}: {', '.join(known) or 'none'}")


def load_config(cls: type[ConfigT], name: str | Path | None, kind: str, overrides: Sequence[str] = ()) -> ConfigT:
    """The validated configuration of a file (or of defaults when ``name`` is None) with `a.b=c` overrides applied.

    Raises ConfigError for a missing file, bad YAML, an unknown key (the nearest valid one is named) or a bad value.
    """
    source = "defaults" if name is None else str(find_config(name, kind))
    raw = {} if name is None else read_yaml(Path(source))
    try:
        for section, section_kind in cls.references.items():
            if isinstance(raw.get(section), str):
                raw[section] = read_yaml(find_config(raw[section], section_kind))
        for override in overrides:
            key, _, text = override.partition("=")
            if key in cls.references and text and not text.startswith(("{", "[")):
                raw[key] = read_yaml(find_config(text, cls.references[key]))
        rest = [item for item in overrides if not _is_reference(item, cls.references)]
        if bad := [item for item in rest if "=" not in item]:
            raise ConfigError(f"override {bad[0]!r} is not of the form key.path=value")
        merged = OmegaConf.merge(OmegaConf.create(raw), _dotlist(rest))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
    return validate(cls, values, source, [item.partition("=")[0] for item in rest])


def setting(key: str, name: str | None, kind: str, overrides: Sequence[str] = ()) -> Any:
    """What a file and its `a.b=c` overrides say of one key, unchecked; None when they say nothing of it.

    For a look before the class that reads the file is loaded, which may take many seconds. Raises ConfigError as `load_config`.
    """
    raw = {} if name is None else read_yaml(find_config(name, kind))
    own = [item for item in overrides if item.startswith(f"{key}=")]
    try:
        merged = OmegaConf.merge(OmegaConf.create({key: raw.get(key)}), _dotlist(own))
        return OmegaConf.to_container(merged, resolve=True)[key]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}") from error


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        try:
            OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {override!r} is not readable: {' '.join(str(error).split())}") from error
    return OmegaConf.from_dotlist(list(overrides))


def _is_reference(override: str, references: Mapping[str, str]) -> bool:
    key, _, text = override.partition("=")
    return key in references and bool(text) and not text.startswith(("{", "["))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds; ConfigError with line and column when it is not one. `1e-4` is a number."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found a {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def validate(cls: type[ConfigT], values: object, source: str, overridden: Sequence[str] = ()) -> ConfigT:
    """``values`` as a ``cls``; ConfigError with every finding, laid to ``source`` or, where a key was ``overridden``, to that."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        blamed = ["the options given" if _is_of(item["loc"], overridden) else source for item in error.errors()]
        findings = [_finding(cls, item) for item in error.errors()]
        told = {place: [text for text, of in zip(findings, blamed, strict=True) if of == place] for place in dict.fromkeys(blamed)}
        raise ConfigError("; ".join(f"{place}: {'; '.join(texts)}" for place, texts in told.items())) from None


def _is_of(location: Sequence[Any], overridden: Sequence[str]) -> bool:
    """Whether a finding lies at, in or around a key that an option changed."""
    place = ".".join(map(str, location))
    return bool(place) and any(f"{place}.".startswith(f"{key}.") or f"{key}.".startswith(f"{place}.") for key in overridden)


def _finding(cls: type[Config], item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(cls, item["loc"][:-1])
        nearest = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=ALIKE) or _deeper(cls, item["loc"], known)
        hint = f"; did you mean {'.'.join(map(str, (*item['loc'][:-1], *nearest)))!r}?" if nearest else f"; valid keys: {', '.join(known)}"
        return f"unknown key {place!r}{hint}"
    if item["type"] == "missing":
        return f"{place} is not set: put it into the file, or give -o {place}=... or the option of that name"
    return f"{place}: {item['msg']}, found {item['input']!r}"


def _deeper(cls: type[Config], location: Sequence[Any], known: Sequence[str]) -> list[str]:
    """The same key, or nearly, one section further down: `optimizer` where `recipe.optimizer` is meant."""
    *above, last = location
    places = {f"{section}.{key}": key for section in known for key in _known_keys(cls, [*above, section])}
    found = difflib.get_close_matches(str(last), list(places.values()), n=1, cutoff=VERY_ALIKE)
    return [next(place for place, key in places.items() if key == found[0])] if found else []


def _known_keys(cls: type[Any], location: Sequence[Any]) -> list[str]:
    """Keys of the section at ``location``, read from the JSON schema: works for pydantic models and dataclasses alike."""
    schema = TypeAdapter(cls).json_schema()
    node = schema
    for part in location:
        node = _resolve(schema, node).get("properties", {}).get(str(part), {})
    return sorted(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for option in (node, *node.get("anyOf", ()), *node.get("allOf", ())):
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            return found
    return node


def to_plain(config: Config) -> dict[str, Any]:
    """The resolved configuration as JSON-ready values."""
    plain: dict[str, Any] = config.model_dump(mode="json")
    return plain


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML: this one text reproduces the run."""
    text: str = yaml.safe_dump(to_plain(config), sort_keys=False)
    return text


def fingerprint(config: Config) -> str:
    """sha256 of the resolved configuration."""
    return hashlib.sha256(json.dumps(to_plain(config), sort_keys=True).encode()).hexdigest()
