"""`cellplane up | down | status | doctor | demo | config`: the local stack and looking around."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, human_bytes, say, table

if TYPE_CHECKING:
    from cellplane.config import Config

config_app = typer.Typer(help="Show configurations, shipped and resolved.", no_args_is_help=True)

SCHEMAS = {  # kind of a config file = its folder -> module and class that read it
    "annotate": ("cellplane.pipelines.folder_annotation", "AnnotateConfig"),
    "cluster": ("cellplane.cluster", "StackConfig"),
    "data": ("cellplane.data.config", "ConvertConfig"),
    "evaluate": ("cellplane.pipelines.config", "EvaluateConfig"),
    "finetune": ("cellplane.pipelines.config", "FinetuneConfig"),
    "k8s": ("cellplane.kubernetes", "KubernetesConfig"),
    "model": ("cellplane.train.config", "ModelFile"),
    "predict": ("cellplane.batch", "PredictConfig"),
    "pretrain": ("cellplane.train.config", "PretrainConfig"),
    "serve": ("cellplane.serve.deployment", "ServeConfig"),
    "simulate": ("cellplane.data.config", "SimulateConfig"),
    "try": ("cellplane.pipelines.try_config", "TryAnnotation"),
    "tune": ("cellplane.pipelines.tune_config", "TuneConfig"),
}
TASK_SCHEMAS = {  # where the task of a file says more than its kind
    ("evaluate", "annotate protocol"): ("cellplane.pipelines.protocol_config", "AnnotationProtocol"),
    ("evaluate", "embed protocol"): ("cellplane.pipelines.protocol_config", "EmbeddingProtocol"),
    ("evaluate", "denoise protocol"): ("cellplane.pipelines.task_protocols", "DenoisingProtocol"),
    ("evaluate", "impute protocol"): ("cellplane.pipelines.task_protocols", "ImputationProtocol"),
    ("evaluate", "perturb protocol"): ("cellplane.pipelines.task_protocols", "PerturbationProtocol"),
    ("evaluate", "unknown protocol"): ("cellplane.pipelines.task_protocols", "UnknownProtocol"),
    ("evaluate", "denoise"): ("cellplane.pipelines.config", "DenoiseEvaluation"),
    ("finetune", "denoise"): ("cellplane.pipelines.config", "DenoiseJobConfig"),
    ("finetune", "impute"): ("cellplane.pipelines.imputation_job", "ImputeJobConfig"),
    ("finetune", "perturb"): ("cellplane.pipelines.perturbation_job", "PerturbJobConfig"),
    ("try", "denoise"): ("cellplane.pipelines.try_config", "TryDenoising"),
    ("try", "embed"): ("cellplane.pipelines.try_config", "TryEmbedding"),
    ("try", "impute"): ("cellplane.pipelines.try_config", "TryImputation"),
    ("try", "perturb"): ("cellplane.pipelines.try_config", "TryPerturbation"),
}


def load_any(path: Path, overrides: list[str] | None = None) -> Config:
    """A config file of any kind: its `kind` key, else its folder's name, says which class reads it."""
    from cellplane.config import load_config, read_yaml
    from cellplane.errors import ConfigError

    if not path.is_file():
        raise ConfigError(f"no config file {str(path)!r}")
    raw = read_yaml(path)
    kind = str(raw.get("kind", path.absolute().parent.name))
    if kind not in SCHEMAS:
        raise ConfigError(f"{path}: kind {kind!r} is not one of {', '.join(SCHEMAS)}")
    loaded: Config = load_config(schema_of(kind, raw), path, kind, overrides or [])
    return loaded


def schema_of(kind: str, raw: Mapping[str, Any]) -> type[Config]:
    """The class that reads a file of a kind, by the task that stands in it."""
    task = f"{raw.get('task')}{' protocol' * ('protocol' in raw)}"
    module, name = TASK_SCHEMAS.get((kind, task), SCHEMAS[kind])
    schema: type[Config] = getattr(importlib.import_module(module), name)
    return schema


def find_any(name: str) -> Path:
    """The file meant by a path or by `kind/name` of a shipped config."""
    from cellplane.config import find_config
    from cellplane.errors import ConfigError

    if Path(name).is_file():
        return Path(name)
    kind, _, rest = name.removesuffix(".yaml").partition("/")
    if kind not in SCHEMAS or not rest:
        raise ConfigError(f"no config file {name!r}; shipped ones are named KIND/NAME, see `cellplane config list`")
    return find_config(rest, kind)


@config_app.command("show")
def config_show(name: Annotated[str, typer.Argument(help="File, or KIND/NAME of a shipped one.")], override: Overrides = None) -> None:
    """Print a configuration as it resolves. Defaults are filled in, references and overrides applied."""
    from cellplane.config import to_yaml

    typer.echo(to_yaml(load_any(find_any(name), override)), nl=False)


