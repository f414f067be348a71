"""Zero-shot cell embedding: a pre-trained model's latent space for any cells, without training.

    CellEmbeddingPipeline("models:/cellplm-tiny@champion").predict(adata, key_added="cellplm")   # obsm["X_cellplm"]

The same model also says what every cell would show had all been measured in one batch: `correct`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.data.company import Context
from cellplane.data.config import DataKeys
from cellplane.data.confounding import confounding
from cellplane.data.sources import AnnData, check_anndata, gene_columns
from cellplane.errors import ConfigError, DataError
from cellplane.inference import Predictor, keys_of, query_keys, rates_of, read_cells, record, write_embedding, write_flags
from cellplane.pipelines.base import as_config, known_labels, open_model
from cellplane.pipelines.evening import evened
from cellplane.results import WARNINGS

log = logging.getLogger(__name__)


class CellEmbeddingPipeline(BaseEstimator):  # type: ignore[misc]
    """fit / predict / score / save / load; nothing is learned, so fit only returns itself.

    ``keys`` say where counts, batches and coordinates lie, a dictionary over those that the model's own cells were read with,
    where it says so (a base model does not); None: just those.
    """

    def __init__(
        self,
        model: str | Path | ModelFolder | None = None,
        keys: DataKeys | Mapping[str, Any] | None = None,
        *,
        pretrain_prefix: str | None = None,
        pretrain_directory: str | Path | None = None,
    ) -> None:
        self.model, self.pretrain_prefix, self.pretrain_directory = model, pretrain_prefix, pretrain_directory
        self.keys = keys
        as_config(DataKeys, keys, DataKeys())  # wrong ones are told at once
        self._opened = self._open()

    def _open(self) -> tuple[tuple[Any, ...], Predictor]:
        asked = (self.model, self.pretrain_prefix, self.pretrain_directory)
        folder = open_model(*asked)
        if folder is None:
            raise ConfigError("an embedding needs a model: a model folder, models:/NAME@ALIAS, or pretrain_prefix with pretrain_directory")
        return asked, Predictor(folder)

    @property
    def predictor(self) -> Predictor:
        """What answers; another one after set_params named another model."""
        asked = (self.model, self.pretrain_prefix, self.pretrain_directory)
        if any(now is not before for now, before in zip(asked, self._opened[0], strict=True)):
            self._opened = self._open()
        return self._opened[1]

    def _keys(self) -> DataKeys:
        keys: DataKeys = as_config(DataKeys, self.keys, keys_of(self.predictor.folder.lineage) or DataKeys())
        return keys

    def fit(self, data: AnnData | None = None, y: object = None) -> CellEmbeddingPipeline:  # noqa: ARG002  (the estimators' common shape)
        """Itself: the model is used as it was pre-trained."""
        if data is not None:
            check_anndata(data)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(
        self, data: AnnData, *, key_added: str | None = None, context: Context | AnnData = "own", even: float = 0.0
    ) -> NDArray[np.float32]:
        """Embedding z of every cell, [n, Z] float32, in the order of ``data``; genes the model does not know are left out.

        ``context`` says in whose company cells are read, see `inference.read_cells`. ``even`` above 0 (0.5 is usual) turns z
        to the main directions of these cells and takes from the strongest, see `evening.evened`. With ``key_added`` also written to
        obsm["X_<key>"] and uns["cellplm"]; obs["<key>_flag"] names cells without counts that the model knows, whose
        embedding is that of their context.
        """
        folder = self.predictor.folder
        company = self.predictor.company(context)
        read = read_cells(data, folder.vocabulary, query_keys(data, self._keys()), folder.max_cells, context=company)
        latent = self.predictor.embed(read.store)
        latent = evened(latent, even) if even else latent
        if key_added is not None:
            write_embedding(data, latent, read.store.table, key_added)
            data.uns["cellplm"] = record(folder, {**read.report, **({"even": even} if even else {})})
        return latent

    @property
    def target_batches(self) -> tuple[str, ...]:
        """Batches that `correct` can decode cells in: those the model's decoder learned."""
        lineage = self.predictor.folder.lineage
        return tuple(json.loads(lineage.get("decoder_batches", lineage.get("batches", "[]"))))

    def correct(self, data: AnnData, target_batch: str | None = None, *, key_added: str | None = None) -> NDArray[np.float32]:
        """Expression as if all cells had been measured in one batch: rates per 10,000, [n, n_vars] float32.

        Every cell's embedding is decoded in ``target_batch``, one of `target_batches`; None averages over all of them. Genes
        the model does not know are NaN. With ``key_added`` also written to layers["<key>_corrected"] and uns["cellplm"].
        Where keys name labels and batches, types that lie in one batch alone are warned of: taking the batch out takes them along.
        DataError for a model that decodes no counts, ConfigError for a batch it did not learn.
        """
        folder, names = self.predictor.folder, self.target_batches
        if target_batch is not None and target_batch not in names:
            known = ", ".join(names[:12]) or "none by name: leave target_batch out"
            raise ConfigError(f"no batch {target_batch!r} was learned; there are {known}")
        if not folder.config.n_batches:
            raise DataError(f"this {folder.task} model learned no batches, so there are none to correct for; take a pre-trained base")
        keys = query_keys(data, self._keys())
        read = read_cells(data, folder.vocabulary, keys, folder.max_cells)
        decoded = range(folder.config.n_batches) if target_batch is None else (names.index(target_batch),)
        columns = gene_columns(data, keys, folder.vocabulary)
        rates = np.empty((data.n_obs, len(columns)), dtype=np.float32)
        warned = confounding(data, self._keys())
        for rows, shares in self.predictor.rates(read.store, tuple(decoded)):
            rates[rows] = rates_of(shares, columns)
        if key_added is not None:
            write_flags(data, read.store.table, key_added)
            data.layers[f"{key_added}_corrected"] = rates
            told = target_batch if target_batch is not None else f"the mean of {folder.config.n_batches}"
            report = {**read.report, "target_batch": told}
            if warned is not None:
                report[WARNINGS] = [*report.get(WARNINGS, ()), warned]
            data.uns["cellplm"] = record(folder, report)
        return rates

    def score(self, data: AnnData, label_fields: list[str]) -> dict[str, float]:
        """NMI and ARI of a k-means clustering of the labelled cells with as many clusters as labels; nothing is tuned on the labels."""
        labels, labelled = known_labels(data, label_fields[0])
        if missing := int((~labelled).sum()):
            log.warning("%d of %d cells have no label in obs[%r] and are not scored", missing, len(labels), label_fields[0])
        truth = labels[labelled].astype(str)
        found = KMeans(n_clusters=len(np.unique(truth)), n_init=10, random_state=0).fit_predict(self.predict(data)[labelled])
        return {"nmi": float(normalized_mutual_info_score(truth, found)), "ari": float(adjusted_rand_score(truth, found))}

    def save(self, directory: str | Path) -> Path:
        """Writes the model folder, which says how cells are read."""
        folder = self.predictor.folder
        lineage = folder.lineage if self.keys is None else {**folder.lineage, "keys": self._keys().model_dump_json()}
        return save_model(replace(folder, lineage=lineage), Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> CellEmbeddingPipeline:
        """A saved pipeline that answers as it did; every file is verified."""
        return cls(load_model(Path(directory)))

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        named = self.model if isinstance(self.model, str | Path) else self.pretrain_prefix or "a model"
        return f"CellEmbeddingPipeline({named})"[:N_CHAR_MAX]
