"""A model that knows more genes, so that fine-tuning can use a panel the base never saw, or fewer, where few are needed.

A new gene begins as the average of those known: its vector, its output and its dispersion are the means of the tables,
which says nothing about it yet but keeps everything else as it was. What the model knew is untouched, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cellplane.artifact.folder import ModelFolder
from cellplane.errors import IntegrityError, VocabularyError
from cellplane.genes import GeneVocabulary

PER_GENE = (  # tensors with a row for every gene
    "embedder.genes_GD",
    "decoder.mean.weight",
    "decoder.mean.bias",
    "decoder.log_dispersion_G",
    "decoder.log_variance_G",
)


def with_genes(model: ModelFolder, new_ids: Iterable[str]) -> ModelFolder:
    """The model with these genes after its own, in memory; the model itself when it knows them all.

    Genes it knows are not added again. Raises IntegrityError when its tables do not have a row for each of its genes.
    """
    vocabulary = model.vocabulary.extended(new_ids)
    added = len(vocabulary) - len(model.vocabulary)
    if added == 0:
        return model
    weights = {name: _grown(model, name, tensor, added) if name in PER_GENE else tensor for name, tensor in model.weights.items()}
    return replace(
        model,
        config=replace(model.config, n_genes=len(vocabulary)),
        weights=weights,
        vocabulary=vocabulary,
        lineage={**model.lineage, "added_genes": str(added)},
        manifest={},  # another model than the one saved
    )


def with_only(model: ModelFolder, vocabulary: GeneVocabulary) -> ModelFolder:
    """The model over these of its genes alone, in their order, in memory; the model itself when they are its own.

    Raises VocabularyError for a gene it does not know, IntegrityError when its tables do not have a row for each of its genes.
    """
    if vocabulary == model.vocabulary:
        return model
    rows = model.vocabulary.index(vocabulary.gene_ids)
    if unknown := [gene for gene, row in zip(vocabulary.gene_ids, rows, strict=True) if row < 0]:
        raise VocabularyError(f"{len(unknown)} genes are none of the model's, e.g. {unknown[:5]}")
    kept = torch.from_numpy(rows)
    weights = {name: _checked(model, name, tensor)[kept] if name in PER_GENE else tensor for name, tensor in model.weights.items()}
    return replace(
        model,
        config=replace(model.config, n_genes=len(vocabulary)),
        weights=weights,
        vocabulary=vocabulary,
        lineage={**model.lineage, "kept_genes": str(len(vocabulary))},
        manifest={},  # another model than the one saved
    )


def _grown(model: ModelFolder, name: str, tensor: Tensor, added: int) -> Tensor:
    known = _checked(model, name, tensor)
    mean = known.to(torch.float64).mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([known, mean.expand(added, *tensor.shape[1:])])


def _checked(model: ModelFolder, name: str, tensor: Tensor) -> Tensor:
    if len(tensor) != len(model.vocabulary):
        raise IntegrityError(f"{name} has {len(tensor)} rows for {len(model.vocabulary)} genes; import or save the model again")
    return tensor.detach()
