"""JSON bodies, read strictly and left at the first thing that is wrong.

Sixteen megabytes of JSON can hold millions of mistakes, and a validator that lists them all takes a minute and a
gigabyte. So lists stop at their first one, dictionaries are looked through before they are read, and one is told.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .limits import BATCH_JOB, Limits, refuse

MOST_PARAMETERS = 64
LARGEST = 1e308  # a number beyond is no float
SPARE_BRACKETS = 100_000  # in names, parameters, and nesting that is refused for its depth
MOST_TOLD = 100  # mistakes; with more than these there are unknown keys without end, and naming one takes as long as all

Strings = Annotated[list[str], Field(fail_fast=True)]
Numbers = Annotated[list[float], Field(fail_fast=True)]
StringRows = Annotated[list[Strings], Field(fail_fast=True)]
NumberRows = Annotated[list[Numbers], Field(fail_fast=True)]
BodyT = TypeVar("BodyT", bound=BaseModel)


class Strict(BaseModel):
    """No other keys, no texts for numbers, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MOST_PARAMETERS:
        raise ValueError(f"{len(given)} parameters, at most {MOST_PARAMETERS} are read")
    return given


def _finite(given: Any) -> Any:
    """A dictionary of numbers, found to be one at a glance."""
    if isinstance(given, dict):
        for name, value in given.items():
            if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:  # neither is NaN
                raise ValueError(f"{str(name)[:40]!r} is no finite number")
    return given


Parameters = Annotated[dict[str, str | int | float | bool], BeforeValidator(_few)]
NumberByName = Annotated[dict[str, float], BeforeValidator(_finite)]


def refuse_crowded(text: bytes, limits: Limits) -> None:
    """ServiceError 413 for more lists and objects than the most cells and genes have: each costs a hundred times its brackets."""
    found, most = text.count(b"[") + text.count(b"{"), 2 * limits.max_cells + limits.max_genes + SPARE_BRACKETS
    if found > most:
        raise refuse(413, f"the JSON holds {found} lists and objects, {limits.max_cells} cells have fewer; {BATCH_JOB}")


def read_json(kind: type[BodyT], text: bytes, limits: Limits) -> BodyT:
    """The body; ServiceError 400 when it is not JSON, 422 naming the place of the first mistake, never quoting what was sent."""
    refuse_crowded(text, limits)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        if error.error_count() > MOST_TOLD:
            raise refuse(422, f"{error.error_count()} unknown keys or wrong values; keys are {', '.join(kind.model_fields)}") from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        raise refuse(422 if place else 400, f"{place or 'the body'}: {first['msg']}"[:300]) from None
