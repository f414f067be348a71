"""The model card: what a person should know before using a model, generated from the model itself."""

from __future__ import annotations

from collections.abc import Mapping

from cellplane.artifact.folder import ModelFolder

TITLES = {"pretrain": "a pre-trained cell language model", "annotate": "a cell type annotator", "denoise": "a denoiser of counts"}


def model_card(model: ModelFolder, scores: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Markdown: purpose, data, network, limits, and scores by method when there are any ({"method": {"metric": value}})."""
    config = model.config
    lines = [
        f"# CellPLM {config.width} x {config.n_blocks}: {TITLES.get(model.task, model.task)}",
        "",
        "Cells are the tokens, a tissue sample is the sentence (Wen et al., CellPLM, ICLR 2024). Made with cellplane.",
        "",
        "| what | value |",
        "|---|---|",
        f"| genes | {len(model.vocabulary):,} ({model.vocabulary.namespace}) |",
        f"| vocabulary fingerprint | `{model.vocabulary.fingerprint[:16]}` |",
        f"| network | width {config.width}, {config.n_blocks} blocks, {config.attention} |",
        f"| latent | {config.latent}, {config.latent_width} wide |",
        f"| context | sentences of at most {model.max_cells} cells of one batch |",
        *(f"| {_cell(name.replace('_', ' '))} | {_cell(value)} |" for name, value in model.lineage.items()),
    ]
    if model.classes:
        lines.append(f"| cell types | {_cell(', '.join(model.classes))} |")
    if scores:
        lines += ["", "## Held-out cells", "", *_score_table(scores)]
    lines += [
        "",
        "## Limits",
        "",
        "- Takes raw counts. A cell's answer depends on the cells it is seen with; contexts are built deterministically.",
        "- Genes outside the vocabulary are left out and counted. Other species and naming schemes are refused, not guessed.",
        "- Not a medical device.",
    ]
    return "\n".join(lines) + "\n"


def _score_table(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    head = ["| method | " + " | ".join(map(_cell, metrics)) + " |", "|---" * (len(metrics) + 1) + "|"]
    values = {method: [f"{row[metric]:.3f}" if metric in row else "" for metric in metrics] for method, row in scores.items()}
    return [*head, *(f"| {_cell(method)} | " + " | ".join(row) + " |" for method, row in values.items())]


def _cell(text: str) -> str:
    """A name that stays inside its cell of a table, whatever is in it."""
    return " ".join(str(text).split()).replace("|", "\\|")
