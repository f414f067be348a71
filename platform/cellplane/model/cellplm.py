"""CellPLM: cells are the tokens, a tissue sample is the sentence.

counts -> embedder -> encoder over the cells of each sentence -> latent space -> decoder and / or head.
Wen et al., "CellPLM: Pre-training of Cell Language Model Beyond Single Cells", ICLR 2024.
"""

# C cells, G genes, D width, Z latent

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.decoder import DECODERS
from cellplane.model.embedder import Embedder
from cellplane.model.encoder import Encoder
from cellplane.model.heads import AnnotationHead
from cellplane.model.latent import LATENTS
from cellplane.model.linear import in_precision
from cellplane.model.losses import SentenceLoss, annotation_loss, imputation_loss, pretraining_loss
from cellplane.model.masking import Mask
from cellplane.model.noise import Noise
from cellplane.model.perturbation import PairedBatch, perturbation_loss


@dataclass(frozen=True)
class CellPLMOutput:
    """``latent`` [C, Z]; ``logits`` [C, n_classes] when there is a head; ``loss`` when something was to be learned."""

    latent: Tensor
    logits: Tensor | None = None
    loss: SentenceLoss | None = None


class CellPLM(nn.Module):
    """The network; parameters only for what its config uses, so that nothing trainable is without gradient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.n_genes < 1:
            raise ValueError("a network needs the size of its gene vocabulary: set n_genes")
        self.config = config
        self.embedder = Embedder(config)
        self.encoder = Encoder(config)
        self.latent = LATENTS[config.latent](config)
        self.decoder = None if config.decoder == "none" else DECODERS[config.decoder](config)
        self.head = AnnotationHead(config) if config.n_classes else None

    def forward(self, batch: CellBatch, mask: Mask | None = None, noise: Noise | None = None) -> CellPLMOutput:
        """Embeds the cells; with a mask and a decoder also scores how well hidden counts are recovered.

        With a head and labels the loss is annotation's, with a residual decoder and a PairedBatch perturbation's.
        Deterministic without ``noise``.
        """
        with in_precision(self.config.precision, batch.value.device):
            return self._answer(batch, mask, noise)

    def _answer(self, batch: CellBatch, mask: Mask | None, noise: Noise | None) -> CellPLMOutput:
        hidden_CD = self.encoder(self.embedder(batch, mask, noise), batch, noise)
        latent = self.latent(hidden_CD, noise)
        if self.head is not None:
            logits = self.head(latent.z_CZ, noise)
            return CellPLMOutput(latent.z_CZ, logits, annotation_loss(batch, logits) if batch.labels is not None else None)
        if isinstance(batch, PairedBatch) and self.decoder is not None:
            shift_CG, theta_G = self.decoder(latent.z_CZ, batch, noise)
            return CellPLMOutput(latent.z_CZ, None, perturbation_loss(batch, shift_CG, theta_G, self.config))
        if mask is None or self.decoder is None or self.config.decoder == "residual":
            return CellPLMOutput(latent.z_CZ)
        likelihoods = self.decoder(latent.z_CZ, batch, noise, mask)
        step = 0 if noise is None else noise.step
        loss_of = imputation_loss if self.config.platform_tokens else pretraining_loss
        return CellPLMOutput(latent.z_CZ, None, loss_of(batch, mask, latent, likelihoods, self.config, step))

    def n_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


def halved(network: CellPLM) -> CellPLM:
    """The network for answering alone: what enters products is kept in the dtype they are computed in, so it is cast once."""
    dtype = getattr(torch, network.config.precision)
    for module in network.modules():
        if isinstance(module, nn.Linear) and not getattr(module, "exact", False):
            module.to(dtype)
    network.embedder.genes_GD.data = network.embedder.genes_GD.data.to(dtype)
    return network


def new_model(config: ModelConfig, seed: int) -> CellPLM:
    """A freshly initialised network that depends on (config, seed) alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CellPLM(config)
