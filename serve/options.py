"""The options of each task as they come in a URL or a body: read, checked, and refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .limits import refuse
from .perturbing import FALLBACKS, KINDS

Scalar = str | int | float | bool
DTYPES = {"float32": np.float32, "float16": np.float16}
CONTEXTS = ("own", "self", "panel")  # the request's own sentences, every cell alone, with the model's reference cells in each sentence


@dataclass(frozen=True)
class Options:
    """How one request wants its answer; what a task does not take keeps its default."""

    threshold: float = 0.0
    top_k: int | None = None
    dtype: str = "float32"
    target_batch: str | None = None
    genes: tuple[str, ...] | None = None
    reference: str | None = None
    min_correlation: float | None = None
    perturbation: tuple[str, ...] | None = None
    kind: str | None = None
    by_group: bool = False
    fallback: str | None = None
    context: str = "own"


def read_options(task: str, given: Mapping[str, Scalar]) -> Options:
    """The options of a request, as they came in a URL or a body; ServiceError 404 for no such task, 422 for a wrong option."""
    if task not in OPTIONS:
        raise refuse(404, f"there is no task {task[:40]!r}; tasks are {', '.join(OPTIONS)}")
    readers, found = OPTIONS[task], {}
    for name, value in given.items():
        if name not in readers:
            raise refuse(422, f"{task} takes no parameter {name[:40]!r}; it takes {', '.join(readers) or 'none'}")
        try:
            found[name] = readers[name](value)
        except (TypeError, ValueError, OverflowError) as error:
            raise refuse(422, f"parameter {name!r}: {error}") from None
    return Options(**found)


def _share(value: Scalar) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise ValueError("expected a number from 0 to 1")
    return number


def _correlation(value: Scalar) -> float:
    number = float(value)
    if isinstance(value, bool) or math.isnan(number) or not -1 <= number <= 1:
        raise ValueError("expected a number from -1 to 1")
    return number


def _positive(value: Scalar) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or not int(str(value)[:9]) >= 1:
        raise ValueError("expected a whole number from 1")
    return int(str(value)[:9])


def _text(value: Scalar) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def _texts(value: Scalar) -> tuple[str, ...]:
    """Texts between commas, each once."""
    found = tuple(dict.fromkeys(part.strip() for part in _text(value).split(",")))
    if not all(found):
        raise ValueError("expected texts between commas")
    return found


def _flag(value: Scalar) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return str(value).lower() == "true"


def _one_of(*choices: str) -> Callable[[Scalar], str]:
    def chosen(value: Scalar) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(value)

    return chosen


OPTIONS: dict[str, dict[str, Callable[[Scalar], Any]]] = {
    "annotate": {"threshold": _share, "top_k": _positive, "context": _one_of(*CONTEXTS)},
    "embed": {"dtype": _one_of(*DTYPES), "context": _one_of(*CONTEXTS)},
    "denoise": {"target_batch": _text},
    "impute": {"genes": _texts, "reference": _text, "min_correlation": _correlation},
    "perturb": {"perturbation": _texts, "kind": _one_of(*KINDS), "by_group": _flag, "fallback": _one_of(*FALLBACKS)},
}
