"""What all estimators share: finding their model, reading an AnnData, and saying how an answer came about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellplane.artifact.folder import ModelFolder, load_model
from cellplane.artifact.official import read_official
from cellplane.config import Config, home, validate
from cellplane.errors import ConfigError, DataError
from cellplane.inference import build_network
from cellplane.tracking.registry import resolve_model

OFFICIAL_MAX_CELLS = 4000  # max_batch_size of the released configurations


def open_model(model: str | Path | ModelFolder | None, prefix: str | None, directory: str | Path | None) -> ModelFolder | None:
    """The model meant by the arguments every estimator takes: a folder or registry URI, or an official prefix + directory.

    None when nothing is named. Raises ConfigError when both ways are used or one is half given.
    """
    if (prefix is None) != (directory is None):
        raise ConfigError("pretrain_prefix and pretrain_directory belong together: the checkpoint's name and its folder")
    if prefix is not None and directory is not None:
        if model is not None:
            raise ConfigError("give either a model, or pretrain_prefix with pretrain_directory, not both")
        return official_model(Path(directory), prefix)
    if model is None or isinstance(model, ModelFolder):
        return model
    return load_model(resolve_model(model, None, home() / "cache").path)


def official_model(directory: Path, prefix: str, positions: Literal["none", "grid"] = "none") -> ModelFolder:
    """A checkpoint by prefix: an official pair of files (``positions``: see `read_official`), or a model folder of that name."""
    if (directory / prefix / "manifest.json").is_file():
        return load_model(directory / prefix)
    config, vocabulary, weights = read_official(directory, prefix, positions)
    folder = ModelFolder(
        config=config,
        weights=weights,
        vocabulary=vocabulary,
        task="pretrain",
        max_cells=OFFICIAL_MAX_CELLS,
        lineage={"source": f"official checkpoint {prefix}"},
    )
    build_network(folder)  # a tensor missing or misshapen is found here, not when the model is first used
    return folder


def as_config(cls: type[Any], config: Config | Mapping[str, Any] | None, default: Any) -> Any:
    """``config`` as a ``cls``: None means ``default``, a mapping is validated over it (the seed's dictionaries)."""
    if config is None:
        return default
    if isinstance(config, cls):
        return config
    if isinstance(config, Mapping):
        return validate(cls, _merged(default.model_dump(), config), "the given config")
    raise ConfigError(f"expected a {cls.__name__} or a dictionary, found {type(config).__name__}")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        out[key] = _merged(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
    return out


def stratified_split(labels: np.ndarray[Any, Any], share: float, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(kept, held out) rows, ``share`` of every label held out, at least one of each label kept; ascending, keyed by the seed."""
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.extend(rows[: min(round(share * len(rows)), len(rows) - 1)].tolist())
    out = np.sort(np.array(held, dtype=np.int64))
    kept = np.setdiff1d(np.arange(len(labels)), out)
    if len(kept) == 0:
        raise DataError("there are no cells to split")
    return kept, out
