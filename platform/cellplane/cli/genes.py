"""`cellplane data genes`: id tables on this machine, and how a file's genes find their place.

cellplane data genes install --from FOLDER      GENCODE and HGNC tables, from files or https
cellplane data genes list                       what is installed
cellplane data genes FILE                       how the genes of a file map, and the counts that are lost
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cellplane.cli.common import Json, answer, table

REPORT = "report"


class FileOrVerb(TyperGroup):
    """A group whose first argument may also be a file: `data genes FILE` is `data genes report FILE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb named, else report."""
        if args and args[0] not in self.commands and ("." in args[0] or "/" in args[0]):
            args = [REPORT, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=FileOrVerb, help="Install gene id tables; with a FILE, tell how its genes map.", no_args_is_help=True)


@app.command("install")
def install(
    source: Annotated[str, typer.Option("--from", help="Table file, folder of them, or https address.")],
    species: Annotated[str | None, typer.Option(help="human or mouse: refuse a file of another species.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Checksum that the file must have.")] = None,
    as_json: Json = False,
) -> None:
    """Install tables of gene ids, symbols and old symbols. They are kept under $CELLPLANE_HOME/genes."""
    from cellplane.data.gene_install import install_tables

    _show(install_tables(source, species, sha256), as_json)


@app.command("list")
def list_tables(as_json: Json = False) -> None:
    """Which tables are installed."""
    from cellplane.data.gene_tables import table_manifests

    _show(table_manifests(), as_json)


def _show(manifests: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        answer({"tables": manifests}, True)
        return
    header = ("species", "genes", "protein_coding", "aliases", "fingerprint", "sources")
    rows = [[*(one[key] for key in header[:4]), one["fingerprint"][:12], _sources(one)] for one in manifests]
    table(header, rows or [["none", *[""] * (len(header) - 1)]])


def _sources(manifest: dict[str, Any]) -> str:
    return ", ".join(source["name"] for source in manifest["sources"])


@app.command(REPORT)
def report(
    file: Annotated[Path, typer.Argument(help="h5ad file or zarr folder.")],
    vocabulary: Annotated[Path | None, typer.Option(help="Gene ids one a line, or a model folder; without, the species' table.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the raw counts; without, they are looked for.")] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Find other spellings too, where they are unique.")] = False,
    as_json: Json = False,
) -> None:
    """Say how the genes of a file map. Mapped, renamed, ambiguous, left out, summed, and their shares of the counts."""
    from cellplane.data.gene_report import gene_report

    found = gene_report(file, vocabulary, layer, ignore_case)
    if as_json:
        answer(found, True)
        return
    shares = found.pop("count_shares")
    answer({key: value for key, value in found.items() if key != "genes"}, False)
    rows = [[kind, number, "unknown" if shares is None else f"{shares[kind]:.2%}"] for kind, number in found["genes"].items()]
    typer.echo()
    table(("genes", "number", "of all counts"), rows)
