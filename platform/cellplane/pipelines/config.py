"""What fine-tuning a task is told; defaults are the released recipes with their faults mended (MODEL.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from cellplane.config import Config
from cellplane.data.config import DataKeys
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.train.config import CheckpointConfig, FitConfig, OptimizerConfig

SMALL_DECODING = ModelConfig(  # for a few thousand cells and genes, learned from scratch in a minute
    width=64,
    n_heads=2,
    n_blocks=1,
    latent="ae",
    latent_width=32,
    decoder_width=64,
    decoder_bottleneck=32,
    dropout=0.0,
    gene_init_sd=0.1,
)


class UnknownConfig(Config):
    """How cells of types that were never learned are told and treated; see `pipelines.unknown`."""

    reject: bool = False
    """Call them "unknown" instead of the nearest known type; their score is written either way. No type may be called so then."""
    refusal_rate: float = Field(0.05, gt=0, lt=1)
    """Share of cells of KNOWN types that may be refused: the threshold is set on cells that were not trained on."""
    entropy_share: float | None = Field(None, ge=0, le=1)
    """Share of the probabilities' entropy in the score, the rest is distance; None: learned, each type playing the stranger."""
    space: Literal["expression", "z"] = "expression"
    """Where distance is measured: 20 components of expression, or the network's embedding, which strangers fall together in."""
    neighbours: int = Field(15, ge=1)
    """Nearest training cells of the predicted class whose distance counts."""
    cells_per_class: int = Field(200, ge=1)
    """Training cells kept in the model for that, at most so many of each class."""


class HierarchyConfig(Config):
    """Broader names for cells whose type is unsure."""

    parents: dict[str, str] = {}
    """{label: broader name, broader name: one above it, ...} up to one root; empty: no broader names."""
    threshold: float = Field(0.8, gt=0.5, le=1)
    """The deepest name whose summed probability reaches this is answered; above one half, so that it is one."""


class VotingConfig(Config):
    """Method `neighbours`: the nearest training cells in the base model's embedding vote."""

    neighbours: int = Field(15, ge=1)
    """How many vote."""
    cells_per_class: int = Field(2000, ge=1)
    """Training cells kept in the model, at most so many of each class."""


class AnnotationConfig(FitConfig):
    """How `CellTypeAnnotationPipeline.fit` learns."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    keys: DataKeys = DataKeys(labels_key="cell_type")
    """Where counts, labels, batches and coordinates lie."""
    model: ModelConfig = ModelConfig(width=128, n_heads=4, n_blocks=2, latent_width=64, dropout=0.2)
    """The network when no base model is given; a base model brings its own encoder."""
    new_genes: Literal["leave_out", "add"] = "leave_out"
    """Genes of the data that the base model does not know: left out, or added, beginning as the mean of those it knows."""
    gene_start: Literal["random", "components"] = "random"
    """Where gene vectors begin without a base model: at random, as released, or at principal components of the training cells."""
    components: int = Field(60, ge=1)
    """At most so many of them, with gene_start components."""
    masking: MaskingConfig = MaskingConfig(drop_cell_rate=0.3, cell_mask_rate=0.75)
    """Cells left out and genes hidden in every step, against overfitting; a linear probe (transfer.learn: head) does without."""
    optimizer: OptimizerConfig = OptimizerConfig(steps=400, lr=5e-3, weight_decay=1e-7, warmup_steps=30, embedder_lr_scale=0.1)
    """AdamW: 5e-3, embedder a tenth of it, warm-up of 30 steps (released recipe)."""
    head_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout before the linear head (released recipe)."""
    members: int = Field(1, ge=1)
    """Networks fitted from as many seeds, whose probabilities are averaged: slower by that factor, and better where cells are few.
    Each has validation cells of its own, and the first alone is calibrated: the mean claims rather less than it could. With
    unknown.reject all share them, so that confidence and the threshold are those of the mean, which none of these cells taught."""
    linear: bool = False
    """A logistic regression on log counts answers with the network, tuned within the training cells; the validation cells set its share."""
    max_cells: int = Field(2048, ge=1)
    """Largest sentence, in training and prediction."""
    validation_share: float = Field(0.15, gt=0, lt=1)
    """Share of the TRAINING cells that choose the best step, calibrate and set the threshold; see validation."""
    validation: Literal["random", "blocks"] = "random"
    """Which those are: the same share of every label at random, or whole tiles of tissue (needs keys.spatial_key), 64 a sample."""
    unlabelled: Literal["leave_out", "company"] = "leave_out"
    """Cells of the data without a label: left out (inductive), or in the training sentences as company whose types nobody tells
    (transductive): the network learns among the cells that it will be asked about."""
    method: Literal["network", "neighbours"] = "network"
    """Fine-tune the network, or train nothing: label transfer by the nearest training cells in the base model's embedding."""
    voting: VotingConfig = VotingConfig()
    """With method neighbours."""
    calibrate: bool = True
    """Scale the probabilities by a temperature learned on the validation cells, so that confidence is honest; no label changes."""
    unknown: UnknownConfig = UnknownConfig()
    """Cells of types that were never learned."""
    hierarchy: HierarchyConfig = HierarchyConfig()
    """Broader names for unsure cells."""
    hierarchy_file: str | None = None
    """YAML or JSON file of {label: broader name or names}, or an ontology's .obo file, instead of hierarchy.parents."""


