"""The predictor: cells -> sentences -> network -> answers in the caller's order.

Pipelines, batch jobs and serving all go through here, so that a notebook and an endpoint give the same answer. A cell's
answer depends on the sentence it is seen in; sentences are built deterministically and never mixed between callers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder, describe, load_model
from cellplane.artifact.judgement import UNKNOWN as UNKNOWN
from cellplane.artifact.judgement import Judgement
from cellplane.artifact.members import members_of, together
from cellplane.artifact.panel import Panel
from cellplane.artifact.smoothing import Smoothing
from cellplane.cells import CellBatch
from cellplane.data.company import READ_ONLY, Context, SharedStore, context_for, store_beside, store_in, store_with_panel
from cellplane.data.config import DataKeys
from cellplane.data.loader import prefetch
from cellplane.data.quality import tell_scale
from cellplane.data.sentences import CellTable, MemoryStore, PlanConfig, SentenceStore
from cellplane.data.sources import AnnData, cell_table, gene_columns
from cellplane.data.sources import query_keys as query_keys
from cellplane.errors import ConfigError, DataError, FileFormatError, IntegrityError
from cellplane.genes import GeneVocabulary, gene_warnings
from cellplane.model.cellplm import CellPLM, CellPLMOutput, halved
from cellplane.model.config import Precision
from cellplane.model.linear import in_precision
from cellplane.results import LABELS_DERIVED as LABELS_DERIVED
from cellplane.results import NO_COUNTS as NO_COUNTS
from cellplane.results import NO_KNOWN_COUNTS as NO_KNOWN_COUNTS
from cellplane.results import Annotation as Annotation
from cellplane.results import Denoised as Denoised
from cellplane.results import answered as answered
from cellplane.results import flag_column as flag_column
from cellplane.results import record as record
from cellplane.results import with_warnings as with_warnings
from cellplane.results import write_annotation as write_annotation
from cellplane.results import write_denoised as write_denoised
from cellplane.results import write_embedding as write_embedding
from cellplane.results import write_flags as write_flags

log = logging.getLogger(__name__)

CELLS_PER_FORWARD = PlanConfig().cells_per_micro_batch
CELLS_PER_DECODE = 256  # of whom all genes are decoded at a time: 20 MB at 19,374 genes
RATES_PER = 10_000  # what denoised rates of a cell add up to over the genes it measured and the model knows
TASKS = {  # what each kind of model can be asked
    "pretrain": ("embed",),
    "annotate": ("annotate", "embed"),
    "denoise": ("denoise", "embed"),
    "impute": ("impute",),
    "perturb": ("perturb",),
}


class Predictor:
    """A loaded model that answers on any SentenceStore; always in evaluation, always deterministic."""

    def __init__(self, folder: ModelFolder, device: str = "cpu", precision: Precision = "float32") -> None:
        self.folder, self.device, self.precision = folder, torch.device(device), precision
        self.model = halved(build_network(folder, precision)).to(self.device).eval()
        others = [build_network(replace(folder, weights=weights), precision) for weights in members_of(folder.attachments)]
        self.others = [halved(network).to(self.device).eval() for network in others]  # that answer with it, see `artifact.members`
        self.judgement = Judgement.of(folder.attachments)
        self.smoothing = Smoothing.of(folder.attachments)
        self.panel = Panel.of(folder.attachments)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", precision: Precision = "float32") -> Predictor:
        """The model of a folder, checksums verified; see `artifact.folder.load_model` for the errors.

        In bfloat16 it is several times faster and half as large; embeddings keep their direction to three digits.
        """
        return cls(load_model(folder), device, precision)

    @property
    def vocabulary(self) -> GeneVocabulary:
        """The genes the model knows."""
        return self.folder.vocabulary

    @property
    def classes(self) -> tuple[str, ...]:
        """The cell types the model names; empty for one that only embeds."""
        return self.folder.classes

    @property
    def task(self) -> str:
        """What the model was trained for: pretrain or annotate."""
        return self.folder.task

    @property
    def max_cells(self) -> int:
        """Largest sentence."""
        return self.folder.max_cells

    @property
    def reads_places(self) -> bool:
        """Whether an answer depends on how far apart cells lie: then sentences are patches of tissue."""
        return self.folder.config.reads_places

    @property
    def tasks(self) -> tuple[str, ...]:
        """What this model can be asked: embed, annotate."""
        return TASKS[self.folder.task]

    @property
    def panel_table(self) -> CellTable:
        """The reference cells that the model carries; ConfigError when it has none."""
        if self.panel is None:
            raise ConfigError("this model carries no reference panel; give it one: cellplane models panel")
        return CellTable(self.panel.crow, self.panel.gene, self.panel.value, self.panel.measured)

    def company(self, context: Context | AnnData) -> Context | AnnData | CellTable:
        """The context as `read_cells` takes it: the panel's cells for its name."""
        if not isinstance(context, str):
            return context
        return self.panel_table if context == "panel" else context_for(context, self.reads_places)

    def store(self, table: CellTable, context: Context) -> tuple[MemoryStore | SharedStore, str]:
        """Cells in a context, and what to record of it; ConfigError for a context this model has not."""
        if context == "panel":
            return store_with_panel(table, self.panel_table, self.max_cells)
        return store_in(context_for(context, self.reads_places), table, self.max_cells)

    def info(self) -> dict[str, Any]:
        """JSON-ready description: tasks, classes, vocabulary fingerprint, context size, checksum, dtype."""
        return {**describe(self.folder), "tasks": list(self.tasks), "dtype": self.precision}

    def annotate(self, store: SentenceStore, judgement: Judgement | None = None) -> Annotation:
        """Cell types of every cell of the store, in the order of its rows; ``judgement`` replaces the model's own.

        DataError when the model has no classes.
        """
        n, classes = n_asked(store), self.folder.classes
        confidence, strange, proba = (np.zeros(shape, dtype=np.float32) for shape in (n, n, (n, len(classes))))
        out = Annotation(np.full(n, UNKNOWN, dtype=object), confidence, proba, classes, strange)
        for rows, part in self.annotations(store, judgement):
            out.labels[rows], confidence[rows], proba[rows] = part.labels, part.confidence, part.proba
            strange[rows] = 0 if part.unknown_score is None else part.unknown_score
        return out if (judgement or self.judgement).rule is not None else replace(out, unknown_score=None)

    def annotations(self, store: SentenceStore, judgement: Judgement | None = None) -> Iterator[tuple[NDArray[np.int64], Annotation]]:
        """The same, some sentences at a time: (rows [c], what is said of them)."""
        judgement, classes = judgement or self.judgement, self.folder.classes
        if "annotate" not in self.tasks:
            raise DataError(f"this model ({self.folder.task}) can {', '.join(self.tasks)}; fine-tune it for annotation first")
        for batch, output in self._forward(store):
            if output.logits is None and judgement.voters is None:
                raise IntegrityError("the model says it annotates but has no annotation head")
            z = output.latent.float().cpu().numpy()
            proba = judgement.probabilities(None if output.logits is None else output.logits.float().cpu().numpy(), z, batch)
            strange = judgement.unknown_scores(proba, z, batch)
            labels, confidence = judgement.words(proba, strange, classes)
            seen = batch.counted().numpy()
            labels[~seen] = UNKNOWN
            yield batch.row.numpy(), Annotation(labels, np.where(seen, confidence, np.float32(0)), proba, classes, strange)

    def logits(self, store: SentenceStore) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The head's raw logits [n, n_classes] (zeros without a head) and z [n, Z], in the order of the store's rows."""
        logits = np.zeros((n_asked(store), len(self.folder.classes)), dtype=np.float32)
        latent = np.zeros((len(logits), self.folder.config.latent_width), dtype=np.float32)
        for batch, output in self._forward(store):
            latent[batch.row.numpy()] = output.latent.float().cpu().numpy()
            if output.logits is not None:
                logits[batch.row.numpy()] = output.logits.float().cpu().numpy()
        return logits, latent

    def embed(self, store: SentenceStore) -> NDArray[np.float32]:
        """Latent z of every cell, [n, Z] float32, in the order of the store's rows."""
        latent = np.zeros((n_asked(store), self.folder.config.latent_width), dtype=np.float32)
        for rows, z in self.embeddings(store):
            latent[rows] = z
        return latent

    def embeddings(self, store: SentenceStore) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The same, some sentences at a time: (rows [c], z [c, Z])."""
        for batch, output in self._forward(store, alone=True):
            yield batch.row.numpy(), output.latent.float().cpu().numpy()

    def rates(self, store: SentenceStore, batches: Sequence[int] | None = None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Every cell's expected share of its counts by gene, some cells at a time: (rows [c], shares [c, G]).

        Shares are 0 for genes a cell's data set did not measure, and add up to 1 over the others. Each cell is decoded in
        its own batch, one whose batch the model did not learn in all of those that it did, or everybody in ``batches``; shares
        of several are averaged. A model's smoothing (see `artifact.smoothing`) is part of the answer in a cell's own batch, and
        none where batches are exchanged: neighbours' counts carry theirs. DataError when the model decodes no counts.
        """
        if self.folder.config.decoder != "negative_binomial":
            raise DataError(
                f"this {self.folder.task} model decodes no counts (decoder {self.folder.config.decoder}): fine-tune it to denoise"
            )
        learned = range(len(batches_of(self.folder)))
        for batch, output in self._forward(store, alone=True):
            new = (batch.batch_index < 0) & bool(learned)
            for cells, told in ((~new, None), (new, learned)) if batches is None else ((new | True, batches),):
                for some in torch.split(cells.nonzero()[:, 0], CELLS_PER_DECODE):
                    part = batch.take(some)
                    shares = self._shares(output.latent[some.to(self.device)], part.to(self.device), told)
                    smoothing = self.smoothing if told is None else None
                    yield part.row.numpy(), shares if smoothing is None else smoothing.mixed(part, shares)

    @torch.inference_mode()
    def _shares(self, z_CZ: torch.Tensor, part: CellBatch, batches: Sequence[int] | None) -> NDArray[np.float32]:
        decoder, measured = self.model.decoder, part.panels[part.panel_index]
        assert decoder is not None
        told = [part] if batches is None else [replace(part, batch_index=torch.full_like(part.batch_index, index)) for index in batches]
        total = torch.zeros(measured.shape, device=self.device)
        for one in told:
            with in_precision(self.precision, self.device):
                mean = decoder(z_CZ, one, None)[0].float() * measured
            total += mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        shares: NDArray[np.float32] = (total / len(told)).cpu().numpy()
        return shares

    def decode(self, batch: CellBatch, told: CellBatch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder says of prepared cells (see `decoded`), on the CPU: [C, G] and the dispersion [G]."""
        moved = None if told is None else told.to(self.device)
        mean_CG, theta_G = decoded(self.model, batch.to(self.device), moved)
        return mean_CG.float().cpu(), theta_G.float().cpu()

    def _forward(self, store: SentenceStore, alone: bool = False) -> Iterator[tuple[CellBatch, CellPLMOutput]]:
        """What the members say together of every pack; ``alone``: the first, whose the latent space is."""
        networks = (self.model,) if alone else (self.model, *self.others)
        asked = list(packs(store.sizes, CELLS_PER_FORWARD))
        read = map(store.read, asked)
        for batch in read if len(asked) < 2 else prefetch(read, ahead=1):  # the next pack is read while the network computes
            if batch.n_genes != len(self.folder.vocabulary):
                raise DataError(f"the cells have {batch.n_genes} gene positions, the model {len(self.folder.vocabulary)}: align them first")
            with torch.inference_mode():
                yield _asked(batch, together(networks, batch.to(self.device)))


def n_asked(store: SentenceStore) -> int:
    """Cells that are answered, all but the read-only ones of a context."""
    known: int | None = getattr(store, "n_asked", None)
    return int(store.sizes.sum()) if known is None else known


def _asked(batch: CellBatch, output: CellPLMOutput) -> tuple[CellBatch, CellPLMOutput]:
    """The batch and what was said of it, without read-only cells."""
    if (batch.row != READ_ONLY).all():
        return batch, output
    cells = (batch.row != READ_ONLY).nonzero()[:, 0]
    there = cells.to(output.latent.device)
    logits = None if output.logits is None else output.logits[there]
    return batch.take(cells), CellPLMOutput(output.latent[there], logits, None)


@torch.inference_mode()
def decoded(network: CellPLM, batch: CellBatch, told: CellBatch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's first table [C, G] (unscaled means, or the log shift of a perturbation) and the dispersion [G].

    The cells are read as they stand in ``batch`` and decoded as if of the batches and platforms of ``told``: the same
    cells, measured elsewhere. ConfigError for a network without a decoder.
    """
    if network.decoder is None:
        raise ConfigError(f"a {network.config.decoder} decoder recovers no counts; take a model that was trained with one")
    latent = network(batch).latent
    found: tuple[torch.Tensor, torch.Tensor] = network.decoder(latent, batch if told is None else told, None)
    return found


def packs(sizes: NDArray[np.int64], budget: int) -> Iterator[list[int]]:
    """Consecutive sentences packed up to ``budget`` cells; a longer sentence comes alone."""
    current: list[int] = []
    cells = 0
    for sentence, size in enumerate(sizes.tolist()):
        if current and cells + size > budget:
            yield current
            current, cells = [], 0
        current.append(sentence)
        cells += size
    if current:
        yield current


def build_network(folder: ModelFolder, precision: Precision = "float32") -> CellPLM:
    """The network with the folder's weights; every tensor must be there with the right shape and nothing else.

    Raises IntegrityError naming the keys.
    """
    with torch.device("meta"):  # no memory and no first values: all come from the folder
        network = CellPLM(replace(folder.config, precision=precision))
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in folder.weights.items()}
    if expected != found:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        common = sorted(expected.keys() & found.keys())
        shapes = [f"{name}: {found[name]} instead of {expected[name]}" for name in common if expected[name] != found[name]]
        raise IntegrityError(
            f"the weights do not belong to this configuration: missing {missing[:5]}, not expected {extra[:5]}, misshapen {shapes[:5]}"
        )
    types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    own = {name: tensor.to(types[name], copy=True) for name, tensor in folder.weights.items()}
    network.load_state_dict(own, strict=True, assign=True)
    return network


