"""What `SpatialImputationPipeline` is told; defaults follow PROTOCOLS 6 where no measurement says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cellplane.data.config import DataKeys
from cellplane.model.config import ModelConfig
from cellplane.pipelines.config import SMALL_DECODING
from cellplane.train.config import FitConfig, OptimizerConfig


class ImputationConfig(FitConfig):
    """How `SpatialImputationPipeline.fit` learns, and what it dares to answer."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    keys: DataKeys = DataKeys(spatial_key="spatial")
    """Where counts, slides (batch_key) and coordinates of the QUERY lie; spatial_key None takes random patches."""
    reference_keys: DataKeys = DataKeys()
    """Where the counts of the reference lie."""
    genes: tuple[str, ...] | None = None
    """Genes to impute; None: those of the reference that the query lacks, at most max_genes."""
    max_genes: int = Field(2000, ge=1)
    """Without a list of genes: how many of the reference's most variable ones are imputed."""
    recipe: Literal["joint", "official"] = "joint"
    """joint: platform tokens, scaled input, hidden genes never visible; official: hidden in the query only, as released."""
    model: ModelConfig = SMALL_DECODING
    """The network when no base model is given; a base model brings its own."""
    new_genes: Literal["leave_out", "add"] = "add"
    """Genes that the base model does not know: left out, or added, beginning as the mean of those it knows."""
    optimizer: OptimizerConfig = OptimizerConfig(steps=200, lr=5e-3, weight_decay=1e-2, warmup_steps=20)
    """AdamW."""
    query_cells: int = Field(128, ge=1)
    """Query cells of a sentence: one patch of the tissue."""
    reference_cells: int = Field(512, ge=1)
    """Reference cells of a sentence, drawn anew in every step; more of them learned better than an equal mix (MERFISH, 134 genes)."""
    query_weight: float = Field(0.3, ge=0)
    """Weight of the query's own observed genes in the loss; the reference weighs 1."""
    masked_cells: float = Field(0.75, ge=0, le=1)
    """Share of the cells that also hide some observed genes in a step (official recipe: 0.95)."""
    masked_genes: tuple[float, float] = (0.1, 0.5)
    """Each of them hides a share between these of its observed genes."""
    folds: int = Field(3, ge=2)
    """Parts of the observed genes, each hidden once from the query: they choose the number of steps and the expected correlations."""
    kept_reference: int = Field(2000, ge=1)
    """Reference cells that stay with the model, counts and all: the context, and the neighbours, of every later prediction."""
    neighbours: int = Field(100, ge=0)
    """Reference cells whose average is mixed into the prediction, by the share that hidden observed genes prefer; 0 = none."""
    ridges: tuple[Annotated[float, Field(gt=0)], ...] = (1000.0, 3000.0, 10000.0)
    """Penalties of a ridge regression in the reference that is tried in the neighbours' place; empty: none is."""
    ridge: float = Field(0.0, ge=0)
    """The penalty that a fit chose, 0 for the neighbours; written by fit, not to be set."""
    min_correlation: float = Field(0.1, ge=-1, le=1)
    """Genes whose expected correlation lies below are refused: NaN in the answer."""
    validate_every: int = Field(25, ge=1)
    """Steps between two looks at the hidden observed genes."""
    patience: int = Field(6, ge=1)
    """Looks without improvement before a fold ends."""
