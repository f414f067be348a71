"""What a fitted imputation keeps beside its network, and what it says of cells: notebooks and endpoints both ask here."""

# n cells, G genes, H genes asked for

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder, unpack_tensors
from cellplane.data.patches import patches
from cellplane.data.sentences import CellTable
from cellplane.errors import FileFormatError, VocabularyError
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.imputation_cells import MixedCells, Rows, limited
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_fit import Flags, Problem, Scaling, Table, mixed, patch_rates
from cellplane.pipelines.imputation_reading import check_shared, shown_total

KNOWN, REFERENCE_CELLS = "imputation.json", "reference.safetensors"  # attachments of the model folder


@dataclass(frozen=True)
class Fitted:
    """What predicting needs beside the network; flags and numbers are over the vocabulary [G], those of scaling over wanted genes."""

    reference: CellTable
    observed: NDArray[np.bool_]
    wanted: NDArray[np.bool_]
    expected: NDArray[np.float64]
    hidden_correlation: NDArray[np.float64]
    total: float
    share: float
    scaling: Scaling
    names: GeneNames
    config: ImputationConfig

    def trusted(self, least: float) -> NDArray[np.bool_]:
        """Which genes [G] are worth an answer: wanted ones expected to correlate ``least`` or better. Unknown counts as -1, the poorest."""
        found: NDArray[np.bool_] = self.wanted & (np.nan_to_num(self.expected, nan=-1.0) >= least)
        return found

    def problem(self, query: CellTable, reference: CellTable | None = None, genes: Flags | None = None) -> Problem:
        """These cells beside the kept reference, or another one, asked for some ``genes`` [G] (None: all that the reference measured).

        VocabularyError when too few observed genes are left, or none to impute; DataError for a reference without counts.
        """
        beside = self.reference if reference is None else limited(reference, self.observed | self.wanted)
        observed = self.observed & query.panel & beside.panel
        check_shared(observed)
        wanted = self.wanted & beside.panel if genes is None else genes
        if reference is not None:
            shown_total(limited(beside, observed), "reference")
            if not wanted.any():
                raise VocabularyError(f"the reference measured none of the {self.wanted.sum()} genes to impute; take one that did")
        return Problem(MixedCells(limited(query, observed), beside), observed, wanted, self.total)


@dataclass(frozen=True)
class Imputed:
    """``counts`` expected of some ``genes`` (positions [H]) at each cell's own depth, and the ``sd`` of such a count; [n, H] each."""

    genes: Rows
    counts: Table
    sd: Table


def imputed(network: CellPLM, state: Fitted, problem: Problem, parts: Sequence[Rows] | None = None) -> Imputed:
    """The wanted genes of every query cell, read in patches (``parts``; None: as its places say)."""
    rates, dispersion = imputed_rates(network, state, problem, parts)
    counts = rates * problem.cells.query.totals()[:, None]
    return Imputed(np.flatnonzero(problem.wanted), counts, np.sqrt(counts + counts**2 / dispersion))


def imputed_rates(network: CellPLM, state: Fitted, problem: Problem, parts: Sequence[Rows] | None = None) -> tuple[Table, Table]:
    """Expected share of each wanted gene in a cell's shown counts [n, H], and its dispersion [H].

    Beside the answer only one patch's genes are in memory at a time.
    """
    asked = np.flatnonzero(problem.wanted)
    rates, dispersion = np.zeros((problem.cells.query.n_cells, len(asked))), np.ones(len(asked))
    parts = patches(problem.cells.query, state.config.query_cells) if parts is None else parts
    for rows, part, theta in patch_rates(network, problem, state.config, parts):
        rates[rows], dispersion = part[: len(rows), asked], theta[asked]
    logs = np.log1p(rates * problem.total)
    if state.share and len(rates):
        near = np.log1p(problem.partner(asked, state.config) * problem.total)
        scaling = state.scaling.only(np.searchsorted(np.flatnonzero(state.wanted), asked))
        logs = mixed(logs, scaling(near), state.share)
    return np.expm1(logs) / problem.total, dispersion


def fitted_from(folder: ModelFolder) -> Fitted:
    """What a model folder keeps beside its network; FileFormatError when that is missing or broken."""
    try:
        known = json.loads(folder.attachments[KNOWN])
        columns = {name: column.numpy() for name, column in unpack_tensors(folder.attachments[REFERENCE_CELLS]).items()}
        flags = {name: np.zeros(len(folder.vocabulary), dtype=bool) for name in ("observed", "wanted")}
        numbers = {name: np.full(len(folder.vocabulary), np.nan) for name in ("expected", "hidden_correlation")}
        for name, genes in flags.items():
            genes[known[name]] = True
        numbers["expected"][flags["wanted"]] = np.array(known["expected"], dtype=np.float64)
        numbers["hidden_correlation"][flags["observed"]] = np.array(known["hidden_correlation"], dtype=np.float64)
        return Fitted(
            reference=CellTable(**columns, panel=flags["observed"] | flags["wanted"]),
            **flags,
            **numbers,
            total=known["total"],
            share=known["share"],
            scaling=Scaling(np.array(known["slope"]), np.array(known["shift"])),
            names=GeneNames(folder.vocabulary, tuple(known["names"])),
            config=ImputationConfig.model_validate(known["config"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FileFormatError(f"the model lacks what an imputation keeps beside its network: {error}; fit and save it again") from error
