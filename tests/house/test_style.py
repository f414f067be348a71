"""The budgets every file keeps, so that a newcomer can read any of them in one sitting."""

from __future__ import annotations

import ast
import statistics

import pytest

from tests.house.source import PLATFORM, ROOT, Function, Source, room, sources

LONGEST_FUNCTION, USUAL_FUNCTION, MEDIAN_FUNCTION = 100, 50, 12
LONGEST_FILE, LONGEST_JOB, MOST_PARAMETERS = 450, 60, 6
each_source = pytest.mark.parametrize("source", sources(), ids=lambda source: source.place)


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: Function) -> list[ast.arg]:
    """Every argument with a name of its own but self and cls, the * and ** ones included."""
    a = function.args
    starred = [arg for arg in (a.vararg, a.kwarg) if arg is not None]
    return [arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *starred) if arg.arg not in ("self", "cls")]


def public(source: Source) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.walk(source.tree) if isinstance(node, kinds) and not node.name.startswith("_")]


def calls(source: Source, name: str) -> list[int]:
    """Lines where a builtin is called by its name."""
    nodes = ast.walk(source.tree)
    return [node.lineno for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]


def is_broad(handler: ast.ExceptHandler) -> bool:
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException")) for name in names)


def swallows(source: Source) -> list[int]:
    """Lines of handlers that catch everything and neither raise nor say in a comment why not."""
    handlers = [node for node in ast.walk(source.tree) if isinstance(node, ast.ExceptHandler) and is_broad(node)]
    lines = source.text.splitlines()
    silent = [handler for handler in handlers if not any(isinstance(node, ast.Raise) for node in ast.walk(handler))]
    return [handler.lineno for handler in silent if "#" not in lines[handler.lineno - 1]]


@each_source
def test_files_are_short_ascii_and_say_what_they_are(source):
    assert source.text.count("\n") <= (LONGEST_JOB if source.place.startswith("jobs/") else LONGEST_FILE)
    assert source.text.isascii()
    assert not source.text.strip() or ast.get_docstring(source.tree), "no module docstring"


@each_source
def test_functions_are_short_and_take_few_annotated_arguments(source):
    for function in source.functions():
        where = f"{source.place}:{function.lineno} {function.name}"
        arguments = parameters(function)
        assert length(function) <= LONGEST_FUNCTION, where
        assert all(argument.annotation is not None for argument in arguments), where
        assert function.returns is not None, where
        if room(source.module) != "cli":  # a verb's options are its parameters
            assert len(arguments) <= MOST_PARAMETERS, where


@each_source
def test_nothing_is_printed_outside_the_command_line_and_the_jobs(source):
    assert room(source.module) in ("cli", "jobs") or not calls(source, "print")


@each_source
def test_no_error_is_swallowed_in_silence(source):
    assert not swallows(source)


@each_source
def test_arguments_are_not_passed_through_unseen(source):
    assert not [function.name for function in source.functions() if function.args.kwarg is not None]


@each_source
def test_nothing_is_loaded_through_pickle(source):
    """No pickle module, no torch.load, no eval: a model or shard from a stranger must not be able to run code."""
    names = {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch"}
    imported = {alias.name for node in ast.walk(source.tree) if isinstance(node, ast.Import) for alias in node.names}
    unpickles = {"pickle", "cloudpickle", "dill", "joblib", "marshal"} & imported
    if source.place != "platform/cellplane/artifact/official.py":  # the official checkpoint's format, read with weights_only
        assert "load" not in names
    assert not unpickles
    assert not calls(source, "eval")
    assert not calls(source, "exec")


def test_most_functions_are_a_few_lines():
    lengths = sorted(length(function) for source in sources() for function in source.functions())
    assert statistics.median(lengths) <= MEDIAN_FUNCTION
    assert lengths[int(0.95 * (len(lengths) - 1))] <= USUAL_FUNCTION


def test_public_names_are_documented():
    named = [(f"{source.place} {node.name}", ast.get_docstring(node)) for source in sources() for node in public(source)]
    bare = [name for name, text in named if not text]
    assert len(bare) <= 0.05 * len(named), bare


def test_there_are_nearly_as_many_lines_of_tests_as_of_code():
    code = sum(source.text.count("\n") for source in sources())
    tests = sum(path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= 0.8 * code


def test_tests_and_configs_are_ascii():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    assert not [path for path in files if not path.read_text(encoding="utf-8").isascii()]


def test_the_package_says_that_it_is_typed():
    assert (PLATFORM / "cellplane" / "py.typed").is_file()


@pytest.mark.parametrize(
    ("body", "silent"),
    [
        ("except Exception:\n    pass", True),
        ("except:\n    pass", True),
        ("except (OSError, BaseException) as error:\n    log(error)", True),
        ("except Exception:  # the tracker may be down, training goes on\n    pass", False),
        ("except Exception as error:\n    raise ValueError from error", False),
        ("except OSError:\n    pass", False),
    ],
)
def test_a_swallowed_error_is_recognised(body, silent):
    text = f"try:\n    work()\n{body}\n"
    assert bool(swallows(Source(ROOT / "probe.py", "probe", text, ast.parse(text)))) is silent