@dataclass(frozen=True)
class Read:
    """An AnnData as sentences, and what to report about reading it: its genes, its counts, the context."""

    store: MemoryStore | SharedStore
    report: Mapping[str, Any]


def read_cells(
    adata: AnnData,
    vocabulary: GeneVocabulary,
    keys: DataKeys,
    max_cells: int,
    classes: tuple[str, ...] | None = None,
    context: Context | AnnData | CellTable = "own",
) -> Read:
    """The cells as sentences of at most ``max_cells`` by ``keys.batch_key``; labels only when ``classes`` are given.

    ``context`` is "own" (these cells, by batch), "section" (patches of neighbouring cells), "self" (each cell alone), or
    another AnnData, whose cells are read beside them and not answered, see `data.company`; a model's panel comes as its
    cells (`Predictor.company`). ConfigError for another name.
    """
    table, read = cell_table(adata, vocabulary, keys, classes)
    report = with_warnings(read, gene_warnings(read, len(vocabulary)))
    tell_scale(table)
    if isinstance(context, str):
        store, told = store_in(context, table, max_cells)
        return Read(store, {**report, "context": told})
    if isinstance(context, CellTable):
        beside, told = store_with_panel(table, context, max_cells)
        return Read(beside, {**report, "context": told})
    others, _ = cell_table(context, vocabulary, query_keys(context, keys))
    shared, told = store_beside(table, others, max_cells)
    return Read(shared, {**report, "context": told})


