"""What the full protocols of annotation and embedding are told: data sets, base models, recipes, seeds."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cellplane.config import Config
from cellplane.data.config import DataKeys
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.splits import FEWEST_CELLS, GUARD_UM
from cellplane.train.config import OptimizerConfig, TransferConfig

Control = Literal["one cell", "shuffled coordinates", "positions only", "random weights"]
CONTROLS: tuple[Control, ...] = ("one cell", "shuffled coordinates", "positions only", "random weights")


class EvaluatedData(Config):
    """A labelled data set."""

    path: str
    """h5ad with counts and labels."""
    keys: DataKeys = DataKeys(labels_key="cell_type", batch_key="batch")
    """Where they lie. With several batches each is left out in turn; with a spatial_key blocks of tissue are held out too."""
    um_per_unit: float | None = Field(None, gt=0)
    """Micrometres in a unit of the file's coordinates; None: not known, and distances are in the file's units."""
    guard: float | None = Field(None, ge=0)
    """Width, in the file's units, of the band around held-out tissue that is not learned from; None: 100 um, if units are known."""
    max_cells: int | None = Field(None, ge=1)
    """Largest sentence for this data set, instead of the recipe's: thousands of whole transcriptomes learn faster in smaller ones."""
    optimizer: OptimizerConfig | None = None
    """For this data set, instead of that of recipe and finetune: a small panel's steps cost little, and it needs more of them."""
    most_splits: int | None = Field(None, ge=1)
    """At most so many splits of each kind with one seed, the next seed takes the next ones; None: all."""
    bases: dict[str, str] = {}
    """Base models for this data set alone, {name: model folder or models:/NAME@ALIAS}; they must not have seen it."""

    @property
    def guard_units(self) -> float | None:
        """The guard band in the file's units; None when nobody knows."""
        if self.guard is not None or self.um_per_unit is None:
            return self.guard
        return GUARD_UM / self.um_per_unit

    @model_validator(mode="after")
    def _guard_known(self) -> Self:
        if self.keys.spatial_key is not None and self.guard_units is None:
            raise ValueError("blocks of tissue need a guard band: set guard in the units of the file, or um_per_unit if it is known")
        if self.keys.labels_key is None:
            raise ValueError("a protocol scores against labels: set keys.labels_key")
        return self


class Protocol(Config):
    """What both protocols are told."""

    kind: Literal["evaluate"] = "evaluate"
    """What this file configures."""
    protocol: Literal["full"] = "full"
    """That splits, baselines and controls are part of it; without this key a file scores one finished model."""
    data: dict[str, EvaluatedData] = {}
    """Data sets by name."""
    bases: dict[str, str] = {}
    """Base models for all data sets, {name: model folder or models:/NAME@ALIAS}; none may have seen the cells."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Each deals the splits and begins the networks anew."""
    fewest_cells: int = Field(FEWEST_CELLS, ge=1)
    """Types with fewer cells are left out."""
    out: str | None = None
    """Folder of ledger, pictures and report; None: $CELLPLANE_HOME/evaluations/<task>."""
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""

    def bases_for(self, dataset: str) -> dict[str, str]:
        """Base models by name for one data set, its own before those for all."""
        own = self.data[dataset].bases
        return own | {name: source for name, source in self.bases.items() if name not in own}


class AnnotationProtocol(Protocol):
    """Annotation from scratch and from bases, beside tuned baselines and controls, on the same splits."""

    task: Literal["annotate"] = "annotate"
    """What is scored."""
    recipe: AnnotationConfig = AnnotationConfig()
    """From scratch; its seed and keys are filled in."""
    finetune: AnnotationConfig = AnnotationConfig()
    """From a base."""
    probe: AnnotationConfig = AnnotationConfig(transfer=TransferConfig(learn="head"))
    """A linear head on a frozen base, or on random weights."""
    local_blocks: int = Field(1, ge=0)
    """Blocks over the nearest cells in the tissue, for a row of their own on data with coordinates; 0: no such row."""
    controls: tuple[Control, ...] = CONTROLS
    """Which controls are fitted."""
    control_seeds: tuple[int, ...] = (0,)
    """Seeds of controls, base models and the local row; those of `seeds` that stand here."""

    @model_validator(mode="after")
    def _probe_keeps_its_base(self) -> Self:
        if self.probe.transfer.learn != "head":
            raise ValueError("probe.transfer.learn must be head: a probe leaves its base as it is")
        return self

    @model_validator(mode="after")
    def _controls_run(self) -> Self:
        if not set(self.control_seeds) & set(self.seeds):
            raise ValueError("control_seeds: none of them is in seeds, so bases and controls would never run; name one of seeds")
        return self


class EmbeddingProtocol(Protocol):
    """Zero-shot embeddings by bases that never saw the cells, beside principal components, raw counts and random weights."""

    task: Literal["embed"] = "embed"
    """What is scored."""
