"""What the full protocols of denoising, imputation, perturbation and unknown types are told: data sets, recipes, seeds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cellplane.config import Config
from cellplane.data.company import Context
from cellplane.data.config import DataKeys
from cellplane.pipelines.config import AnnotationConfig, DenoisingConfig
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.protocol_config import EvaluatedData, Protocol

STRIP_UM = 50.0  # between the halves of one tissue (PROTOCOLS 6)


class DenoisingProtocol(Protocol):
    """Denoising by masking and by count splitting, beside tuned baselines; labels are not read."""

    task: Literal["denoise"] = "denoise"
    """What is scored."""
    recipe: DenoisingConfig = DenoisingConfig()
    """Ours, fitted anew to the thinned cells for every seed; its seed and keys are filled in."""
    finetune: DenoisingConfig | None = None
    """From a base, which brings its own network; None: as the recipe. The base must know every gene, or new_genes be add."""


class ImputedData(Config):
    """A spatial data set whose genes are hidden in folds, and the reference that they are imputed from."""

    path: str
    """h5ad of the spatial cells."""
    reference: str | None = None
    """h5ad of the single-cell reference; None: the left half of the tissue is the reference of the right one."""
    keys: DataKeys = DataKeys(spatial_key="spatial")
    """Where counts and coordinates of the spatial cells lie."""
    reference_keys: DataKeys = DataKeys()
    """Where the counts of the reference lie."""
    strip_um: float = Field(STRIP_UM, ge=0)
    """Width of the strip between the halves whose cells are left out, in units of the coordinates."""
    bases: dict[str, str] = {}
    """Base models for this data set alone, {name: model folder or models:/NAME@ALIAS}; they must not have seen either file."""


class ImputationProtocol(Protocol):
    """Imputation of shared genes, hidden from the query in folds, beside tuned baselines; labels are not read."""

    task: Literal["impute"] = "impute"
    """What is scored."""
    data: dict[str, ImputedData] = {}  # type: ignore[assignment]
    """Data sets by name."""
    gene_folds: int = Field(5, ge=2)
    """Parts of the shared genes, each hidden from the query once a seed."""
    recipe: ImputationConfig = ImputationConfig()
    """Ours; its keys, genes and seed are filled in."""
    finetune: ImputationConfig | None = None
    """From a base, which brings its own network; None: as the recipe."""


class ScreenData(Config):
    """A perturbation data set, and what is left out of training in turn."""

    path: str
    """h5ad of control and perturbed cells."""
    leave_out: Literal["perturbation", "cell_type"] = "perturbation"
    """Each perturbation, with combinations that hold it, or the perturbed cells of each cell type."""
    apart: tuple[str, ...] = ()
    """Perturbations that are told in a table of their own, such as enhancers, which are no genes."""
    recipe: PerturbationConfig = PerturbationConfig()
    """Ours, with the keys of this data set; its seed is filled in."""
    finetune: PerturbationConfig | None = None
    """From a base, which brings its own embedder and encoder; None: as the recipe."""
    bases: dict[str, str] = {}
    """Base models for this data set alone, {name: model folder or models:/NAME@ALIAS}; they must not have seen it."""


class PerturbationProtocol(Protocol):
    """Perturbations that were never seen, beside what needs no network, from controls that the truth does not use."""

    task: Literal["perturb"] = "perturb"
    """What is scored."""
    data: dict[str, ScreenData] = {}  # type: ignore[assignment]
    """Data sets by name."""


class StrangerData(EvaluatedData):
    """A labelled data set whose types are left out in turn."""

    types: tuple[str, ...] | None = None
    """Types that play the stranger; None: all that have the fewest cells or more."""


class UnknownProtocol(Protocol):
    """Cells of a type that was never learned, told from known ones by our score and by simple ones."""

    task: Literal["unknown"] = "unknown"
    """What is scored."""
    data: dict[str, StrangerData] = {}  # type: ignore[assignment]
    """Data sets by name; coordinates are not read."""
    contexts: tuple[Context, ...] = Field(("own", "self"), min_length=1)
    """In whose company the asked cells are read: beside one another, and each alone."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of every type's cells that are asked about; of a stranger with fewer than fewest_cells of them, all."""
    recipe: AnnotationConfig = AnnotationConfig()
    """From scratch, fitted anew without each type; its seed and keys are filled in."""
    finetune: AnnotationConfig | None = None
    """From a base, which brings its own network; None: as the recipe."""
