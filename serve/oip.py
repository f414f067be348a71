"""The Open Inference Protocol, version 2, with its binary extension: what KServe, Triton and MLServer clients speak.

Cells come as tensors: ``genes`` BYTES [genes] and ``counts`` [cells, genes], or CSR as ``indptr`` [cells + 1],
``indices`` [nnz], ``data`` [nnz]; ``coordinates`` [cells, 2], ``batch`` and ``role`` BYTES [cells] may be there too. A binary
body is a JSON header followed by the tensors' bytes, little-endian; BYTES elements carry their length in front.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from .bodies import MOST_PARAMETERS, NumberRows, Numbers, Parameters, Strict, StringRows, Strings, read_json
from .codec import Cells, Columns, checked
from .limits import HEADER_LENGTH, OCTETS, Limits, refuse, refuse_unreadable

BINARY_TYPES = {
    name: np.dtype(code)
    for name, code in (
        *(("FP32", "<f4"), ("FP64", "<f8"), ("INT32", "<i4"), ("INT64", "<i8")),
        *(("UINT8", "u1"), ("INT8", "i1"), ("UINT16", "<u2"), ("INT16", "<i2"), ("UINT32", "<u4"), ("UINT64", "<u8")),
    )
}
BYTES = "BYTES"
DATATYPES = {"O": BYTES, "b": "BOOL", "i": "INT64"}  # of an output, by the kind of its values; else FP32
EXPECTED = {"genes": 1, "counts": 2, "indptr": 1, "indices": 1, "data": 1, "coordinates": 2, "batch": 1, "role": 1}  # dimensions
TEXTS = ("genes", "batch", "role")

Data = Annotated[Numbers | Strings | NumberRows | StringRows, Field(union_mode="left_to_right")]


class RequestInput(Strict):
    """One tensor of a request; ``data`` is left out when it follows in binary."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**40)]], Field(fail_fast=True)]
    datatype: str
    parameters: Parameters | None = None
    data: Data | None = None


class RequestOutput(Strict):
    """An output that is wanted."""

    name: str
    parameters: Parameters | None = None


class InferRequest(Strict):
    """Body of an inference; ``parameters`` may name the ``task`` and its options."""

    id: str | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=len(EXPECTED), fail_fast=True)]
    outputs: Annotated[list[RequestOutput], Field(max_length=MOST_PARAMETERS, fail_fast=True)] | None = None


class ResponseOutput(BaseModel):
    """One tensor of an answer."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[float | str | bool] | None = None


class InferResponse(BaseModel):
    """An answer; ``parameters`` say who gave it and in which context."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[ResponseOutput]


class TensorInfo(BaseModel):
    """A tensor of the model's metadata; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    properties: dict[str, str]


class ServerMetadata(BaseModel):
    """Which server this is."""

    name: str
    version: str
    extensions: list[str]


@dataclass(frozen=True)
class Inference:
    """A decoded request: its cells, and what was said about how to answer."""

    id: str | None
    cells: Cells
    parameters: Mapping[str, str | int | float | bool]
    outputs: Mapping[str, bool] | None  # name -> in binary; None: all, as ``binary`` says
    binary: bool


def decode_inference(body: bytes, header_length: str | None, limits: Limits) -> Inference:
    """The cells of a body; ServiceError 400 for what cannot be read, 413 for too much, 422 for tensors that make no sense."""
    text, rest = _split(body, header_length, limits)
    request = read_json(InferRequest, text, limits)
    tensors = _tensors(request.inputs, rest)
    parameters = dict(request.parameters or {})
    binary = parameters.pop("binary_data_output", False) is True
    outputs = (
        None
        if request.outputs is None
        else {out.name: (out.parameters or {}).get("binary_data", binary) is True for out in request.outputs}
    )
    gene_ids, columns = _columns(tensors)
    return Inference(request.id, checked(gene_ids, columns, limits), parameters, outputs, binary)


def encode_inference(inference: Inference, columns: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers; ServiceError 422 for an output that the task does not give."""
    wanted = dict.fromkeys(columns, inference.binary) if inference.outputs is None else inference.outputs
    if unknown := next((name for name in wanted if name not in columns), None):
        raise refuse(422, f"there is no output {unknown[:80]!r}; this task gives {', '.join(columns)}")
    outputs, tail = [], []
    for name, in_binary in wanted.items():
        values = columns[name]
        output: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": DATATYPES.get(values.dtype.kind, "FP32")}
        if in_binary:
            tail.append(_to_bytes(values))
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = values.reshape(-1).tolist()
        outputs.append(output)
    said = {
        name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
        for name, value in about.items()
        if value is not None
    }
    answer = {"model_name": about["model"], "model_version": about["version"], "id": inference.id, "parameters": said, "outputs": outputs}
    head = json.dumps({key: value for key, value in answer.items() if value is not None}, allow_nan=False).encode()
    if not tail:
        return head, {"content-type": "application/json"}
    return head + b"".join(tail), {"content-type": OCTETS, HEADER_LENGTH: str(len(head))}


