"""What fine-tuning a task is told; defaults are the released recipes with their faults mended (MODEL.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from cellplane.config import Config
from cellplane.data.config import DataKeys
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.train.config import OptimizerConfig


class AnnotationConfig(Config):
    """How `CellTypeAnnotationPipeline.fit` learns."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    keys: DataKeys = DataKeys(labels_key="cell_type")
    """Where counts, labels, batches and coordinates lie."""
    model: ModelConfig = ModelConfig(width=128, n_heads=4, n_blocks=2, latent_width=64, dropout=0.2)
    """The network when no base model is given; a base model brings its own encoder."""
    new_genes: Literal["leave_out", "add"] = "leave_out"
    """Genes of the data that the base model does not know: left out, or added, beginning as the mean of those it knows."""
    masking: MaskingConfig = MaskingConfig(drop_cell_rate=0.3, cell_mask_rate=0.75)
    """Cells left out and genes hidden in every step, against overfitting."""
    optimizer: OptimizerConfig = OptimizerConfig(steps=400, lr=5e-3, weight_decay=1e-7, warmup_steps=30, embedder_lr_scale=0.1)
    """AdamW: 5e-3, embedder a tenth of it, warm-up of 30 steps (released recipe)."""
    head_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout before the linear head (released recipe)."""
    max_cells: int = Field(2048, ge=1)
    """Largest sentence, in training and prediction."""
    validation_share: float = Field(0.15, gt=0, lt=1)
    """Share of the TRAINING cells that only choose the best step; stratified by label."""
    validate_every: int = Field(10, ge=1)
    """Steps between two looks at the validation cells."""
    patience: int = Field(20, ge=1)
    """Looks without improvement before training ends; the best weights are kept."""
    seed: int = 0
    """Keys initialisation, split, masks and dropout."""


class FinetuneConfig(AnnotationConfig):
    """A fine-tuning job: the recipe above, its data and its place in tracker and registry."""

    kind: Literal["finetune"] = "finetune"
    """What this file configures."""
    task: Literal["annotate"] = "annotate"
    """What is learned."""
    data: str = ""
    """h5ad with labelled training cells."""
    test: str | None = None
    """h5ad of held-out labelled cells: scored beside the baselines when training is done."""
    base_model: str | None = None
    """Model folder or models:/NAME@ALIAS to start from; None trains from scratch."""
    run: str = "finetune"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""
    register_as: str | None = None
    """Name in the model registry; None: the model is logged but not registered."""


class EvaluateConfig(Config):
    """Scoring a fine-tuned model and its baselines on held-out cells."""

    kind: Literal["evaluate"] = "evaluate"
    """What this file configures."""
    model: str = ""
    """Model folder or models:/NAME@ALIAS."""
    train: str = ""
    """h5ad the model was fine-tuned on: the baselines learn from the same cells."""
    test: str = ""
    """h5ad of held-out labelled cells."""
    keys: DataKeys = DataKeys(labels_key="cell_type")
    """Where counts and labels lie."""
    seed: int = 0
    """Seed of the baselines."""
    out: str | None = None
    """Folder for scores and plots; None: $CELLPLANE_HOME/evaluations/<model checksum>."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered model."""


