"""How `cellplane data validate` shows what it found: a few lines a section, the verdict last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from cellplane.cli.common import table

SHOWN = 8  # groups of a column
SHOWN_QUANTILES = ("0", "5", "50", "95", "100")


def show_validations(found: Mapping[str, Any]) -> None:
    """Prints a `Verdict.plain`: each file, then what they are together."""
    if "files" not in found:
        show(found)
        return
    for one in found["files"]:
        show(one)
        typer.echo()
    for text in found["errors"]:
        typer.echo(f"error: {text}")
    bad = [one for one in found["files"] if not one["ok"]]
    for one in bad:
        typer.echo(f"CANNOT be converted: {one['path']}" if one["readable"] else f"CANNOT be read: {_unread(one)}")
    good = len(found["files"]) - len(bad)
    readable = [one["cells"] for one in found["files"] if one["readable"]]
    kind = "" if len(readable) == len(found["files"]) else "readable "
    typer.echo(f"{sum(readable)} cells in {len(readable)} {kind}file{'' if len(readable) == 1 else 's'}")
    typer.echo(f"{good} of {len(found['files'])} files can be converted{'' if not found['errors'] else ', but NOT together'}")


def show(found: Mapping[str, Any]) -> None:
    """Prints a `Validation.plain`."""
    if not found["readable"]:
        typer.echo(f"CANNOT be read: {_unread(found)}")
        return
    typer.echo(f"{found['path']}: {found['cells']} cells")
    if found["places"]:
        _places(found["places"], found["counts"].get("place"))
    for section in (_counts(found["counts"]), _genes(found["genes"]), _columns(found["columns"]), _rest(found)):
        for line in section:
            typer.echo(line)
    for level in ("warnings", "errors"):
        for text in found[level]:
            typer.echo(f"{level[:-1]}: {text}")
    typer.echo("can be converted" if found["ok"] else "CANNOT be converted")


def _unread(found: Mapping[str, Any]) -> str:
    reason = found["errors"][0]
    return reason if reason.startswith(found["path"]) else f"{found['path']}: {reason}"


def _places(places: Mapping[str, Mapping[str, Any]], used: str | None) -> None:
    rows = [
        [
            "->" if place == used else "",
            place,
            one.get("layout", "-"),
            one.get("dtype", "-"),
            "-" if "integer_share" not in one else f"{one['integer_share']:.1%}",
            one["holds"],
        ]
        for place, one in places.items()
    ]
    table(["", "matrix", "layout", "type", "integers", "holds"], rows)


def _counts(counts: Mapping[str, Any]) -> list[str]:
    if "library_size" not in counts:
        return []
    names = {"library_size": "counts per cell", "genes_per_cell": "genes per cell"}
    lines = [f"{name:<16} " + "  ".join(f"{q}% {counts[key][q]:.0f}" for q in SHOWN_QUANTILES) for key, name in names.items()]
    poor = f"{counts['few_genes_share']:.1%} with fewer than {counts['few_genes_floor']} genes"
    lines.append(f"cells            {counts['empty_cells']} empty, {poor}, {counts['doublet_like_share']:.1%} doublet-like")
    if counts["recovered"]:
        lines.append(f"recovered        from logarithms, at most {counts['largest_deviation']:.3f} from a whole number")
    return lines


def _genes(genes: Mapping[str, Any]) -> list[str]:
    if "naming" not in genes:
        return []
    lines = [f"genes            {genes['genes']}, {genes['seen']} with counts; named by {genes['naming']} ({genes['namespace']})"]
    if "count_shares" in genes:
        numbers = {
            "mapped": genes["n_shared"] - genes.get("n_renamed", 0),
            **{key[2:]: genes[key] for key in genes if key.startswith("n_")},
        }
        numbers["unknown"] = genes["n_dropped"] - genes.get("n_ambiguous", 0) - genes.get("n_outside", 0)
        told = [f"{numbers[kind]} {kind} ({share:.1%} of counts)" for kind, share in genes["count_shares"].items() if numbers.get(kind)]
        lines.append(f"in a vocabulary  {genes['n_shared']} of {genes['n_genes']} in {genes['vocabulary']}: {', '.join(told)}")
    return lines


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for role, column in columns.items():
        sizes = ", ".join(f"{name} {size}" for name, size in list(column["sizes"].items())[:SHOWN])
        more = ", ..." if column["groups"] > SHOWN else ""
        option = f"--{'batch' if role == 'batch' else 'labels'}-key {column['key']}"
        guessed = "" if column["chosen"] or role == "fov" else f" (not chosen; {option} would)"
        lines.append(f"{role:<16} {column['key']}{guessed}: {column['groups']} groups: {sizes}{more}")
    return lines


def _rest(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["spatial"].get("nearest_neighbour") is not None:
        lines.append(f"positions        {found['spatial']['key']}: neighbours {found['spatial']['nearest_neighbour']:.4g} apart (median)")
    if estimate := found["estimate"]:
        source = "compressed " if estimate["compressed_source"] else ""
        size = f"{estimate['bytes'] / 1e6:.1f} MB in {estimate['shards']} shards, about {estimate['cpu_s']:.1f} CPU seconds"
        lines.append(f"shards           {size} from the {source}{estimate['source_bytes'] / 1e6:.1f} MB file")
    return lines
