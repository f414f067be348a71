"""The reference pages in docs/reference/, written from the code itself: verbs, configuration keys, endpoints, errors, Python.

`python -m cellplane.cli.reference docs/reference` writes them; a test fails when a page is not what the code says.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

import cellplane
from cellplane import errors
from cellplane.config import Config, configs_root

REQUIRED = object()
GENERATED = "Written by `make reference` from the code; a test keeps it so.\n"
CONFIGS = {  # every folder of configs/ with the classes that read its files
    "data": ("cellplane.data.config:ConvertConfig",),
    "simulate": ("cellplane.data.config:SimulateConfig",),
    "pretrain": ("cellplane.train.config:PretrainConfig",),
    "finetune": (
        "cellplane.pipelines.config:FinetuneConfig",
        "cellplane.pipelines.config:DenoiseJobConfig",
        "cellplane.pipelines.imputation_job:ImputeJobConfig",
        "cellplane.pipelines.perturbation_job:PerturbJobConfig",
    ),
    "tune": ("cellplane.pipelines.tune_config:TuneConfig",),
    "evaluate": (
        "cellplane.pipelines.config:EvaluateConfig",
        "cellplane.pipelines.config:DenoiseEvaluation",
        "cellplane.pipelines.protocol_config:AnnotationProtocol",
        "cellplane.pipelines.protocol_config:EmbeddingProtocol",
        "cellplane.pipelines.task_protocols:DenoisingProtocol",
        "cellplane.pipelines.task_protocols:ImputationProtocol",
        "cellplane.pipelines.task_protocols:PerturbationProtocol",
        "cellplane.pipelines.task_protocols:UnknownProtocol",
    ),
    "annotate": ("cellplane.pipelines.folder_annotation:AnnotateConfig",),
    "try": tuple(
        f"cellplane.pipelines.try_config:Try{task}" for task in ("Annotation", "Embedding", "Imputation", "Denoising", "Perturbation")
    ),
    "predict": ("cellplane.batch:PredictConfig",),
    "serve": ("cellplane.serve.deployment:ServeConfig",),
    "cluster": ("cellplane.cluster:StackConfig",),
    "k8s": ("cellplane.kubernetes:KubernetesConfig",),
}


def verbs() -> str:
    """Every command with its options, as `--help` has them."""
    from cellplane.cli.main import app

    command = typer.main.get_command(app)
    context: Any = command.make_context("cellplane", [], resilient_parsing=True)  # typer's annotation names another class
    text = get_docs_for_click(obj=command, ctx=context, name="cellplane", title="Commands")
    head, _, rest = text.partition("\n\n")
    return f"{head}\n\n{GENERATED}\n{_same_everywhere(rest)}"


def _same_everywhere(text: str) -> str:
    """Without trailing spaces, and one empty line between parts."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip() + "\n"


def keys() -> str:
    """Every key of every kind of configuration file: type, default, meaning."""
    parts = ["# Configuration keys\n", GENERATED]
    parts.append(
        "Each file says its `kind`; keys of a section are written `section.key`, as `-o section.key=value` takes them. "
        "An unknown key or a wrong value ends a command with exit code 2 and names the nearest key.\n"
    )
    sections: dict[str, type] = {}
    for folder, classes in CONFIGS.items():
        shipped = ", ".join(f"`{file.stem}`" for file in sorted((configs_root() / folder).glob("*.yaml")))
        parts.append(f"## {folder}\n\nShipped files: {shipped}.\n")
        for where in classes:
            parts.append(_table(_found(where), "###", sections))
    parts.append("## Sections\n")
    shown = 0
    while shown < len(sections):  # a section may have sections
        parts.append(_table(list(sections.values())[shown], "###", sections))
        shown += 1
    return _same_everywhere("\n".join(parts))


def _table(config: type, level: str, sections: dict[str, type]) -> str:
    """A heading, what it is, and a row a key; sections that are met are added to ``sections``."""
    head = "| key | type | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"{level} {config.__name__}\n\n{_summary(config)}\n\n{head}", *_rows(config, sections), ""])


