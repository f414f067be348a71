"""An evaluation as people read it: one HTML file that needs nothing beside it, one Markdown file, one JSON file, one MLflow run."""

from __future__ import annotations

import html
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cellplane.data.files import atomic_file
from cellplane.errors import ServiceError
from cellplane.pipelines.job import run_name
from cellplane.pipelines.pages import figure, heading, items, page, paragraph
from cellplane.pipelines.protocol import Evaluation, Picture, Row
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import RunSpec, TrackedRun, code_tags

log = logging.getLogger(__name__)

LEGEND = (
    "Mean +- sample standard deviation (number of splits x seeds). The lead is the model's over the row, paired over splits and "
    "seeds, with a 95 % interval and the p value of the corrected resampled t test (Nadeau and Bengio 2003); "
    "p >= .05 means that no difference was shown."
)
SAME_CELLS = (
    "Mean +- sample standard deviation (number of seeds). The lead is the model's over the row, paired over seeds. All seeds ask about "
    "the same cells or perturbations, so their spread says nothing about others, and leads have neither interval nor p value here."
)


@dataclass(frozen=True)
class Report:
    """Files of a written report."""

    html: Path
    markdown: Path
    json: Path


def write_report(evaluation: Evaluation, folder: Path, title: str | None = None) -> Report:
    """report.html (pictures inside), report.md (pictures beside) and evaluation.json in ``folder``, each whole or not at all."""
    name = title or f"Evaluation: {evaluation.task}"
    report = Report(folder / "report.html", folder / "report.md", folder / "evaluation.json")
    texts = {
        report.html: as_html(evaluation, name),
        report.markdown: as_markdown(evaluation, name, folder),
        report.json: json.dumps(evaluation.plain(), indent=1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return report


def as_markdown(evaluation: Evaluation, title: str, folder: Path) -> str:
    """The report as Markdown; pictures are named relative to ``folder``."""
    parts = [f"# {title}", "", legend(evaluation), ""]
    for dataset, protocol in evaluation.tables():
        parts += [f"## {dataset}, {protocol}", "", *markdown_table(evaluation, dataset, protocol), ""]
    if evaluation.notes:
        parts += ["## Notes", "", *(f"- {note}" for note in evaluation.notes), ""]
    for picture in evaluation.pictures:
        parts += [f"## {picture.title}", "", _markdown_image(picture, folder), "", picture.caption, ""]
    return "\n".join(parts)


def markdown_table(evaluation: Evaluation, dataset: str, protocol: str) -> list[str]:
    """Lines of one table: method, kind, every metric, and the model's lead."""
    header, lines = _header(evaluation, dataset, protocol), []
    for row in evaluation.rows(dataset, protocol):
        cells = [text.replace("|", "/") for text, _ in cells_of(evaluation, (dataset, protocol), row)]
        lines.append(f"| {' | '.join(cells)} |")
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines]


def as_html(evaluation: Evaluation, title: str) -> str:
    """The report as one page without scripts, with its pictures inside."""
    return page(title, [paragraph(legend(evaluation)), *sections(evaluation)])


def legend(evaluation: Evaluation) -> str:
    """How to read its tables."""
    return LEGEND if evaluation.splits_differ else SAME_CELLS


def sections(evaluation: Evaluation) -> list[str]:
    """The tables, notes and pictures of an evaluation as pieces of a page."""
    body: list[str] = []
    for dataset, protocol in evaluation.tables():
        body += [heading(f"{dataset}, {protocol}"), _html_table(evaluation, dataset, protocol)]
    if evaluation.notes:
        body += [heading("Notes"), items(evaluation.notes)]
    return [*body, *(figure(picture) for picture in evaluation.pictures)]


def _html_table(evaluation: Evaluation, dataset: str, protocol: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _header(evaluation, dataset, protocol))
    lines = []
    for row in evaluation.rows(dataset, protocol):
        cells = "".join(f'<td class="{kind}">{html.escape(text)}</td>' for text, kind in cells_of(evaluation, (dataset, protocol), row))
        ours = ' class="model"' if row.method.name == evaluation.model else ""
        lines.append(f"<tr{ours}>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _header(evaluation: Evaluation, dataset: str, protocol: str) -> list[str]:
    arrows = [f"{name} ({_direction(evaluation, name)})" for name in evaluation.metrics_of(dataset, protocol)]
    return ["method", "kind", *arrows, f"lead in {evaluation.decides(protocol)}"]


def _direction(evaluation: Evaluation, metric: str) -> str:
    if metric in evaluation.aims:
        return f"{evaluation.aims[metric]:g} is best"
    return "lower is better" if metric in evaluation.lower_is_better else "higher is better"


def cells_of(evaluation: Evaluation, table: tuple[str, str], row: Row) -> list[tuple[str, str]]:
    """(text, verdict) of a row's cells; only the lead has a verdict."""
    lead = None if row.method.name == evaluation.model else evaluation.difference(*table, row.method.name)
    scores = [(row.text(name), "") for name in evaluation.metrics_of(*table)]
    verdict = ("", "") if lead is None else (lead.text(), lead.verdict)
    return [(row.method.name, ""), (row.method.kind, ""), *scores, verdict]


def _markdown_image(picture: Picture, folder: Path) -> str:
    """The picture beside the report; a blank in its name or a bracket in its description does not end it early."""
    described = picture.described.replace("[", "(").replace("]", ")")
    return f"![{described}]({quote(_beside(picture.path, folder))})"


def _beside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def log_evaluation(evaluation: Evaluation, folder: Path, identity: str, params: Mapping[str, object], uri: str | None = None) -> str | None:
    """The run of this evaluation in the tracker, with means as metrics and the folder as artifacts; None when nobody answers.

    The same ``identity`` finds the same run again, so an evaluation that was killed and goes on stays one run.
    """
    names = "-".join(dict.fromkeys(dataset for dataset, _ in evaluation.tables())) or "nothing"
    spec = RunSpec(
        run_key=f"evaluate:{evaluation.task}:{identity[:32]}",
        experiment="cellplane/evaluate",
        name=run_name(evaluation.task, names[:80]),
        params=params,
        tags={**code_tags(), "task": evaluation.task, "evaluation": identity},
    )
    try:
        run = TrackedRun.open(spec, uri)
        journal = Journal(folder / "journals" / f"{identity[:16]}.jsonl")  # of this run alone: another configuration may share the folder
        told, rows = means(evaluation), journal.rows()
        if not rows or dict(rows[-1].metrics) != told:
            journal.append(rows[-1].step + 1 if rows else 0, told)
        run.replay(journal)
        run.log_artifacts(folder, "")
        run.finish()
    except ServiceError as error:
        log.warning("the evaluation is complete in %s; the tracker has not heard of it: %s", folder, error)
        return None
    return run.run_id


def means(evaluation: Evaluation) -> dict[str, float]:
    """Mean of every metric of every row: {"osmfish/blocks/cellplm/macro_f1": ...}; unknown ones are left out."""
    return {
        f"{dataset}/{protocol}/{row.method.name}/{name}": row.mean(name)
        for dataset, protocol in evaluation.tables()
        for row in evaluation.rows(dataset, protocol)
        for name in evaluation.metrics_of(dataset, protocol)
        if math.isfinite(row.mean(name))
    }
