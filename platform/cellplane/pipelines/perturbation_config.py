"""What `PerturbationPipeline` is told; defaults follow PROTOCOLS 9 where no measurement says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cellplane.data.config import DataKeys
from cellplane.model.config import ModelConfig
from cellplane.pipelines.config import SMALL_DECODING
from cellplane.train.config import FitConfig, OptimizerConfig

Kind = Literal["knockout", "crispri", "crispra", "stimulation"]
TARGETS = 2  # genes of one perturbation, as CellBatch has room for


class PerturbationConfig(FitConfig):
    """How `PerturbationPipeline.fit` learns, and what it answers about perturbations it does not know."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    keys: DataKeys = DataKeys()
    """Where counts lie; batch_key and labels_key (cell type) tell groups apart: perturbed cells are compared with controls of their own."""
    perturbation_key: str = "perturbation"
    """obs column of the perturbation's name: genes joined by `separator`, or a name that `targets` explains."""
    control: str = "control"
    """What that column says of an unperturbed cell."""
    separator: str = "+"
    """Between the genes of a combination; a part equal to `control` is none."""
    kind: Kind = "knockout"
    """What the perturbations are."""
    kinds: dict[str, Kind] = {}
    """The kind of single perturbations, by name, where it differs."""
    targets: dict[str, Annotated[tuple[str, ...], Field(min_length=1, max_length=TARGETS)]] = {}
    """Genes (one or two) of perturbations whose names are not genes, e.g. {IFN-b: [IFNB1]}; a stimulus without one has a vector of its
    own."""
    ignore: tuple[str, ...] = ()
    """Names in that column whose cells are left out, e.g. multiple, unassigned."""
    unknown: Literal["error", "leave_out"] = "error"
    """What happens in fit to perturbations whose gene is not known: refused, or left out with a warning; a stimulus is always learned."""
    fallback: Literal["error", "mean_of_training"] = "error"
    """What predict answers to them: an error, or the mean change of the training perturbations, flagged in obs."""
    model: ModelConfig = replace(SMALL_DECODING, dropout=0.1)
    """The network when no base model is given; a base model brings its own embedder and encoder."""
    new_genes: Literal["leave_out", "add"] = "add"
    """Genes that the base model does not know: left out, or added, beginning as the mean of those it knows."""
    max_genes: Annotated[int, Field(ge=1)] | None = 5000
    """How many of the most variable measured genes are read and predicted, targets always among them; None: all, also those that only
    the base model knows, so that predictions can be asked about them."""
    optimizer: OptimizerConfig = OptimizerConfig(steps=200, lr=2e-3, weight_decay=1e-2, warmup_steps=10)
    """AdamW."""
    change_weight: float = Field(10.0, ge=0)
    """Weight of the squared error of the mean change beside the likelihood of the perturbed cells."""
    control_cells: int = Field(64, ge=1)
    """Control cells of a sentence, drawn anew in every step; predictions use sentences of at most 256."""
    perturbed_cells: int = Field(64, ge=1)
    """Perturbed cells that a sentence is compared with, drawn anew in every step."""
    pairs_per_step: int = Field(8, ge=1)
    """Pairs of (group, perturbation) in a step; all pairs once an epoch, each perturbation weighing the same."""
    min_cells: int = Field(5, ge=2)
    """A group needs so many controls, and a perturbation so many cells in it, to count."""
    folds: int = Field(3, ge=0)
    """Parts of the perturbations (or, with fewer than three, of the groups) hidden in turn to choose the number of steps; 0 = all steps."""
    validate_every: int = Field(10, ge=1)
    """Steps between two looks at hidden perturbations."""
    patience: int = Field(8, ge=1)
    """Looks without improvement before a fold ends."""
