"""Denoising: the counts a cell would be expected to show, learned by hiding counts of the same cells.

    pipeline = DenoisingPipeline("models:/cellplm-tiny@champion").fit(adata)
    pipeline.predict(adata, key_added="cellplm")   # layers["cellplm_denoised"]: rates per 10,000

A quarter of all entries is hidden in every step, zeros included: a model that only ever recovers non-zeros learns what a
count is once it is there, and fills every zero. Nothing is hidden when it answers (PROTOCOLS 8).
"""

# C cells, G genes

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cellplane.artifact.folder import ModelFolder
from cellplane.cells import CellBatch
from cellplane.config import fingerprint
from cellplane.data.config import DataKeys
from cellplane.data.confounding import confounding
from cellplane.data.sentences import CellTable, PlanConfig, StepPlan
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError, DataError
from cellplane.genes import GeneVocabulary
from cellplane.inference import (
    BatchedStore,
    Predictor,
    build_network,
    decoded_in,
    denoise,
    keys_of,
    query_keys,
    record,
    write_denoised,
    write_flags,
)
from cellplane.model.cellplm import CellPLM, CellPLMOutput, new_model
from cellplane.model.linear import in_precision
from cellplane.model.losses import pretraining_loss
from cellplane.model.masking import Mask, mask_genes
from cellplane.model.noise import Noise
from cellplane.pipelines.base import Estimator, base_name, check_transfer, starting_model, take_over
from cellplane.pipelines.components import main_directions
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising_baselines import Answers, gene_shares
from cellplane.pipelines.denoising_scores import evaluate
from cellplane.pipelines.denoising_smoothing import smoothed
from cellplane.pipelines.job import Scores
from cellplane.results import WARNINGS
from cellplane.seeds import keyed_seed
from cellplane.train.finetune import Best, Course, Look, Progress, finetune
from cellplane.train.loop import Keeping
from cellplane.train.objective import MaskedObjective

log = logging.getLogger(__name__)

START = 0.1  # hidden counts of simulated cells, nats: 66.2 with 1, 63.5 with 0.1, 63.6 with 0, 64.4 without the average cell
SPREAD = 1.0  # of a main direction; hidden counts of validation cells, cellbench: 4,019 nats with 1, 4,030 with 0.5, 4,055 with 2
LEAST_MEAN = 1e-4  # ten times the least mean that the decoder can say
BATCH_PART = "decoder.batch."  # what the decoder knows of batches: a base model's are not the user's


class Denoiser(nn.Module):
    """The network with the loss of denoising: hidden entries weigh more than seen ones; same parts, same names.

    Two likelihoods come from the decoder: of all measured entries, told the cell's total, and of the hidden ones, told
    theirs. With weights h and s for hidden and seen entries the loss is s times the first plus (h - s) times the second.
    """

    def __init__(self, network: CellPLM, weights: tuple[float, float]) -> None:
        super().__init__()
        self.config, (self.hidden_weight, self.seen_weight) = network.config, weights
        self.embedder, self.encoder, self.latent, self.decoder = network.embedder, network.encoder, network.latent, network.decoder

    def forward(self, batch: CellBatch, mask: Mask, noise: Noise | None = None) -> CellPLMOutput:
        """The loss of every sentence, and as its parts the two likelihoods as they are, beside the latent terms."""
        assert self.decoder is not None
        step = 0 if noise is None else noise.step
        with in_precision(self.config.precision, batch.value.device):
            latent = self.latent(self.encoder(self.embedder(batch, mask, noise), batch, noise), noise)
            full_C, hidden_C = self.decoder(latent.z_CZ, batch, noise, mask)
            weighted = self.seen_weight * full_C, (self.hidden_weight - self.seen_weight) * hidden_C
            loss = pretraining_loss(batch, mask, latent, weighted, self.config, step)
            plain = pretraining_loss(batch, mask, latent, (full_C.detach(), hidden_C.detach()), self.config, step)
        return CellPLMOutput(latent.z_CZ, None, replace(loss, parts=plain.parts))


