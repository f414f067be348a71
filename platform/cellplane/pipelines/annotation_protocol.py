"""The full protocol of annotation: ours from scratch and from bases, tuned baselines, and controls, all on the same splits.

Each sample is left out in turn where there are several; else every cell is asked once in five stratified splits, and where
cells have coordinates held-out blocks of tissue are asked too (PROTOCOLS 2). An *arm* is what is fitted once on a split; it
gives one or more rows. The ledger keeps each arm's scores under what decides them, so that changing one recipe measures that
arm again and nothing else, and an evaluation that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.company import Context
from cellplane.data.sources import AnnData, column, find_counts
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.annotation_baselines import position_answers, tuned_baselines
from cellplane.pipelines.baselines import majority
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.metrics import annotation_scores, expected_calibration_error
from cellplane.pipelines.protocol import Found, Method
from cellplane.pipelines.protocol_config import AnnotationProtocol, EvaluatedData
from cellplane.pipelines.splits import Split, batch_splits, block_splits, random_splits, scorable

OWN = "own context"  # of the asked cells alone; the default row of a random split of tissue reads the whole section
LOCAL, ONE_CELL, SHUFFLED = "neighbours in the tissue", "one-cell context", "shuffled coordinates"
TUNED = "tuned baseline"  # the family with the best inner score
ALONE = "_cellplane_cell"  # obs column of the one-cell control: every cell a sample of its own
FAMILIES = ("logistic regression", "random forest", "pca50 + knn15")

Rows = Mapping[str, Found]


@dataclass(frozen=True)
class Study:
    """A data set ready to be split: its scorable cells, their types and, in units of the file, places."""

    name: str
    asked: EvaluatedData
    cells: AnnData
    types: NDArray[np.object_]
    dropped: int
    bases: Mapping[str, ModelFolder]

    @property
    def places(self) -> NDArray[np.float64] | None:
        """Coordinates [n, 2] in the file's units; None without a spatial_key."""
        key = self.asked.keys.spatial_key
        return None if key is None else np.asarray(self.cells.obsm[key], dtype=np.float64)[:, :2]


@dataclass(frozen=True)
class Trial:
    """One split of a study with one seed: what is learned from and what is asked."""

    study: Study
    split: Split
    seed: int

    @property
    def train(self) -> AnnData:
        """Cells to learn from."""
        return self.study.cells[self.split.train].copy()

    @property
    def test(self) -> AnnData:
        """Cells to ask about."""
        return self.study.cells[self.split.test].copy()

    @property
    def truth(self) -> NDArray[np.object_]:
        """Types of the asked cells."""
        return self.study.types[self.split.test]

    @property
    def section(self) -> bool:
        """Whether asked cells lie among those learned from, so that the whole slide may be read (PROTOCOLS 2)."""
        return self.split.protocol == "random" and self.study.asked.keys.spatial_key is not None


@dataclass(frozen=True)
class Arm:
    """What is fitted once on a split: the rows it gives, the settings that decide them, on which seeds it runs."""

    methods: tuple[Method, ...]
    settings: Mapping[str, Any]
    work: Callable[[Trial], Rows]
    seeds: tuple[int, ...]


def study_of(name: str, asked: EvaluatedData, data: AnnData, bases: Mapping[str, ModelFolder], fewest: int) -> Study:
    """The scorable cells of a data set; places in micrometres where the unit is known. DataError when fewer than two types are left."""
    types = column(data, str(asked.keys.labels_key))
    keep = scorable(types, fewest)
    if len(set(types[keep])) < 2:
        raise DataError(f"{name}: fewer than two types have {fewest} cells or more in obs[{asked.keys.labels_key!r}]")
    return Study(name, asked, data[keep].copy(), types[keep].astype(str).astype(object), int((~keep).sum()), bases)


def splits_of(study: Study, turn: int, seed: int) -> Iterator[Split]:
    """Every split that a study has with one seed, or as many as are asked; ``turn`` counts the seeds, each has other splits."""
    key = study.asked.keys.batch_key
    batches = None if key is None else column(study.cells, key)
    if batches is not None and len(set(batches)) > 1:
        yield from _turn_of(list(batch_splits(batches)), turn, study.asked.most_splits)
    else:
        yield from _turn_of(list(random_splits(study.types, seed)), turn, study.asked.most_splits)
    if study.places is not None:
        assert study.asked.guard_units is not None
        yield from _turn_of(list(block_splits(study.places, seed, guard_um=study.asked.guard_units)), turn, study.asked.most_splits)


def _turn_of(splits: list[Split], turn: int, most: int | None) -> Iterator[Split]:
    """The splits of one seed's turn: all, or the next ``most`` after those of the seed before, around the end."""
    if most is None or most >= len(splits):
        return iter(splits)
    return iter([splits[(turn * most + number) % len(splits)] for number in range(most)])


