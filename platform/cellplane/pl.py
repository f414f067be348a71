"""Pictures of an AnnData: `cellplane.pl.umap(adata, "cell_type")`. Axes in, axes out, as scanpy's `pl`.

Without ``ax`` a function makes a figure that pyplot does not know of, so no state is left behind; `axes.figure` shows it in a
notebook, `axes.figure.savefig(path)` keeps it. Nothing is written into the AnnData.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.data.config import UNLABELLED, DataKeys
from cellplane.data.naming import merged_columns
from cellplane.data.sources import AnnData, column, find_counts
from cellplane.errors import ColumnError, DataError
from cellplane.pipelines import drawing
from cellplane.pipelines.drawing import Axes
from cellplane.pipelines.metrics import annotation_scores, correlations
from cellplane.pipelines.metrics import confusion as confusion_table
from cellplane.pipelines.plots import umap_layout

DIFFERENTIAL = 20  # genes named in a picture of a change


def umap(adata: AnnData, color: str, *, use_rep: str | None = None, seed: int = 0, ax: Axes | None = None) -> Axes:
    """Cells in two dimensions by an obs column: labels and batches get a colour each, numbers (a confidence) a colour scale.

    obsm["X_umap"] where it is there, else a UMAP of obsm["X_cellplm"]; with ``use_rep`` always one of that embedding. A UMAP
    takes seconds: keep `layout_of` in obsm["X_umap"] to colour it twice. ColumnError for what the AnnData does not have.
    """
    layout = adata.obsm["X_umap"] if use_rep is None and "X_umap" in adata.obsm else layout_of(adata, use_rep or "X_cellplm", seed)
    points = np.asarray(layout, dtype=np.float64)[:, :2]
    labels = column(adata, color)
    if pd.api.types.is_numeric_dtype(adata.obs[color]) and not pd.api.types.is_bool_dtype(adata.obs[color]):
        axes = drawing.draw_values(_given(ax, (7.5, 6.5)), points, adata.obs[color], color)
    else:
        labels[np.isin(labels, UNLABELLED)] = None
        axes = drawing.draw_groups(_given(ax, drawing.umap_size(len(set(labels)))), points, labels)
    axes.set_title(drawing.safe(color))
    return axes


def layout_of(adata: AnnData, use_rep: str = "X_cellplm", seed: int = 0) -> NDArray[np.float32]:
    """Two UMAP coordinates of every cell, [n, 2]; the same for the same seed. ColumnError for an embedding that is not there."""
    if use_rep not in adata.obsm:
        raise ColumnError(f"no {use_rep!r} in obsm, it has {', '.join(map(str, adata.obsm)) or 'nothing'}: embed the cells first")
    return umap_layout(adata.obsm[use_rep], seed)


def confusion(adata: AnnData, labels_key: str = "cell_type", predicted_key: str = "cellplm_cell_type", *, ax: Axes | None = None) -> Axes:
    """Which types the cells of each type were given, cells without a label left out."""
    (truth, answers), _ = _labelled(adata, labels_key, predicted_key)
    classes = sorted({*truth, *answers})
    return drawing.draw_confusion(_given(ax, drawing.confusion_size(len(classes))), confusion_table(truth, answers, classes), classes)


def per_class_f1(
    adata: AnnData, labels_key: str = "cell_type", predicted_keys: Sequence[str] = ("cellplm_cell_type",), *, ax: Axes | None = None
) -> Axes:
    """F1 of every type for one or several columns of predictions."""
    scores = {key: annotation_scores(*_labelled(adata, labels_key, key)[0]) for key in predicted_keys}
    classes = next(iter(scores.values()))["support"]
    return drawing.draw_f1(_given(ax, drawing.f1_size(len(classes))), scores)


def reliability(
    adata: AnnData,
    labels_key: str = "cell_type",
    predicted_key: str = "cellplm_cell_type",
    confidence_key: str = "cellplm_confidence",
    *,
    ax: Axes | None = None,
) -> Axes:
    """Share of right answers against stated confidence."""
    (truth, answers), rows = _labelled(adata, labels_key, predicted_key)
    column(adata, confidence_key)  # a missing one is named, with what is near
    return drawing.draw_reliability(_given(ax), adata.obs[confidence_key].to_numpy(dtype=np.float64)[rows], truth == answers)


def gene_pearson(truth: AnnData, imputed: AnnData | Mapping[str, AnnData], *, ax: Axes | None = None) -> Axes:
    """Pearson correlation over cells of every imputed gene that ``truth`` measured; several imputations side by side by name.

    Of log1p of counts scaled to a common depth. Refused genes, and those that do not vary in the truth, are left out.
    """
    named = imputed if isinstance(imputed, Mapping) else {"imputed": imputed}
    scores = {}
    for name, answer in named.items():
        genes, measured, found = _paired(truth, answer)
        pearson = correlations(measured, found)
        scores[name] = {gene: float(value) for gene, value in zip(genes, pearson, strict=True) if np.isfinite(value)}
    return drawing.draw_gene_correlations(_given(ax, (11, 5)), scores)


def spatial(truth: AnnData, imputed: AnnData, gene: str, *, spatial_key: str = "spatial", axes: Sequence[Axes] | None = None) -> list[Axes]:
    """A gene in the tissue, three panels: truth, prediction, and prediction minus truth, as log1p of counts of a common depth."""
    genes, measured, found = _paired(truth, imputed)
    if gene not in genes:
        raise ColumnError(f"gene {gene!r} was not both measured and imputed; there are {', '.join(genes[:12])}")
    if spatial_key not in truth.obsm:
        raise ColumnError(f"no {spatial_key!r} in obsm: where do the cells lie? it has {', '.join(map(str, truth.obsm)) or 'nothing'}")
    panels = drawing.axes_in_a_row(3) if axes is None else list(axes)
    if len(panels) != 3:
        raise DataError(f"truth, prediction and error need three axes, found {len(panels)}")
    true, guess = measured[:, genes.index(gene)], found[:, genes.index(gene)]
    drawing.draw_beside_truth(panels, np.asarray(truth.obsm[spatial_key]), true, guess, gene)
    return panels


def change(
    adata: AnnData,
    predicted: AnnData,
    perturbation: str,
    keys: tuple[str, str] = ("perturbation", "control"),
    *,
    ax: Axes | None = None,
) -> Axes:
    """Predicted against measured change of every gene, the 20 most differential ones named.

    ``adata`` holds perturbed and control cells, told by ``keys`` = (obs column, name of the controls); ``predicted`` is what
    `PerturbationPipeline.predict` answered. Predict from other control cells than those in ``adata``: shared ones correlate
    by noise alone.
    """
    done = column(adata, keys[0])
    if perturbation not in set(predicted.obs["perturbation"].astype(str)):
        raise ColumnError(f"{perturbation!r} was not predicted; there are {', '.join(map(str, predicted.obs['perturbation']))}")
    places = {gene: place for place, gene in enumerate(map(str, predicted.var_names))}
    counts, genes = _counts(adata)
    shared = [gene for gene in genes if gene in places]
    if not shared:
        raise DataError("the cells and the prediction share no gene; use the same naming scheme for both")
    at = {gene: column for column, gene in enumerate(genes)}
    logs = _scaled(_dense(counts, [at[gene] for gene in shared]), _totals(counts))
    perturbed, controls = logs[done == perturbation], logs[done == keys[1]]
    if len(perturbed) < 2 or len(controls) < 2:
        raise DataError(f"a change needs two cells or more of each, found {len(perturbed)} perturbed and {len(controls)} control cells")
    row = np.flatnonzero(predicted.obs["perturbation"].astype(str) == perturbation)[0]
    guess = np.asarray(predicted.layers["delta"])[row, [places[gene] for gene in shared]]
    truth = perturbed.mean(0) - controls.mean(0)
    error = np.sqrt(perturbed.var(0, ddof=1) / len(perturbed) + controls.var(0, ddof=1) / len(controls))
    differential = np.argsort(-np.abs(truth) / np.maximum(error, 1e-9), kind="stable")[:DIFFERENTIAL]
    axes = drawing.draw_change(_given(ax, (7, 7)), truth, guess, shared, differential.tolist())
    axes.set_title(f"{drawing.safe(perturbation)}, {axes.get_title()}", fontsize=11)
    return axes


def _given(ax: Axes | None, size: tuple[float, float] = (6.5, 6.0)) -> Axes:
    return drawing.new_axes(size) if ax is None else ax


def _labelled(adata: AnnData, labels_key: str, predicted_key: str) -> tuple[tuple[NDArray[Any], NDArray[Any]], NDArray[np.int64]]:
    """(truth, predictions) of the cells that have both, and their rows."""
    truth, answers = column(adata, labels_key), column(adata, predicted_key)
    known = [label is not None and label not in UNLABELLED and answer is not None for label, answer in zip(truth, answers, strict=True)]
    rows = np.flatnonzero(known)
    if not len(rows):
        raise DataError(f"no cell has both a label in obs[{labels_key!r}] and a prediction in obs[{predicted_key!r}]")
    return (truth[rows], answers[rows]), rows


def _counts(adata: AnnData) -> tuple[Any, list[str]]:
    """Counts [n, G], CSR, and the genes; a data set made dense takes gigabytes, so only what is drawn is."""
    source = find_counts(adata, DataKeys())
    return merged_columns(source.matrix, list(map(str, source.namings.get("var_names", source.gene_ids))))


def _dense(counts: Any, columns: Sequence[int]) -> NDArray[np.float64]:
    return np.asarray(counts[:, columns].toarray(), dtype=np.float64)


def _totals(counts: Any) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def _scaled(counts: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """log1p of counts at the median of the totals [n]."""
    depth = float(np.median(totals[totals > 0])) if (totals > 0).any() else 1.0
    return np.asarray(np.log1p(np.maximum(counts, 0) * (depth / np.maximum(totals, 1e-12))[:, None]))


def _paired(truth: AnnData, imputed: AnnData) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """The genes that were measured and imputed, and both tables [n, G] of log counts at a common depth.

    The truth is scaled by all its counts, the imputation, which is told at each cell's observed depth, by those that it read.
    """
    if list(truth.obs_names) != list(imputed.obs_names):
        raise DataError("truth and imputation are not of the same cells in the same order: select those of the imputation first")
    counts, measured = _counts(truth)
    values = imputed.X
    answered = [str(imputed.var_names[gene]) for gene in np.flatnonzero(np.isfinite(values).all(axis=0))]
    place, own = {gene: at for at, gene in enumerate(measured)}, {gene: at for at, gene in enumerate(map(str, imputed.var_names))}
    genes = [gene for gene in answered if gene in place]
    if not genes:
        raise DataError("the truth measured none of the imputed genes; use the same naming scheme for both")
    totals = _totals(counts)
    shown = _totals(counts[:, [at for gene, at in place.items() if gene not in own]])
    true = _scaled(_dense(counts, [place[gene] for gene in genes]), totals)
    guess = np.asarray(values[:, [own[gene] for gene in genes]], dtype=np.float64)
    found = _scaled(guess, shown if (shown > 0).any() else totals)
    return genes, true, found
