"""Fine-tuning any task by the one training loop: what learns and how fast, looks at held-out cells, the best weights.

A task brings a network whose forward gives a loss, an Objective that prepares its cells, and a `look` at cells that are
not trained on. Everything else is the loop that pre-training runs: same guard, same checkpoints, same journal. What is
remembered of the best look travels in every checkpoint, so a fit that was killed goes on exactly and ends alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cellplane.data.sentences import StepPlan
from cellplane.errors import ConfigError
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import FitConfig, TransferConfig
from cellplane.train.engine import TorchEngine
from cellplane.train.loop import Keeping, Looking, train
from cellplane.train.objective import Objective, Work
from cellplane.train.optimizer import trainable
from cellplane.train.step import StepResult

Progress = Callable[[int, Mapping[str, float]], None]  # (steps done, metrics of the newest)
BEST = "best"  # what a state's `extra` holds of the best look, and the prefix of its weights among the tensors


@dataclass(frozen=True)
class Look:
    """What was seen of cells that are not trained on: ``metrics`` val/..., and a ``score``, compared in order, larger is better."""

    metrics: Mapping[str, float]
    score: tuple[float, ...]


@dataclass(frozen=True)
class Course:
    """What goes along with a fit: who is told of every step, and where it is kept so that it can go on after a kill."""

    progress: Progress | None = None
    keeping: Keeping | None = None


@dataclass(frozen=True)
class Best:
    """The weights of the best look, on the CPU, after which ``step`` they were seen, and its ``score``.

    Step 0 and an empty score: no look found anything finite, and the weights are those of the beginning. ``history`` has
    the metrics of every step; ``steps`` were taken in all.
    """

    weights: dict[str, Tensor]
    step: int
    score: tuple[float, ...]
    history: list[dict[str, float]]
    steps: int


def finetune(
    network: nn.Module, objective: Objective, plan: StepPlan, recipe: FitConfig, look: Callable[[], Look], course: Course | None = None
) -> Best:
    """Trains until nothing gets better or the steps are done, and answers the best weights; the network is left as it ended.

    ``look`` is asked every `validate_every` steps and after the last one, on every rank. With a `keeping` the fit goes on
    from its newest valid checkpoint. Raises ConfigError when nothing is left to learn, and what `train` raises.
    """
    course = Course() if course is None else course
    restrict(network, recipe.transfer)
    network.to(device_named(recipe.device))
    state = None if course.keeping is None else course.keeping.checkpoints.newest_valid(course.keeping.identity)
    done = 0 if state is None else state.step
    engine = TorchEngine(network, recipe.optimizer, state, recipe.guard)
    watch = _Watch(network, recipe, look, course.progress)
    keeping = None if course.keeping is None else _begin(course.keeping, watch, done)
    if state is not None:
        watch.restore(state)
    if not watch.over:
        done = train(_Remembering(engine, watch), objective, plan, range(done, recipe.optimizer.steps), keeping, watch)
    if keeping is not None:
        keeping.checkpoints.wait()
    return Best({name: tensor.cpu() for name, tensor in watch.weights.items()}, watch.step, watch.score, watch.history, done)


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda`, or whichever there is for `auto`; ConfigError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device is cuda, but torch sees no GPU here; take device: auto or cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def restrict(network: nn.Module, transfer: TransferConfig) -> None:
    """Freezes what must not learn, and gives the encoder's blocks and the embedder their share of the learning rate.

    `learn: head` freezes the embedder and the encoder, and the latent space where there is a decoder on top of it. Raises
    ConfigError for a frozen part that the network does not have, or when nothing is left to learn.
    """
    frozen: set[str] = set(transfer.frozen)
    if absent := sorted(name for name in frozen if getattr(network, name, None) is None):
        raise ConfigError(f"transfer.frozen names the {absent[0]}, which this network does not have; leave it out")
    if transfer.learn == "head":
        frozen |= {"embedder", "encoder"} | ({"latent"} if getattr(network, "decoder", None) is not None else set())
    scales = _scales([name for name, _ in network.named_parameters()], transfer.block_lr_decay)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.split(".")[0] not in frozen)
        parameter.lr_scale = scales.get(_layer(name), 1.0)  # type: ignore[attr-defined]
    if not trainable(network):
        raise ConfigError("nothing is left to learn: transfer.frozen and transfer.learn freeze every part of the network")


def _layer(name: str) -> str:
    """The encoder block a parameter belongs to, or its part of the network."""
    part, *rest = name.split(".")
    return ".".join([part, *rest[:2]]) if part == "encoder" and rest[0] in ("blocks", "local") else part


def _scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """Share of the learning rate of every encoder block, the last one 1, and of the embedder below them."""
    blocks = list(dict.fromkeys(layer for name in names if (layer := _layer(name)).startswith("encoder.")))
    return {layer: decay**depth for depth, layer in enumerate([*reversed(blocks), "embedder"])}


def _begin(keeping: Keeping, watch: _Watch, done: int) -> Keeping:
    """The keeping of this fit: its journal cut at the restored step, what it tells already in the history."""
    if keeping.journal is not None:
        keeping.journal.cut(done)
        for row in keeping.journal.rows():
            watch.write_down(row.step, row.metrics)
    return replace(keeping, looking=Looking(watch.recipe.validate_every, watch.looked))


@dataclass
class _Watch:
    """Looks when it is time, keeps the best weights, and says when to stop; after every step, on every rank."""

    network: nn.Module
    recipe: FitConfig
    look: Callable[[], Look]
    progress: Progress | None
    history: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(init=False)
    step: int = 0  # after which the best weights were seen
    score: tuple[float, ...] = ()
    waited: int = 0  # looks without improvement since
    _newest: tuple[int, Mapping[str, float]] = (-1, {})  # the last look, and after how many steps

    def __post_init__(self) -> None:
        self.weights = self._copied()

    def __call__(self, done: int, result: StepResult) -> bool:
        """True when `patience` looks brought nothing better."""
        due = done % self.recipe.validate_every == 0 or done == self.recipe.optimizer.steps
        parts = {f"train/{name}": value for name, value in result.parts.items()}
        metrics = {"train/loss": result.loss, **parts, "train/grad_norm": result.grad_norm, "train/lr": result.lr}
        metrics |= self.looked(done) if due else {}
        self.write_down(done, metrics)
        if self.progress is not None:
            self.progress(done, metrics)
        return self.over

    @property
    def over(self) -> bool:
        """Whether training should end here."""
        return self.waited >= self.recipe.patience

    def write_down(self, done: int, metrics: Mapping[str, float]) -> None:
        """Adds to the history of a step."""
        if not self.history or self.history[-1]["step"] != done:
            self.history.append({"step": float(done)})
        self.history[-1].update(metrics)

    def looked(self, done: int) -> Mapping[str, float]:
        """Metrics of the look after so many steps; looks and judges only once."""
        if self._newest[0] != done:
            look = self.look()
            self._newest = (done, look.metrics)
            self._judge(done, look.score)
        return self._newest[1]

    def _judge(self, done: int, score: tuple[float, ...]) -> None:
        better = all(map(math.isfinite, score)) and (not self.score or score > self.score)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.weights, self.step, self.score = self._copied(), done, score

    def _copied(self) -> dict[str, Tensor]:
        """The network's weights as they are now; what is frozen never changes and is not copied."""
        frozen = {name for name, parameter in self.network.named_parameters() if not parameter.requires_grad}
        state = self.network.state_dict()
        return {name: tensor.detach() if name in frozen else tensor.detach().clone() for name, tensor in state.items()}

    def remember(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint holds: JSON-ready values, and the best of the weights that learn."""
        learned = {name for name, _ in trainable(self.network)}
        tensors = {f"{BEST}:{name}": tensor for name, tensor in self.weights.items() if name in learned}
        return {"step": self.step, "score": list(self.score), "waited": self.waited}, tensors

    def restore(self, state: TrainingState) -> None:
        """Takes up what the checkpoint remembers; the network holds the state's weights already."""
        known = state.extra[BEST]
        self.step, self.waited = int(known["step"]), int(known["waited"])
        self.score = tuple(map(float, known["score"]))
        self.weights = self._copied()
        for name, _ in trainable(self.network):
            self.weights[name].copy_(state.optimizer[f"{BEST}:{name}"])


class _Remembering:
    """The engine, whose checkpoints also hold the best look."""

    def __init__(self, engine: TorchEngine, watch: _Watch) -> None:
        self.engine, self.watch = engine, watch
        self.rank, self.world_size, self.model = engine.rank, engine.world_size, engine.model

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """See Engine."""
        return self.engine.step(works, total, step)

    def state(self, step: int, identity: str) -> TrainingState:
        """See Engine."""
        state = self.engine.state(step, identity)
        if self.rank:
            return state
        known, tensors = self.watch.remember()
        return replace(state, optimizer={**state.optimizer, **tensors}, extra={**state.extra, BEST: known})