@dataclass(frozen=True)
class BatchedStore:
    """A SentenceStore whose cells know their batch: ``batch_index`` [n] positions in the decoder's table, -1 = unseen."""

    store: MemoryStore
    batch_index: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence."""
        return self.store.sizes

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """See SentenceStore."""
        batch = self.store.read(sentences)
        return replace(batch, batch_index=torch.from_numpy(self.batch_index[batch.row.numpy()]))

    @classmethod
    def of(cls, table: CellTable, names: Sequence[str], max_cells: int, reads_places: bool = False) -> BatchedStore:
        """The table's cells in sentences of their own batch, its name looked up among ``names``; see `company.context_for`."""
        place = {name: index for index, name in enumerate(names)}
        none = np.full(table.n_cells, -1, dtype=np.int64)
        known = none if table.batch is None else np.array([place.get(str(name), -1) for name in table.batch], dtype=np.int64)
        return cls(store_in(context_for("own", reads_places), table, max_cells)[0], known)

    @classmethod
    def for_model(cls, table: CellTable, folder: ModelFolder) -> BatchedStore:
        """The table's cells as a denoiser reads them."""
        return cls.of(table, batches_of(folder), folder.max_cells, folder.config.reads_places)


def denoise(predictor: Predictor, data: AnnData, keys: DataKeys, target_batch: str | None = None) -> Denoised:
    """What a model expects every cell to show, decoded in ``target_batch`` or as `decoded_in` says.

    Beside the answer only some cells' genes are in memory at a time. Columns of one gene all get the gene's rate. The report
    counts cells of batches that the model did not learn, where it learned any.
    """
    folder = predictor.folder
    table, report = cell_table(data, folder.vocabulary, keys)
    store = BatchedStore.for_model(table, folder)
    columns = gene_columns(data, keys, folder.vocabulary)
    rates = np.empty((table.n_cells, len(columns)), dtype=np.float32)
    for rows, shares in predictor.rates(store, decoded_in(folder, store, target_batch)):
        rates[rows] = rates_of(shares, columns)
    report = with_warnings(report, gene_warnings(report, len(folder.vocabulary)))
    new = int((store.batch_index < 0).sum()) if batches_of(folder) and target_batch is None else 0
    return Denoised(rates, table, {**report, "cells_of_unlearned_batches": new} if new else report)


