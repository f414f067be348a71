"""Perturbations: how one enters a cell, and how well a predicted population is the one that was measured.

Cells are destroyed when they are read, so control and perturbed cells are never pairs. Control cells go in, each with the
perturbation added to its hidden state; what comes out, averaged over the cells, is a population: its rates are compared
with the perturbed cells' counts, its mean with theirs (PROTOCOLS 9). A gene enters by its own row of the gene table, so
that genes never perturbed in training can be asked for.
"""

# C cells, G genes, S sentences, D width, N free stimuli, Q nodes of the quadrature, T targets of a cell

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.kernels import DISPERSION_RANGE
from cellplane.model.losses import SentenceLoss

KINDS = ("knockout", "crispri", "crispra", "stimulation")
SIGNS = (-1.0, -1.0, 1.0, 0.0)  # of each kind: silences its gene, raises it, or leaves its counts alone
RAISED = 4.0  # what CRISPRa multiplies its gene's counts by (PROTOCOLS 9)
KIND_WIDTH = 16
NODES = tuple(-16 + 0.25 * node for node in range(79))  # log t from a mean of e^16 down to where exp(-t) has vanished


@dataclass(frozen=True, kw_only=True)
class PairedBatch(CellBatch):
    """Sentences of control cells with one perturbation each, and the perturbed cells each is compared with.

    ``answers`` has the same S sentences; ``control_SG`` are the rates of the controls they are pooled with (rows sum to 1 over
    the measured genes), ``change_SG`` the true change of the mean of log1p of scaled counts.
    """

    answers: CellBatch
    control_SG: Tensor
    change_SG: Tensor

    def to(self, device: torch.device | str) -> PairedBatch:
        """The same batch on another device, answers and all."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, answers=self.answers.to(device), **moved)


class PerturbationEmbedding(nn.Module):
    """What a cell's perturbations add to its hidden state: the sum over its targets, through one projection, [C, D].

    A target is its gene's row of the gene table, which takes no gradient from here, or a free row for a stimulus that is no
    gene (positions from G on), through two layers; its kind stands beside it. Exactly 0 for a cell without any.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.gene = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.kind = nn.Parameter(torch.randn(len(KINDS), KIND_WIDTH))
        self.stimulus_ND = nn.Parameter(torch.randn(config.n_stimuli, width)) if config.n_stimuli else None
        self.project = nn.Linear(width + KIND_WIDTH, width, bias=False)

    def forward(self, batch: CellBatch, genes_GD: Tensor) -> Tensor:
        """[C, D]."""
        if batch.perturbation is None or batch.perturbation_kind is None:
            raise ValueError("a perturbation model needs a perturbation of every cell (-1 = none) and its kind")
        target_CT, there_CT = batch.perturbation, batch.perturbation >= 0
        used, place = torch.unique(torch.stack([target_CT, batch.perturbation_kind], -1)[there_CT], dim=0, return_inverse=True)
        rows = self.gene(self._rows(used[:, 0], genes_GD))
        part = torch.cat([rows, self.kind[used[:, 1]]], 1)
        cell = there_CT.nonzero()[:, 0]
        summed = part.new_zeros(batch.n_cells, part.shape[1]).index_add(0, cell, part[place])
        out: Tensor = self.project(summed)
        return out

    def _rows(self, position: Tensor, genes_GD: Tensor) -> Tensor:
        """Normalised rows of genes and free stimuli, [n, D]."""
        known = len(genes_GD)
        rows = genes_GD.detach()[position.clamp(max=known - 1)].float()
        if self.stimulus_ND is not None:
            free = self.stimulus_ND[(position - known).clamp(min=0)]
            rows = torch.where((position >= known)[:, None], free, rows)
        return F.layer_norm(rows, rows.shape[1:])


def perturbed_counts(batch: CellBatch) -> Tensor:
    """The stored counts [nnz] as the encoder sees them: a silenced gene's are 0, a raised one's times four."""
    if batch.perturbation is None or batch.perturbation_sign is None:
        return batch.value
    cell, value = batch.cell_of_entry(), batch.value
    for target in range(batch.perturbation.shape[1]):
        sign = batch.perturbation_sign[cell, target] * (batch.perturbation[cell, target] == batch.gene)
        value = torch.where(sign < 0, 0.0, torch.where(sign > 0, value * RAISED, value))
    return value


