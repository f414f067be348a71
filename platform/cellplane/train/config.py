"""What a training run is told: optimizer, engine, workers, checkpoints, and the whole of a pre-training job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self, get_type_hints

from pydantic import Field, create_model, model_validator

from cellplane.config import Config
from cellplane.data.sentences import PlanConfig
from cellplane.model.config import MaskingConfig, ModelConfig


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate (2e-4: the released pre-training)."""
    weight_decay: float = Field(1e-8, ge=0)
    """Decoupled weight decay (1e-8: the released pre-training)."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or a cosine down to 0 at the last step."""
    clip: float = Field(2.0, gt=0)
    """Gradients are scaled down to at most this global norm (2.0: the released recipes)."""
    embedder_lr_scale: float = Field(1.0, gt=0)
    """The embedder's learning rate relative to the rest (fine-tuning: 0.1)."""

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...; a pure function, so that a resumed run needs no scheduler state."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class EngineConfig(Config):
    """What turns a loss into a step."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed with ZeRO, or plain PyTorch: the same numbers to rounding."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the workers: nothing, optimizer state, + gradients, + parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What DeepSpeed keeps in the host's memory instead of the device's: AdamW's state (ZeRO 1-3), or also parameters (ZeRO 3)."""
    bf16: bool = False
    """DeepSpeed (ZeRO 1-3) holds working weights and gradients in bfloat16, float32 masters beside them; half the memory and traffic."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.name == "torch" and (self.offload != "none" or self.bf16):
            asked = "bf16 (for products in bfloat16 set model.precision)" if self.bf16 else f"offload {self.offload}"
            raise ValueError(f"engine torch knows no {asked}; take engine.name deepspeed")
        if self.offload == "parameters" and self.zero_stage < 3:
            raise ValueError(f"offload parameters needs zero_stage 3, found {self.zero_stage}: only there are parameters shared out")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3: at 0 the optimizer is not DeepSpeed's")
        if self.bf16 and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1, 2 or 3; with one worker 1 is the same as 0")
        return self


class GuardConfig(Config):
    """What happens to a step whose numbers cannot be trusted."""

    max_skips: int = Field(10, ge=0)
    """Steps in a row whose loss or gradients are not finite (or spike) that are skipped before the run is given up; 0 = none."""
    spike_factor: float = Field(0.0, ge=0)
    """A gradient norm above this multiple of the running median is a spike and its step is skipped; 0 = never."""


class ValidationConfig(Config):
    """Sentences that training never sees, and how often their loss is looked at."""

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the sentences held out, chosen by the plan's seed; 0 = none."""
    every_steps: int = Field(100, ge=1)
    """Steps between looks; the last step is always looked at."""
    max_cells: int = Field(20_000, ge=1)
    """At most about so many held-out cells are looked at each time, always the same ones."""


class WorkersConfig(Config):
    """Where the run's processes go."""

    count: int = Field(2, ge=1)
    """Workers; the result does not depend on it."""
    min: int | None = Field(None, ge=1)
    """Elastic: as few workers as the run may shrink to when a node is lost; None = always `count`."""
    max: int | None = Field(None, ge=1)
    """Elastic: as many workers as it may grow to when nodes appear; None = `count`."""
    cpus: int = Field(1, ge=1)
    """CPUs, and torch threads, of each worker."""
    use_gpu: bool = False
    """One GPU for each worker."""
    max_failures: int = Field(2, ge=0)
    """Times in a row that workers may be lost without a new checkpoint in between before the run is given up."""
    collective_timeout_s: int = Field(300, ge=1)
    """A worker that does no step for so long counts as lost."""

    @property
    def least(self) -> int:
        """Workers without which nothing starts."""
        return self.count if self.min is None else self.min

    @property
    def most(self) -> int:
        """Workers that are never exceeded."""
        return self.count if self.max is None else self.max

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the run goes on."""
        return self.least < self.most

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.least > self.most:
            least, most = "min" if self.min is not None else "count", "max" if self.max is not None else "count"
            raise ValueError(f"{least} = {self.least} workers is more than {most} = {self.most}; for an elastic run set min <= max")
        return self


class CheckpointConfig(Config):
    """When state is kept."""

    every_steps: int = Field(50, ge=1)
    """Steps between checkpoints; the last step is always kept."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay."""
    keep_best: bool = True
    """Where there is a validation, the checkpoint with the lowest validation loss stays too."""
    asynchronous: bool = True
    """A thread writes while the next steps are computed; the state is copied first, so the file is that of its step. A kill
    before it is complete costs the interval before it too; false: the run waits, and a kill costs one interval at most."""
    format: Literal["consolidated", "sharded"] = "consolidated"
    """One verified file set for any engine and world size, or DeepSpeed's own shards (above ~3 B parameters)."""
    folder: str | None = None
    """Another place, where each run has a folder of its name; None = the run's own folder alone.

    A path (a relative one lies under $CELLPLANE_HOME) holds them instead; to an fsspec URL such as s3://bucket/runs they are
    copied once they are complete in the run's folder.
    """

    @model_validator(mode="after")
    def _one_place_for_shards(self) -> Self:
        if self.format == "sharded" and self.folder is not None and "://" in self.folder:
            raise ValueError(f"checkpoint.format sharded needs a folder that all workers see, {self.folder} is a URL; name a shared path")
        return self


