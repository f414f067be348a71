"""The one thing that passes from data to model: a packed batch of cells, grouped into sentences.

C cells of S sentences lie one after another without padding; sentence s owns the cells cu_seqlens[s]:cu_seqlens[s+1].
Counts are sparse rows over vocabulary positions. P panels say which of the G genes each cell's data set measured at
all: a gene outside the panel is unknown, not zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CellBatch:
    """C cells of S sentences.

    Counts are CSR: row c holds ``gene[crow[c]:crow[c+1]]`` (vocabulary positions) and their raw ``value``.
    Indices -1 mean unseen or unknown; a NaN row of ``coordinates`` (micrometres) means missing. ``row`` is each
    cell's position in the caller's data. Raises ValueError when shapes disagree.
    """

    crow: Tensor  # [C+1] int64
    gene: Tensor  # [nnz] int64
    value: Tensor  # [nnz] float32, raw counts
    panels: Tensor  # [P, G] bool
    panel_index: Tensor  # [C] int64
    cu_seqlens: Tensor  # [S+1] int64
    sentence_seed: Tensor  # [S] int64, keys all randomness that concerns one sentence
    batch_index: Tensor  # [C] int64
    dataset_index: Tensor  # [C] int64
    platform_index: Tensor  # [C] int64
    coordinates: Tensor  # [C, 2] float32
    row: Tensor  # [C] int64
    labels: Tensor | None = None  # [C] int64, -1 = unlabelled
    perturbation: Tensor | None = None  # [C, 2] int64 gene positions, -1 = none
    perturbation_sign: Tensor | None = None  # [C, 2] float32: -1 silences the gene, 1 raises it, 0 leaves its counts alone
    perturbation_kind: Tensor | None = None  # [C, 2] int64, see `model.perturbation.KINDS`

    def __post_init__(self) -> None:
        if self._fits():  # cheap, because a loader makes thousands; what does not fit is then looked at closely
            return
        cells, nonzeros = self.n_cells, int(self.gene.numel())
        wrong = [
            f"{name} has {got}, expected {expected}"
            for name, got, expected in (
                ("value", tuple(self.value.shape), (nonzeros,)),
                ("sentence_seed", tuple(self.sentence_seed.shape), (self.n_sentences,)),
                ("coordinates", tuple(self.coordinates.shape), (cells, 2)),
                *((name, tuple(getattr(self, name).shape), (cells,)) for name in PER_CELL),
                *self._optional(),
                *self._ends(nonzeros),
            )
            if got != expected
        ]
        if wrong:
            raise ValueError(f"a CellBatch of {cells} cells does not fit together: " + "; ".join(wrong))

    def _fits(self) -> bool:
        """Whether a batch on the CPU is right beyond doubt."""
        crow, edges, cells = self.crow, self.cu_seqlens, self.crow.shape[0] - 1
        if crow.device.type != "cpu" or self.perturbation is not None or self.perturbation_sign is not None or edges.shape[0] == 0:
            return False
        if cells < 0:
            return False
        cell, starts, ends = self.row.shape, crow.numpy(), edges.numpy()  # a tensor takes four times as long to give a number
        return (
            bool(starts[0] == 0 == ends[0] and starts[-1] == self.gene.shape[0] and ends[-1] == cells)
            and cell == (cells,)
            and cell == self.panel_index.shape == self.batch_index.shape == self.dataset_index.shape == self.platform_index.shape
            and (self.labels is None or self.labels.shape == cell)
            and self.value.shape == self.gene.shape
            and self.gene.dim() == 1
            and self.coordinates.shape == (cells, 2)
            and self.sentence_seed.shape == (edges.shape[0] - 1,)
        )

    def _optional(self) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        for name, of_one_cell in OPTIONAL_PER_CELL.items():
            if (column := getattr(self, name)) is not None:
                yield name, tuple(column.shape), (self.n_cells, *of_one_cell)

    def _ends(self, nonzeros: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        if self.crow.device.type != "cpu":  # looking at values would make the device wait; they were checked where data entered
            return []
        edges = (("crow", self.crow, nonzeros), ("cu_seqlens", self.cu_seqlens, self.n_cells))
        return [(f"{name} from, to", (int(edge[0]), int(edge[-1])), (0, end)) for name, edge, end in edges]

    @property
    def n_cells(self) -> int:
        """C."""
        return int(self.crow.numel()) - 1

    @property
    def n_sentences(self) -> int:
        """S."""
        return int(self.cu_seqlens.numel()) - 1

    @property
    def n_genes(self) -> int:
        """G, the size of the vocabulary."""
        return int(self.panels.shape[1])

    def totals(self) -> Tensor:
        """Sum of each cell's counts, [C] float32."""
        return torch.zeros(self.n_cells, dtype=self.value.dtype, device=self.value.device).index_add_(0, self.cell_of_entry(), self.value)

    def counted(self) -> Tensor:
        """Which cells have a count at all, [C] bool: `totals` above 0, without adding up where no zeros are stored."""
        none_stored = self.value.numel() == 0 or bool(self.value.min() > 0)
        return self.crow.diff() > 0 if none_stored else self.totals() > 0

    def cell_of_entry(self) -> Tensor:
        """The cell each stored entry belongs to, [nnz] int64."""
        return torch.repeat_interleave(torch.arange(self.n_cells, device=self.crow.device), self.crow.diff(), output_size=self.gene.numel())

    def sentence_of_cell(self) -> Tensor:
        """The sentence each cell belongs to, [C] int64."""
        sentences = torch.arange(self.n_sentences, device=self.cu_seqlens.device)
        return torch.repeat_interleave(sentences, self.cu_seqlens.diff(), output_size=self.n_cells)

    def spans(self) -> list[tuple[int, int]]:
        """(first cell, end) of every sentence."""
        edges = self.cu_seqlens.tolist()
        return list(pairwise(edges))

    def sentences(self) -> Iterator[CellBatch]:
        """Each sentence as a batch of its own."""
        for index, (start, end) in enumerate(self.spans()):
            part = self.take(torch.arange(start, end, device=self.crow.device))
            keep = torch.tensor([0, end - start], device=self.crow.device)
            yield replace(part, cu_seqlens=keep, sentence_seed=self.sentence_seed[index : index + 1])

    def take(self, cells: Tensor) -> CellBatch:
        """These cells only, [n] ascending positions; every sentence keeps its seed, even one left without cells."""
        lengths = self.crow.diff()[cells]
        crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        entry = torch.arange(int(crow[-1]), device=crow.device) - torch.repeat_interleave(crow[:-1] - self.crow[:-1][cells], lengths)
        kept = torch.bincount(self.sentence_of_cell()[cells], minlength=self.n_sentences)
        per_cell = {
            name: column[cells] for name in (*PER_CELL, *OPTIONAL_PER_CELL, "coordinates") if (column := getattr(self, name)) is not None
        }
        return replace(
            self,
            crow=crow,
            gene=self.gene[entry],
            value=self.value[entry],
            cu_seqlens=torch.cat([kept.new_zeros(1), kept.cumsum(0)]),
            **per_cell,
        )

    def to(self, device: torch.device | str) -> CellBatch:
        """The same batch on another device."""
        moved = {f.name: value.to(device, non_blocking=True) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    @staticmethod
    def concat(batches: Sequence[CellBatch]) -> CellBatch:
        """All sentences of several batches in one, in order. All must share one panel table (as every store does)."""
        first = batches[0]
        if any(batch.panels is not first.panels and not torch.equal(batch.panels, first.panels) for batch in batches[1:]):
            raise ValueError("batches with different panel tables cannot be packed together")
        if len(batches) == 1:
            return first
        joined: dict[str, Tensor] = {}
        for name in (*PER_CELL, *OPTIONAL_PER_CELL, "gene", "value", "coordinates", "sentence_seed"):
            columns = [column for batch in batches if (column := getattr(batch, name)) is not None]
            if 0 < len(columns) < len(batches):
                raise ValueError(f"{len(columns)} of {len(batches)} batches have {name}: give it to all, or to none (-1 = unknown)")
            if columns:
                joined[name] = torch.cat(columns)
        for name in ("crow", "cu_seqlens"):
            lengths = torch.cat([getattr(batch, name).diff() for batch in batches])
            joined[name] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return replace(first, **joined)


PER_CELL = ("panel_index", "batch_index", "dataset_index", "platform_index", "row")
OPTIONAL_PER_CELL: dict[str, tuple[int, ...]] = {  # shape of one cell's
    "labels": (),
    "perturbation": (2,),
    "perturbation_sign": (2,),
    "perturbation_kind": (2,),
}


def single_panel_batch(
    crow: Tensor, gene: Tensor, value: Tensor, panel: Tensor, sentence_lengths: Sequence[int] | None = None
) -> CellBatch:
    """A batch from CSR rows and one panel [G] bool; one sentence unless lengths are given; every index unknown."""
    cells = int(crow.numel()) - 1
    lengths = torch.tensor(list(sentence_lengths) if sentence_lengths is not None else [cells], dtype=torch.int64)
    unknown = torch.full((cells,), -1, dtype=torch.int64)
    return CellBatch(
        crow=crow.to(torch.int64),
        gene=gene.to(torch.int64),
        value=value.to(torch.float32),
        panels=panel.to(torch.bool)[None, :],
        panel_index=torch.zeros(cells, dtype=torch.int64),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        sentence_seed=torch.arange(len(lengths), dtype=torch.int64),
        batch_index=unknown,
        dataset_index=unknown.clone(),
        platform_index=unknown.clone(),
        coordinates=torch.full((cells, 2), torch.nan),
        row=torch.arange(cells, dtype=torch.int64),
    )
