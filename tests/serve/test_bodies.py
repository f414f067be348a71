"""A senseless JSON body costs about what a good one costs, however many mistakes it holds."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cellplane.client import JSON_TYPE
from cellplane.errors import ServiceError
from serve.bodies import MOST_PARAMETERS
from serve.codec import decode
from serve.limits import Limits
from serve.mlflow_protocol import decode_invocation
from serve.oip import decode_inference

LIMITS = Limits()
SIZE = 2_000_000  # bytes; the limit is eight times as much
MOST_S = 2.0  # of processor time; before, five million lists or mistakes took a minute at the limit's size


def native(body: bytes) -> object:
    return decode(body, JSON_TYPE, LIMITS)


def oip(body: bytes) -> object:
    return decode_inference(body, None, LIMITS)


def mlflow(body: bytes) -> object:
    return decode_invocation(body, LIMITS)


def many(item: str, around: str) -> bytes:
    """The item as often as fits, with %d counted up, inside of something."""
    items = [item.replace("%d", str(index)) for index in range(SIZE // (len(item) + 1))]
    return around.replace("@", ",".join(items)).encode()


TENSOR = '{"inputs": [{"name": "counts", "shape": [1, 1], "datatype": "FP32", "data": [@]}]}'
CASES: dict[str, tuple[Callable[[bytes], object], bytes, int, str]] = {
    "native unknown keys": (native, many('"%d":1', "{@}"), 422, "unknown keys"),
    "native texts": (native, many('["x"]', '{"gene_ids": ["a"], "gene": [@], "count": []}'), 413, "lists and objects"),
    "native texts in a row": (native, many('"x"', '{"gene_ids": ["a"], "counts": [[@]]}'), 422, "row 0"),
    "native empty rows": (native, many("[]", '{"gene_ids": ["a"], "counts": [@]}'), 413, "lists and objects"),
    "native genes": (native, many('"%d"', '{"gene": [], "count": [], "gene_ids": [@]}'), 413, "genes"),
    "oip booleans": (oip, many("true", TENSOR), 422, "data"),
    "oip empty rows": (oip, many("[]", TENSOR), 413, "lists and objects"),
    "oip mixed": (oip, many('1,"a"', TENSOR), 422, "data"),
    "oip outputs": (oip, many('{"a":1}', '{"inputs": [], "outputs": [@]}'), 413, "lists and objects"),
    "oip inputs": (oip, many("1", '{"inputs": [@]}'), 422, "inputs"),
    "oip shape": (oip, many("-1", TENSOR.replace("[1, 1]", "[@]").replace("[@]}", "[]}")), 422, "shape"),
    "oip parameters": (oip, many('"%d":1', '{"inputs": [], "parameters": {@}}'), 422, "parameters"),
    "oip unknown keys": (oip, many('"%d":1', '{"inputs": [{@}]}'), 422, "unknown keys"),
    "mlflow one record": (mlflow, many('"%d":"x"', '{"dataframe_records": [{@}]}'), 422, "no finite number"),
    "mlflow records": (mlflow, many('{"a":"x"}', '{"dataframe_records": [@]}'), 422, "no finite number"),
    "mlflow empty records": (mlflow, many("{}", '{"dataframe_records": [@]}'), 413, "lists and objects"),
    "mlflow columns": (mlflow, many("1", '{"dataframe_split": {"data": [], "columns": [@]}}'), 422, "columns"),
    "mlflow rows": (mlflow, many('"x"', '{"dataframe_split": {"columns": ["a"], "data": [@]}}'), 422, "data"),
    "mlflow parameters": (mlflow, many('"%d":1', '{"params": {@}}'), 422, "parameters"),
    "mlflow unknown keys": (mlflow, many('"%d":1', "{@}"), 422, "unknown keys"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_body_of_nothing_but_mistakes_is_refused_at_once(case: str) -> None:
    read, body, status, words = CASES[case]
    began = time.process_time()
    with pytest.raises(ServiceError, match=words) as refused:
        read(body)
    assert refused.value.status == status
    assert time.process_time() - began < MOST_S


@pytest.mark.parametrize("value", ["NaN", "1e999", "true", "null", '"1"', "1" * 400, "[]"])
def test_a_record_holds_finite_numbers(value: str) -> None:
    with pytest.raises(ServiceError, match=r"dataframe_records\.0.*'GENE0001'") as refused:
        mlflow(b'{"dataframe_records": [{"GENE0001": %s}]}' % value.encode())
    assert refused.value.status == 422


def test_as_many_parameters_as_anyone_needs_are_read() -> None:
    record, names = '"dataframe_records": [{"GENE0001": 1}]', [f'"p{index}": 1' for index in range(MOST_PARAMETERS + 1)]
    assert mlflow(f'{{{record}, "params": {{{", ".join(names[1:])}}}}}'.encode())
    with pytest.raises(ServiceError, match=f"at most {MOST_PARAMETERS}"):
        mlflow(f'{{{record}, "params": {{{", ".join(names)}}}}}'.encode())


def test_as_many_rows_as_the_limit_allows_are_read() -> None:
    rows = ",".join(["[0]"] * LIMITS.max_cells)
    ones = ",".join(["[1]"] * LIMITS.max_cells)
    cells = decode(f'{{"gene_ids": ["a"], "gene": [{rows}], "count": [{ones}]}}'.encode(), JSON_TYPE, LIMITS)
    assert cells.n_cells == LIMITS.max_cells
