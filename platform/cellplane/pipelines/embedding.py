"""Zero-shot cell embedding: a pre-trained model's latent space for any cells, without training.

    CellEmbeddingPipeline("models:/cellplm-tiny@champion").predict(adata, key_added="cellplm")   # obsm["X_cellplm"]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData, column
from cellplane.errors import ConfigError
from cellplane.inference import Predictor, query_keys, read_cells, record, write_flags
from cellplane.pipelines.base import as_config, open_model


class CellEmbeddingPipeline:
    """fit / predict / score / save / load; nothing is learned, so fit only returns itself."""

    def __init__(
        self,
        model: str | Path | ModelFolder | None = None,
        keys: DataKeys | Mapping[str, Any] | None = None,
        *,
        pretrain_prefix: str | None = None,
        pretrain_directory: str | Path | None = None,
    ) -> None:
        folder = open_model(model, pretrain_prefix, pretrain_directory)
        if folder is None:
            raise ConfigError("an embedding needs a model: a model folder, models:/NAME@ALIAS, or pretrain_prefix with pretrain_directory")
        self.keys: DataKeys = as_config(DataKeys, keys, DataKeys())
        self.predictor = Predictor(folder)

    def fit(self, data: AnnData) -> CellEmbeddingPipeline:  # noqa: ARG002  (the estimators' common shape)
        """Itself: the model is used as it was pre-trained."""
        return self

    def predict(self, data: AnnData, *, key_added: str | None = None) -> NDArray[np.float32]:
        """Embedding z of every cell, [n, Z] float32, in the order of ``data``; genes the model does not know are left out.

        With ``key_added`` also written to obsm["X_<key>"] and uns["cellplm"]; obs["<key>_flag"] names cells without counts
        that the model knows, whose embedding is that of their context.
        """
        folder = self.predictor.folder
        read = read_cells(data, folder.vocabulary, query_keys(data, self.keys), folder.max_cells)
        latent = self.predictor.embed(read.store)
        if key_added is not None:
            write_flags(data, read.store.table, key_added)
            data.obsm[f"X_{key_added}"] = latent
            data.uns["cellplm"] = record(folder, read.report)
        return latent

    def score(self, data: AnnData, label_fields: list[str]) -> dict[str, float]:
        """NMI and ARI of a k-means clustering with as many clusters as labels; no parameter is tuned on the labels."""
        truth = np.array([str(label) for label in column(data, label_fields[0])])
        found = KMeans(n_clusters=len(np.unique(truth)), n_init=10, random_state=0).fit_predict(self.predict(data))
        return {"nmi": float(normalized_mutual_info_score(truth, found)), "ari": float(adjusted_rand_score(truth, found))}

    def save(self, directory: str | Path) -> Path:
        """Writes the model folder."""
        return save_model(self.predictor.folder, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> CellEmbeddingPipeline:
        """A saved pipeline; every file is verified."""
        return cls(load_model(Path(directory)))
