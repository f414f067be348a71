"""Golden answers: what a model said about a few made-up cells when it was saved, kept beside its weights.

Whoever loads the model later, on another machine or with another library, asks it again: other answers mean that it
must not be used. The cells are drawn from nobody, so that no donor's data travel in an artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import pack_tensors, unpack_tensors
from cellplane.errors import IntegrityError

GOLDEN = "golden.safetensors"
ROUGH_TOLERANCE = 5e-2  # in bfloat16, whose numbers have eight bits: 0.2 to 1.3 % were seen
TOLERANCE = 1e-3  # of the largest answer: other cores and libraries differ by 1e-6, another model by 1e-1
CELLS = ("crow", "gene", "value", "sizes")
ANSWER = "answer."


@dataclass(frozen=True)
class Golden:
    """n cells of some sentences, and what the model said of them.

    ``crow`` [n+1], ``gene`` [nnz] positions and ``value`` [nnz] are CSR over the whole vocabulary; ``sizes`` [S] cells of
    each sentence in order; ``answers`` by name, [n, width] each.
    """

    crow: NDArray[np.int64]
    gene: NDArray[np.int64]
    value: NDArray[np.float32]
    sizes: NDArray[np.int64]
    answers: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of(cls, attachments: Mapping[str, bytes]) -> Golden | None:
        """The golden answers among a model's attachments, None when it has none; IntegrityError when they are incomplete."""
        if GOLDEN not in attachments:
            return None
        columns = {name: tensor.numpy() for name, tensor in unpack_tensors(attachments[GOLDEN]).items()}
        answers = {name.removeprefix(ANSWER): values for name, values in columns.items() if name.startswith(ANSWER)}
        if missing := sorted(set(CELLS) - columns.keys()) + ([] if answers else ["answers"]):
            raise IntegrityError(f"{GOLDEN} lacks {', '.join(missing)}; save the model again")
        return cls(columns["crow"], columns["gene"], columns["value"], columns["sizes"], answers)

    def attachment(self) -> dict[str, bytes]:
        """As a file of the model folder."""
        columns = {name: getattr(self, name) for name in CELLS} | {f"{ANSWER}{name}": values for name, values in self.answers.items()}
        return {GOLDEN: pack_tensors({name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()})}

    def compare(self, answers: Mapping[str, NDArray[np.float32]], tolerance: float = TOLERANCE) -> float:
        """The largest difference, as a share of the largest golden answer; IntegrityError beyond ``tolerance``, or when not finite."""
        worst = 0.0
        for name, expected in self.answers.items():
            found = answers.get(name)
            if found is None or found.shape != expected.shape:
                shape = None if found is None else found.shape
                raise IntegrityError(f"the model answers {name!r} with {shape}, its golden answer has {expected.shape}")
            gap = float(np.abs(found - expected).max(initial=0) / max(float(np.abs(expected).max(initial=0)), 1e-12))
            if not gap <= tolerance:
                raise IntegrityError(
                    f"the model does not give its golden answers: {name!r} differs by {gap:.2g} of its size, {tolerance:g} is allowed; "
                    "it was saved by other code or read wrongly"
                )
            worst = max(worst, gap)
        return worst
