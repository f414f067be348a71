"""What `cellplane try` is told: the user's own file, how much of it to hide, and a recipe small enough for a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cellplane.config import Config, home
from cellplane.data.config import DataKeys
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.config import SMALL_DECODING, AnnotationConfig, DenoisingConfig
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.train.config import OptimizerConfig


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
    """Folder of the report and the answer; None: $CELLPLANE_HOME/tried/<task>-<file>."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered base model."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        name = f"{getattr(self, 'task', 'try')}-{Path(self.data).stem}"
        return Path(self.out) if self.out else home() / "tried" / name

    @property
    def answer(self) -> Path:
        """The file of the winner's answer; never the input."""
        return self.folder / f"{Path(self.data).stem}.answer.h5ad"

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
