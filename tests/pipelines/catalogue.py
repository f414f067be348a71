"""The catalogue of bad inputs (RELIABILITY.md, C1 to C54), row by row, and what becomes of each in the five pipelines.

A row is an input and its outcome: an error of ours that names what is wrong and the way out, or an answer, which is the very
same, finite, flagged in obs or accompanied by a warning. The table of docs/bad-input.md is made of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplane.errors import CellplaneError, ColumnError, CountsNotFoundError, DataError, IntegrityError, VocabularyError
from tests.pipelines import broken
from tests.pipelines.all_calls import FITS, PREDICTIONS, SCORES, TASKS
from tests.pipelines.broken import Maker, named_genes, placed, stored_as, with_column, with_value, without_counts


@dataclass(frozen=True)
class Outcome:
    """What becomes of an input: a ``word`` for the page, and what proves it."""

    word: str
    said: str = ""
    error: type[CellplaneError] | None = None


def refused(said: str, error: type[CellplaneError] = DataError) -> Outcome:
    """An error of this class whose message matches."""
    return Outcome("refused", said, error)


def warned(said: str) -> Outcome:
    """A finite answer, and a warning that matches."""
    return Outcome("answered, with a warning", said)


def flagged(said: str) -> Outcome:
    """A finite answer, and these words in obs[key_flag]."""
    return Outcome("answered, flagged", said)


SAME = Outcome("same answer")
WORKS = Outcome("answered")
EMPTY = Outcome("empty answer")
UNREAD = Outcome("not read")


@dataclass(frozen=True)
class Row:
    """An input of the catalogue. ``usual`` becomes of it in every call, unless ``other`` says otherwise of a call, a task or a verb."""

    number: str
    what: str
    make: Maker
    usual: Outcome
    other: Mapping[str, Outcome] = field(default_factory=dict)
    layer: str | None = None
    on_disk: bool = False

    def outcome(self, call: str) -> Outcome:
        """What becomes of it in this call."""
        task, verb, *beside = call.split()
        keys = (call, *beside, task, verb)
        return next((self.other[key] for key in keys if key in self.other), self.usual)

    @property
    def calls(self) -> list[str]:
        """Where it is read: fits and predictions, and scores where something is said of them."""
        asked = (*FITS, *PREDICTIONS, *(call for call in SCORES if call in self.other or "score" in self.other))
        return [call for call in asked if self.outcome(call) != UNREAD]


def mouse(names: list[str]) -> list[str]:
    return [f"Gene{number}" for number in range(len(names))]


def wrong_labels(values: Any) -> Maker:
    return with_column("cell_type", values)


def by_batch(values: Callable[[pd.Series[Any]], Any]) -> Maker:
    return with_column("batch", values)


ONLY_LABELS = {"annotate predict": UNREAD, "embed": UNREAD, "impute": UNREAD, "denoise": UNREAD, "perturb": UNREAD}
ONLY_SCREEN = {"annotate": UNREAD, "embed": UNREAD, "impute": UNREAD, "denoise": UNREAD}
ONLY_PLACES = {"annotate": UNREAD, "embed": UNREAD, "denoise": UNREAD, "perturb": UNREAD, "beside": UNREAD}
NOT_BESIDE = {"beside": UNREAD}
ONE_BATCH_ALONE = warned("3 of 3 cell types lie in one of 3 batches alone.*type_0: 22 cells, all in type_0")
FEW = "at least 10 are needed"
NONE_KNOWN = {
    "annotate fit": refused("none of 60 labelled cells has counts in genes the model knows"),
    "impute": refused("no cell of the query has counts in the genes that both share"),
    "beside": refused("no cell of the reference has counts"),
    "denoise fit": refused("0 of 60 cells have counts; denoising needs some to learn"),
    "perturb": refused("no control cell has counts in genes the model knows"),
}

ROWS = [
    Row(
        "C1",
        "negative counts",
        with_value(-3.1),
        refused("1 negative values, the first at cell 3, gene 7: looks scaled.*layer", CountsNotFoundError),
    ),
    Row("C2", "NaN in X", with_value(np.nan), refused("1 NaN values, the first at cell 3, gene 7")),
    Row("C3", "infinity in X", with_value(np.inf), refused("1 infinite values, the first at cell 3, gene 7")),
    Row(
        "C4",
        "normalised",
        lambda cells: broken.with_counts(cells, broken.scaled_rows(cells)),
        refused("non-integer, looks normalised; put the raw counts into", CountsNotFoundError),
    ),
    Row(
        "C5",
        "logarithms",
        lambda cells: broken.with_counts(cells, np.log1p(broken.scaled_rows(cells))),
        refused("looks log1p-normalised.*recover_counts=true", CountsNotFoundError),
    ),
    Row("C6", "z-scored", broken.z_scored, refused("negative values.*looks scaled", CountsNotFoundError)),
    Row("C7", "a gene name twice", named_genes(lambda names: ["A", "A", *names[2:]]), refused(r"1 genes stand.*\['A'\]; sum or drop")),
    Row("C8", "all cells of one name", broken.named_cells(lambda _: "same"), SAME, NOT_BESIDE),
    Row(
        "C9",
        "genes of another species",
        named_genes(broken.ensembl("ENSMUSG")),
        refused("0 of 40 genes.*mouse.*human.*same species", VocabularyError),
    ),
    Row("C10", "5 of 40 genes known", named_genes(broken.strangers(5)), refused(f"5 of 40 genes.*{FEW}", VocabularyError)),
    Row(
        "C10",
        "12 of 40 genes known",
        named_genes(broken.strangers(12)),
        WORKS,
        {
            "impute fit beside": refused("10 of 10 genes to impute were not measured in the reference"),
            "impute predict beside": refused("the reference measured none of the 10 genes to impute", VocabularyError),
            "impute predict": warned("18 of the 30 genes that the model was fitted with are missing here"),
            **{f"{task} predict": warned("12 of the model's 50 genes were measured here") for task in ("annotate", "embed", "denoise")},
        },
    ),
    Row("C11", "Ensembl ids with versions", named_genes(lambda names: [f"{name}.3" for name in names]), SAME),
    Row("C12", "mouse symbols", named_genes(mouse), refused("0 of 40 genes", VocabularyError)),
    Row("C13", "symbols, the ids in a column", broken.ids_in_a_column, SAME),
    Row("C13", "symbols alone", named_genes(broken.symbols), refused("0 of 40 genes.*tried var_names", VocabularyError)),
    Row(
        "C14",
        "12 cells without counts",
        without_counts(slice(0, 12)),
        flagged("no counts"),
        {
            "annotate fit": warned("12 of 60 labelled cells have no counts .* are left out"),
            "impute fit": warned("12 of 60 cells of the query show no counts"),
            "impute fit beside": warned("12 of 60 cells of the reference show no counts"),
            "impute predict beside": warned("12 of 60 cells of the reference show no counts"),
            "denoise fit": warned("12 of 60 cells have no counts .* are left out"),
            "perturb fit": warned("12 of 60 cells have no counts .* are left out"),
            "perturb predict": warned("control cells have no counts .* are left out"),
        },
    ),
    Row("C14", "no counts at all", without_counts(slice(None)), flagged("no counts"), NONE_KNOWN),
    Row(
        "C15",
        "no counts in genes the model knows",
        broken.counts_elsewhere,
        flagged("no counts in genes the model knows"),
        {**NONE_KNOWN, "impute fit beside": refused("10 of 10 genes to impute")}
        | {"impute predict beside": refused("no cell of the reference has counts")},
    ),
    Row(
        "C16",
        "no cells",
        lambda cells: cells[:0].copy(),
        EMPTY,
        {
            "annotate fit": refused("0 cell types"),
            "impute fit": refused("no cell of the query has counts"),
            "beside": refused("no cell of the reference has counts"),
            "denoise fit": refused("0 of 0 cells have counts"),
            "perturb": refused("there are no cells.*predictions start from control cells"),
            "annotate score": refused(r"none of the 0 cells has a label in obs\['cell_type'\]"),
            "embed score": refused(r"none of the 0 cells has a label in obs\['cell_type'\]"),
            "impute score": refused("no cell of the query has counts"),
            "denoise score": refused("there is nothing to hide and score"),
        },
    ),
    Row("C17", "no genes", lambda cells: cells[:, :0].copy(), refused("no genes at all")),
    Row(
        "C18",
        "one cell",
        broken.one_control,
        WORKS,
        {
            "annotate fit": refused("1 cell types.*at least two"),
            "impute fit": refused("no observed gene varies over the 1 cells of the query.*fit on cells that differ"),
            "denoise fit": refused("1 of 1 cells have counts; denoising needs some to learn and some to validate with"),
            "perturb fit": refused("no group has 2 control and 2 perturbed cells"),
            "impute score": refused("none of the 10 genes varies over the 1 cells; score on cells that differ"),
        },
    ),
    Row("C19", "a row longer than the genes", broken.long_row, refused("a row with more entries than its 40 columns", IntegrityError)),
    Row("C20", "uint16", stored_as(lambda X: X.astype(np.uint16)), SAME),
    Row("C20", "float64", stored_as(lambda X: X.astype(np.float64)), SAME),
    Row("C21", "a count above 2^24", with_value(2.0**25), refused("counts above 16777216, the first at cell 3, gene 7.*check the units")),
    Row("C22", "truth values", stored_as(lambda X: X > 0), refused("binarised", CountsNotFoundError)),
    Row("C23", "objects", stored_as(lambda X: X.toarray().astype(object)), refused("X holds object values; counts are numbers")),
    Row("C23", "text", stored_as(lambda X: X.toarray().astype(str)), refused("X holds .* values; counts are numbers")),
    Row("C24", "CSC", stored_as(sp.csc_matrix), SAME),
    Row("C24", "dense", stored_as(lambda X: X.toarray()), SAME),
    Row("C24", "sparse array", stored_as(sp.csr_array), SAME),
    Row(
        "C24",
        "masked array",
        stored_as(lambda X: np.ma.masked_array(X.toarray(), mask=X.toarray() > 3)),
        refused("X is a masked array; fill the masked entries first"),
    ),
    Row("C25", "backed by a file", lambda cells: cells, SAME, on_disk=True),
    Row("C26", "a view", lambda cells: cells[:], SAME),
    Row("C27", "no X", lambda cells: broken.with_counts(cells, None), refused("X: absent; put the raw counts into", CountsNotFoundError)),
    Row(
        "C27",
        "counts in a layer that no key names",
        broken.in_a_layer,
        refused(r"X: absent \(not looked at: layers\['spliced'\]\); .*keys\.layer", CountsNotFoundError),
    ),
    Row("C28", "counts in raw, of more genes", broken.only_raw, SAME, {"denoise predict": WORKS}),
    Row(
        "C29",
        "the layer is missing",
        lambda cells: cells,
        refused(r"no layers\['spliced'\].*this file has X", ColumnError),
        layer="spliced",
    ),
    Row("C30", "column index too large", broken.corrupt(1, 40), refused("corrupt sparse matrix: column indices", IntegrityError)),
    Row("C30", "column index negative", broken.corrupt(1, -1), refused("corrupt sparse matrix: column indices", IntegrityError)),
    Row("C30", "row starts that fall", broken.corrupt(2, 0), refused("corrupt sparse matrix: row starts", IntegrityError)),
    Row("C31", "unsorted and repeated entries", broken.unsorted, SAME),
    Row("C33", "a category no cell has", wrong_labels(lambda labels: labels.cat.add_categories(["none"])), SAME, ONLY_LABELS),
    Row(
        "C34",
        "5 labels missing",
        wrong_labels(broken.missing_in),
        warned(r"5 of 60 cells have no label in obs\['cell_type'\]"),
        {**ONLY_LABELS, "annotate score": WORKS, "embed score": warned(r"5 of 60 cells have no label in obs\['cell_type'\]")},
    ),
    Row("C34", "5 perturbations missing", with_column("perturbation", broken.missing_in), WORKS, ONLY_SCREEN),
    Row(
        "C34",
        "no labels at all",
        wrong_labels(lambda labels: [None] * len(labels)),
        refused(r"0 cell types|none of the 60 cells has a label in obs\['cell_type'\]"),
        {**ONLY_LABELS, "annotate score": refused("none of the 60 cells"), "embed score": refused("none of the 60 cells")},
    ),
    Row("C35", "labels of several types", wrong_labels(lambda labels: [1, "1", 2] * 20), refused("several types"), ONLY_LABELS),
    Row("C35", "numbers as labels", wrong_labels(lambda labels: labels.cat.codes.astype(int)), SAME, ONLY_LABELS),
    Row(
        "C36",
        "labels never learned",
        wrong_labels(lambda labels: ["never", *labels[1:]]),
        UNREAD,
        {"annotate score": warned("1 of 60 cells have labels that were never learned and count as wrong: never")},
    ),
    Row(
        "C37",
        "no such label column",
        broken.without_column("cell_type"),
        refused("no 'cell_type' in obs; did you mean 'cell_tyep'", ColumnError),
        {**ONLY_LABELS, **{call: refused("did you mean 'cell_tyep'", ColumnError) for call in ("annotate score", "embed score")}},
    ),
    Row(
        "C37",
        "no such batch column",
        broken.without_column("batch"),
        refused("no 'batch' in obs; did you mean 'bathc'", ColumnError),
        {**NOT_BESIDE, "predict": warned("did you mean 'bathc'.*the 60 cells are taken as one sample")},
    ),
    Row(
        "C37",
        "no such perturbation column",
        broken.without_column("perturbation"),
        refused("no 'perturbation' in obs; did you mean 'perturbatino'", ColumnError),
        {**ONLY_SCREEN, "perturb predict": WORKS},
    ),
    Row(
        "C38",
        "batches never learned",
        by_batch(lambda names: "new " + names.astype(str)),
        SAME,
        {"fit": UNREAD, "beside": UNREAD, "denoise predict": warned("60 cells are of batches that were not learned")},
    ),
    Row(
        "C39",
        "5 batches missing",
        by_batch(broken.missing_in),
        refused(r"5 of 60 cells have no value in obs\['batch'\].*fill or drop"),
        NOT_BESIDE,
    ),
    Row("C39", "one batch", by_batch(lambda _: "one"), WORKS, NOT_BESIDE),
    Row(
        "C39",
        "one cell a batch",
        by_batch(lambda names: [str(row) for row in range(len(names))]),
        WORKS,
        {**NOT_BESIDE, "perturb fit": refused("no group has 2 control and 2 perturbed cells")},
    ),
    Row("C40", "numbers as names of cells", broken.named_cells(lambda row: row), SAME, NOT_BESIDE),
    Row("C41", "strange names of cells", broken.named_cells(lambda row: f"\u00e9/\U0001f9ec {row}"), SAME, NOT_BESIDE),
    Row("C41", "strange names of batches", by_batch(lambda _: ["a/\u00df", "b\U0001f9ec"] * 30), WORKS, NOT_BESIDE),
    Row(
        "C42",
        "no positions",
        broken.unplaced,
        refused("no 'spatial' in obsm.*keys.spatial_key null does without", ColumnError),
        {**ONLY_PLACES, "impute predict": warned(r"no obsm\['spatial'\]: they are imputed without positions")},
    ),
    Row("C43", "positions NaN", placed(broken.with_nan), refused("2 cells with NaN or infinite coordinates; drop"), ONLY_PLACES),
    Row("C44", "positions in space", placed(lambda xy: np.column_stack([xy, xy[:, 0]])), refused(r"shape \(60, 3\)"), ONLY_PLACES),
    Row("C44", "positions on a line", placed(lambda xy: xy[:, :1]), refused(r"shape \(60, 1\)"), ONLY_PLACES),
    Row("C44", "positions as words", placed(lambda xy: np.full(xy.shape, "left")), refused("no numbers"), ONLY_PLACES),
    Row("C45", "all cells at one place", placed(np.ones_like), WORKS, ONLY_PLACES),
    Row("C45", "cells in a row", placed(lambda xy: xy * [1, 0]), WORKS, ONLY_PLACES),
    Row("C45", "two cells at every place", placed(lambda xy: np.repeat(xy[:30], 2, axis=0)), WORKS, ONLY_PLACES),
    Row("C46", "positions in pixels", placed(lambda xy: xy * 1e4), warned("pixels.*taken as micrometres"), ONLY_PLACES),
    Row("C47", "2,000 other columns", broken.huge_obs, SAME, NOT_BESIDE),
    Row("", "one class", wrong_labels(lambda _: "only"), refused("1 cell types.*at least two"), ONLY_LABELS),
    Row(
        "",
        "one cell a class",
        wrong_labels(lambda labels: [f"type {row}" for row in range(len(labels))]),
        refused("validation_share.*raise it, or label more cells of each type"),
        ONLY_LABELS,
    ),
    Row("", "one class of one cell", wrong_labels(lambda labels: ["lonely", *labels[1:]]), WORKS, ONLY_LABELS),
    Row(
        "",
        "batch and type coincide",
        lambda cells: by_batch(lambda _: cells.obs["cell_type"].astype(str))(cells),
        WORKS,
        {**NOT_BESIDE, "annotate fit": ONE_BATCH_ALONE, "denoise fit": ONE_BATCH_ALONE},
    ),
    Row(
        "",
        "batch and perturbation coincide",
        lambda cells: by_batch(lambda _: cells.obs["perturbation"].astype(str))(cells),
        refused("batch and perturbation coincide"),
        {**ONLY_SCREEN, "perturb predict": WORKS},
    ),
    Row("", "a panel of 3 genes", lambda cells: cells[:, :3].copy(), refused(f"3 of 3 genes.*{FEW}", VocabularyError)),
    Row(
        "",
        "a perturbed gene outside the vocabulary",
        with_column("perturbation", lambda names: ["control" if name == "control" else "NOSUCH" for name in names]),
        refused(r"1 perturbations are no genes the model knows, e.g. \['NOSUCH'\].*targets.*ignore.*leave_out"),
        {**ONLY_SCREEN, "perturb predict": WORKS},
    ),
    Row(
        "",
        "no control cells",
        with_column("perturbation", lambda names: "ENSG00000000003"),
        refused("no cell of .*is 'control'.*set control to what yours are called"),
        ONLY_SCREEN,
    ),
    Row(
        "",
        "nothing but controls",
        with_column("perturbation", lambda _: "control"),
        refused("no group has 2 control and 2 perturbed cells"),
        {**ONLY_SCREEN, "perturb predict": WORKS},
    ),
]

FILES = {
    "C32": "the shape in the file disagrees",
    "C48": "a file cut short",
    "C49": "text, a zip, a picture, nothing",
    "C50": "HDF5, but not AnnData",
    "C51": "a folder, no file, no permission",
    "C52": "links to other files",
    "C53": "a file that declares terabytes",
    "C54": "another version, loom, zarr",
}  # refused where files are read, before any pipeline: tests/data/test_bad_inputs.py


def table() -> str:
    """The rows as the table of docs/bad-input.md."""
    lines = ["| Number | Input | " + " | ".join(TASKS) + " |", "|---" * (2 + len(TASKS)) + "|"]
    lines += [f"| {row.number} | {row.what} | " + " | ".join(_told(row, task) for task in TASKS) + " |" for row in ROWS]
    return "\n".join(lines)


def _told(row: Row, task: str) -> str:
    """What becomes of a row in one pipeline: once where all calls agree, else call by call."""
    calls = [call for call in row.calls if call.startswith(f"{task} ")]
    words = {call.removeprefix(f"{task} ").replace("beside", "(reference)"): row.outcome(call).word for call in calls}
    if not words:
        return UNREAD.word
    everything = {call.removeprefix(f"{task} ") for call in (*FITS, *PREDICTIONS) if call.startswith(f"{task} ") and "beside" not in call}
    if len(set(words.values())) == 1 and everything <= words.keys():
        return next(iter(words.values()))
    by_word = {word: [call for call, one in words.items() if one == word] for word in dict.fromkeys(words.values())}
    return "; ".join(f"{', '.join(calls)}: {word}" for word, calls in by_word.items())
