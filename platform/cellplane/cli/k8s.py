"""`cellplane k8s render`: the Kubernetes manifests, filled with values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellplane.cli.common import ConfigOption, Json, answer, say

k8s_app = typer.Typer(help="Kubernetes manifests for KubeRay.", no_args_is_help=True)
SET_HELP = "Change one value of the config: --set namespace=cells. May be repeated."


@k8s_app.command("render")
def render(
    names: Annotated[list[str] | None, typer.Argument(help="Manifests, e.g. base network raycluster; default: all.")] = None,
    config: ConfigOption = "default",
    values: Annotated[list[str] | None, typer.Option("--set", "--override", "-o", help=SET_HELP)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write them to, one file each; default: print them.")] = None,
    as_json: Json = False,
) -> None:
    """Fill the manifests with your values. They are printed, for `kubectl apply -f -`, or written to a folder."""
    from cellplane.config import load_config
    from cellplane.kubernetes import KubernetesConfig
    from cellplane.kubernetes import render as filled

    texts = filled(load_config(KubernetesConfig, config, "k8s", values or []), names or [])
    if out is not None:
        _write(texts, out)
    if as_json:
        answer({name: text if out is None else str(out / f"{name}.yaml") for name, text in texts.items()}, True)
    elif out is None:
        typer.echo("---\n".join(texts.values()), nl=False)


def _write(texts: dict[str, str], out: Path) -> None:
    from cellplane.errors import StorageError

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / f"{name}.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write manifests to {out}: {error.strerror or error}") from error
    say(f"{len(texts)} manifests in {out}; apply them: kubectl apply -f {out}/base.yaml, then the others")
