"""`cellplane diff`: what changed between two answers about the same cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellplane.cli.common import Json, answer, table


def diff(
    first: Annotated[Path, typer.Argument(help="Answers before: an h5ad or Parquet that `cellplane predict` wrote.")],
    second: Annotated[Path, typer.Argument(help="Answers after.")],
    as_json: Json = False,
) -> None:
    """Compare two results. Changed labels, confidence, embeddings, rates by gene; ends well however much changed."""
    from cellplane.difference import difference, sections

    told = difference(first, second)
    if as_json:
        answer(told, True)
        return
    for title, header, rows in sections(told):
        typer.echo(f"\n{title}")
        if rows:
            table(header, rows)