def arms_of(config: AnnotationProtocol, study: Study, protocol: str) -> list[Arm]:
    """What is fitted on the splits of one protocol, ours first."""
    spatial = study.places is not None
    rare = tuple(seed for seed in config.seeds if seed in config.control_seeds)
    recipe, section = config.recipe, spatial and protocol == "random"
    attends = recipe.model.n_blocks + recipe.model.local_blocks > 0  # else no cell sees another, and two rows would be one
    arms = [_ours(MODEL_ROW, recipe, None, config.seeds, section and attends), _baselines(config.seeds), _majority(config.seeds)]
    for name, base in study.bases.items():
        arms.append(_ours(f"{MODEL_ROW} from {name}", config.finetune, base, rare, section))
        arms.append(_ours(f"linear probe of {name}", config.probe, base, rare, section))
    if "random weights" in config.controls:
        arms += [_random_probe(config, name, base, rare) for name, base in (study.bases.items() or ((None, None),))]
    if "one cell" in config.controls and attends:
        arms.append(_one_cell(recipe, rare))
    if not spatial:
        return arms
    if "positions only" in config.controls:
        arms.append(_positions(config.seeds))
    if config.local_blocks:
        local = recipe.model_copy(update={"model": replace(recipe.model, local_blocks=config.local_blocks)})
        arms.append(_local(local, rare, shuffled=False))
        if "shuffled coordinates" in config.controls:
            arms.append(_local(local, rare, shuffled=True))
    return arms


def _ours(name: str, recipe: AnnotationConfig, base: ModelFolder | None, seeds: tuple[int, ...], section: bool) -> Arm:
    """The network without coordinates; on a random split of tissue also the row that reads the asked cells alone."""
    own = Method(f"{name}, {OWN}", "model")
    methods = (Method(name, "model"), *((own,) if section else ()))

    def work(trial: Trial) -> Rows:
        pipeline = _fitted(trial, trial.train, recipe, base)
        if not section:
            return {name: _answered(trial, pipeline, trial.test, "own")}
        return {
            name: _answered(trial, pipeline, trial.test, trial.train),
            own.name: _answered(trial, pipeline, trial.test, "own"),
        }

    return Arm(methods, {"recipe": recipe.model_dump(mode="json"), "base": None if base is None else base.model_sha256}, work, seeds)


def _one_cell(recipe: AnnotationConfig, seeds: tuple[int, ...]) -> Arm:
    """The same network, every cell a sentence of its own in training and prediction: what context is worth."""
    method = Method(f"{MODEL_ROW}, {ONE_CELL}", "control")

    def work(trial: Trial) -> Rows:
        train = trial.train
        train.obs[ALONE] = [str(row) for row in range(train.n_obs)]
        pipeline = _fitted(trial, train, recipe, None, batch_key=ALONE)
        return {method.name: _answered(trial, pipeline, trial.test, "self")}

    return Arm((method,), {"recipe": recipe.model_dump(mode="json")}, work, seeds)


def _local(recipe: AnnotationConfig, seeds: tuple[int, ...], shuffled: bool) -> Arm:
    """The network with blocks over the nearest cells in the tissue; shuffled: the same cells at one another's places."""
    method = Method(f"{MODEL_ROW}, {LOCAL}", "model")
    if shuffled:
        method = Method(f"{method.name}, {SHUFFLED}", "control")

    def work(trial: Trial) -> Rows:
        train, test = _scaled(trial, trial.train), _scaled(trial, trial.test)
        if shuffled:
            train, test = (_shuffled(trial, data) for data in (train, test))
        pipeline = _fitted(trial, train, recipe, None, spatial=True)
        return {method.name: _answered(trial, pipeline, test, train if trial.section else "section")}

    return Arm((method,), {"recipe": recipe.model_dump(mode="json"), "shuffled": shuffled}, work, seeds)


def _random_probe(config: AnnotationProtocol, name: str | None, base: ModelFolder | None, seeds: tuple[int, ...]) -> Arm:
    """A linear head on a network that learned nothing, as large as the base: what a base's training is worth."""
    method = Method("linear probe of random weights" + (f" ({name})" if name is not None else ""), "control")

    def work(trial: Trial) -> Rows:
        untrained = _without_training(trial, config, base)
        return {method.name: _answered(trial, _fitted(trial, trial.train, config.probe, untrained), trial.test, "own")}

    size = config.recipe.model.as_dict() if base is None else base.config.as_dict()
    settings = {"recipe": config.probe.model_dump(mode="json"), "size": size}
    return Arm((method,), settings if base is None else {**settings, "genes": base.vocabulary.fingerprint}, work, seeds)


def _without_training(trial: Trial, config: AnnotationProtocol, base: ModelFolder | None) -> ModelFolder:
    if base is not None:
        return random_weights(base, trial.seed)
    genes = GeneVocabulary.from_ids(dict.fromkeys(find_counts(trial.study.cells, trial.study.asked.keys).gene_ids))
    size = replace(config.recipe.model, n_genes=len(genes), n_classes=0, latent="ae")
    weights = new_model(size, trial.seed).state_dict()
    return ModelFolder(config=size, weights=weights, vocabulary=genes, task="pretrain", max_cells=config.probe.max_cells)