class TransferConfig(Config):
    """What of a network learns in fine-tuning, and how fast."""

    learn: Literal["all", "head"] = "all"
    """Everything, or only what the task puts on top of the frozen base model: for annotation a linear probe, which is far faster."""
    frozen: tuple[Literal["embedder", "encoder", "latent", "decoder"], ...] = ()
    """Parts that stay as the base model has them."""
    block_lr_decay: float = Field(1.0, gt=0, le=1)
    """Each encoder block learns at this share of the rate of the block above it, the embedder below the first; 1 = all alike."""

    @property
    def plain(self) -> bool:
        """Whether everything learns at the rate of the optimizer's own settings."""
        return self == TransferConfig()


class FitConfig(Config):
    """How any task is fine-tuned: the part of its recipe that does not depend on the task."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    transfer: TransferConfig = TransferConfig()
    """What of the base model learns."""
    guard: GuardConfig = GuardConfig()
    """What is done about steps that are not finite."""
    validate_every: int = Field(10, ge=1)
    """Steps between two looks at the validation cells."""
    patience: int = Field(20, ge=1)
    """Looks without improvement before training ends; the best weights are kept."""
    seed: int = 0
    """Keys initialisation, split, masks and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network learns; auto takes a GPU where there is one."""


class PretrainConfig(Config):
    """A masked pre-training run over Arrow shards."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    kind: Literal["pretrain"] = "pretrain"
    """What this file configures."""
    shards: str = ""
    """Folder written by `cellplane data convert`, or its URL, such as s3://bucket/shards, which is mirrored here and checked."""
    run: str = "pretrain"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    model: ModelConfig = ModelConfig()
    """The network, or the name of a file in configs/model/; gene and batch numbers come from the shards."""
    gene_start: Literal["random", "components"] = "random"
    """Where gene vectors begin: at random, as released, or at main directions of the training cells, for short runs."""
    components: int = Field(50, ge=1)
    """At most so many of them, with gene_start components."""
    masking: MaskingConfig = MaskingConfig()
    """What is dropped and hidden."""
    plan: PlanConfig = PlanConfig()
    """How sentences are packed into steps; its seed keys all randomness."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed or plain PyTorch."""
    workers: WorkersConfig = WorkersConfig()
    """Processes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """State kept on the way."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out sentences."""
    guard: GuardConfig = GuardConfig()
    """What is done about steps that are not finite."""
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""
    register_as: str | None = None
    """Name in the model registry; None: the model is logged but not registered."""
    purpose: str | None = None
    """What the model is for, in a sentence: it stands in its card."""

    @model_validator(mode="after")
    def _something_to_recover(self) -> Self:
        if self.masking.cell_mask_rate == 0:
            raise ValueError("masking.cell_mask_rate is 0: nothing would be hidden, so nothing learned")
        return self

    @model_validator(mode="after")
    def _somebody_who_writes_shards(self) -> Self:
        if self.checkpoint.format == "sharded" and self.engine.name == "torch":
            raise ValueError("checkpoint.format sharded are DeepSpeed's own files: take engine.name deepspeed, or format consolidated")
        if self.checkpoint.format == "sharded" and self.workers.elastic:
            raise ValueError("checkpoint.format sharded fits one number of workers: leave out workers.min and max, or take consolidated")
        return self


def _model_file() -> type[Config]:
    hints = get_type_hints(ModelConfig)
    keys: dict[str, Any] = {field.name: (hints[field.name], field.default) for field in fields(ModelConfig)}

    def check(values: Config) -> Config:
        ModelConfig(**values.model_dump())
        return values

    validators: dict[str, Any] = {"check": model_validator(mode="after")(check)}
    return create_model("ModelFile", __base__=Config, __validators__=validators, **keys)


ModelFile = _model_file()  # a file of configs/model: the keys of ModelConfig, checked as a configuration of its own
