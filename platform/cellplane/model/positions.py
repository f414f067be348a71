"""Where a cell lies in its tissue, as a vector added to its embedding.

The released model bins each slide into a 100 x 100 grid and then switches positions off by mistake: `grid`, for its
checkpoints. Ours are continuous, in micrometres, centred per sentence and divided by a fixed length, so that a patch and
a slide differ.
"""

# C cells, D width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cellplane.cells import CellBatch

LENGTH_UM = 100.0  # one unit of the encoding: the range of direct neighbours in tissue
BINS = 100  # of the released grid, along each side of a slide


class ContinuousPositions(nn.Module):
    """Sines and cosines of centred coordinates; cells without coordinates get one learned vector. Translation changes nothing."""

    frequency: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.missing_D = nn.Parameter(torch.zeros(width))
        self.register_buffer("frequency", _frequencies(width), persistent=False)

    def forward(self, batch: CellBatch) -> Tensor:
        """[C, D]."""
        missing_C = batch.coordinates.isnan().any(1)
        xy_C2 = torch.where(missing_C[:, None], torch.zeros_like(batch.coordinates), batch.coordinates)
        sentence_C = batch.sentence_of_cell()
        counted_S = torch.zeros(batch.n_sentences, device=xy_C2.device).index_add_(0, sentence_C, (~missing_C).float()).clamp(min=1)
        centre_S2 = torch.zeros(batch.n_sentences, 2, device=xy_C2.device).index_add_(0, sentence_C, xy_C2) / counted_S[:, None]
        angle = ((xy_C2 - centre_S2[sentence_C]) / LENGTH_UM)[:, :, None] * self.frequency
        encoded_CD = torch.cat([angle.sin().flatten(1), angle.cos().flatten(1)], dim=1)
        return torch.where(missing_C[:, None], self.missing_D, encoded_CD.to(self.missing_D.dtype))


class GridPositions(nn.Module):
    """The released encoding of x, y in [0, 1]: bins of a 100 x 100 grid; cells without coordinates get one learned vector.

    First half of the width: interleaved sines and cosines of y's bin, second half: of x's. Outside [0, 1] the outermost
    bin counts. Nothing is stored but the learned vector: a row is computed from its bin.
    """

    frequency: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.missing_D = nn.Parameter(torch.randn(width) * 0.01)  # as released
        self.register_buffer("frequency", _frequencies(width), persistent=False)

    def forward(self, batch: CellBatch) -> Tensor:
        """[C, D]."""
        missing_C = batch.coordinates.isnan().any(1)
        bins_C2 = ((1.02 * batch.coordinates - 0.01) * BINS).floor().nan_to_num(0.0).clamp(0, BINS - 1)
        return torch.where(missing_C[:, None], self.missing_D, self.encoded(bins_C2).to(self.missing_D.dtype))

    def encoded(self, bins_C2: Tensor) -> Tensor:
        """Sines and cosines of bins (x, y), [C, D] float32."""
        angle = bins_C2.flip(1)[:, :, None] * self.frequency
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def _frequencies(width: int) -> Tensor:
    """Geometric from 1 to 1 / 10,000, [D / 4]; on the CPU even while a network without memory is built."""
    frequencies: Tensor = 10_000 ** (-torch.arange(width // 4, device="cpu") / (width // 4))
    return frequencies


POSITIONS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda width: None,  # noqa: ARG005
    "continuous": ContinuousPositions,
    "grid": GridPositions,
}
