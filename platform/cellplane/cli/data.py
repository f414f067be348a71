"""`cellplane data`: from AnnData to shards and back, and looking at shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli import genes as gene_verbs
from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, live, progress
from cellplane.cli.validation import show_validations
from cellplane.errors import DataError

app = typer.Typer(help="Convert AnnData to shards, look at them, check them.", no_args_is_help=True)
app.add_typer(gene_verbs.app, name="genes")
Folder = Annotated[str, typer.Argument(help="Folder or URL written by `cellplane data convert`.")]


@app.command("convert")
def convert(
    inputs: Annotated[list[str] | None, typer.Argument(help="h5ad files, zarr folders, folders, globs, URLs; else the config's.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the shards, or a URL to copy them to.")] = None,
    config: ConfigOption = None,
    override: Overrides = None,
    vocabulary: Annotated[Path | None, typer.Option(help="Text file of gene ids, or model folder, that fixes the genes.")] = None,
    layer: Annotated[str | None, typer.Option(help="Where the raw counts are; they are looked for without it.")] = None,
    batch_key: Annotated[str | None, typer.Option(help="obs column of the sample: its cells form sentences.")] = None,
    fov_key: Annotated[str | None, typer.Option(help="obs column of the field of view: no sentence crosses one.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the labels.")] = None,
    spatial_key: Annotated[str | None, typer.Option(help="obsm entry of coordinates in micrometres: sentences become patches.")] = None,
    recover_counts: Annotated[bool, typer.Option("--recover-counts", help="Invert log1p values when counts come back exactly.")] = False,
    as_json: Json = False,
) -> None:
    """Convert AnnData to Arrow shards with Ray Data. What is there already is reused."""
    columns = {"layer": layer, "batch_key": batch_key, "labels_key": labels_key, "spatial_key": spatial_key}
    keys = given({f"keys.{key}": value for key, value in {**columns, "recover_counts": recover_counts}.items()})
    options = given({"inputs": inputs, "out": out, "vocabulary": vocabulary, "fov_key": fov_key})
    answer(convert_files(config, [*options, *keys, *(override or [])]), as_json)


def convert_files(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration and converts on whatever Ray there is; what to print."""
    from cellplane.cluster import local_ray
    from cellplane.config import load_config
    from cellplane.data.config import ConvertConfig
    from cellplane.data.convert import convert as run
    from cellplane.data.convert import refuse_file
    from cellplane.data.planning import check_inputs
    from cellplane.data.remote import is_url, shard_folder

    loaded = load_config(ConvertConfig, config, "data", overrides)
    refuse_file(shard_folder(loaded.out).absolute())
    check_inputs(loaded)
    with local_ray(log_to_driver=False), live() as tell:
        report = run(loaded, tell)
    return {
        "shards": loaded.out if is_url(loaded.out) else report.out,
        "cells": report.cells,
        "genes": report.genes,
        "sentences": report.sentences,
        "new": report.shards_new,
        "reused": report.shards_reused,
        "counts": ", ".join(f"{name}: {place}" for name, place in report.count_source.items()),
        "recovered": report.recovered,
        "largest_deviation": round(report.largest_deviation, 4),
        "seconds": round(report.seconds, 1),
        "cells_per_s": round(report.cells_per_s),
    }


@app.command("info")
def info(folder: Folder, as_json: Json = False) -> None:
    """What a folder of shards holds."""
    from cellplane.data.manifest import read_manifest
    from cellplane.data.remote import fetch_shards

    manifest = read_manifest(fetch_shards(folder))
    measured = manifest.panels().sum(axis=1).tolist()
    answer(
        {
            "cells": manifest.cells,
            "genes": manifest.n_genes,
            "stored_values": manifest.nnz,
            "bytes": sum(entry.bytes for entry in manifest.shards),
            "sentences": len(manifest.sentences),
            "shards": len(manifest.shards),
            "datasets": ", ".join(entry.name for entry in manifest.datasets),
            "cells_and_genes": ", ".join(f"{entry.cells} x {genes}" for entry, genes in zip(manifest.datasets, measured, strict=True)),
            "counts": ", ".join(f"{entry.name}: {entry.count_source}" for entry in manifest.datasets),
            "batches": len(manifest.batch_names),
            "labels": ", ".join(manifest.label_names) or "none",
            "not_kept": "; ".join(f"{entry.name}: {entry.left_out}" for entry in manifest.datasets if entry.left_out) or "nothing known of",
            "fingerprint": manifest.fingerprint,
        },
        as_json,
    )