def random_weights(base: ModelFolder, seed: int) -> ModelFolder:
    """A model of the base's size and genes that has learned nothing."""
    return replace(base, weights=new_model(base.config, seed).state_dict(), attachments={}, lineage={}, manifest={})


def _baselines(seeds: tuple[int, ...]) -> Arm:
    """Every family tuned by inner cross-validation of the training cells, and the one that did best there."""
    methods = tuple(Method(name, "baseline") for name in (TUNED, *FAMILIES))

    def work(trial: Trial) -> Rows:
        counts, split = find_counts(trial.study.cells, trial.study.asked.keys).matrix, trial.split
        tuned = tuned_baselines((counts[split.train], trial.study.types[split.train]), counts[split.test], trial.seed)
        rows = {
            name: _found(trial, answers, {"setting": tuned.settings[name], "inner_macro_f1": tuned.inner[name]})
            for name, answers in tuned.answers.items()
        }
        best = rows[tuned.best]
        return {TUNED: Found(best.metrics, {**best.details, "family": tuned.best}), **rows}

    return Arm(methods, {}, work, seeds)


def _majority(seeds: tuple[int, ...]) -> Arm:
    method = Method("majority", "baseline")

    def work(trial: Trial) -> Rows:
        counts = find_counts(trial.study.cells, trial.study.asked.keys).matrix
        split = trial.split
        return {method.name: _found(trial, majority(counts[split.train], trial.study.types[split.train], counts[split.test]), {})}

    return Arm((method,), {}, work, seeds)


def _positions(seeds: tuple[int, ...]) -> Arm:
    """The vote of the 15 nearest training cells in the tissue: what anatomy alone tells."""
    method = Method("positions only (kNN15)", "control")

    def work(trial: Trial) -> Rows:
        places, split = trial.study.places, trial.split
        assert places is not None
        answers = position_answers((places[split.train], places[split.test]), trial.study.types[split.train])
        return {method.name: _found(trial, answers, {})}

    return Arm((method,), {}, work, seeds)


def _fitted(
    trial: Trial, train: AnnData, recipe: AnnotationConfig, base: ModelFolder | None, batch_key: str | None = None, spatial: bool = False
) -> CellTypeAnnotationPipeline:
    keys = trial.study.asked.keys
    own = keys.batch_key if batch_key is None else batch_key
    validation = recipe.validation if keys.spatial_key is not None else "random"  # blocks where there is tissue
    changes = {"batch_key": own, "spatial_key": keys.spatial_key if spatial or validation == "blocks" else None}
    size = trial.study.asked.max_cells or recipe.max_cells
    steps = recipe.optimizer if recipe.transfer.learn == "head" else trial.study.asked.optimizer or recipe.optimizer
    told = {"seed": trial.seed, "max_cells": size, "optimizer": steps, "keys": keys.model_copy(update=changes), "validation": validation}
    asked = recipe.model_copy(update=told)
    return CellTypeAnnotationPipeline(base, asked).fit(train)


def _answered(trial: Trial, pipeline: CellTypeAnnotationPipeline, test: AnnData, context: Context | AnnData) -> Found:
    """Scores of the most probable type of every asked cell; refusing and broader names are other questions."""
    proba = pipeline.predict_proba(test, context=context)
    assert pipeline.folder_ is not None
    answers = np.array(pipeline.folder_.classes, dtype=object)[proba.argmax(axis=1)]
    confidence = proba.max(axis=1)
    found = _found(trial, answers, {"confidence": [round(float(one), 4) for one in confidence]})
    error = expected_calibration_error(confidence, answers == trial.truth)
    best = {"best_step": pipeline.folder_.lineage["best_step"]}
    return Found({**found.metrics, "calibration_error": error}, {**found.details, **best})


def _found(trial: Trial, answers: NDArray[Any], details: Mapping[str, Any]) -> Found:
    scores = annotation_scores(trial.truth, answers)
    told = {"per_class_f1": scores["per_class_f1"], "answers": [str(one) for one in answers], **details}
    return Found({"macro_f1": scores["macro_f1"], "accuracy": scores["accuracy"]}, told)


def _scaled(trial: Trial, data: AnnData) -> AnnData:
    """The cells with places in micrometres, where the unit is known."""
    key, unit = trial.study.asked.keys.spatial_key, trial.study.asked.um_per_unit
    if unit is not None:
        data.obsm[key] = np.asarray(data.obsm[key], dtype=np.float64)[:, :2] * unit
    return data


def _shuffled(trial: Trial, data: AnnData) -> AnnData:
    """The cells at one another's places."""
    key = trial.study.asked.keys.spatial_key
    order = np.random.default_rng(trial.seed).permutation(data.n_obs)
    data.obsm[key] = np.asarray(data.obsm[key])[order]
    return data
