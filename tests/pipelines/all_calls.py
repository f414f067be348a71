"""The five pipelines, tiny and fitted once, and every call that a catalogue of bad inputs makes of them.

A call takes cells and gives back numbers: the weights of a fit, the answer of a prediction, the scores. Two clean calls give
the same numbers bit for bit, so that an input which ought to make no difference can be told to make none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sources import AnnData
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.perturbation import PerturbationPipeline
from tests.pipelines.broken import small_cells

TASKS = ("annotate", "embed", "impute", "denoise", "perturb")
LEARNERS: dict[str, type[Any]] = {
    "annotate": CellTypeAnnotationPipeline,
    "impute": SpatialImputationPipeline,
    "denoise": DenoisingPipeline,
    "perturb": PerturbationPipeline,
}
WANTED = 10  # genes to impute, the last ones
FIT = {"optimizer": {"steps": 1, "warmup_steps": 0}, "validate_every": 1, "device": "cpu", "new_genes": "leave_out"}
RECIPES: dict[str, dict[str, Any]] = {
    "annotate": {"max_cells": 60, "keys": {"labels_key": "cell_type", "batch_key": "batch"}},
    "impute": {
        "query_cells": 30,
        "reference_cells": 30,
        "folds": 2,
        "neighbours": 5,
        "ridges": [1000.0],
        "min_correlation": -1.0,
        "keys": {"spatial_key": "spatial", "batch_key": "batch"},
        "reference_keys": {},
    },
    "denoise": {"max_cells": 60, "keys": {"batch_key": "batch", "labels_key": "cell_type"}, "smoothing": {"neighbours": [5], "steps": [1]}},
    "perturb": {"keys": {"batch_key": "batch"}, "folds": 0, "min_cells": 2, "control_cells": 16, "perturbed_cells": 16},
}
FITS = ("annotate fit", "impute fit", "impute fit beside", "denoise fit", "perturb fit")
PREDICTIONS = ("annotate predict", "embed predict", "impute predict", "impute predict beside", "denoise predict", "perturb predict")
SCORES = tuple(f"{task} score" for task in TASKS)
Numbers = list[np.ndarray[Any, Any]]


def base_model(genes: list[str]) -> ModelFolder:
    """An untrained model over the cells' genes and ten more, with a decoder."""
    widths = {"width": 16, "n_heads": 2, "latent_width": 8, "cluster_width": 8, "decoder_width": 8, "decoder_bottleneck": 5}
    vocabulary = GeneVocabulary.from_ids([*genes, *(f"ENSG{number:011d}" for number in range(900, 910))])
    config = ModelConfig(n_genes=len(vocabulary), n_blocks=1, n_clusters=3, **widths)
    return ModelFolder(config=config, weights=new_model(config, 0).state_dict(), vocabulary=vocabulary, task="pretrain", max_cells=64)


class Calls:
    """What can be asked of the five pipelines; ``layer`` is where their recipes say that counts lie (None: nothing is said)."""

    def __init__(self, layer: str | None = None) -> None:
        self.layer, self._known = layer, dict[str, Any]()
        genes = list(small_cells().var_names)
        self.base, self.wanted = base_model(genes), genes[-WANTED:]

    def good(self) -> AnnData:
        """Cells with nothing wrong, their counts where the recipes look for them."""
        return self._placed(small_cells())

    def _placed(self, cells: AnnData) -> AnnData:
        if self.layer is not None:
            cells.layers[self.layer] = cells.X.copy()
        return cells

    def recipe(self, task: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A task's configuration."""
        plain = {**FIT, **RECIPES[task], **({"genes": self.wanted} if task == "impute" else {}), **(changes or {})}
        named = {key: {**plain[key], "layer": self.layer} for key in ("keys", "reference_keys") if key in plain}
        return {**plain, **named}

    def fit(self, task: str, cells: AnnData, beside: AnnData | None = None, changes: Mapping[str, Any] | None = None) -> Any:
        """A pipeline of this task that has learned these cells."""
        pipeline = LEARNERS[task](self.base, self.recipe(task, changes))
        if task != "impute":
            return pipeline.fit(cells)
        return pipeline.fit(cells, self._placed(small_cells(1)) if beside is None else beside)

    def fitted(self, task: str) -> Any:
        """The pipeline that learned good cells; always the same one."""
        if task not in self._known:
            keys = {"batch_key": "batch", "layer": self.layer}
            self._known[task] = CellEmbeddingPipeline(self.base, keys) if task == "embed" else self.fit(task, self.good())
        return self._known[task]

    @cached_property
    def clean(self) -> dict[str, Numbers]:
        """What every fit and prediction gives for good cells."""
        return {call: self(call, self._placed(small_cells(1)) if "beside" in call else self.good()) for call in (*FITS, *PREDICTIONS)}

    def __call__(self, call: str, cells: AnnData) -> Numbers:
        """The numbers of a call, such as "annotate fit" or "impute predict beside" (the cells are the reference)."""
        task, verb, *beside = call.split()
        if verb == "fit":
            pipeline = self.fit(task, self.good(), cells) if beside else self.fit(task, cells)
            return [tensor.numpy() for _, tensor in sorted(pipeline.folder_.weights.items())]
        if verb == "score":
            return _scores(self.fitted(task), task, cells)
        return [_predicted(self.fitted(task), task, *((self.good(), cells) if beside else (cells, None)))]

    def flags(self, task: str, cells: AnnData) -> list[str]:
        """What the cells are flagged as in obs, in a copy of their own; nothing for a cell that is not."""
        pipeline, copy = self.fitted(task), cells.copy()
        if task == "impute":
            copy = pipeline.predict(copy)
        else:
            pipeline.predict(copy, key_added="cellplm")
        return [str(flag) for flag in copy.obs["cellplm_flag"].dropna()]


def _predicted(pipeline: Any, task: str, cells: AnnData, beside: AnnData | None) -> np.ndarray[Any, Any]:
    answers: dict[str, Callable[[], Any]] = {
        "annotate": lambda: pipeline.predict_proba(cells),
        "impute": lambda: pipeline.predict(cells, reference=beside).X,
        "perturb": lambda: pipeline.predict(cells).X,
    }
    found: np.ndarray[Any, Any] = answers.get(task, lambda: pipeline.predict(cells))()
    return found


def _scores(pipeline: Any, task: str, cells: AnnData) -> Numbers:
    scores = pipeline.score(cells, ["cell_type"]) if task == "embed" else pipeline.score(cells)
    return [np.array([value for value in scores.values() if isinstance(value, float)])]
