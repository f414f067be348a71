"""The one page about an annotated folder: what was found in which sample, by which markers, and where to look again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.inference import UNKNOWN
from cellplane.pipelines.drawing import confusion_size, draw_bands, draw_confusion, draw_dots, new_axes
from cellplane.pipelines.folder_annotation import FolderReport
from cellplane.pipelines.pages import figure, heading, items, paragraph, plain_table, write_page
from cellplane.pipelines.plots import save_axes
from cellplane.pipelines.protocol import Picture

MOST_SAMPLES, MOST_PAIRS, MOST_CLASSES = 60, 20, 40  # shown in a picture or table; the rest is in the files
MARKERS = (
    "Genes that tell each type from its nearest one in the reference, as the annotated cells show them. A type whose own genes are "
    "small and dark was not named for its markers."
)
NOTES = (
    "Confidence is calibrated on cells of the reference that trained nothing. It is honest for cells like these, and too high for "
    "another tissue, technology or disease: look at the markers before you believe it.",
    "A cell is unknown when it is stranger to its type than nearly all cells of the reference are, or shows no counts in genes of the "
    "reference. A type that resembles a known one closely is not recognised as new.",
    "The second opinion is the best of several tuned classical methods on the same reference. Where it disagrees neither is right by "
    "itself: these are the cells to check.",
)


def write_folder_report(report: FolderReport) -> Path:
    """report.html in the folder of the annotated files, with its pictures inside and beside it."""
    pictures = _pictures(report) if report.summaries else []
    return write_page(report.out / "report.html", "Annotated cells", [*_words(report), *(figure(picture) for picture in pictures)])


def _words(report: FolderReport) -> list[str]:
    samples = _samples(report)
    cells, unknown, agree = (sum(sample[name] for sample in samples.values()) for name in ("cells", "unknown", "agree"))
    (family, setting), score = report.opinion
    body: list[str] = []
    if cells:
        told = f"{cells} cells in {len(report.summaries)} files: {unknown / cells:.1%} unknown"
        body.append(paragraph(f"{told}; the second opinion agrees on {agree / cells:.1%}.", "verdict"))
    body.append(paragraph(f"Second opinion: {family} ({setting}), macro-F1 {score:.3f} by inner cross-validation on the reference."))
    if report.failed:
        body += [heading("Files that were skipped"), items([f"{name}: {reason}" for name, reason in report.failed.items()])]
    body += [heading("Samples"), plain_table(*_sample_table(samples)), heading("How to read this"), items(NOTES)]
    if rows := _disagreements(report):
        header = ("model", "second opinion", "cells")
        body += [heading("Where model and second opinion disagree most"), plain_table(header, rows[:MOST_PAIRS])]
    return body


def _samples(report: FolderReport) -> dict[str, Mapping[str, Any]]:
    """Samples by the name shown: the file's, and the sample's where a file has several."""
    found = {}
    for name, summary in report.summaries.items():
        for sample, numbers in summary.samples.items():
            found[name if len(summary.samples) == 1 else f"{name}: {sample}"] = numbers
    return found


def _sample_table(samples: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    header = ("sample", "cells", "unknown", "without known counts", "confidence (median)", "second opinion agrees")
    rows: list[tuple[object, ...]] = []
    for name, one in samples.items():
        shares = [f"{one[key] / one['cells']:.1%}" for key in ("unknown", "agree")]
        rows.append((name, one["cells"], shares[0], one["flagged"], f"{one['confidence'][1]:.2f}", shares[1]))
    return header, rows


def _disagreements(report: FolderReport) -> list[tuple[str, str, int]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for summary in report.summaries.values():
        for mine, theirs, cells in summary.pairs:
            pairs[mine, theirs] += cells if mine != theirs else 0
    return [(mine, theirs, cells) for (mine, theirs), cells in pairs.most_common() if cells]


def _pictures(report: FolderReport) -> list[Picture]:
    folder, samples = report.out / "pictures", _samples(report)
    shown = dict(sorted(samples.items(), key=lambda item: item[1]["confidence"][1])[:MOST_SAMPLES])
    bands = {name: (*one["confidence"],) for name, one in shown.items()}
    unknown = {name: one["unknown"] / one["cells"] for name, one in shown.items()}
    axes = draw_bands(new_axes((10, 1.8 + 0.34 * len(shown))), bands, unknown, ("confidence", "share of unknown cells"))
    left_out = "" if len(shown) == len(samples) else f" The {len(shown)} least confident of {len(samples)} samples."
    found = [
        Picture(
            "Confidence and unknown cells by sample",
            save_axes(axes, folder / "samples.png"),
            f"The least confident sample is on top.{left_out}",
        )
    ]
    if report.genes:
        types, shares, levels = _dots(report)
        axes = draw_dots(new_axes((3.5 + 0.3 * len(report.genes), 2.6 + 0.34 * len(types))), shares, levels, types, report.genes)
        found.append(Picture("Markers of the predicted types", save_axes(axes, folder / "markers.png"), MARKERS))
    matrix, classes = _agreement(report)
    if len(classes) <= MOST_CLASSES:
        names = ("model", "second opinion")
        axes = draw_confusion(new_axes(confusion_size(len(classes))), matrix, classes, names)
        caption = "Rows: what the model says; columns: what the second opinion says of the same cells. It knows no unknown cells."
        found.append(Picture("Model and second opinion", save_axes(axes, folder / "agreement.png"), caption))
    return found


def _dots(report: FolderReport) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Types that were found, unknown cells last; the share of cells that show each marker and their mean level, [K, M] each."""
    types = sorted({name for summary in report.summaries.values() for name in summary.dots}, key=lambda name: (name == UNKNOWN, name))
    cells = np.zeros((len(types), 1))
    shown, level = np.zeros((len(types), len(report.genes))), np.zeros((len(types), len(report.genes)))
    for summary in report.summaries.values():
        for name, one in summary.dots.items():
            row = types.index(name)
            cells[row] += one["cells"]
            shown[row] += one["shown"]
            level[row] += one["level"]
    return types, shown / cells, level / cells


def _agreement(report: FolderReport) -> tuple[NDArray[np.int64], list[str]]:
    pairs = [pair for summary in report.summaries.values() for pair in summary.pairs]
    classes = sorted({name for mine, theirs, _ in pairs for name in (mine, theirs)}, key=lambda name: (name == UNKNOWN, name))
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for mine, theirs, cells in pairs:
        matrix[classes.index(mine), classes.index(theirs)] += cells
    return matrix, classes