@config_app.command("list")
def config_list(as_json: Json = False) -> None:
    """The shipped configurations."""
    from cellplane.config import configs_root

    found = {
        f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for path in sorted(configs_root().glob("*/*.yaml"))
    }
    if as_json:
        answer(found, True)
        return
    for name, purpose in found.items():
        typer.echo(f"{name:<24} {purpose}")


def up(config: ConfigOption = "local", override: Overrides = None, as_json: Json = False) -> None:
    """Start MLflow and Ray on this machine, on loopback."""
    from cellplane.cluster import StackConfig
    from cellplane.cluster import up as start
    from cellplane.config import load_config

    stack = start(load_config(StackConfig, config, "cluster", override or []), None, say)
    answer({"mlflow": stack.mlflow_uri, "ray_dashboard": stack.dashboard_url, "ray": stack.ray_address, "stop": "cellplane down"}, as_json)


def down(as_json: Json = False) -> None:
    """Stop the local stack, exactly the processes that `up` started."""
    from cellplane.cluster import down as stop

    found = "stopped" if stop(None, say) else "nothing was running"
    if as_json:
        answer({"stack": found}, True)
    else:
        typer.echo(found)


def status(as_json: Json = False) -> None:
    """Say what runs of the local stack, and what is served."""
    from dataclasses import asdict

    from cellplane.cluster import running
    from cellplane.cluster import status as look

    members, stack = [asdict(member) for member in look(None)], running()
    endpoint = None if stack is None else endpoint_at(stack.host, stack.serve_port)
    if as_json:
        answer({"members": members, "endpoint": endpoint}, True)
        return
    if not members:
        typer.echo("nothing is running; start it with `cellplane up`")
        return
    rows = [
        [*(m[key] for key in ("name", "pid", "address", "processes")), human_bytes(m["rss_bytes"]), "yes" if m["answers"] else "NO"]
        for m in members
    ]
    table(["name", "pid", "address", "processes", "memory", "answers"], rows)
    typer.echo()
    _show_endpoint(endpoint)


def endpoint_at(host: str, port: int) -> dict[str, Any] | None:
    """What answers HTTP there: its url and the versions of the models it serves; None where nobody answers.

    ``refused`` is a status that hides the versions: 401 without the key of $CELLPLANE_API_KEY.
    """
    import json

    from cellplane.processes import http_get

    code, body = http_get(host, port, "/v1/models", os.environ.get("CELLPLANE_API_KEY"))
    if code == 0:
        return None
    versions = json.loads(body)["versions"] if code == 200 else []
    return {"url": f"http://{host}:{port}", "refused": None if code == 200 else code, "models": versions}


def _show_endpoint(endpoint: dict[str, Any] | None) -> None:
    if endpoint is None or endpoint["refused"] == 404:  # Serve without an application of ours
        typer.echo("no model is served; serve one with `cellplane serve models:/NAME@champion`")
        return
    typer.echo(f"endpoint {endpoint['url']}, its paths explained at {endpoint['url']}/docs")
    if endpoint["refused"]:
        typer.echo(f"it answered {endpoint['refused']} and tells no models: put its key into $CELLPLANE_API_KEY")
        return
    rows = [
        [row["name"], row["version"], ", ".join(row["aliases"]) or "-", _state(row), f"{row['share']:.0%}"] for row in endpoint["models"]
    ]
    table(["model", "version", "aliases", "state", "of the requests"], rows)


def _state(row: Mapping[str, Any]) -> str:
    return f"{row['state']}: {row['reason']}" if row["reason"] else str(row["state"])


def doctor(as_json: Json = False) -> None:
    """Check this machine. Versions, memory, disk, ports, tracker; each red line with its fix."""
    from cellplane.doctor import examine

    checks = examine()
    if as_json:
        answer({"checks": [{"name": c.name, "ok": c.ok, "found": c.found, "fix": c.fix} for c in checks]}, True)
    else:
        for check in checks:
            typer.echo(f"{'ok ' if check.ok else 'NO '} {check.name:<22} {check.found}")
            if not check.ok:
                typer.echo(f"    {'':<22} fix: {check.fix}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave MLflow, Ray and the endpoint up, and say how to stop them.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of split, masks and initialisation.")] = 0,
    override: Annotated[list[str] | None, typer.Option("--override", "-o", help="Change the stack: -o mlflow_port=5001.")] = None,
    as_json: Json = False,
) -> None:
    """Go the whole way once, on real cells. Shards, pre-training, fine-tuning, registry, endpoint, answer."""
    from cellplane.demo import run_demo

    result: dict[str, Any] = run_demo(keep=keep, seed=seed, overrides=override or [], say=say)
    answer(result, as_json)


def inventory(
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: print it.")] = None,
) -> None:
    """List what is installed here. A CycloneDX bill of materials in JSON."""
    import json

    from cellplane.errors import StorageError
    from cellplane.inventory import inventory as listed

    text = json.dumps(listed(), indent=1)
    if out is None:
        typer.echo(text)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    say(f"{text.count('bom-ref')} packages in {out}")
