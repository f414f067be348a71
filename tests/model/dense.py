"""The likelihoods of the counts written the plain way, C x G at once: what the chunked kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.kernels import NB_EPSILON
from cellplane.model.masking import Mask


def negative_binomial(batch: CellBatch, mean_CG: Tensor, dispersion_G: Tensor, where_CG: Tensor) -> Tensor:
    """Negative log likelihood of the counts at ``where_CG``, summed per cell, [C].

    Exact and sparse-aware: for a zero count the three lgamma terms cancel, so they are computed at stored entries only.
    """
    e = NB_EPSILON
    theta_G = dispersion_G + e
    zero_C = (dispersion_G * torch.log1p(mean_CG / theta_G) * where_CG).sum(1)
    cell, gene, x = batch.cell_of_entry(), batch.gene, batch.value
    mean, theta = mean_CG[cell, gene], theta_G[gene]
    extra = (
        torch.lgamma(theta)
        + torch.lgamma(x + 1)
        - torch.lgamma(x + theta)
        + x * (torch.log1p(mean / theta) + torch.log(theta) - torch.log(mean + e))
    )
    return zero_C.index_add(0, cell, extra * where_CG[cell, gene])


def reconstruction(batch: CellBatch, mask: Mask, mean_CG: Tensor, dispersion_G: Tensor) -> tuple[Tensor, Tensor]:
    """NB over all measured genes and NB over hidden entries alone, each [C].

    The mean is scaled to the cell's total over the same genes. Genes outside the cell's panel appear nowhere.
    """
    measured_CG = batch.panels[batch.panel_index]
    full_C = negative_binomial(batch, _scaled(batch, mean_CG, measured_CG), dispersion_G, measured_CG)
    hidden_C = negative_binomial(batch, _scaled(batch, mean_CG, mask.hidden_CG), dispersion_G, mask.hidden_CG)
    return full_C, hidden_C


def _scaled(batch: CellBatch, mean_CG: Tensor, where_CG: Tensor) -> Tensor:
    """The mean, scaled so that each cell's sum over ``where_CG`` is its counts' sum there."""
    cell = batch.cell_of_entry()
    total_C = mean_CG.new_zeros(batch.n_cells).index_add_(0, cell, batch.value * where_CG[cell, batch.gene])
    return mean_CG * (total_C / (mean_CG * where_CG).sum(1).clamp(min=NB_EPSILON))[:, None]
