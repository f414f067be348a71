"""Other models of single cells as sides of a measurement: Geneformer, scGPT and scVI, from counts to a cell's embedding.

Only their speed is asked for, so that weights are random and the networks are built here, in the shapes that their
authors released, from the parts that these use themselves: BERT of transformers (Geneformer), torch's transformer encoder
(scGPT) and scvi-tools' own module (scVI). Runs in an environment with transformers and scvi-tools.
"""

# C cells, N non-zero counts of each cell, T tokens, D model width

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.benchmark.cells import random_cells
from cellplane.benchmark.worker import measured, serve

PAD = 0
SPECIAL = 2  # tokens before the first gene: padding and mask


@dataclass(frozen=True)
class Counts:
    """Cells of equally many counts: which genes, ascending, and how many molecules of each."""

    gene_CN: Tensor
    value_CN: Tensor

    def __len__(self) -> int:
        return len(self.gene_CN)

    def chunk(self, start: int, end: int) -> Counts:
        """Some of the cells."""
        return Counts(self.gene_CN[start:end], self.value_CN[start:end])


class Geneformer(nn.Module):
    """A cell's genes by falling expression into a BERT encoder; the embedding is the mean over its tokens."""

    def __init__(self, shape: Mapping[str, int]) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.tokens = shape["tokens"]
        config = BertConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=shape["feed_forward"],
            max_position_embeddings=shape["tokens"],
            hidden_act="relu",
            pad_token_id=PAD,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        generator = torch.Generator().manual_seed(0)  # of a gene in the training cells, here made up
        self.register_buffer("gene_median", torch.rand(shape["vocabulary"], generator=generator) + 0.5)

    def forward(self, counts: Counts) -> Tensor:  # [C, D]
        """Embeddings. No cell is padded, so that no mask is needed."""
        hidden: Tensor = self.encoder(input_ids=rank_tokens(counts, self.gene_median, self.tokens)).last_hidden_state
        return hidden.mean(1)


def rank_tokens(counts: Counts, gene_median: Any, tokens: int) -> Tensor:  # [C, T]
    """Rank-value encoding: genes by falling count, each relative to its median elsewhere, the first ``tokens`` of them."""
    relative_CN = counts.value_CN / gene_median[counts.gene_CN]
    order_CT = relative_CN.argsort(dim=1, descending=True)[:, :tokens]
    return counts.gene_CN.gather(1, order_CT) + SPECIAL


class ScGPT(nn.Module):
    """A random choice of a cell's genes, each with its value, and a cls token whose output is the embedding."""

    def __init__(self, shape: Mapping[str, int]) -> None:
        super().__init__()
        width, self.genes, self.cls = shape["width"], shape["tokens"] - 1, shape["vocabulary"] - 1
        self.gene = nn.Sequential(nn.Embedding(shape["vocabulary"], width), nn.LayerNorm(width))
        self.value = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width))
        block = nn.TransformerEncoderLayer(width, shape["heads"], shape["feed_forward"], batch_first=True)
        self.encoder = nn.TransformerEncoder(block, shape["layers"], enable_nested_tensor=False)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, counts: Counts) -> Tensor:  # [C, D]
        """Embeddings of length 1."""
        counts = self.chosen(counts)
        gene_CT = F.pad(counts.gene_CN, (1, 0), value=self.cls)
        value_CT = F.pad(counts.value_CN.log1p(), (1, 0))
        hidden_CTD = self.encoder(self.gene(gene_CT) + self.value(value_CT[..., None]))
        return F.normalize(hidden_CTD[:, 0], dim=1)

    def chosen(self, counts: Counts) -> Counts:
        """As many genes as fit beside the cls token."""
        if counts.gene_CN.shape[1] <= self.genes:
            return counts
        kept = torch.rand(counts.gene_CN.shape, generator=self.generator).topk(self.genes, dim=1).indices
        return Counts(counts.gene_CN.gather(1, kept), counts.value_CN.gather(1, kept))


class ScVI(nn.Module):
    """The encoder over all genes: dense counts, their logarithm, one hidden layer, the mean of the latent."""

    def __init__(self, shape: Mapping[str, int]) -> None:
        super().__init__()
        from scvi.module import VAE

        self.genes = shape["genes"]
        self.vae = VAE(n_input=self.genes, n_hidden=shape["hidden"], n_latent=shape["latent"], n_layers=1)

    def forward(self, counts: Counts) -> Tensor:  # [C, latent]
        """What get_latent_representation gives."""
        dense_CG = torch.zeros(len(counts), self.genes).scatter_(1, counts.gene_CN, counts.value_CN)
        inferred = self.vae.inference(dense_CG, torch.zeros(len(counts), 1, dtype=torch.int64))
        mean: Tensor = inferred["qz"].loc
        return mean


NETWORKS: dict[str, Callable[[Mapping[str, int]], nn.Module]] = {"geneformer": Geneformer, "scgpt": ScGPT, "scvi": ScVI}


class Peer:
    """The network and the cells."""

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.counts: Counts | None = None

    def setup(self, kind: str, threads: int, shape: Mapping[str, int]) -> dict[str, Any]:
        """Builds one of NETWORKS in this shape. Answers with how many parameters it has."""
        if kind not in NETWORKS:
            raise ValueError(f"there is no peer {kind!r}; known are {', '.join(NETWORKS)}")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.network = NETWORKS[kind](shape).eval()
        return {"parameters": sum(parameter.numel() for parameter in self.network.parameters())}

    def cells(self, cells: int, nonzeros: int, genes: int, seed: int = 0) -> None:
        """Makes the cells that the next commands run on."""
        _, gene, value = random_cells(cells, nonzeros, genes, seed)
        self.counts = Counts(*(torch.from_numpy(column.reshape(cells, nonzeros)) for column in (gene, value)))

    def embed(self, batch: int, first: int | None = None, save: str | None = None) -> dict[str, Any]:
        """Embeds the first cells (None: all), this many at a time; ``save`` keeps the embeddings."""
        if self.network is None or self.counts is None:
            raise RuntimeError("nothing to embed: setup and cells come first")
        network, counts = self.network, self.counts.chunk(0, first or len(self.counts))
        kept: list[Tensor] = []

        def _run() -> None:
            with torch.inference_mode():
                kept.extend(network(counts.chunk(start, start + batch)) for start in range(0, len(counts), batch))

        figures = measured(_run)
        if save:
            np.save(save, torch.cat(kept).numpy())
        return figures | {"cells": len(counts)}


def main() -> None:
    """Serves until the input ends."""
    torch.backends.mha.set_fastpath_enabled(False)  # slower on a CPU than the attention it replaces: scGPT 1.4 against 0.9 s a cell
    side = Peer()
    serve({"setup": side.setup, "cells": side.cells, "embed": side.embed})


if __name__ == "__main__":
    main()
