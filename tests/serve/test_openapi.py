"""What /openapi.json says: everything the Open Inference Protocol says, a form for every body, and every refusal there is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serve import perturbing
from serve.document import OPTION_SCHEMAS, REASONS
from serve.front import Front
from serve.limits import CODES, Limits
from serve.native import NativePaths
from serve.options import OPTIONS
from serve.routes import Table
from tests.serve.wire import Ask, answered, application, good_asks

Document = dict[str, Any]
JSON = "application/json"


async def nobody(*_: object) -> None:
    raise AssertionError


@pytest.fixture(scope="module")
def ours() -> Document:
    return NativePaths(Front(Table, nobody), Limits()).app().openapi()


@pytest.fixture(scope="module")
def protocol(shared: Path) -> Document:
    return yaml.safe_load((shared / "schemas" / "open_inference_rest.yaml").read_text(encoding="utf-8"))


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                yield path, method, operation


def resolved(document: Document, schema: Document) -> Document:
    """A schema with its reference followed, and "or null" taken away."""
    if "$ref" in schema:
        return resolved(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    return resolved(document, kinds[0]) if len(kinds) == 1 else schema


def lacks(theirs: Document, ours: Document, wanted: Document, given: Document, where: str) -> list[str]:
    """What a schema of the protocol has and ours has not: fields by name and kind, elements of lists."""
    wanted, given, found = resolved(theirs, wanted), resolved(ours, given), list[str]()
    kind, other = wanted.get("type"), given.get("type", "array" if "anyOf" in given else None)
    if kind is not None and kind != other:
        return [f"{where} is {other}, expected {kind}"]
    for name, schema in wanted.get("properties", {}).items():
        if name not in given.get("properties", {}):
            found.append(f"{where}.{name} is missing")
        elif where.count(".") < 6:
            found += lacks(theirs, ours, schema, given["properties"][name], f"{where}.{name}")
    if "items" in wanted and "items" in given and "anyOf" not in wanted["items"] and "$ref" in str(wanted["items"]):
        found += lacks(theirs, ours, wanted["items"], given["items"], f"{where}[]")
    return found


def by_place(document: Document) -> dict[tuple[str, str], Document]:
    """Operations by path without the names of its parts, and method."""
    return {(re.sub(r"\$?\{[^}]*\}", "*", path), method): operation for path, method, operation in operations(document)}


def missing(protocol: Document, ours: Document) -> list[str]:
    """Every path, body and field of the protocol that ours lacks."""
    wanted, given, found_missing = by_place(protocol), by_place(ours), list[str]()
    for place, operation in wanted.items():
        if place not in given:
            found_missing.append(" ".join(reversed(place)))
            continue
        where = " ".join(reversed(place))
        pairs = [(operation.get("requestBody"), given[place].get("requestBody"), "request")]
        pairs += [(answer, given[place]["responses"].get(status), status) for status, answer in operation["responses"].items()]
        for theirs, found, name in pairs:
            if theirs is None or "content" not in theirs:
                continue
            if found is None:
                found_missing.append(f"{where} {name}")
                continue
            found_missing += lacks(protocol, ours, theirs["content"][JSON]["schema"], found["content"][JSON]["schema"], f"{where} {name}")
    return found_missing


def test_every_path_and_field_of_the_protocol_is_there(ours: Document, protocol: Document) -> None:
    assert not missing(protocol, ours)
    less = copy.deepcopy(ours)
    del less["components"]["schemas"]["TensorInfo"]["properties"]["shape"]
    del less["paths"]["/v2/models/{model}/versions/{version}/infer"]["post"]["responses"]["400"]
    del less["paths"]["/v2/health/live"]
    found = " ".join(missing(protocol, less))
    assert all(words in found for words in ("inputs[].shape is missing", "infer 400", "get /v2/health/live"))


# a tensor in binary has its values behind the JSON part
OPTIONAL_BY_EXTENSION = {"response_output": {"data"}}
NAMES = {
    "metadata_server_response": "ServerMetadata",
    "metadata_model_response": "ModelMetadata",
    "metadata_tensor": "TensorInfo",
    "inference_response": "InferResponse",
    "response_output": "ResponseOutput",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_protocol_requires_of_an_answer_ours_always_have(ours: Document, protocol: Document, name: str) -> None:
    wanted = set(protocol["components"]["schemas"][name]["required"]) - OPTIONAL_BY_EXTENSION.get(name, set())
    assert wanted <= set(ours["components"]["schemas"][NAMES[name]]["required"])


def test_a_request_needs_no_more_than_the_protocol_requires(ours: Document, protocol: Document) -> None:
    """Else a client that follows the protocol would be refused."""
    given = ours["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"][JSON]["schema"]
    theirs = protocol["components"]["schemas"]
    assert set(given["required"]) <= set(theirs["inference_request"]["required"])
    assert set(given["properties"]["inputs"]["items"]["required"]) <= set(theirs["request_input"]["required"])


def is_empty(document: Document, schema: Document) -> bool:
    """Whether a schema lets anything pass."""
    schema = resolved(document, schema)
    told = {"properties", "enum", "anyOf", "oneOf", "items", "format", "pattern"} & set(schema) or isinstance(
        schema.get("additionalProperties"), dict
    )
    return not told and (schema.get("type") not in ("string", "number", "integer", "boolean"))


def test_every_body_has_a_form(ours: Document) -> None:
    untyped = []
    for path, method, operation in operations(ours):
        bodies = [("answer", operation["responses"]["200"])] + ([("request", operation["requestBody"])] if method == "post" else [])
        for name, body in bodies:
            contents = body.get("content", {})
            untyped += [f"{method} {path} {name}"] if not contents else []
            untyped += [f"{method} {path} {name} {kind}" for kind, told in contents.items() if is_empty(ours, told.get("schema", {}))]
    assert not untyped


def test_every_field_has_a_form(ours: Document) -> None:
    fields = {
        f"{name}.{field}": form for name, schema in ours["components"]["schemas"].items() for field, form in schema["properties"].items()
    }
    assert not [name for name, form in fields.items() if is_empty(ours, form)]


def test_refusals_are_described_in_one_shape(ours: Document) -> None:
    for path, method, operation in operations(ours):
        refusals = {status: answer for status, answer in operation["responses"].items() if status != "200"}
        assert set(refusals) >= {"408", "431", "500"}, f"{method} {path}"
        assert method != "post" or set(refusals) >= {"400", "401", "404", "409", "413", "415", "422", "429", "503"}, path
        for status, answer in refusals.items():
            fields = resolved(ours, answer["content"][JSON]["schema"])["properties"]
            assert set(fields) == ({"error"} if path.startswith("/v2") else {"error", "code"}), f"{method} {path} {status}"
            assert answer["description"]
    assert {status for _, _, operation in operations(ours) for status in operation["responses"]} <= {"200", *map(str, CODES)}
    assert set(REASONS) == set(CODES) - {405}, "405 is about methods that are not described"


def test_every_option_of_every_task_is_described(ours: Document) -> None:
    assert set(OPTION_SCHEMAS) == {name for options in OPTIONS.values() for name in options}
    parameters = ours["paths"]["/v1/models/{model}/{task}"]["post"]["parameters"]
    assert {one["name"] for one in parameters if one["in"] == "query"} == set(OPTION_SCHEMAS)
    (task,) = (one for one in parameters if one["name"] == "task")
    assert task["schema"]["enum"] == list(OPTIONS)


def test_everything_is_described_but_what_describes(ours: Document) -> None:
    """The document itself and its page are the only paths that are not in it."""
    app = NativePaths(Front(Table, nobody), Limits()).app()
    hidden = {getattr(route, "path", "") for route in app.routes} - set(ours["paths"])
    assert hidden == {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
    assert app.openapi() is app.openapi()


GETS = ("/v1/models", "/v1/models/tiny", "/v1/models/tiny/genes", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready")
GETS += ("/v2/models/tiny", "/v2/models/tiny/ready", "/v2/models/tiny/versions/3", "/v2/models/tiny/versions/3/ready")


def described(ours: Document, ask: Ask) -> Document:
    """The operation of a request, found by its path."""
    for path, method, operation in operations(ours):
        if method == ask.method.lower() and re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", path), ask.target.partition("?")[0]):
            return operation
    raise AssertionError(f"{ask.target} is not described")


def assert_fits(ours: Document, schema: Document, value: Any) -> None:
    jsonschema.validate(value, {**schema, "components": ours["components"]}, jsonschema.Draft202012Validator)


def test_requests_and_answers_have_the_form_that_is_described(ours: Document, model_path: Path) -> None:
    app = application(model_path)
    asks = [ask for ask in good_asks().values() if ask.kind == JSON]
    asks += [
        replace(asks[0], target=f"/v1/models/tiny/{rest}") for rest in ("embed", "annotate?top_k=2", "embed?context=self&dtype=float16")
    ]
    asks += [Ask(target, kind="", method="GET") for target in GETS]
    for ask in asks:
        answer, operation = answered(app, ask), described(ours, ask)
        assert answer.status == 200, ask
        assert_fits(ours, operation["responses"]["200"]["content"][JSON]["schema"], answer.json())
        if ask.method == "POST":
            assert_fits(ours, operation["requestBody"]["content"][JSON]["schema"], json.loads(ask.chunks[0]))
    with pytest.raises(jsonschema.ValidationError):
        assert_fits(ours, {"$ref": "#/components/schemas/Prediction"}, {**answered(app, asks[0]).json(), "confidence": "high"})


def test_every_column_of_every_task_is_described(ours: Document) -> None:
    told = set(ours["components"]["schemas"]["Prediction"]["properties"])
    columns = {"cell_id", "cell_type", "confidence", "unknown_score", "proba", "top_cell_type", "top_proba", "embedding", "size_factor"}
    columns |= {"rate", "sd", "perturbation", "group", "kind", "seen", "fallback", "control_cells", *perturbing.TABLES}
    assert columns <= told