class HiddenCounts:
    """A look at hidden counts, always the same ones, of cells that are not trained on."""

    def __init__(self, denoiser: Denoiser, store: BatchedStore, config: DenoisingConfig) -> None:
        self.denoiser, self.works = denoiser, []
        everybody = config.masking if config.masking.drop_cell_rate == 0 else replace(config.masking, drop_cell_rate=0.0)
        plan = StepPlan(store.sizes, PlanConfig(seed=config.seed, cells_per_micro_batch=config.cells_per_step, micro_batches_per_step=1))
        for step in range(plan.steps_of_epoch(0)):
            (part,) = plan.at(step)
            seeds = torch.tensor([keyed_seed(config.seed, "validation", sentence) for sentence in part.sentences])
            batch = replace(store.read(part.sentences), sentence_seed=seeds)
            self.works.append((batch, mask_genes(batch, store.sizes[list(part.sentences)], everybody)))

    def __call__(self) -> Look:
        """Nats of a cell's hidden counts, mean over the cells, and the loss."""
        device = next(self.denoiser.parameters()).device
        totals = torch.zeros(3, dtype=torch.float64)
        for batch, mask in self.works:
            with torch.inference_mode():
                loss = self.denoiser(batch.to(device), mask.to(device)).loss
            assert loss is not None
            nb_hidden = loss.parts[loss.names.index("nb_hidden")]
            sizes = batch.cu_seqlens.diff().double()
            rows = torch.stack([loss.total.detach(), nb_hidden]).cpu().double() @ sizes
            totals += torch.cat([rows, sizes.sum()[None]])
        found, hidden = (totals[:2] / totals[2]).tolist()
        return Look({"val/loss": found, "val/nb_hidden": hidden}, (-hidden,))