class SmoothingConfig(Config):
    """The counts of similar cells that a denoiser mixes with what its network says; see `artifact.smoothing`.

    Whatever has several values is chosen in fit, by foretelling counts that were taken out of the validation cells.
    """

    share: tuple[float, ...] = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
    """Share of the neighbours in the answer, between 0 and 1; (0.0,) leaves the network alone."""
    neighbours: tuple[int, ...] = (15, 30)
    """Nearest cells that a step of the walk goes to."""
    steps: tuple[int, ...] = (1, 2, 3, 4)
    """Length of the walk."""
    components: int = Field(50, ge=1)
    """Main components of expression in which cells are near to one another."""
    kept_cells: int = Field(5000, ge=2)
    """Training cells that stay with the model, counts and all, for every later answer; chosen by the seed."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if not (self.share and self.neighbours and self.steps):
            raise ValueError("share, neighbours and steps need at least one value each; share: [0.0] leaves the network alone")
        if not all(0 <= share <= 1 for share in self.share):
            raise ValueError(f"share {list(self.share)}: shares lie between 0 and 1")
        if min(*self.neighbours, *self.steps) < 1:
            raise ValueError(f"neighbours {list(self.neighbours)} and steps {list(self.steps)} are whole numbers from 1 on")
        return self


class DenoisingConfig(FitConfig):
    """How `DenoisingPipeline.fit` learns: hidden counts of the same cells are recovered, zeros included."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    keys: DataKeys = DataKeys()
    """Where counts, batches and coordinates lie. With a batch_key the decoder is told each cell's batch."""
    model: ModelConfig = replace(SMALL_DECODING, dropout=0.1)
    """The network when no base model is given; a base model brings its own, decoder included."""
    new_genes: Literal["leave_out", "add"] = "leave_out"
    """Genes of the data that the base model does not know: left out (and not denoised), or added as the mean of those it knows."""
    masking: MaskingConfig = MaskingConfig(drop_cell_rate=0.0, cell_mask_rate=1.0, gene_mask="fixed", gene_mask_rate=0.25)
    """What every step hides: a quarter of all entries, zeros included. Hiding non-zeros alone would learn E[x | x > 0]."""
    hidden_weight: float = Field(1.0, gt=0)
    """Weight of the likelihood of a hidden entry."""
    seen_weight: float = Field(0.1, ge=0)
    """Weight of the likelihood of an entry that was not hidden."""
    smoothing: SmoothingConfig = SmoothingConfig()
    """Similar cells whose counts are mixed with what the network says."""
    optimizer: OptimizerConfig = OptimizerConfig(steps=200, lr=5e-3, weight_decay=1e-6, warmup_steps=20)
    """AdamW."""
    max_cells: int = Field(512, ge=1)
    """Largest sentence, in training and prediction."""
    cells_per_step: int = Field(512, ge=1)
    """Sentences are packed until a step would exceed this many cells; a longer sentence is a step of its own."""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of the cells whose hidden entries only choose the best step; chosen by the seed."""

    @model_validator(mode="after")
    def _weights_in_order(self) -> Self:
        if self.seen_weight > self.hidden_weight:
            raise ValueError(f"seen_weight {self.seen_weight} is more than hidden_weight {self.hidden_weight}: copying would be learned")
        if self.masking.cell_mask_rate == 0:
            raise ValueError("masking.cell_mask_rate is 0: nothing would be hidden, so nothing learned")
        if self.model.decoder != "negative_binomial":
            raise ValueError(
                f"denoising learns the likelihood of counts: model.decoder must be negative_binomial, not {self.model.decoder}"
            )
        return self


class JobConfig(Config):
    """What a fine-tuning job of any task is told beside its recipe: data, base model, its place in tracker and registry.

    ``inputs`` are the keys that name files whose content makes the model, ``indifferent`` those that do not change it,
    ``renamed`` keys of the recipe that have another name here.
    """

    inputs: ClassVar[tuple[str, ...]] = ("data",)
    indifferent: ClassVar[tuple[str, ...]] = ("tracking_uri", "register_as")
    renamed: ClassVar[Mapping[str, str]] = {}

    kind: Literal["finetune"] = "finetune"
    """What this file configures."""
    data: str = ""
    """h5ad with the training cells."""
    base_model: str | None = None
    """Model folder or models:/NAME@ALIAS to start from; None trains from scratch."""
    run: str = "finetune"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    checkpoint: CheckpointConfig = CheckpointConfig(keep=1, keep_best=False)
    """State kept on the way, so that a job that was killed goes on; the best weights are part of each."""
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""
    register_as: str | None = None
    """Name in the model registry; None: the model is logged but not registered."""

    @model_validator(mode="after")
    def _consolidated(self) -> Self:
        if self.checkpoint.format != "consolidated":
            raise ValueError("fine-tuning runs in one process and writes checkpoint.format consolidated alone")
        return self


class PanelConfig(Config):
    """Cells that a model carries so that a lone one can be read in company; see `pipelines.panel`."""

    cells: int = Field(0, ge=0)
    """How many; 0 = none. At most half of the model's largest sentence."""
    origin: Literal["centroids", "cells"] = "centroids"
    """centroids: counts drawn from averages of clusters, nobody's; cells: real training cells, which then travel with the model."""
    seed: int = 0
    """Of clusters and draws."""