def rates_of(shares: NDArray[np.float32], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Shares [c, G] as rates per 10,000 of a file's columns [c, n_vars]; NaN where the vocabulary has no place (-1)."""
    known = columns >= 0
    rates = np.full((len(shares), len(columns)), np.nan, dtype=np.float32)
    rates[:, known] = RATES_PER * shares[:, columns[known]]
    return rates


def batches_of(folder: ModelFolder) -> tuple[str, ...]:
    """The batches a denoiser learned, in the order of its decoder's table; none for a base model, whose are not the user's."""
    return tuple(json.loads(folder.lineage.get("batches", "[]")))


def keys_of(lineage: Mapping[str, str]) -> DataKeys | None:
    """Where counts and columns lay in the cells that a model learned; None: it does not say. FileFormatError when that is broken."""
    if (kept := lineage.get("keys")) is None:
        return None
    try:
        return DataKeys.model_validate_json(kept)
    except ValueError as error:
        raise FileFormatError(f"the model does not say clearly how its cells were read (keys in its lineage): {error}") from error


def reading_keys(known: DataKeys | None, named: DataKeys) -> DataKeys:
    """How other cells are read for a model: by the keys that are ``named``, else by its own (``known``, where it has some)."""
    return named if known is None else known.model_copy(update=named.model_dump(exclude_unset=True))


def decoded_in(folder: ModelFolder, store: BatchedStore, target: str | None) -> tuple[int, ...] | None:
    """Which batches to decode all cells in: the target; None = each in its own, as `Predictor.rates` says."""
    names = batches_of(folder)
    if target is not None:
        if target not in names:
            raise ConfigError(f"no batch {target!r} was learned; there are {', '.join(names) or 'none: fit with keys.batch_key'}")
        return (names.index(target),)
    if names and (new := int((store.batch_index < 0).sum())):
        log.warning("%d cells are of batches that were not learned: they are decoded in the mean of %d", new, len(names))
    return None
