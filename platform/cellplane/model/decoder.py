"""From the embedding back to counts, told which batch and data set a cell came from.

Because the decoder is told the batch, z can forget it: this is what removes batch effects (as in scVI). Source:
CellPLM (Wen et al., ICLR 2024), `nbmlp`.
"""

# C cells, G genes, Z latent

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.dispatch import reconstruction_of
from cellplane.model.embedder import NORM_GROUPS, platform_rows
from cellplane.model.fused import spared
from cellplane.model.gaussian import LOG_VARIANCE_RANGE, LogLayer
from cellplane.model.kernels import DISPERSION_RANGE, MEAN_RANGE, Counts
from cellplane.model.linear import Linear
from cellplane.model.masking import Mask
from cellplane.model.noise import Noise, dropout
from cellplane.model.norms import GroupNorm, PReLU
from cellplane.model.perturbation import KINDS, dispersion, efficiency_of


class Covariate(nn.Module):
    """A table of rows, one per batch (or data set), and what stands in for an unknown one."""

    def __init__(self, rows: int, width: int, unseen: Literal["mean", "sum"]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, width))
        self.unseen = unseen
        self.activation, self.norm = PReLU(), GroupNorm(NORM_GROUPS, width)

    def forward(self, index_C: Tensor) -> Tensor:
        """[C, width]; index -1 takes the mean (or, as released, the sum) of all rows."""
        used, place_C = torch.unique(index_C, return_inverse=True)  # ascending: -1 comes first
        rows = self.table[used[used >= 0]]
        if len(rows) < len(used):
            unknown = self.table.mean(0) if self.unseen == "mean" else self.table.sum(0)
            rows = torch.cat([unknown[None], rows])
        out: Tensor = self.norm(self.activation(rows))
        return out[place_C]


class _Trunk(nn.Module):
    """What both decoders share: z and covariates -> bottleneck."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.dropout = config.dropout
        self.linear, self.activation = Linear(config.latent_width, width), PReLU()
        self.norm = GroupNorm(NORM_GROUPS, width)
        self.batch = Covariate(config.n_batches, width, config.unseen_batch) if config.n_batches else None
        self.dataset = Covariate(config.n_datasets, width, config.unseen_batch) if config.n_datasets else None
        self.platform = Covariate(config.n_platforms, width, config.unseen_batch) if config.n_platforms else None
        self.bottleneck = Linear(width, config.decoder_bottleneck)

    def bottlenecked(self, z_CZ: Tensor, batch: CellBatch, noise: Noise | None) -> Tensor:
        """[C, K]."""
        u = self.norm(dropout(self.activation(self.linear(z_CZ)), self.dropout, noise, "decoder"))
        if self.batch is not None:
            u = u + self.batch(batch.batch_index)
        if self.dataset is not None:
            u = u + self.dataset(batch.dataset_index)
        if self.platform is not None:
            u = u + self.platform(batch.platform_index)
        return F.relu(self.bottleneck(u))


class NegativeBinomialDecoder(_Trunk):
    """z and covariates -> mean [C, G] and dispersion [G] of a negative binomial."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.platform_tokens = config.platform_tokens
        self.mean = CountLayer(config.decoder_bottleneck + config.platform_tokens, config.n_genes)
        self.log_dispersion_G = nn.Parameter(torch.randn(config.n_genes))
        if config.platform_tokens:  # the last columns are what each platform adds to each gene's logit
            with torch.no_grad():
                self.mean.weight[:, config.decoder_bottleneck :] = 0

    def forward(self, z_CZ: Tensor, batch: CellBatch, noise: Noise | None, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
        """Unscaled mean [C, G] and dispersion [G], both clamped to the released ranges.

        With a mask the likelihoods instead: over all measured genes [C] and over hidden genes [C] (see `kernels`).
        """
        u = spared(self.bottlenecked, z_CZ, batch, noise)
        if self.platform_tokens:
            u = torch.cat([u, platform_rows(batch, self.platform_tokens).to(u.dtype)], 1)
        if mask is not None:
            likelihoods: tuple[Tensor, Tensor] = self.mean(u, self.log_dispersion_G, counts_of(batch, mask))
            return likelihoods
        mean_CG = self.mean(u).float().exp().clamp(*MEAN_RANGE)
        return mean_CG, self.log_dispersion_G.exp().clamp(*DISPERSION_RANGE)


class GaussianDecoder(_Trunk):
    """z and covariates -> mean [C, G] and variance [G] of log1p of the counts per 10,000 (see `gaussian`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mean = LogLayer(config.decoder_bottleneck, config.n_genes)
        self.log_variance_G = nn.Parameter(torch.zeros(config.n_genes))

    def forward(self, z_CZ: Tensor, batch: CellBatch, noise: Noise | None, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
        """Mean [C, G] and variance [G]; with a mask the likelihoods over all measured genes [C] and over hidden genes [C]."""
        u = spared(self.bottlenecked, z_CZ, batch, noise)
        if mask is not None:
            likelihoods: tuple[Tensor, Tensor] = self.mean(u, self.log_variance_G, (batch, mask))
            return likelihoods
        return self.mean(u).float(), self.log_variance_G.clamp(*LOG_VARIANCE_RANGE).exp()


class ResidualDecoder(_Trunk):
    """z -> what a perturbation changes: the shift [C, G] of the control's log rates, and dispersion [G] of the counts.

    The last layer begins at 0 and only a perturbed gene's own row begins with an efficiency, so that at first a
    perturbation changes nothing but its target.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mean = Linear(config.decoder_bottleneck, config.n_genes)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        self.log_dispersion_G = nn.Parameter(torch.zeros(config.n_genes))
        self.log_efficiency = nn.Parameter(torch.zeros(len(KINDS)))

    def forward(self, z_CZ: Tensor, batch: CellBatch, noise: Noise | None, mask: Mask | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Shift [C, G], exactly 0 where the cells carry no perturbation, and dispersion [G]."""
        assert batch.perturbation is not None
        learned_CG = self.mean(spared(self.bottlenecked, z_CZ, batch, noise)).float()
        perturbed_C = (batch.perturbation >= 0).any(1)
        shift_CG = torch.where(perturbed_C[:, None], learned_CG, 0.0) + efficiency_of(batch, self.log_efficiency)
        return shift_CG, dispersion(self.log_dispersion_G)


class CountLayer(nn.Linear):
    """The decoder's last layer: logits [C, G], or the likelihoods of the counts without ever holding C x G."""

    def forward(self, u_CK: Tensor, log_dispersion_G: Tensor | None = None, counts: Counts | None = None) -> Any:
        """Logits; with dispersion and counts the two likelihoods [C]. One module call, so that ZeRO 3 gathers its weights."""
        if log_dispersion_G is None or counts is None:
            return super().forward(u_CK)
        return reconstruction_of(u_CK.device)(u_CK, self.weight, self.bias, log_dispersion_G, counts)


def counts_of(batch: CellBatch, mask: Mask) -> Counts:
    """What the likelihoods compare with."""
    return Counts(
        crow=batch.crow,
        gene=batch.gene,
        value=batch.value,
        entry_hidden=mask.entry,
        panels=batch.panels,
        panel_index=batch.panel_index,
        hidden_bits=mask.bits,
        hidden_C=mask.hidden_C,
        everything_measured=not batch.panels.is_cuda and bool(batch.panels.all()),  # looking would make the host wait for a GPU
    )


DECODERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "negative_binomial": NegativeBinomialDecoder,
    "gaussian": GaussianDecoder,
    "residual": ResidualDecoder,
}
