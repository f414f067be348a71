"""`cellplane models`: what the registry holds, which version serves, and whether a folder is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellplane.cli.common import Json, answer, table, use_running_stack

app = typer.Typer(help="List, promote, show and verify models.", no_args_is_help=True)
TrackingUri = Annotated[str | None, typer.Option(help="Default: $MLFLOW_TRACKING_URI, the running stack or the local one.")]


@app.command("list")
def list_(tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """Every registered version and its aliases."""
    from cellplane.tracking.registry import list_models

    use_running_stack()
    found = list_models(tracking_uri)
    if as_json:
        answer({"models": [{"name": m.name, "version": m.version, "aliases": list(m.aliases), "run_id": m.run_id} for m in found]}, True)
    elif found:
        table(["name", "version", "aliases", "run"], [[m.name, m.version, ",".join(m.aliases) or "-", m.run_id or "-"] for m in found])
    else:
        typer.echo("no models are registered yet; fine-tune one with -o register_as=NAME")


@app.command("promote")
def promote(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    version: Annotated[int, typer.Argument(help="Version that becomes champion.")],
    tolerance: Annotated[float, typer.Option(help="How far below the champion's held-out score it may be.")] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Promote although the gate refuses; the history says so.")] = False,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Make a version the champion if its scores allow it. The one before becomes `previous`, and endpoints follow."""
    from cellplane.tracking.promotion import promote as move
    from cellplane.tracking.registry import PREVIOUS, aliases_of

    use_running_stack()
    verdict = move(name, version, tracking_uri, tolerance, force)
    gate = "no held-out scores" if verdict.metric is None else f"{verdict.metric} {verdict.value:.4f}"
    gate += "" if verdict.champion is None else f", champion until now {verdict.champion:.4f}"
    gate += "" if verdict.baseline is None else f", best baseline {verdict.baseline:.4f}"
    before = aliases_of(name, tracking_uri).get(PREVIOUS)
    told = {} if verdict.warning is None else {"warning": verdict.warning}
    answer({"name": name, "champion": version, "previous": before or "none", "gate": gate, **told}, as_json)


@app.command("rollback")
def rollback(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Let champion and previous change places. Endpoints follow at once: both versions are loaded."""
    from cellplane.tracking.promotion import rollback as back
    from cellplane.tracking.registry import PREVIOUS, aliases_of

    use_running_stack()
    champion = back(name, tracking_uri)
    answer({"name": name, "champion": champion, "previous": aliases_of(name, tracking_uri)[PREVIOUS]}, as_json)


@app.command("history")
def history(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Who promoted which version when, and what the gate said."""
    from datetime import UTC, datetime

    from cellplane.tracking.registry import history_of

    use_running_stack()
    found = history_of(name, tracking_uri)
    if as_json:
        answer({"name": name, "promotions": found}, True)
        return
    rows = [
        [
            datetime.fromtimestamp(entry["time_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            entry.get("what", "promote"),
            entry["from"] or "-",
            entry["version"],
            entry.get("by", "-"),
            "forced"
            if entry.get("forced")
            else "-"
            if not (gate := entry.get("gate")) or gate["value"] is None
            else f"{gate['value']:.4f}",
        ]
        for entry in found
    ]
    table(["time (UTC)", "what", "from", "to", "by", "gate"], rows)


@app.command("show")
def show(
    model: Annotated[str, typer.Argument(help="Model folder or models:/NAME@ALIAS.")],
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """What a model is."""
    from cellplane.artifact.folder import describe, load_model
    from cellplane.config import home
    from cellplane.tracking.registry import resolve_model

    use_running_stack()
    answer(describe(load_model(resolve_model(model, tracking_uri, home() / "cache").path)), as_json)


@app.command("verify")
def verify(folder: Annotated[Path, typer.Argument(help="Model folder.")], as_json: Json = False) -> None:
    """Check every file of a model folder against its manifest."""
    from cellplane.artifact.folder import verify_model

    manifest = verify_model(folder)
    answer({"verified": str(folder), "files": len(manifest["files"]), "model_sha256": manifest["model_sha256"]}, as_json)


@app.command("import")
def import_(
    directory: Annotated[Path | None, typer.Argument(help="Folder of the official files.")] = None,
    prefix: Annotated[str | None, typer.Argument(help="Name before .config.json and .best.ckpt.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Model folder to write.")] = None,
    official: Annotated[Path | None, typer.Option("--official", help="DIR/PREFIX, instead of the two arguments.")] = None,
    positions: Annotated[
        str, typer.Option("--positions", help="none, as the released model was trained, or grid: its sinusoid switched on.")
    ] = "none",
    as_json: Json = False,
) -> None:
    """Turn an official CellPLM checkpoint into a model folder."""
    from dataclasses import replace

    from cellplane.artifact.card import model_card
    from cellplane.artifact.folder import save_model, verify_model
    from cellplane.errors import ConfigError
    from cellplane.pipelines.base import official_model

    if official is not None and directory is None:
        directory, prefix = official.parent, official.name
    elif official is not None or directory is None or prefix is None:
        raise ConfigError("name the checkpoint once: --official DIR/PREFIX, or the arguments DIR PREFIX")
    if out is None:
        raise ConfigError("name the model folder to write: --out MODEL")
    if positions not in ("none", "grid"):
        raise ConfigError(f"--positions {positions}: expected none or grid")
    model = official_model(directory, prefix, "grid" if positions == "grid" else "none")
    save_model(replace(model, card=model_card(model)), out)
    answer({"model": out, "genes": len(model.vocabulary), "model_sha256": verify_model(out)["model_sha256"]}, as_json)


@app.command("panel")
def panel(
    model: Annotated[str, typer.Argument(help="Model folder or models:/NAME@ALIAS, of an annotator or a base.")],
    data: Annotated[Path, typer.Argument(help="h5ad of training cells.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    cells: Annotated[int, typer.Option("--cells", min=1, help="How many, at most half of the model's largest sentence.")] = 128,
    real_cells: Annotated[bool, typer.Option("--real-cells", help="Real training cells instead of averages; the card says so.")] = False,
    as_json: Json = False,
) -> None:
    """Give a model reference cells of its own. A lone cell can then be read in their company (`context: panel`)."""
    from cellplane.artifact.folder import load_model, save_model, verify_model
    from cellplane.artifact.panel import Panel
    from cellplane.config import home
    from cellplane.data.config import DataKeys
    from cellplane.data.sources import read_h5ad
    from cellplane.pipelines.config import PanelConfig
    from cellplane.pipelines.panel import with_panel
    from cellplane.tracking.registry import resolve_model

    use_running_stack()
    folder = load_model(resolve_model(model, None, home() / "cache").path)
    keys = DataKeys.model_validate_json(folder.lineage.get("keys", "{}"))
    config = PanelConfig(cells=cells, origin="cells" if real_cells else "centroids")
    found = with_panel(folder, read_h5ad(data), keys, config)
    save_model(found, out)
    made = Panel.of(found.attachments)
    answer({"model": out, "panel": made.told if made else "none", "model_sha256": verify_model(out)["model_sha256"]}, as_json)
