"""What a search for a better recipe is told: where it starts, what it may change, and how much it may try."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cellplane.config import Config
from cellplane.errors import ConfigError


class Values(Config):
    """What one key may be: one of ``choices``, or a number between ``low`` and ``high``."""

    choices: tuple[Any, ...] | None = None
    """Drawn with equal chances."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    scale: Literal["linear", "log"] = "linear"
    """log: every factor of ten is as likely as the next."""
    integer: bool = False
    """Round to whole numbers."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ranged = self.low is not None and self.high is not None
        if (self.choices is None) != ranged or self.choices == ():
            raise ValueError("give choices, or low and high")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        if self.scale == "log" and self.low is not None and self.low <= 0:
            raise ValueError(f"a log scale needs low above 0, found {self.low}")
        return self

    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""
        if self.choices is not None:
            return self.choices[int(rng.integers(len(self.choices)))]
        assert self.low is not None
        assert self.high is not None
        if self.scale == "log":
            value = float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        else:
            value = float(rng.uniform(self.low, self.high))
        return round(value) if self.integer else float(f"{value:.4g}")


class TuneConfig(Config):
    """A search over the settings of a fine-tuning job."""

    once: ClassVar[tuple[str, ...]] = ("task", "base", "fixed", "space", "seed", "metric", "mode")  # what makes it another search

    kind: Literal["tune"] = "tune"
    """What this file configures."""
    task: str = "annotate"
    """What is learned: annotate, denoise, impute or perturb."""
    base: str = "annotate"
    """The fine-tuning configuration that everything else comes from: a file, or the name of a shipped one."""
    fixed: dict[str, Any] = {}
    """Keys of it that differ from that file, nested as there: {data: train.h5ad}; those that are also tried are trial 0's."""
    space: dict[str, Values] = {}
    """What is tried, by dotted key: {"optimizer.lr": {low: 5e-4, high: 2e-2, scale: log}}."""
    run: str = "tune"
    """Name of the search: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    trials: int = Field(12, ge=1)
    """How many recipes are tried, the base's own first; may be raised later."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the trials."""
    metric: str = "val/macro_f1"
    """Metric of the validation cells that decides."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    grace_steps: int = Field(50, ge=1)
    """No trial is stopped before so many steps."""
    reduction: float = Field(3.0, gt=1)
    """At every rung about one trial in so many goes on; rungs lie this factor apart."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at the same time; None: as many as the cluster's CPUs allow."""
    cpus: int = Field(1, ge=1)
    """CPUs, and torch threads, of each trial."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of each trial; half a GPU lets two share one."""
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""


def overrides_of(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= overrides_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_space(config: TuneConfig) -> None:
    """ConfigError when nothing is to be tried."""
    if not config.space:
        raise ConfigError('space is empty: name what to try, e.g. space: {"optimizer.lr": {low: 5e-4, high: 2e-2, scale: log}}')
