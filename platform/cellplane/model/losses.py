"""What training minimises, one value per sentence, always in float32.

Per sentence, because the floor on the latent terms and the renormalisation to the hidden total are not additive: the
loss of a packed batch is the weighted mean of its sentences, whatever they are packed with.
"""

# C cells, G genes, S sentences

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.latent import Latent
from cellplane.model.masking import Mask

NB_EPSILON = 1e-10  # as released


@dataclass(frozen=True)
class SentenceLoss:
    """``total`` [S] with gradient, and its ``parts``: names beside values [n_parts, S] without."""

    total: Tensor
    names: tuple[str, ...]
    parts: Tensor


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


def pretraining_loss(
    batch: CellBatch, mask: Mask, latent: Latent, decoded: tuple[Tensor, Tensor], config: ModelConfig
) -> SentenceLoss:
    """NB of the cells with hidden entries plus the latent terms, per sentence."""
    full_C, hidden_C = reconstruction(batch, mask, decoded[0].float(), decoded[1].float())
    scored_C = mask.hidden_CG.any(1)
    nb_S, hidden_S = sentence_mean(full_C, batch, scored_C), sentence_mean(hidden_C, batch, scored_C)
    everyone_C = torch.ones_like(scored_C)
    kl_S = torch.zeros_like(nb_S) if latent.kl_C is None else sentence_mean(latent.kl_C.float(), batch, everyone_C)
    cluster_S = torch.zeros_like(nb_S) if latent.cluster_C is None else sentence_mean(latent.cluster_C.float(), batch, everyone_C)
    total_S = nb_S + hidden_S
    if latent.kl_C is not None:
        total_S = total_S + config.kl_weight * kl_S.clamp(min=config.kl_floor)
    if latent.cluster_C is not None:
        total_S = total_S + config.cluster_weight * cluster_S.clamp(min=config.kl_floor)
    return SentenceLoss(total_S, ("nb", "nb_hidden", "kl", "cluster"), torch.stack([nb_S, hidden_S, kl_S, cluster_S]).detach())


def annotation_loss(batch: CellBatch, logits: Tensor) -> SentenceLoss:
    """Cross entropy over the labelled cells of each sentence; 0 for a sentence without any."""
    if batch.labels is None:
        raise ValueError("annotation needs a batch with labels")
    known_C = batch.labels >= 0
    ce_C = F.cross_entropy(logits.float(), batch.labels.clamp(min=0), reduction="none")
    right_C = (logits.argmax(-1) == batch.labels).float()
    ce_S = sentence_mean(ce_C, batch, known_C)
    return SentenceLoss(ce_S, ("cross_entropy", "accuracy"), torch.stack([ce_S, sentence_mean(right_C, batch, known_C)]).detach())


def sentence_mean(value_C: Tensor, batch: CellBatch, where_C: Tensor) -> Tensor:
    """Mean over the cells of each sentence where ``where_C``, [S]; 0 where there is none."""
    sentence_C = batch.sentence_of_cell()
    zeros = value_C.new_zeros(batch.n_sentences)
    count_S = zeros.index_add(0, sentence_C, where_C.to(value_C.dtype)).clamp(min=1)
    return zeros.index_add(0, sentence_C, value_C * where_C) / count_S