class DenoisingPipeline(Estimator):
    """fit / predict / score / save / load on AnnData; learned attributes end in an underscore.

    ``model`` is a model folder or registry URI with a count decoder to start from (None: from scratch);
    ``pretrain_prefix`` with ``pretrain_directory`` names an official CellPLM checkpoint instead. With a base model it can
    predict without fit: zero-shot, cells read as the model's own were where `config.keys` is left as it is by default.
    """

    task = "denoise"
    recipe = DenoisingConfig
    config: DenoisingConfig

    def __init__(
        self,
        model: str | Path | ModelFolder | None = None,
        config: DenoisingConfig | Mapping[str, Any] | None = None,
        *,
        pretrain_prefix: str | None = None,
        pretrain_directory: str | Path | None = None,
    ) -> None:
        super().__init__(model, config, pretrain_prefix=pretrain_prefix, pretrain_directory=pretrain_directory)
        self._zero_shot: Predictor | None = None

    def fit(
        self,
        data: AnnData,
        config: DenoisingConfig | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        keeping: Keeping | None = None,
    ) -> DenoisingPipeline:
        """Learns to recover hidden counts of these cells; cells without counts are left out. The AnnData is not changed.

        With a ``keeping`` a fit that was killed goes on where it was. Raises DataError for too few cells, ConfigError for
        a base model that decodes no counts.
        """
        told = self.configured(config)
        cells = Cells.of(data, self.base, told)
        if empty := int((cells.table.totals() == 0).sum()):
            log.warning("%d of %d cells have no counts in genes the model knows and are left out", empty, cells.table.n_cells)
        return self._fit(cells, told, Course(progress, keeping))

    def fit_cells(self, cells: Cells, course: Course | None = None) -> DenoisingPipeline:
        """The same for cells that were read already."""
        return self._fit(cells, self.configured(None), course)

    def _fit(self, cells: Cells, config: DenoisingConfig, course: Course | None) -> DenoisingPipeline:
        check_transfer(config.transfer, self.base)
        counted = np.flatnonzero(cells.table.totals() > 0)
        order = np.random.default_rng(keyed_seed(config.seed, "validation cells")).permutation(counted)
        held = max(1, round(config.validation_share * len(order)))
        if len(order) <= held:
            raise DataError(
                f"{len(order)} of {cells.table.n_cells} cells have counts; denoising needs some to learn and some to validate with"
            )
        network = self._network(cells, cells.table.rows(np.sort(order[held:])), config)
        training, validation = (
            BatchedStore.of(cells.table.rows(np.sort(rows)), cells.batches, config.max_cells, network.config.reads_places)
            for rows in (order[held:], order[:held])
        )
        denoiser = Denoiser(network, (config.hidden_weight, config.seen_weight))
        plan = StepPlan(training.sizes, PlanConfig(seed=config.seed, cells_per_micro_batch=config.cells_per_step, micro_batches_per_step=1))
        look = HiddenCounts(denoiser, validation, config)
        best = finetune(denoiser, MaskedObjective(training, config.masking), plan, config, look, course)
        self.history_ = best.history
        folder = ModelFolder(
            config=network.config,
            weights=best.weights,
            vocabulary=cells.vocabulary,
            task="denoise",
            max_cells=config.max_cells,
            lineage=self._lineage(best, cells, len(order), config),
        )
        known = np.sort(order)
        self._answer_with(smoothed(folder, cells.table.rows(known), np.searchsorted(known, np.sort(order[:held])), config), config)
        return self

    def predict(self, data: AnnData, *, key_added: str | None = None, target_batch: str | None = None) -> NDArray[np.float32]:
        """Rates per 10,000, [n, n_vars] float32, rows and columns as in ``data``; NaN for genes the model does not know.

        A cell is decoded in its own batch when all batches were learned, else in every learned one, the rates averaged;
        ``target_batch`` decodes all cells in that one. With ``key_added`` also layers[key_denoised], obs[key_size_factor]
        (rates times it / 10,000 are expected counts), uns["cellplm"], and obs[key_flag] for cells without known counts.
        """
        predictor = self._asked()
        found = denoise(predictor, data, query_keys(data, self._keys()), target_batch)
        if key_added is not None:
            write_flags(data, found.table, key_added)
            write_denoised(data, found, key_added)
            data.uns["cellplm"] = record(predictor.folder, found.report)
        return found.rates

    def score(self, data: AnnData) -> Scores:
        """Errors on counts that were taken out before anything was learned, beside the baselines; see `denoising_scores`.

        The recipe is fitted anew on the thinned cells, from the same base model: twice, once for each protocol.
        """
        config = self.settings()
        cells = Cells.of(data, self.base, config)

        def refitted(thinned: CellTable) -> Answers:
            again = type(self)(self.base, config).fit_cells(replace(cells, table=thinned))
            return answers(again._fitted(), thinned)

        return evaluate(refitted, cells.table, config.seed)

    def score_as_it_is(self, data: AnnData) -> Scores:
        """The same for the model as it stands. Only honest for cells that it was not fitted on."""
        predictor = self._asked()
        table, _ = cell_table(data, predictor.folder.vocabulary, query_keys(data, self._keys()))
        return evaluate(lambda thinned: answers(predictor, thinned), table, self.settings().seed)

    def _keys(self) -> DataKeys:
        """How to read cells: as this pipeline was told, else (zero-shot) as the model's own cells were read."""
        keys: DataKeys = self.settings().keys
        if self._predictor is None and self.base is not None and keys == self.recipe().keys:
            return keys_of(self.base.lineage) or keys
        return keys

    def _asked(self) -> Predictor:
        """The fitted model, else the base model as it was pre-trained."""
        if self._predictor is not None or self.base is None:
            return self._fitted()
        if self._zero_shot is None or self._zero_shot.folder is not self.base:
            self._zero_shot = Predictor(self.base)
        return self._zero_shot

    def _network(self, cells: Cells, training: CellTable, config: DenoisingConfig) -> CellPLM:
        """The network as training finds it; from scratch it begins at what the ``training`` cells tell."""
        start, n_batches = cells.start, len(cells.batches)
        if start is None:
            network = new_model(replace(config.model, n_genes=len(cells.vocabulary), n_batches=n_batches), config.seed)
            return begun_at(network, gene_shares(training), main_directions(training, network.config.decoder_bottleneck, config.seed))
        if start.config.decoder != "negative_binomial":
            raise ConfigError(f"the base model decodes no counts (decoder {start.config.decoder}): name a pre-trained one, or none")
        if not n_batches:
            return build_network(start)
        network = new_model(replace(start.config, n_batches=n_batches), config.seed)
        take_over(network, start, [name for name in start.weights if not name.startswith(BATCH_PART)])
        if start.config.n_batches:  # new rows begin as the mean of those the base model learned
            assert network.decoder is not None
            own = {name.removeprefix(BATCH_PART): tensor for name, tensor in start.weights.items() if name.startswith(BATCH_PART)}
            mean = own["table"].mean(0, keepdim=True).expand(n_batches, -1).clone()
            network.decoder.batch.load_state_dict({**own, "table": mean})  # type: ignore[union-attr]
        return network

    def _lineage(self, best: Best, cells: Cells, trained_on: int, config: DenoisingConfig) -> dict[str, str]:
        batches = {"batches": json.dumps(list(cells.batches))} if cells.batches else {}
        return {
            "base_model": base_name(self.base),
            "training_cells": str(trained_on),
            "counts": str(cells.report.get("count_source", "")),
            "config_sha256": fingerprint(config),
            "best_step": str(best.step),
            "keys": config.keys.model_dump_json(),
            **batches,
            **({WARNINGS: str(cells.report[WARNINGS])} if WARNINGS in cells.report else {}),
        }