def metadata(described: Mapping[str, Any], versions: Sequence[str]) -> ModelMetadata:
    """What a served model takes and gives, in the protocol's words."""
    inputs = [("genes", BYTES, [-1]), ("counts", "FP32", [-1, -1]), ("indptr", "INT64", [-1]), ("indices", "INT32", [-1])]
    inputs += [("data", "FP32", [-1]), ("coordinates", "FP32", [-1, 2]), ("batch", BYTES, [-1]), ("role", BYTES, [-1])]
    width, classes = int(described["latent_width"]), len(described["classes"])
    by_task = {
        "embed": [("embedding", "FP32", [-1, width])],
        "annotate": [
            *(("cell_type", BYTES, [-1]), ("confidence", "FP32", [-1]), ("unknown_score", "FP32", [-1])),
            ("proba", "FP32", [-1, classes]),
        ],
        "denoise": [("rate", "FP32", [-1, -1]), ("size_factor", "FP32", [-1])],
        "impute": [("rate", "FP32", [-1, -1]), ("sd", "FP32", [-1, -1])],
        "perturb": [
            *(("perturbation", BYTES, [-1]), ("group", BYTES, [-1]), ("kind", BYTES, [-1]), ("seen", "BOOL", [-1])),
            *(("fallback", "BOOL", [-1]), ("control_cells", "INT64", [-1]), ("log_fold_change", "FP32", [-1, -1])),
            *((name, "FP32", [-1, -1]) for name in ("mean_log", "rate_control", "rate_perturbed")),
        ],
    }
    outputs = [output for task in by_task if task in described["tasks"] for output in by_task[task]]
    told = [[TensorInfo(name=name, datatype=kind, shape=shape) for name, kind, shape in group] for group in (inputs, outputs)]
    names = {"name": described["name"], "versions": list(versions), "platform": "cellplane"}
    properties = {name: str(described[name]) for name in ("task", "model_sha256", "vocabulary_fingerprint")}
    return ModelMetadata(**names, inputs=told[0], outputs=told[1], properties=properties)


def _split(body: bytes, header_length: str | None, limits: Limits) -> tuple[bytes, bytes]:
    """The JSON part of a body and the bytes behind it."""
    refuse_unreadable(body, "inputs")
    if header_length is None:
        length = len(body)
    elif not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > len(body):  # 5,000 digits are no int
        raise refuse(400, f"the header {HEADER_LENGTH} must be the length of the body's JSON part, at most {len(body)}")
    else:
        length = int(header_length)
    if length > limits.max_json_bytes:
        raise refuse(413, f"the JSON part has {length} bytes, the limit is {limits.max_json_bytes}; send tensors in binary")
    if not length:
        raise refuse(400, "the body is empty; send inputs")
    return body[:length], body[length:]


def _tensors(inputs: Sequence[RequestInput], rest: bytes) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in inputs:
        if tensor.name not in EXPECTED or tensor.name in tensors:
            raise refuse(422, f"input {tensor.name[:80]!r} is unknown or given twice; inputs are {', '.join(EXPECTED)}")
        if len(tensor.shape) != EXPECTED[tensor.name]:
            raise refuse(422, f"input {tensor.name!r} has {len(tensor.shape)} dimensions, expected {EXPECTED[tensor.name]}")
        expected = (BYTES,) if tensor.name in TEXTS else tuple(BINARY_TYPES)
        if tensor.datatype not in expected:
            raise refuse(422, f"input {tensor.name!r} cannot be {tensor.datatype[:20]!r}; expected {' or '.join(expected)}")
        size = (tensor.parameters or {}).get("binary_data_size")
        if (size is None) == (tensor.data is None):
            raise refuse(422, f"input {tensor.name!r} needs either data or binary_data_size")
        if size is None:
            tensors[tensor.name] = _from_json(tensor)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
            raise refuse(400, f"input {tensor.name!r} announces {str(size)[:20]} bytes, {len(rest)} are left in the body")
        tensors[tensor.name], rest = _from_bytes(tensor, rest[:size]), rest[size:]
    if rest:
        raise refuse(400, f"{len(rest)} bytes of the body belong to no input")
    return tensors


