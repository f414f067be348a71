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


class WorkersConfig(Config):
    """Where the run's processes go."""

    count: int = Field(2, ge=1)
    """Workers; the result does not depend on it."""
    cpus: int = Field(1, ge=1)
    """CPUs, and torch threads, of each worker."""
    use_gpu: bool = False
    """One GPU for each worker."""
    max_failures: int = Field(2, ge=0)
    """Restarts from the newest checkpoint before the run is given up."""
    collective_timeout_s: int = Field(300, ge=1)
    """A worker that is not heard for so long counts as lost."""


class CheckpointConfig(Config):
    """When state is kept."""

    every_steps: int = Field(50, ge=1)
    """Steps between checkpoints; the last step is always kept."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay."""


class PretrainConfig(Config):
    """A masked pre-training run over Arrow shards."""

    references: ClassVar[Mapping[str, str]] = {"model": "model"}

    kind: Literal["pretrain"] = "pretrain"
    """What this file configures."""
    shards: str = ""
    """Folder written by `cellplane data convert`."""
    run: str = "pretrain"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    model: ModelConfig = ModelConfig()
    """The network, or the name of a file in configs/model/; gene and batch numbers come from the shards."""
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
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""
    register_as: str | None = None
    """Name in the model registry; None: the model is logged but not registered."""

    @model_validator(mode="after")
    def _something_to_recover(self) -> Self:
        if self.masking.cell_mask_rate == 0:
            raise ValueError("masking.cell_mask_rate is 0: nothing would be hidden, so nothing learned")
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
