"""What all estimators share: finding their model, reading an AnnData, and saying how an answer came about."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError as SklearnNotFittedError

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.artifact.genes import with_genes
from cellplane.artifact.official import read_official
from cellplane.config import Config, home, validate
from cellplane.data.config import UNLABELLED, DataKeys
from cellplane.data.gene_mapping import GeneRules, genes_without_place
from cellplane.data.gene_tables import installed_tables
from cellplane.data.naming import best_naming
from cellplane.data.sources import AnnData, column, find_counts
from cellplane.errors import ConfigError, DataError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor, build_network, keys_of
from cellplane.model.cellplm import CellPLM
from cellplane.tracking.registry import resolve_model
from cellplane.train.config import TransferConfig

log = logging.getLogger(__name__)

OFFICIAL_MAX_CELLS = 4000  # max_batch_size of the released configurations


class NotFittedError(DataError, SklearnNotFittedError):  # type: ignore[misc]
    """Something was asked that only a pipeline which has learned can answer; scikit-learn's tools know it too."""


class Estimator(BaseEstimator):  # type: ignore[misc]
    """What the pipelines that learn share: scikit-learn's get_params, set_params and clone, save, load, and their base model.

    ``model`` is a model folder or registry URI to start from (None: from scratch); ``pretrain_prefix`` with
    ``pretrain_directory`` names an official CellPLM checkpoint instead. Learned attributes end in an underscore: ``config_``
    are the settings of the last fit, or of the model that was loaded. A fit never changes the parameters themselves.
    """

    task: ClassVar[str]
    recipe: ClassVar[type[Any]]

    def __init__(
        self,
        model: str | Path | ModelFolder | None = None,
        config: Config | Mapping[str, Any] | None = None,
        *,
        pretrain_prefix: str | None = None,
        pretrain_directory: str | Path | None = None,
    ) -> None:
        self.model, self.pretrain_prefix, self.pretrain_directory = model, pretrain_prefix, pretrain_directory
        self.config: Any = as_config(self.recipe, config, self.recipe())
        self.folder_: ModelFolder | None = None
        self.config_: Any = None
        self._config_then: Any = None  # the parameter when config_ was learned
        self.history_: list[dict[str, float]] = []
        self._predictor: Predictor | None = None
        self._opened = self._open()

    def _open(self) -> tuple[tuple[Any, ...], ModelFolder | None]:
        asked = (self.model, self.pretrain_prefix, self.pretrain_directory)
        return asked, open_model(*asked)

    @property
    def base(self) -> ModelFolder | None:
        """The model that fit starts from; None: from scratch."""
        asked = (self.model, self.pretrain_prefix, self.pretrain_directory)
        if any(now is not before for now, before in zip(asked, self._opened[0], strict=True)):  # after set_params
            self._opened = self._open()
        return self._opened[1]

    def configured(self, config: Config | Mapping[str, Any] | None) -> Any:
        """What a fit is told: the pipeline's configuration with the changes of one call; ConfigError for what is none."""
        return as_config(self.recipe, config, as_config(self.recipe, self.config, self.recipe()))

    def settings(self, config: Config | Mapping[str, Any] | None = None) -> Any:
        """What an answer is told: the settings of the fit, over them those set since, over these the changes of one call.

        A dictionary changes what it names, a whole configuration replaces all. Before a fit: as `configured`.
        """
        if self.config_ is None:
            return self.configured(config)
        set_since = self.config is not self._config_then
        return as_config(self.recipe, config, as_config(self.recipe, self.config, self.config_) if set_since else self.config_)

    def _since(self, config: Any) -> Any:
        """What was asked in a dictionary since the fit, under what one call asks; None where nothing is."""
        if isinstance(self.config, Mapping) and self.config is not self._config_then and (config is None or isinstance(config, Mapping)):
            return _merged(self.config, config or {}) or None
        return config

    def save(self, directory: str | Path) -> Path:
        """Writes the model folder: manifest with checksums, weights, vocabulary."""
        return save_model(self._fitted().folder, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """A saved pipeline that answers as it did; every file is verified. DataError for a model of another task.

        It reads cells as those that it learned (`keys`); a folder of an early version does not say, and is read by default.
        """
        folder = load_model(Path(directory))
        if folder.task != cls.task:
            raise DataError(f"{directory} holds a {folder.task} model, not one to {cls.task} with: it is no {cls.__name__}")
        pipeline = cls()
        pipeline.adopt(folder)
        pipeline.config = pipeline.config_  # a clone reads alike
        return pipeline

    def adopt(self, folder: ModelFolder) -> None:
        """Answers with this model from now on, and reads cells as it says that its own were read."""
        config, keys = self.configured(None), keys_of(folder.lineage)
        self._answer_with(folder, config if keys is None else config.model_copy(update={"keys": keys}))

    def _answer_with(self, folder: ModelFolder, config: Any) -> None:
        """The same, by these settings."""
        self._predictor = Predictor(folder)
        self.folder_, self.config_, self._config_then = folder, config, self.config

    def _fitted(self) -> Predictor:
        if self._predictor is None:
            raise NotFittedError("this pipeline has not learned anything yet: call fit, or load a saved one")
        return self._predictor

    def __sklearn_is_fitted__(self) -> bool:
        return self._predictor is not None

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        base = self.model if isinstance(self.model, str | Path) else "a model" if self.base is not None else "from scratch"
        return f"{type(self).__name__}({base}, {'fitted' if self._predictor else 'not fitted'})"[:N_CHAR_MAX]


def starting_model(base: ModelFolder | None, data: AnnData, keys: DataKeys, new_genes: str) -> tuple[ModelFolder | None, GeneVocabulary]:
    """The base model, with rows for the data's new genes when these are added, and the genes to read: its own, or the data's.

    VocabularyError when it knows so few of the data's genes that nearly all would be new: there is nothing to start from.
    """
    if base is None:
        return None, GeneVocabulary.from_ids(dict.fromkeys(find_counts(data, keys).gene_ids))
    if new_genes == "leave_out":
        return base, base.vocabulary
    source = find_counts(data, keys)
    best_naming(source.namings, base.vocabulary, GeneRules(keys.repeated_genes, keys.ignore_gene_case))  # raises for too few known ones
    new = genes_without_place(source.gene_ids, base.vocabulary, installed_tables())
    log.info("%d genes that the base model does not know begin as the mean of its genes", len(new))
    grown = with_genes(base, new)
    return grown, grown.vocabulary


def take_over(network: CellPLM, start: ModelFolder, prefixes: Sequence[str]) -> None:
    """Copies the base model's weights under these prefixes into the network; DataError when one is missing or misshapen."""
    taken = {name: tensor for name, tensor in build_network(start).state_dict().items() if name.startswith(tuple(prefixes))}
    missing, unexpected = network.load_state_dict(taken, strict=False)
    if unexpected or any(name.startswith(tuple(prefixes)) for name in missing):
        raise DataError(f"the base model does not fit: missing {missing}, unexpected {unexpected}")


def check_transfer(transfer: TransferConfig, base: ModelFolder | None, new: Sequence[str] = ()) -> None:
    """ConfigError when parts are to stay as a base model has them and there is none, or they are ``new`` in this task."""
    if fresh := [part for part in transfer.frozen if part in new]:
        raise ConfigError(f"transfer.frozen: the {fresh[0]} is new in this task, frozen it would stay random; leave it out")
    if base is None and (transfer.frozen or transfer.learn == "head"):
        asked = "learn: head" if transfer.learn == "head" else f"frozen: {', '.join(transfer.frozen)}"
        raise ConfigError(f"transfer.{asked} keeps what a base model knows, but there is none; name one, or let everything learn")


def base_name(base: ModelFolder | None) -> str:
    """What a lineage says of the base model."""
    return "none" if base is None else (base.model_sha256 or base.lineage.get("source", "unsaved"))


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


def known_labels(data: AnnData, key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The labels of an obs column as text [n], and which cells have one [n] bool; DataError when none has."""
    labels = column(data, key)
    labelled = np.array([label is not None and label not in UNLABELLED for label in labels], dtype=bool)
    if not labelled.any():
        raise DataError(f"none of the {len(labels)} cells has a label in obs[{key!r}]: there is nothing to score; name another column")
    return labels, labelled


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