def _from_json(tensor: RequestInput) -> NDArray[Any]:
    data: list[Any] = tensor.data or []
    if data and isinstance(data[0], list):
        width = tensor.shape[-1] if len(tensor.shape) == 2 else -1
        if (ragged := next((row for row, values in enumerate(data) if len(values) != width), None)) is not None:
            raise refuse(422, f"input {tensor.name!r}, row {ragged}: {len(data[ragged])} values, the shape says {width}")
        data = [value for values in data for value in values]
    if any(isinstance(value, str) for value in data) != (tensor.datatype == BYTES and bool(data)):
        raise refuse(422, f"input {tensor.name!r} of datatype {tensor.datatype} holds values of another kind")
    return _shaped(tensor, np.array(data, dtype=object if tensor.datatype == BYTES else np.float64))


def _from_bytes(tensor: RequestInput, data: bytes) -> NDArray[Any]:
    if tensor.datatype == BYTES:
        return _shaped(tensor, np.array(_texts(tensor.name, data), dtype=object))
    kind = BINARY_TYPES[tensor.datatype]
    if len(data) % kind.itemsize:
        raise refuse(400, f"input {tensor.name!r}: {len(data)} bytes are no whole number of {tensor.datatype}")
    return _shaped(tensor, np.frombuffer(data, dtype=kind))


def _texts(name: str, data: bytes) -> list[str]:
    texts, at = [], 0
    while at < len(data):
        length = struct.unpack_from("<I", data, at)[0] if at + 4 <= len(data) else len(data)
        at += 4
        if at + length > len(data):
            raise refuse(400, f"input {name!r}: an element reaches beyond its bytes")
        try:
            texts.append(data[at : at + length].decode())
        except UnicodeDecodeError:
            raise refuse(422, f"input {name!r}: element {len(texts)} is not UTF-8") from None
        at += length
    return texts


def _shaped(tensor: RequestInput, values: NDArray[Any]) -> NDArray[Any]:
    expected = int(np.prod([float(size) for size in tensor.shape]))
    if len(values) != expected:
        raise refuse(422, f"input {tensor.name!r} has {len(values)} values, its shape {tensor.shape} holds {expected}")
    return values.reshape(tensor.shape)


def _columns(tensors: Mapping[str, NDArray[Any]]) -> tuple[list[str], Columns]:
    if "genes" not in tensors:
        raise refuse(422, "input 'genes' is missing; name the genes, BYTES [genes]")
    genes, columns = [str(gene) for gene in tensors["genes"]], Columns()
    sparse = [name for name in ("indptr", "indices", "data") if name in tensors]
    if "counts" in tensors and not sparse:
        cells, width = tensors["counts"].shape
        if not width or width != len(genes):  # before a row's length is written down for each of up to 2**40 empty rows
            raise refuse(422, f"input 'counts' has {width} columns for {len(genes)} genes")
        columns["counts"] = np.full(cells, width, dtype=np.int64), tensors["counts"].reshape(-1)
    elif len(sparse) == 3 and "counts" not in tensors:
        columns |= _csr(tensors["indptr"], tensors["indices"], tensors["data"])
    else:
        raise refuse(422, "send either 'counts' or all of 'indptr', 'indices', 'data'")
    if "coordinates" in tensors:
        if tensors["coordinates"].shape[1] != 2:
            raise refuse(422, f"'coordinates' has {tensors['coordinates'].shape[1]} columns, expected 2: x and y in micrometres")
        columns["x_um"], columns["y_um"] = (tensors["coordinates"][:, axis] for axis in (0, 1))
    columns |= {name: tensors[name] for name in ("batch", "role") if name in tensors}
    return genes, columns


def _csr(indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any]) -> Columns:
    """As lists of cells; every edge is checked before anything is cut along it."""
    edges = indptr.astype(np.float64)
    if not len(edges) or edges[0] != 0 or edges[-1] != len(indices) or (np.diff(edges) < 0).any() or (edges != np.rint(edges)).any():
        raise refuse(422, f"'indptr' must rise from 0 to the length of 'indices', {len(indices)}")
    if (indices != np.rint(indices)).any():
        raise refuse(422, "'indices' holds positions that are no whole numbers")
    lengths = np.diff(edges).astype(np.int64)
    if len(data) != len(indices):
        raise refuse(422, f"'indices' has {len(indices)} entries and 'data' has {len(data)}")
    return {"gene": (lengths, indices.astype(np.int64)), "count": (lengths, data)}


def _to_bytes(values: NDArray[Any]) -> bytes:
    if values.dtype != object:
        return np.ascontiguousarray(values, dtype={"b": "?", "i": "<i8"}.get(values.dtype.kind, "<f4")).tobytes()
    texts = [str(value).encode() for value in values.reshape(-1)]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
