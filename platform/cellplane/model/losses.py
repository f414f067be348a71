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


@dataclass(frozen=True)
class SentenceLoss:
    """``total`` [S] with gradient, and its ``parts``: names beside values [n_parts, S] without."""

    total: Tensor
    names: tuple[str, ...]
    parts: Tensor


def pretraining_loss(
    batch: CellBatch, mask: Mask, latent: Latent, likelihoods: tuple[Tensor, Tensor], config: ModelConfig, step: int = 0
) -> SentenceLoss:
    """Reconstruction of the cells with hidden entries plus the latent terms, per sentence.

    ``likelihoods`` are over all measured genes and over hidden genes, each [C]; ``step`` is the optimizer step that the
    warm-up of the latent Gaussian term goes by.
    """
    full_C, hidden_C = likelihoods
    scored_C = mask.hidden_C > 0
    full_S, hidden_S = sentence_mean(full_C, batch, scored_C), sentence_mean(hidden_C, batch, scored_C)
    total_S, terms = add_latent_terms(full_S + hidden_S, batch, latent, config, step)
    return SentenceLoss(total_S, PARTS[config.decoder], torch.stack([full_S, hidden_S, *terms]).detach())


def imputation_loss(
    batch: CellBatch, mask: Mask, latent: Latent, likelihoods: tuple[Tensor, Tensor], config: ModelConfig, step: int = 0
) -> SentenceLoss:
    """Reconstruction of all measured genes of the reference, plus `query_weight` times that of the query (platform 0), per sentence.

    Only cells that hide something count; the rest is as in `pretraining_loss`.
    """
    scored_C, query_C = mask.hidden_C > 0, batch.platform_index == 0
    query_S = sentence_mean(likelihoods[0], batch, scored_C & query_C)
    reference_S = sentence_mean(likelihoods[0], batch, scored_C & ~query_C)
    total_S, terms = add_latent_terms(reference_S + config.query_weight * query_S, batch, latent, config, step)
    return SentenceLoss(total_S, ("nb_reference", "nb_query", "kl", "cluster"), torch.stack([reference_S, query_S, *terms]).detach())


def add_latent_terms(
    total_S: Tensor, batch: CellBatch, latent: Latent, config: ModelConfig, step: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The reconstruction plus what the latent space costs, and its two terms, each [S]."""
    everyone_C = torch.ones(batch.n_cells, dtype=torch.bool, device=total_S.device)
    kl_S = torch.zeros_like(total_S) if latent.kl_C is None else sentence_mean(latent.kl_C.float(), batch, everyone_C)
    cluster_S = torch.zeros_like(total_S) if latent.cluster_C is None else sentence_mean(latent.cluster_C.float(), batch, everyone_C)
    if latent.kl_C is not None:
        total_S = total_S + kl_term(kl_S, config, step)
    if latent.cluster_C is not None:
        total_S = total_S + config.cluster_weight * cluster_S.clamp(min=config.kl_floor)
    return total_S, (kl_S, cluster_S)


PARTS = {
    "negative_binomial": ("nb", "nb_hidden", "kl", "cluster"),
    "gaussian": ("gaussian", "gaussian_hidden", "kl", "cluster"),
}


def kl_term(kl_S: Tensor, config: ModelConfig, step: int) -> Tensor:
    """What the latent Gaussian term adds to the loss, [S]: floored, weighted, warmed up, and left out where it is small.

    The weight is 0 at step 0 and whole from `kl_warmup_steps` on (the released code stops one step short of whole).
    """
    warmth = min(1.0, step / config.kl_warmup_steps) if config.kl_warmup_steps else 1.0
    term_S = config.kl_weight * warmth * kl_S.clamp(min=config.kl_floor)
    return torch.where(term_S < config.kl_drop_below, torch.zeros_like(term_S), term_S)


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
