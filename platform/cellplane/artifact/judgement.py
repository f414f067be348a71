"""How an annotator words its answer: honest probabilities, "unknown", and a broader name when it is unsure.

What `fit` learned about the network's own answers, kept in the model folder beside the weights: a temperature (Guo et
al., ICML 2017), reference cells with the rule that tells strangers from known types, and a tree of labels. Nothing here
runs the network: notebook, job and endpoint hand over its logits and z, and get the same words.
"""

# C cells, G genes, K classes, N reference cells, Z width of the space that distances are measured in, F features

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from cellplane.artifact.folder import JUDGEMENT, JUDGEMENT_CELLS, pack_tensors, unpack_tensors
from cellplane.artifact.linear import Linear
from cellplane.artifact.space import Space, nearest_columns, sixteen_bits
from cellplane.cells import CellBatch
from cellplane.errors import DataError, FileFormatError

UNKNOWN = "unknown"  # the label of a cell that shows the model no counts, or that is refused
RULE = ("centre", "spread", "weights")
CELLS_AT_A_TIME = 512  # whose distances to all reference cells are in memory: 40 MB at 20,000 of them


@dataclass(frozen=True, eq=False)
class Reference:
    """Training cells that answers are compared with: their place ``z`` [N, Z], ``label`` [N] position of the class, ``scale`` [K].

    ``scale`` is the median, over a class's own cells, of the mean distance to the ``neighbours`` nearest others of it.
    """

    z: NDArray[np.float32]
    label: NDArray[np.int64]
    scale: NDArray[np.float32]
    neighbours: int

    @cached_property
    def _of_class(self) -> list[NDArray[np.float32]]:
        return [self.z[self.label == index] for index in range(len(self.scale))]

    def distance_ratios(self, z: NDArray[np.float32], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean distance of each cell to the nearest reference cells of its predicted class, in that class's scale, [C]."""
        out = np.zeros(len(z))
        for index in np.unique(predicted):
            rows = np.flatnonzero(predicted == index)
            out[rows] = mean_distance(z[rows], self._of_class[index], self.neighbours) / self.scale[index]
        return out

    def votes(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logarithm of each class's smoothed share among the nearest reference cells, [C, K]: one vote is dealt to all classes."""
        k, classes = min(self.neighbours, len(self.z)), len(self.scale)
        out = np.zeros((len(z), classes), dtype=np.float32)
        for start in range(0, len(z), CELLS_AT_A_TIME):
            part = slice(start, start + CELLS_AT_A_TIME)
            nearest = nearest_columns(cdist(z[part], self.z), k)
            counted = (self.label[nearest][:, :, None] == np.arange(classes)).sum(1)
            out[part] = np.log((counted + 1 / classes) / (k + 1))
        return out


@dataclass(frozen=True, eq=False)
class StrangerRule:
    """Score u = sum of ``weights`` x (feature - ``centre``) / ``spread``, [F] each; larger is stranger.

    ``known`` are the scores of known cells that were not trained on, ascending: u is refused above their quantile.
    """

    centre: NDArray[np.float64]
    spread: NDArray[np.float64]
    weights: NDArray[np.float64]
    known: NDArray[np.float64]

    def scores(self, features_CF: NDArray[np.float64]) -> NDArray[np.float32]:
        """u of every cell, [C]."""
        u: NDArray[np.float32] = ((features_CF - self.centre) / self.spread @ self.weights).astype(np.float32)
        return u

    def threshold(self, refusal_rate: float) -> float:
        """The score above which about this share of known cells lies; infinite where they are too few to say."""
        rank = math.ceil((len(self.known) + 1) * (1 - refusal_rate))  # the conformal quantile: right on average at any size
        return float(self.known[rank - 1]) if rank <= len(self.known) else math.inf


@dataclass(frozen=True)
class Tree:
    """Labels and what is above them: ``parents`` {child: parent}, one root. A name passes with this summed probability."""

    parents: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.8

    def path(self, name: str) -> list[str]:
        """The label and everything above it, the root last."""
        out = [name]
        while out[-1] in self.parents:
            out.append(self.parents[out[-1]])
        return out

    def members(self, classes: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        """For every name at or above a class: which classes it means, [K]."""
        paths = [self.path(name) for name in classes]
        return {node: np.array([node in path for path in paths]) for node in {name for path in paths for name in path}}


@dataclass(frozen=True, eq=False)
class Judgement:
    """What is known of a model's answers; the default takes them as they are, as models saved before this was learned.

    ``reference`` lies in ``space``, or in z where that is None. ``voters`` (in z): the classes come from their vote, the
    network has no head. ``linear`` answers together with either. ``reject``: strangers are called unknown, at
    ``refusal_rate`` of the known cells.
    """

    temperature: float = 1.0
    reference: Reference | None = None
    rule: StrangerRule | None = None
    space: Space | None = None
    voters: Reference | None = None
    tree: Tree = Tree()
    reject: bool = False
    refusal_rate: float = 0.05
    linear: Linear | None = None

    @classmethod
    def of(cls, attachments: Mapping[str, bytes]) -> Judgement:
        """The judgement of a model folder; FileFormatError when it is not readable."""
        if JUDGEMENT not in attachments:
            return cls()
        try:
            plain = json.loads(attachments[JUDGEMENT])
            cells = {name: tensor.numpy() for name, tensor in unpack_tensors(attachments[JUDGEMENT_CELLS]).items()}
            return cls(
                reference=_reference(cells, "reference", plain["neighbours"]),
                rule=StrangerRule(known=cells["known"], **{name: np.array(plain["rule"][name]) for name in RULE}),
                space=Space(cells["axes"].astype(np.float32), cells["mean"], plain["total"]) if "axes" in cells else None,
                voters=_reference(cells, "voters", plain["voting"]) if plain["voting"] else None,
                linear=Linear.of(plain["linear"], cells) if "linear" in plain else None,
                tree=Tree(plain["tree"]["parents"], plain["tree"]["threshold"]),
                **{name: plain[name] for name in ("temperature", "reject", "refusal_rate")},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{JUDGEMENT} is not readable: {error!r}; restore the model folder from where it came") from error

    def attachments(self) -> dict[str, bytes]:
        """The same as files of a model folder; cells and axes in 16 bits, so they are made to be such before they are used."""
        if self.reference is None or self.rule is None:
            return {}
        plain: dict[str, Any] = {
            "temperature": self.temperature,
            "reject": self.reject,
            "refusal_rate": self.refusal_rate,
            "neighbours": self.reference.neighbours,
            "voting": self.voters.neighbours if self.voters is not None else 0,
            "total": self.space.total if self.space is not None else 0.0,
            "tree": asdict(self.tree),
            "rule": {name: getattr(self.rule, name).tolist() for name in RULE},
        }
        plain |= {} if self.linear is None else {"linear": self.linear.plain()}
        columns = {"known": self.rule.known, **_columns(self.reference, "reference")}
        columns |= {} if self.voters is None else _columns(self.voters, "voters")
        columns |= {} if self.linear is None else self.linear.columns()
        columns |= {} if self.space is None else {"axes": sixteen_bits(self.space.axes), "mean": self.space.mean}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        return {JUDGEMENT: (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode(), JUDGEMENT_CELLS: pack_tensors(tensors)}

    def probabilities(
        self, logits: NDArray[np.float32] | None, z: NDArray[np.float32], batch: CellBatch | None = None
    ) -> NDArray[np.float32]:
        """Calibrated probability of every class, [C, K], from the head's logits or, without a head, the neighbours' vote.

        A ``linear`` member reads the counts of the ``batch``. DataError without it, and for a model that names no types.
        """
        if self.voters is not None:
            logits = self.voters.votes(z)
        if logits is None:
            raise DataError("the model has neither an annotation head nor reference cells: it cannot name cell types")
        if self.linear is not None:
            if batch is None:
                raise DataError("this model's linear member reads counts: pass the batch that the logits are of")
            logits = self.linear.mixed(logits, batch)
        proba: NDArray[np.float32] = torch.from_numpy(logits / np.float32(self.temperature)).softmax(-1).numpy()
        return proba

    def unknown_scores(self, proba: NDArray[np.float32], z: NDArray[np.float32], batch: CellBatch) -> NDArray[np.float32] | None:
        """How strange each cell of the batch is, [C], larger is stranger, without bounds; None where that was not learned."""
        if self.reference is None or self.rule is None:
            return None
        places = z if self.space is None else self.space.places(batch)
        return self.rule.scores(stranger_features(proba, places, self.reference))

    def words(
        self, proba: NDArray[np.float32], scores: NDArray[np.float32] | None, classes: Sequence[str]
    ) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Label and confidence of every cell, [C] each: the best class, a broader name, or unknown.

        The confidence of a broader name is its summed probability. DataError when strangers are to be refused by a model
        that never learned to tell them.
        """
        best = proba.argmax(1) if len(proba) else np.zeros(0, dtype=np.int64)
        labels, confidence = np.array(classes, dtype=object)[best], proba.max(1, initial=0.0)
        if self.tree.parents:
            labels, confidence = _broader(self.tree, proba, classes)
        if self.reject:
            if scores is None or self.rule is None:
                raise DataError("this model was fitted before strangers could be refused; fit it again, or leave reject off")
            labels = np.where(scores > self.rule.threshold(self.refusal_rate), UNKNOWN, labels).astype(object)
        return labels, confidence


def _columns(cells: Reference, name: str) -> dict[str, NDArray[Any]]:
    return {f"{name}.z": sixteen_bits(cells.z), f"{name}.label": cells.label.astype(np.int32), f"{name}.scale": cells.scale}


def _reference(columns: Mapping[str, NDArray[Any]], name: str, neighbours: int) -> Reference:
    z, label, scale = (columns[f"{name}.{part}"] for part in ("z", "label", "scale"))
    return Reference(z.astype(np.float32), label.astype(np.int64), scale, neighbours)


def stranger_features(proba: NDArray[np.float32], z: NDArray[np.float32], reference: Reference) -> NDArray[np.float64]:
    """What strangers are told by, [C, F]: entropy of the probabilities (1 = all classes alike), log of the distance ratio."""
    p = proba.astype(np.float64).clip(1e-12)
    entropy = -(p * np.log(p)).sum(1) / math.log(max(p.shape[1], 2))
    predicted = p.argmax(1) if len(p) else np.zeros(0, dtype=np.int64)
    return np.stack([entropy, np.log(reference.distance_ratios(z, predicted).clip(1e-6))], axis=1)


def mean_distance(z: NDArray[np.float32], to: NDArray[np.float32], neighbours: int, *, itself: bool = False) -> NDArray[np.float64]:
    """Mean distance of each cell to its nearest ``to``, [C]; with ``itself`` the cells are among them, and do not count.

    NaN where there is no other cell.
    """
    out = np.full(len(z), np.nan)
    k = min(neighbours, len(to) - itself)
    for start in range(0, len(z) if k > 0 else 0, CELLS_AT_A_TIME):
        part = slice(start, start + CELLS_AT_A_TIME)
        out[part] = np.partition(cdist(z[part], to), k - 1 + itself, axis=1)[:, : k + itself].sum(1) / k
    return out


def _broader(tree: Tree, proba: NDArray[np.float32], classes: Sequence[str]) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
    """The deepest name whose summed probability passes: above one half there is only one path of them, and the root always passes."""
    members = tree.members(classes)
    order = sorted(members, key=lambda name: (len(tree.path(name)), name))
    labels = np.full(len(proba), order[0], dtype=object)
    confidence = np.ones(len(proba), dtype=np.float32)
    for name in order[1:]:
        summed = proba[:, members[name]].sum(1)
        passes = summed >= tree.threshold
        labels[passes], confidence[passes] = name, summed[passes].clip(max=1)
    return labels, confidence