@dataclass(frozen=True)
class Cells:
    """Cells read over the vocabulary of the model that fit starts from, and the names of their batches (none for fewer than two)."""

    table: CellTable
    vocabulary: GeneVocabulary
    start: ModelFolder | None
    batches: tuple[str, ...]
    report: Mapping[str, Any]

    @classmethod
    def of(cls, data: AnnData, base: ModelFolder | None, config: DenoisingConfig) -> Cells:
        """Reads an AnnData; raises what `cell_table` raises."""
        keys = config.keys.model_copy(update={"labels_key": None})
        start, vocabulary = starting_model(base, data, keys, config.new_genes)
        table, report = cell_table(data, vocabulary, keys)
        warned = confounding(data, config.keys)
        names = () if table.batch is None else tuple(sorted(set(map(str, table.batch))))
        return cls(table, vocabulary, start, names if len(names) > 1 else (), report | ({} if warned is None else {WARNINGS: warned}))


def begun_at(network: CellPLM, share_G: NDArray[np.float64], directions_GK: NDArray[np.float64]) -> CellPLM:
    """The network, whose answer begins near the average cell and can move from there in the main directions of the cells.

    So its steps go to which cell lies where, not to finding gene by gene what varies together. The weights above the bottleneck
    that are no such direction begin a tenth as large as usual: at their usual size they spoil a start this good, and the quickest
    way to mend it is to switch the bottleneck off, from which the network does not recover.
    """
    mean = np.clip(share_G * len(share_G), LEAST_MEAN, None)  # 1 for an average gene
    weights = network.state_dict()
    weights["decoder.mean.bias"] = torch.from_numpy(np.log(mean)).float()
    weights["decoder.mean.weight"] = START * weights["decoder.mean.weight"]
    weights["decoder.mean.weight"][:, : directions_GK.shape[1]] = SPREAD * torch.from_numpy(directions_GK).float()
    network.load_state_dict(weights)
    return network


def answers(predictor: Predictor, table: CellTable) -> Answers:
    """What a model says of these cells, each in its own batch where all were learned."""
    store = BatchedStore.for_model(table, predictor.folder)
    return predictor.rates(store, decoded_in(predictor.folder, store, None))