def efficiency_of(batch: CellBatch, log_efficiency: Tensor) -> Tensor:
    """What the targets' own log rates change by, [C, G]: each kind's learned efficiency at the cell's target genes."""
    assert batch.perturbation is not None
    assert batch.perturbation_kind is not None
    change_CG = torch.zeros(batch.n_cells, batch.n_genes, device=batch.value.device)
    there = (batch.perturbation >= 0) & (batch.perturbation < batch.n_genes)
    cell, _ = there.nonzero(as_tuple=True)
    return change_CG.index_put((cell, batch.perturbation[there]), log_efficiency[batch.perturbation_kind[there]], accumulate=True)


def population_rates(batch: CellBatch, control_SG: Tensor, shift_CG: Tensor) -> Tensor:
    """Mean over each sentence's cells of control rates times exp(shift), each cell's summing to 1 over its genes, [S, G]."""
    sentence_C = batch.sentence_of_cell()
    logits_CG = control_SG.clamp(min=torch.finfo(torch.float32).tiny).log()[sentence_C] + shift_CG
    rates_CG = logits_CG.masked_fill(~batch.panels[batch.panel_index], -torch.inf).softmax(1)
    count_S = batch.cu_seqlens.diff().clamp(min=1)
    return torch.zeros_like(control_SG).index_add(0, sentence_C, rates_CG) / count_S[:, None]


def mean_log(mean: Tensor, theta_G: Tensor) -> Tensor:
    """E log1p(K) of a negative binomial K with these means [..., G] and dispersions.

    From log(1 + k) = integral over t > 0 of (1 - exp(-k t)) exp(-t) / t and the NB's generating function, by the trapezoid
    rule in log t, where the integrand is smooth: exact to 1e-5 from 0 to 1e6.
    """
    log_t_Q = torch.tensor(NODES, device=mean.device)
    reach_Q = -torch.expm1(-log_t_Q.exp())
    weight_Q = torch.exp(-log_t_Q.exp()) * (NODES[1] - NODES[0])
    total = torch.zeros_like(mean)
    for reach, weight in zip(reach_Q.tolist(), weight_Q.tolist(), strict=True):
        total = total - torch.expm1(-theta_G * torch.log1p(mean * (reach / theta_G))) * weight
    return total


def change_of(rates_SG: Tensor, control_SG: Tensor, theta_G: Tensor, total: float) -> Tensor:
    """How the mean of log1p of counts scaled to ``total`` changes from the control's rates to these, [S, G]."""
    return mean_log(rates_SG * total, theta_G) - mean_log(control_SG * total, theta_G)


def perturbation_loss(batch: PairedBatch, shift_CG: Tensor, theta_G: Tensor, config: ModelConfig) -> SentenceLoss:
    """Likelihood of the perturbed cells under the predicted population, and the squared error of its change, per sentence."""
    rates_SG = population_rates(batch, batch.control_SG, shift_CG)
    nb_S = population_likelihood(rates_SG, theta_G, batch.answers)
    found_SG = change_of(rates_SG, batch.control_SG, theta_G.detach(), config.input_total)
    error_S = (found_SG - batch.change_SG).square().sum(1)
    return SentenceLoss(nb_S + config.change_weight * error_S, ("nb", "change"), torch.stack([nb_S, error_S]).detach())


def population_likelihood(rates_SG: Tensor, theta_G: Tensor, answers: CellBatch) -> Tensor:
    """Negative log NB of the cells of ``answers`` under their sentence's rates times their own totals, mean over cells, [S]."""
    sentence_C, total_C = answers.sentence_of_cell(), answers.totals()
    mean_CG = rates_SG[sentence_C] * total_C[:, None]
    nb_C = (theta_G * torch.log1p(mean_CG / theta_G)).sum(1)
    cell, theta, x = answers.cell_of_entry(), theta_G[answers.gene], answers.value
    mean = mean_CG[cell, answers.gene].clamp(min=torch.finfo(torch.float32).tiny)
    extra = torch.lgamma(theta) + torch.lgamma(x + 1) - torch.lgamma(x + theta) + x * (torch.log(theta + mean) - torch.log(mean))
    nb_C = nb_C.index_add(0, cell, extra)
    count_S = answers.cu_seqlens.diff().clamp(min=1)
    return torch.zeros_like(rates_SG[:, 0]).index_add(0, sentence_C, nb_C) / count_S


def dispersion(log_dispersion_G: Tensor) -> Tensor:
    """theta [G], within the released range."""
    return log_dispersion_G.float().exp().clamp(*DISPERSION_RANGE)