def _found(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def _rows(config: type, sections: dict[str, type]) -> Iterator[str]:
    meanings = _meanings(config)
    for name, kind, default in _fields(config):
        met: list[type] = [part for part in (kind, *get_args(kind)) if inspect.isclass(part) and _has_keys(part)]
        sections.update({part.__name__: part for part in met})
        shown = f"`{_cell(_type(kind))}`"
        for part in met:
            shown = shown.replace(part.__name__, f"`[{part.__name__}](#{part.__name__.lower()})`").replace("``", "")
        yield f"| `{name}` | {shown} | {_value(default)} | {_cell(meanings.get(name, ''))} |"


def _fields(config: type) -> Iterator[tuple[str, Any, object]]:
    """Name, type and default of each key; the default is REQUIRED where there is none."""
    if issubclass(config, BaseModel):
        for name, field in config.model_fields.items():
            default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
            yield name, field.annotation, default
        return
    kinds = get_type_hints(config)
    for part in fields(cast("Any", config)):
        made = part.default if part.default_factory is MISSING else part.default_factory()
        yield part.name, kinds[part.name], REQUIRED if made is MISSING else made


def _has_keys(kind: type) -> bool:
    """True for a section: one of our configurations, or a dataclass that stands for one."""
    return issubclass(kind, Config) or (is_dataclass(kind) and kind.__module__.startswith("cellplane."))


def _value(default: object) -> str:
    """A default; of a section what differs from the section's own defaults."""
    if default is REQUIRED:
        return "required"
    if isinstance(default, BaseModel):
        text = default.model_dump_json(exclude_defaults=True)
    elif is_dataclass(default) and not isinstance(default, type):
        own = {name: value for name, _, value in _fields(type(default))}
        text = json.dumps({name: getattr(default, name) for name, value in own.items() if getattr(default, name) != value})
    else:
        text = str(default) if isinstance(default, Path) else repr(default)
    return "" if text == "{}" else f"`{_cell(text)}`"


def _type(kind: Any) -> str:
    """A type as one writes it in Python, without what only checks it (bounds, patterns)."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return " | ".join(repr(part) for part in parts)
    if origin in (Union, UnionType):
        return " | ".join(_type(part) for part in parts)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if part is Ellipsis else _type(part) for part in parts)}]"
    return "None" if kind is type(None) else str(getattr(kind, "__name__", kind))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _meanings(config: type) -> dict[str, str]:
    """The text under each field, also of the classes it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(config.__mro__):
        if part.__module__.split(".")[0] in ("cellplane", "serve"):
            found.update(_texts_under_fields(part))
    return found


def _texts_under_fields(part: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        told = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(told, str):
            found[field.target.id] = told
    return found


def _summary(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def endpoints() -> str:
    """Every path of the endpoint, from its own OpenAPI document."""
    from cellplane.serve.front import Front
    from cellplane.serve.limits import CODES, Limits
    from cellplane.serve.native import NativePaths
    from cellplane.serve.routes import Table

    async def nobody(*_: object) -> None:
        raise AssertionError("the document asks no model")

    document = NativePaths(Front(Table, cast("Any", nobody)), Limits()).app().openapi()
    parts = ["# Endpoints\n", GENERATED, "The same, for programs: `/openapi.json` of a running endpoint.\n"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                parts.append(_operation(path, method, operation, methods.get("parameters", [])))
    parts.append("## Codes of refusals\n\n| status | code |\n|---|---|")
    parts.append("\n".join(f"| {status} | `{code}` |" for status, code in CODES.items()))
    return _same_everywhere("\n".join(parts))


def _operation(path: str, method: str, operation: Mapping[str, Any], shared: list[Any]) -> str:
    told = [f"## `{method.upper()} {path}`\n", operation.get("description") or operation.get("summary", ""), ""]
    for given in (*shared, *operation.get("parameters", [])):
        meaning = _cell(given.get("description", ""))
        told.append(f"- `{given['name']}` in {given['in']}{f': {meaning}' if meaning else ''}")
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies:
        told.append(f"- body: {', '.join(f'`{kind}`' for kind in bodies)}")
    told.append(f"- answers: {', '.join(operation['responses'])}\n")
    return "\n".join(told)


def failures() -> str:
    """The tree of errors with their exit codes."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.CellplaneError)]
    kinds.sort(key=lambda kind: [parent.__name__ for parent in reversed(kind.__mro__)])
    rows = [f"| `{kind.__name__}` | `{kind.__bases__[0].__name__}` | {kind.exit_code} | {_cell(_summary(kind))} |" for kind in kinds]
    table = "| error | is a | exit code | when |\n|---|---|---|---|\n" + "\n".join(rows)
    rest = "Ctrl-C and SIGTERM end a command with 130; a wrong option with 2. `CELLPLANE_DEBUG=1` shows the whole trace."
    return f"# Errors and exit codes\n\n{GENERATED}\nEvery error that is raised on purpose, in `cellplane.errors`.\n\n{table}\n\n{rest}\n"


def names() -> str:
    """What `import cellplane` offers: classes with their methods, and the pictures."""
    parts = ["# Python\n", GENERATED]
    for name in sorted(set(cellplane.__all__) - {"__version__"}):
        thing = getattr(cellplane, name)
        if inspect.ismodule(thing):
            parts.append(f"## `cellplane.{name}`\n\n{_summary(thing)}\n")
            own = [part for _, part in inspect.getmembers(thing, inspect.isfunction) if part.__module__ == thing.__name__]
            parts += [_function(part, "###") for part in own if not part.__name__.startswith("_")]
        else:
            parts.append(f"## `cellplane.{name}`\n\n{inspect.getdoc(thing) or ''}\n")
            parts += [_function(part, "###") for part in _methods(thing)]
    return _same_everywhere("\n".join(parts))


def _methods(thing: type) -> Iterator[Callable[..., Any]]:
    for name, part in inspect.getmembers(thing, callable):
        ours = str(getattr(part, "__module__", None)).startswith("cellplane")
        if ours and not name.startswith("_") and (inspect.isfunction(part) or inspect.ismethod(part)):
            yield part


def _function(part: Callable[..., Any], level: str) -> str:
    signature = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", str(inspect.signature(part)))
    return f"{level} `{part.__name__}`\n\n```python\n{part.__name__}{signature}\n```\n\n{inspect.getdoc(part) or ''}\n"


PAGES: dict[str, Callable[[], str]] = {
    "commands": verbs,
    "configuration": keys,
    "endpoints": endpoints,
    "errors": failures,
    "python": names,
}


def write(folder: Path) -> list[Path]:
    """Every page, replacing what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, page in PAGES.items():
        paths.append(folder / f"{name}.md")
        paths[-1].write_text(page(), encoding="utf-8")
    return paths


if __name__ == "__main__":
    for written in write(Path(sys.argv[1])):
        print(written)
