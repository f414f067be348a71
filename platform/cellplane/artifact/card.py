"""The model card: what a person should know before using a model, generated from the model itself."""

from __future__ import annotations

from collections.abc import Mapping

from cellplane.artifact.folder import ModelFolder

TITLES = {"pretrain": "a pre-trained cell language model", "annotate": "a cell type annotator"}


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
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in model.lineage.items()),
    ]
    if model.classes:
        lines.append(f"| cell types | {', '.join(model.classes)} |")
    if scores:
        metrics = list(next(iter(scores.values())))
        lines += ["", "## Held-out cells", "", "| method | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        lines += [f"| {method} | " + " | ".join(f"{row[metric]:.3f}" for metric in metrics) + " |" for method, row in scores.items()]
    lines += [
        "",
        "## Limits",
        "",
        "- Takes raw counts. A cell's answer depends on the cells it is seen with; contexts are built deterministically.",
        "- Genes outside the vocabulary are left out and counted. Other species and naming schemes are refused, not guessed.",
        "- Not a medical device.",
    ]
    return "\n".join(lines) + "\n"
