"""Cells and parameters on which the fused likelihoods must equal the chunked ones; for the interpreter and for a GPU."""

# C cells, G genes, K bottleneck width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.decoder import counts_of
from cellplane.model.gpu import fused_reconstruction
from cellplane.model.kernels import DISPERSION_RANGE, MEAN_RANGE, chunked_reconstruction
from cellplane.model.masking import Mask, mask_of
from tests.model.dense import reconstruction
from tests.tiny import dense_batch, random_counts


@dataclass(frozen=True)
class Case:
    """Sizes and oddities of one comparison."""

    n_cells: int
    n_genes: int
    width: int
    panels: int = 1
    hide: float = 0.4
    extreme: bool = False  # clamped means and dispersions, huge and fractional counts


CASES = {
    "one tile": Case(5, 20, 8),
    "no multiple of any tile": Case(21, 37, 5, panels=2),
    "exact tiles": Case(16, 32, 16),
    "two panels": Case(9, 40, 20, panels=2),
    "clamped, with huge counts": Case(18, 35, 6, panels=2, extreme=True),
    "nothing hidden": Case(6, 20, 4, hide=0.0),
    "all hidden": Case(6, 20, 4, hide=1.1),
    "one cell, one gene": Case(1, 1, 1, hide=1.1),
}


def cells(case: Case) -> tuple[CellBatch, Mask]:
    """Among the cells: one without counts, one that hides nothing and one that hides everything."""
    counts = random_counts(case.n_cells, case.n_genes, seed=3) * 10
    if case.extreme:
        counts[0, 0], counts[1, 1], counts[-1, 2] = 4e6, 70_000, 0.5
    if case.n_cells > 4:
        counts[2] = 0
    panels = torch.ones(case.panels, case.n_genes, dtype=torch.bool)
    panels[1:, ::3] = False
    index = torch.arange(case.n_cells) % case.panels
    batch = replace(dense_batch(counts * panels[index]), panels=panels, panel_index=index)
    hidden = torch.rand(case.n_cells, case.n_genes, generator=torch.Generator().manual_seed(1)) < case.hide
    if case.n_cells > 4:
        hidden[3], hidden[4] = False, case.hide > 0
    return batch, mask_of(batch, hidden)


def parameters(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """u in ``dtype``, weight, bias and log dispersion in float32, all on the CPU and without gradient yet."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((case.n_cells, case.width), (case.n_genes, case.width), (case.n_genes,), (case.n_genes,))
    u, weight, bias, dispersion = (torch.randn(shape, generator=generator) for shape in shapes)
    if case.extreme:
        weight[0], bias[0], bias[3], bias[5] = 0, -20.0, 60.0, 12.0  # below, and above the mean's range
        dispersion[1], dispersion[2], dispersion[7] = 12.0, -12.0, 9.0  # above, below, and nearly Poisson
    return u.to(dtype), weight, bias, dispersion


def pulls(scored_C: Tensor) -> Tensor:
    """Gradients of both likelihoods [2, C]; 0 for cells that no loss looks at."""
    return torch.rand(2, len(scored_C), generator=torch.Generator().manual_seed(5)).to(scored_C.device) * scored_C


@dataclass(frozen=True)
class Result:
    """Both likelihoods [C] of scored cells, and the gradients of u, weight, bias and log dispersion."""

    likelihoods: tuple[Tensor, Tensor]
    gradients: tuple[Tensor, ...]


def result(function: Callable[..., tuple[Tensor, Tensor]], given: tuple[Tensor, ...], scored_C: Tensor) -> Result:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    full, hidden = function(*leaves)
    torch.autograd.backward([full, hidden], [pull.to(full.dtype) for pull in pulls(scored_C)])
    found = (torch.where(scored_C, full.detach(), 0), torch.where(scored_C, hidden.detach(), 0))
    return Result(found, tuple(leaf.grad for leaf in leaves))


def exact(case: Case) -> Result:
    """The plain formulas in float64, all C x G of them."""
    batch, mask = cells(case)
    batch = replace(batch, value=batch.value.double())

    def plain(u: Tensor, weight: Tensor, bias: Tensor, dispersion: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.linear(u, weight, bias).exp().clamp(*MEAN_RANGE)
        return reconstruction(batch, mask, mean, dispersion.exp().clamp(*DISPERSION_RANGE))

    return result(plain, tuple(tensor.double() for tensor in parameters(case)), mask.hidden_C > 0)


def both(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Result, Result]:
    """Fused and chunked, on the same cells."""
    batch, mask = cells(case)
    batch, mask = batch.to(device), mask.to(torch.device(device))
    given = tuple(tensor.to(device) for tensor in parameters(case, dtype))
    counts, scored_C = counts_of(batch, mask), mask.hidden_C > 0
    return result(partial(fused_reconstruction, counts=counts), given, scored_C), result(
        partial(chunked_reconstruction, counts=counts), given, scored_C
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    size = expected.double().norm().clamp(min=1e-30)
    return float((found.double().cpu() - expected.double().cpu()).norm() / size.cpu())


def errors(found: Result, expected: Result) -> dict[str, float]:
    """Relative error of each likelihood and each gradient."""
    names = ("full", "hidden", "u", "weight", "bias", "dispersion")
    pairs = zip((*found.likelihoods, *found.gradients), (*expected.likelihoods, *expected.gradients), strict=True)
    return {name: relative_error(*pair) for name, pair in zip(names, pairs, strict=True)}
