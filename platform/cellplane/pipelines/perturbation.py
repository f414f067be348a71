"""Perturbation response: control cells in, the population they become out.

    pipeline = PerturbationPipeline(config={"kind": "crispri", "keys": {"batch_key": "batch"}}).fit(screen)
    pipeline.predict(controls, ["GATA1", "GATA1+MYC"])        # AnnData: perturbations x genes

A perturbation enters through its gene's own row of the gene table, so that genes never perturbed can be asked for; what is
decoded is the change, so that an unknown one means "its target changes and nothing else", never noise (PROTOCOLS 9).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.config import fingerprint
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError
from cellplane.inference import query_keys, record
from cellplane.pipelines.base import Estimator, base_name, check_transfer
from cellplane.pipelines.perturbation_answer import KNOWN as KNOWN
from cellplane.pipelines.perturbation_answer import PER, Fitted, averaged, kept, populations
from cellplane.pipelines.perturbation_answer import fitted_from as fitted_from
from cellplane.pipelines.perturbation_cells import Perturbation, Screen, groups, named, read_screen, understood
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_fit import SENTENCE_CELLS, Learned, learn, predicted
from cellplane.pipelines.perturbation_scores import screen_scores
from cellplane.train.finetune import Course, Progress
from cellplane.train.loop import Keeping

log = logging.getLogger(__name__)


class PerturbationPipeline(Estimator):
    """fit / predict / score / save / load on AnnData; see `PerturbationConfig` for what must be told about a screen."""

    task: ClassVar[str] = "perturb"
    recipe: ClassVar[type[Any]] = PerturbationConfig

    def fit(
        self,
        data: AnnData,
        config: PerturbationConfig | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        keeping: Keeping | None = None,
    ) -> PerturbationPipeline:
        """Learns from control and perturbed cells of ``data``, which is not changed.

        ``progress`` and ``keeping`` go along with the last fit, after those that hide perturbations. Raises DataError without
        controls, for perturbations that are no known genes, or where no group has both controls and perturbed cells.
        """
        told: PerturbationConfig = self.configured(config)
        check_transfer(told.transfer, self.base, new=("latent", "decoder"))
        screen, start, report = read_screen(data, told, self.base)
        learned = learn(screen, told, start, Course(progress, keeping))
        self.history_ = learned.history
        self.adopt(self._folder((screen, report), learned, told))
        return self

    def adopt(self, folder: ModelFolder) -> None:
        """Answers with this model from now on, as it was told when it was fitted."""
        known = fitted_from(folder)
        self._answer_with(folder, known.config)
        self._known = known

    @property
    def perturbations_(self) -> tuple[str, ...]:
        """The perturbations that were learned, sorted."""
        return self._state().names

    def predict(
        self, data: AnnData, perturbations: Sequence[str] | None = None, config: Mapping[str, Any] | None = None, by_group: bool = False
    ) -> AnnData:
        """What the control cells of ``data`` become under each perturbation (None: all that were learned), one row each.

        All cells are taken as controls unless the perturbation column says otherwise. X is the predicted mean over cells of
        log1p of counts scaled to the training controls' median total; layers["delta"] the change from these controls,
        layers["rates"] expected counts per 10,000 of that same population (see `perturbation_answer.moved`); var["measured"] says
        which genes ``data`` measured: of others nothing is said, their change and rate are 0. Groups (batch x cell type) are
        predicted apart and averaged by their cells, or with ``by_group`` given a row each. A+B is B+A. obs: perturbation, kind,
        seen (these genes were in training with this kind), fallback, control_cells. Raises VocabularyError for genes the model
        does not know, unless `fallback` is mean_of_training; DataError without controls; ConfigError where ``perturbations`` are
        no names.
        """
        state, asked = self._state(), self.settings(config)
        names = asked_names(self.perturbations_ if perturbations is None else perturbations)
        for name in names:  # an unknown one is told before anything is read
            state.meaning(name, asked)
        screen, report = self._controls(data)
        rows = populations(self._fitted().model, state, screen, names, asked)
        rows = rows if by_group else averaged(rows)
        obs = pd.DataFrame(
            {
                "perturbation": [row.name for row in rows],
                "group": [row.group for row in rows],
                "kind": [row.kind for row in rows],
                "seen": [row.seen for row in rows],
                "fallback": [row.answer.fallback for row in rows],
                "control_cells": [row.cells for row in rows],
            },
            index=pd.Index([f"{row.name} | {row.group}" if by_group else row.name for row in rows]),
        )
        profile, change, rates = (np.stack([getattr(row.answer, part) for row in rows]) for part in ("profile", "change", "rates"))
        out = AnnData(
            X=profile.astype(np.float32),
            obs=obs,
            var=pd.DataFrame(
                {"gene_id": list(self._fitted().vocabulary.gene_ids), "measured": screen.table.panel}, index=pd.Index(state.genes.labels)
            ),
            layers={"delta": change.astype(np.float32), "rates": (rates * PER).astype(np.float32)},
        )
        out.uns["cellplm"] = self._record(report)
        return out

    def score(self, data: AnnData) -> dict[str, Any]:
        """How well the changes of the perturbed cells of ``data`` are predicted, beside the baselines (see `screen_scores`).

        Controls are halved by the seed: from one half is predicted, the truth is told from the other.
        """
        screen, state, network = self._screen(data), self._state(), self._fitted().model

        def predict(rows: NDArray[np.int64], one: Perturbation) -> NDArray[np.float64]:
            return state.measured.blended(predicted(network, screen, rows, one).change, one)

        return screen_scores(screen, predict, state.measured, state.config)

    def _state(self) -> Fitted:
        self._fitted()
        return self._known

    def _controls(self, data: AnnData) -> tuple[Screen, Mapping[str, Any]]:
        """The control cells of ``data``; all its cells where no column says what was done to them."""
        config, folder = self.settings(), self._fitted().folder
        keys = query_keys(data, config.keys)
        table, report = cell_table(data, folder.vocabulary, keys)
        group, _ = groups(data, config.model_copy(update={"keys": _present(data, config)}))
        name = named(data, config) if config.perturbation_key in data.obs else np.full(data.n_obs, "", dtype=object)
        controls = name == ""
        if empty := int((controls & (table.totals() == 0)).sum()):
            log.warning("%d of %d control cells have no counts in genes the model knows and are left out", empty, controls.sum())
        return self._state().controls(table, group, name), report

    def _screen(self, data: AnnData) -> Screen:
        """Control and perturbed cells over the model's genes; perturbations that it cannot mean are left out."""
        config, folder = self.settings(), self._fitted().folder
        table, _ = cell_table(data, folder.vocabulary, query_keys(data, config.keys))
        group, cell_type = groups(data, config.model_copy(update={"keys": _present(data, config)}))
        names = named(data, config)
        asked, stimuli = sorted({name for name in names if name}), self._state().stimuli
        found = {name: understood(name, config, self._state().genes, stimuli) for name in asked}
        meaning = {name: one for name, one in found.items() if one is not None}
        if left_out := sorted(found.keys() - meaning.keys()):
            log.warning("%d perturbations that are no known genes are not scored: %s", len(left_out), ", ".join(left_out[:5]))
        screen = Screen(table, self._state().genes, group, names, meaning, self._state().total, cell_type, stimuli)
        return screen.only((table.totals() > 0) & np.array([name == "" or name in meaning for name in names]))

    def _record(self, report: Mapping[str, Any]) -> dict[str, Any]:
        context = f"own: control cells of one group, sentences of at most {SENTENCE_CELLS} cells in their order"
        state = self._state()
        extra = {
            "context": context,
            "total": state.total,
            "stimuli_without_gene": list(state.stimuli),
            "measured_share": state.measured.share,
        }
        return record(self._fitted().folder, {**report, **extra})

    def _folder(self, read: tuple[Screen, Mapping[str, object]], learned: Learned, told: PerturbationConfig) -> ModelFolder:
        screen, report = read
        known = kept(screen, learned.measured, told)
        return ModelFolder(
            config=learned.network.config,
            weights=learned.network.cpu().state_dict(),
            vocabulary=screen.genes.vocabulary,
            task="perturb",
            max_cells=SENTENCE_CELLS,
            lineage={
                "base_model": base_name(self.base),
                "training_cells": str(screen.table.n_cells),
                "perturbations": str(len(screen.meaning)),
                "counts": str(report.get("count_source", "")),
                "config_sha256": fingerprint(told),
                "best_step": str(learned.step),
                "keys": told.keys.model_dump_json(),
            },
            attachments={KNOWN: json.dumps(known).encode()},
        )


def asked_names(perturbations: Sequence[str]) -> list[str]:
    """The names as a list, one alone too; ConfigError for none, and for what is no text."""
    names = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"perturbations are names, such as GATA1 or GATA1+MYC, found {names}; leave them out to ask for all learned ones")
    return names


def _present(data: AnnData, config: PerturbationConfig) -> Any:
    """The keys, without columns that the data do not have."""
    absent = {name: None for name in ("batch_key", "labels_key") if getattr(config.keys, name) not in data.obs}
    return config.keys.model_copy(update=absent)