class FinetuneConfig(AnnotationConfig, JobConfig):
    """A fine-tuning job of an annotator."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "hierarchy_file")
    indifferent: ClassVar[tuple[str, ...]] = (*JobConfig.indifferent, "test")

    task: Literal["annotate"] = "annotate"
    """What is learned."""
    test: str | None = None
    """h5ad of held-out labelled cells: scored beside the baselines when training is done."""
    panel: PanelConfig = PanelConfig()
    """Reference cells that the model carries, so that a lone cell can be read in company."""


class DenoiseJobConfig(DenoisingConfig, JobConfig):
    """A fine-tuning job of a denoiser."""

    indifferent: ClassVar[tuple[str, ...]] = (*JobConfig.indifferent, "evaluate")

    task: Literal["denoise"] = "denoise"
    """What is learned."""
    run: str = "denoise"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    evaluate: bool = False
    """Also score the recipe by masking and by count splitting, beside the baselines: it is fitted twice more, on thinned cells."""


class EvaluateConfig(Config):
    """Scoring a fine-tuned model and its baselines on held-out cells."""

    kind: Literal["evaluate"] = "evaluate"
    """What this file configures."""
    task: Literal["annotate"] = "annotate"
    """What is scored."""
    model: str = ""
    """Model folder or models:/NAME@ALIAS."""
    train: str = ""
    """h5ad the model was fine-tuned on: the baselines learn from the same cells."""
    test: str = ""
    """h5ad of held-out labelled cells."""
    keys: DataKeys = DataKeys(labels_key="cell_type")
    """Where counts and labels lie; what is not named here lies as in the cells that the model learned."""
    seed: int = 0
    """Seed of the baselines."""
    out: str | None = None
    """Folder for scores and plots; None: $CELLPLANE_HOME/evaluations/<model checksum>."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered model."""


class DenoiseEvaluation(Config):
    """Scoring a denoiser by hiding counts of the cells it is given; fine-tuned as it is, without learning these cells."""

    kind: Literal["evaluate"] = "evaluate"
    """What this file configures."""
    task: Literal["denoise"] = "denoise"
    """What is scored."""
    model: str = ""
    """Model folder or models:/NAME@ALIAS: a denoiser, or a base model (zero-shot)."""
    data: str = ""
    """h5ad of the cells."""
    keys: DataKeys = DataKeys()
    """Where counts, batches and coordinates lie; what is not named here lies as in the cells that the model learned."""
    refit: bool = False
    """Fine-tune the model on the thinned cells first, as in use; else it is asked as it is."""
    recipe: DenoisingConfig = DenoisingConfig()
    """How, when refitting."""
    seed: int = 0
    """Chooses what is hidden."""
    out: str | None = None
    """Folder for the scores; None: $CELLPLANE_HOME/evaluations/<model checksum>-denoise."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered model."""
