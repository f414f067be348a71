"""What `cellplane try` is told: the user's own file, how much of it to hide, and a recipe small enough for a CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from cellplane.config import Config, home
from cellplane.data.config import DataKeys
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.config import SMALL_DECODING, AnnotationConfig, DenoisingConfig
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.train.config import OptimizerConfig

PATH_DIGITS = 6  # of the place of a file, behind its name: two files of one name are told apart


class TryConfig(Config):
    """What trying has in common for all tasks."""

    kind: Literal["try"] = "try"
    """What this file configures."""
    data: str = ""
    """h5ad of the cells to try it on."""
    reference: str | None = None
    """h5ad of a reference."""
    base_model: str | None = None
    """Model folder or models:/NAME@ALIAS to start from; None trains from scratch."""
    auto: bool = False
    """Also write the winner's answer, the simple method's too."""
    seed: int = Field(0, ge=0)
    """Of what is hidden, the recipe and the simple methods."""
    out: str | None = None
    """Folder of the report and the answer; None: $CELLPLANE_HOME/tried/<task>-<file>-<six digits of where it lies>."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered base model."""

    @property
    def folder(self) -> Path:
        """Where everything is written; a file of the same name in another folder has a folder of its own."""
        if self.out:
            return Path(self.out)
        digits = hashlib.sha256(str(Path(self.data).resolve()).encode()).hexdigest()[:PATH_DIGITS]
        return home() / "tried" / f"{getattr(self, 'task', 'try')}-{Path(self.data).stem}-{digits}"

    @property
    def answer(self) -> Path:
        """The file of the winner's answer; never the input."""
        return self.folder / f"{Path(self.data).stem}.answer.h5ad"

    @property
    def learned(self) -> Path:
        """The model folder, where that is the answer."""
        return self.folder / "model"

    def check(self) -> None:
        """ConfigError when no file is named, DataError when one is not there."""
        if not self.data:
            raise ConfigError("data is empty: name an h5ad with your cells")
        for path in filter(None, (self.data, self.reference)):
            if not Path(path).is_file():
                raise DataError(f"{path}: no such file")


class TryAnnotation(TryConfig):
    """Hides labels of the file, or with a reference all of them, and names them again."""

    task: Literal["annotate"] = "annotate"
    """What is tried."""
    split: Literal["auto", "random", "batch", "blocks"] = "auto"
    """What is hidden together: single cells, samples (recipe.keys.batch_key) or blocks of tissue (recipe.keys.spatial_key)."""
    folds: int = Field(3, ge=2)
    """Parts of the labelled cells, each hidden once; samples are hidden one at a time."""
    recipe: AnnotationConfig = AnnotationConfig()
    """How the model learns; recipe.keys says where labels, samples and places lie."""


class TryImputation(TryConfig):
    """Hides genes that file and reference share, and fills them in from the reference."""

    task: Literal["impute"] = "impute"
    """What is tried."""
    folds: int = Field(3, ge=2)
    """Parts of the genes to hide, each hidden once."""
    hidden_genes: int = Field(300, ge=2)
    """At most so many shared genes are hidden in all, drawn by the seed."""
    recipe: ImputationConfig = ImputationConfig()
    """How the model learns."""


class TryDenoising(TryConfig):
    """Takes a tenth of all counts out and foretells them."""

    task: Literal["denoise"] = "denoise"
    """What is tried."""
    recipe: DenoisingConfig = DenoisingConfig(
        keys=DataKeys(), model=SMALL_DECODING, optimizer=OptimizerConfig(steps=300, lr=5e-3, weight_decay=1e-6, warmup_steps=20)
    )
    """How the model learns."""


class TryPerturbation(TryConfig):
    """Leaves perturbations out and foretells from control cells what they do."""

    task: Literal["perturb"] = "perturb"
    """What is tried."""
    leave_out: Literal["auto", "perturbation", "cell_type"] = "auto"
    """What is left out in turn: each perturbation, or the perturbed cells of each cell type (recipe.keys.labels_key); auto: the latter
    where fewer than three perturbations have enough cells."""
    recipe: PerturbationConfig = PerturbationConfig()
    """How the model learns, and how the file says what was done: perturbation_key, control, kind, targets, ignore."""


class TryEmbedding(TryConfig):
    """Places the cells by a base model and by simple methods, and looks which places keep the cell types together."""

    task: Literal["embed"] = "embed"
    """What is tried."""
    halvings: int = Field(5, ge=2)
    """How often the cells are dealt in two halves; every half is placed and clustered by itself."""
    max_cells: int = Field(6000, ge=100)
    """At most so many labelled cells are dealt, drawn by the seed."""
    keys: DataKeys = DataKeys(labels_key="cell_type")
    """Where counts and labels lie. The labels only judge; with a batch_key the mixing of samples is told as well."""

    def check(self) -> None:
        """ConfigError also without a base model or a column of labels."""
        super().check()
        if self.base_model is None:
            raise ConfigError(
                "nothing is learned here, so a base model is needed: --base-model FOLDER or models:/NAME@ALIAS. `cellplane models list` "
                "shows those you have, `cellplane models import` brings an official checkpoint, `cellplane pretrain` makes one"
            )
        if self.keys.labels_key is None:
            raise ConfigError("places are judged by labels: name their obs column with --labels-key")
