"""`cellplane data`: from h5ad files to shards, and looking at shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, say

app = typer.Typer(help="Convert AnnData to shards, look at them, check them.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Folder written by `cellplane data convert`.")]


@app.command("convert")
def convert(
    inputs: Annotated[list[Path] | None, typer.Argument(help="h5ad files; without any, those of the configuration.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the shards.")] = None,
    config: ConfigOption = None,
    override: Overrides = None,
    batch_key: Annotated[str | None, typer.Option(help="obs column of the sample: its cells form sentences.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the labels.")] = None,
    recover_counts: Annotated[bool, typer.Option("--recover-counts", help="Invert log1p values when counts come back exactly.")] = False,
    as_json: Json = False,
) -> None:
    """Convert h5ad files to Arrow shards with Ray Data; what is there already is reused."""
    keys = given({"keys.batch_key": batch_key, "keys.labels_key": labels_key, "keys.recover_counts": recover_counts})
    answer(convert_files(config, [*given({"inputs": inputs, "out": out}), *keys, *(override or [])]), as_json)


def convert_files(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration and converts on whatever Ray there is; what to print."""
    from cellplane.cluster import local_ray
    from cellplane.config import load_config
    from cellplane.data.config import ConvertConfig
    from cellplane.data.convert import convert as run
    from cellplane.data.sources import check_h5ad

    loaded = load_config(ConvertConfig, config, "data", overrides)
    for path in loaded.inputs:
        check_h5ad(Path(path))  # before a cluster is started for nothing
    with local_ray(log_to_driver=False):
        report = run(loaded, say)
    return {
        "shards": report.out,
        "cells": report.cells,
        "genes": report.genes,
        "sentences": report.sentences,
        "new": report.shards_new,
        "reused": report.shards_reused,
        "counts": ", ".join(f"{name}: {place}" for name, place in report.count_source.items()),
        "recovered": report.recovered,
        "largest_deviation": round(report.largest_deviation, 4),
        "seconds": round(report.seconds, 1),
    }


@app.command("info")
def info(folder: Folder, as_json: Json = False) -> None:
    """What a folder of shards holds."""
    from cellplane.data.shards import read_manifest

    manifest = read_manifest(folder)
    answer(
        {
            "cells": manifest.cells,
            "genes": manifest.n_genes,
            "stored_values": manifest.nnz,
            "sentences": len(manifest.sentences),
            "shards": len(manifest.shards),
            "datasets": ", ".join(entry.name for entry in manifest.datasets),
            "batches": len(manifest.batch_names),
            "labels": ", ".join(manifest.label_names) or "none",
            "fingerprint": manifest.fingerprint,
        },
        as_json,
    )


@app.command("verify")
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check every byte of a folder of shards against its manifest."""
    from cellplane.data.shards import verify_shards

    manifest = verify_shards(folder)
    answer({"verified": str(folder), "shards": len(manifest.shards), "cells": manifest.cells}, as_json)