@app.command("verify")
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check every byte of a folder of shards against its manifest."""
    from cellplane.data.manifest import verify_shards
    from cellplane.data.remote import fetch_shards

    manifest = verify_shards(fetch_shards(folder))
    answer({"verified": folder, "shards": len(manifest.shards), "cells": manifest.cells}, as_json)


@app.command("export")
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="Folder of the h5ad files, one for each data set.")],
    dataset: Annotated[list[str] | None, typer.Option(help="Export this data set only; may be repeated.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there; they may hold more than shards do.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write shards back as h5ad files. The counts are as they were converted, with their tables of cells and genes.

    X, obs, var and the coordinates come back. uns, other layers, other obsm entries, obsp, varm and varp are not in
    shards, nor are genes that the vocabulary did not have: a warning names what a file had of these.
    """
    from cellplane.data.export import export as run
    from cellplane.data.remote import fetch_shards

    with progress("exporting") as show:
        files = run(fetch_shards(folder), out, dataset or (), lambda done, total: show(done, total, {}), overwrite)
    answer({"written": ", ".join(map(str, files)), "bytes": sum(path.stat().st_size for path in files)}, as_json)


@app.command("simulate")
def simulate(
    out: Annotated[Path, typer.Option("--out", help="h5ad file to write.")],
    cells: Annotated[int | None, typer.Option("--cells", help="Number of cells.")] = None,
    genes: Annotated[int | None, typer.Option("--genes", help="Number of genes.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Another seed gives other types and cells.")] = None,
    gzip: Annotated[bool, typer.Option("--gzip", help="Compress the file; slower to write and to read.")] = False,
    config: ConfigOption = "default",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write made-up cells of which the truth is known. Types, donors, neighbours that act, knock-outs; any size, little memory."""
    options = given({"n_cells": cells, "n_genes": genes, "seed": seed})
    answer(simulate_file(out, config, [*options, *(override or [])], gzip), as_json)


def simulate_file(out: Path, config: str | None, overrides: list[str], gzip: bool) -> dict[str, Any]:
    """Loads the configuration and writes the cells; what to print."""
    from cellplane.config import fingerprint, load_config
    from cellplane.data.config import SimulateConfig
    from cellplane.data.simulate import simulate_to
    from cellplane.errors import ConfigError

    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name the h5ad file to write")
    loaded = load_config(SimulateConfig, config, "simulate", overrides)
    began = time.monotonic()
    with progress(f"simulating {out.name}") as show:
        simulate_to(out, loaded, lambda done: show(done, loaded.n_cells, {}), gzip=gzip)
    seconds = time.monotonic() - began
    return {
        "out": out,
        "cells": loaded.n_cells,
        "genes": loaded.n_genes,
        "bytes": out.stat().st_size,
        "seconds": round(seconds, 1),
        "cells_per_s": round(loaded.n_cells / max(seconds, 1e-9)),
        "config_sha256": fingerprint(loaded),
    }


@app.command("validate")
def validate(
    inputs: Annotated[list[str], typer.Argument(help="h5ad files, zarr folders, folders, globs, URLs, as for convert.")],
    config: ConfigOption = None,
    override: Overrides = None,
    layer: Annotated[str | None, typer.Option(help="Where the raw counts are; they are looked for without it.")] = None,
    batch_key: Annotated[str | None, typer.Option(help="obs column of the sample, as for convert.")] = None,
    fov_key: Annotated[str | None, typer.Option(help="obs column of the field of view, as for convert.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the labels.")] = None,
    spatial_key: Annotated[str | None, typer.Option(help="obsm entry of the positions.")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="Text file of gene ids that the genes must be found in.")] = None,
    recover_counts: Annotated[bool, typer.Option("--recover-counts", help="Accept log1p values whose counts come back exactly.")] = False,
    as_json: Json = False,
) -> None:
    """Say what is in files and what would go wrong. Ends with 3 when converting them (together) would fail."""
    columns = {"layer": layer, "batch_key": batch_key, "labels_key": labels_key, "spatial_key": spatial_key}
    keys = {f"keys.{key}": value for key, value in {**columns, "recover_counts": recover_counts}.items()}
    options = given({"inputs": inputs, **keys, "fov_key": fov_key, "vocabulary": vocabulary})
    found = validate_files(config, [*options, *(override or [])])
    if as_json:
        answer(found, True)
    else:
        show_validations(found)
    if not found["ok"]:
        raise typer.Exit(DataError.exit_code)


def validate_files(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration of a conversion and looks at its files; what to print."""
    from cellplane.config import load_config
    from cellplane.data.config import ConvertConfig
    from cellplane.data.validate import validate_inputs

    loaded = load_config(ConvertConfig, config, "data", [*overrides, "out=."])  # nothing is written
    with progress("looking at the counts") as show:
        return validate_inputs(loaded, lambda _, done, cells: show(done, cells, {})).plain()
