"""The model folder: everything a trained model is, readable without cellplane and without pickle.

    manifest.json         format version, lineage, size + sha256 of every other file and of itself; written last
    config.json           the network's configuration, its task, classes and context size
    vocabulary.json       gene ids in order
    weights.safetensors   every tensor of the network, loaded strictly
    README.md             the model card
    ...                   what a task keeps beside (an imputation its reference cells), listed in the manifest like all else

No format detects a flipped bit by itself, so nothing is used before its sha256 was checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from cellplane.errors import DataError, FileFormatError, IntegrityError, StorageError
from cellplane.genes import GeneVocabulary
from cellplane.model.config import ModelConfig, identifying

FORMAT_VERSION = 1
READ_SUFFIXES = (".safetensors", ".json")
MANIFEST, CONFIG, VOCABULARY, WEIGHTS, CARD = "manifest.json", "config.json", "vocabulary.json", "weights.safetensors", "README.md"
TASKS = ("pretrain", "annotate", "denoise", "impute", "perturb")
HOW_IT_IS_COMPUTED = ("recompute", "precision")
CONTENT = (CONFIG, VOCABULARY, WEIGHTS)  # what the model's identity is made of
JUDGEMENT, JUDGEMENT_CELLS = "judgement.json", "judgement.safetensors"  # how an annotator words its answers: artifact.judgement
SMOOTHING, SMOOTHING_CELLS = "smoothing.json", "smoothing.safetensors"  # what a denoiser adds to its network: artifact.smoothing
MEMBERS = "members.safetensors"  # more networks that answer with the first one: artifact.members
PANEL, PANEL_CELLS = "panel.json", "panel.safetensors"  # company for lone cells: artifact.panel
ANSWERING = {  # attachments that change the answers
    "judgement": (JUDGEMENT, JUDGEMENT_CELLS),
    "smoothing": (SMOOTHING, SMOOTHING_CELLS),
    "members": (MEMBERS,),
    "panel": (PANEL, PANEL_CELLS),
}


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model in memory, as saved: network configuration, weights by name, vocabulary, classes, where it came from.

    ``task`` is one of TASKS; ``max_cells`` the largest sentence it is used with; ``lineage`` names its data, its base
    model and its run; ``card`` is Markdown. ``attachments`` are files of the task's own, by name.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    vocabulary: GeneVocabulary
    task: str
    max_cells: int
    classes: tuple[str, ...] = ()
    lineage: Mapping[str, str] = field(default_factory=dict)
    card: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def model_sha256(self) -> str:
        """Identity of configuration, vocabulary and weights; empty before the model was saved."""
        return str(self.manifest.get("model_sha256", ""))


def save_model(model: ModelFolder, path: Path) -> Path:
    """Writes the folder in one move (a reader sees all of it or nothing), replacing an older one; returns ``path``."""
    path = Path(path).absolute()
    described = {"model": _what_it_is(model.config), "task": model.task, "classes": list(model.classes), "max_cells": model.max_cells}
    for part, names in ANSWERING.items():  # they change the answers, so they are part of the identity
        if kept := [name for name in names if name in model.attachments]:
            described[part] = {name: hashlib.sha256(model.attachments[name]).hexdigest() for name in kept}
    genes = {"namespace": model.vocabulary.namespace, "gene_ids": list(model.vocabulary.gene_ids)}
    files = {
        CONFIG: _json(described),
        VOCABULARY: _json(genes),
        WEIGHTS: save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in model.weights.items()}),
        CARD: model.card.encode(),
    }
    if taken := sorted({*files, MANIFEST} & model.attachments.keys()):
        raise DataError(f"an attachment may not be called {taken[0]}: the model folder has a file of that name; rename it")
    files |= model.attachments
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "cellplane-model",
        "task": model.task,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "vocabulary_fingerprint": model.vocabulary.fingerprint,
        "model_sha256": _identity({name: hashlib.sha256(files[name]).hexdigest() for name in CONTENT}),
        "lineage": dict(model.lineage),
        "files": {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()},
    }
    write_folder(path, {**files, MANIFEST: sealed(manifest)})
    return path


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as an attachment: readable without pickle."""
    data: bytes = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    return data


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of such an attachment; FileFormatError for anything else."""
    try:
        return dict(load_safetensors(data))
    except SafetensorError as error:
        raise FileFormatError(f"not a readable attachment of tensors: {error}") from error


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written: with the sha256 of all the rest of it, so that no bit of it flips unseen either."""
    return _json({**manifest, "manifest_sha256": hashlib.sha256(_json(manifest)).hexdigest()})


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Files in order into a staging folder, then one rename; an older folder of that name is replaced.

    Raises StorageError, with nothing left behind, when the disk is full or not writable, and when something else than
    such a folder has that name: what is not ours is never removed.
    """
    with staged_folder(path, files, _kind(files.get(MANIFEST, b""))) as staging:
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def staged_folder(path: Path, names: Collection[str], kind: object) -> Iterator[Path]:
    """A folder to write the files ``names`` into, which takes the name ``path`` in one move when the block ends well.

    An older folder of that name goes when it holds nothing else or its manifest is of this ``kind``; StorageError as of
    `write_folder` otherwise, and for whatever the disk refuses inside the block.
    """
    path = Path(path).resolve()
    try:
        if path.exists() and not _is_ours(path, names, kind):
            raise StorageError(f"{path} holds something else, which is not replaced; choose another name or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield staging
            staging.chmod(0o755)
            _put(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except StorageError:
        raise
    except OSError as error:
        existing = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(existing).free
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {free:,} bytes are free there") from error


def _is_ours(path: Path, names: Collection[str], kind: object) -> bool:
    """Whether a folder may be replaced by these files: it holds nothing that they do not, or its manifest is of their kind."""
    if not path.is_dir():
        return False
    if {file.name for file in path.iterdir()} <= set(names):
        return True
    return (path / MANIFEST).is_file() and _kind((path / MANIFEST).read_bytes()) == kind is not None


def _kind(manifest: bytes) -> object:
    try:
        return json.loads(manifest)["kind"]
    except (ValueError, KeyError, TypeError):
        return None


def _put(staging: Path, path: Path) -> None:
    """Gives the staging folder its name; an older folder of that name is then found under the staging one's."""
    if not path.exists():
        staging.rename(path)
    elif not _exchange(staging, path):
        old = staging.with_name(staging.name + ".old")
        path.rename(old)
        try:
            staging.rename(path)
        except OSError:
            old.rename(path)
            raise
        old.rename(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names at once, so that a kill leaves one of them whole; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """The folder's manifest; FileFormatError when there is none, when it is of another kind, or of a newer format.

    IntegrityError when it is not, to the byte, what was written.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise FileFormatError(f"{path} is not a {kind} folder: it has no {MANIFEST}")
    return parse_manifest(file.read_bytes(), kind, str(file))


def parse_manifest(data: bytes, kind: str, file: str) -> dict[str, Any]:
    """`read_manifest` of bytes that came from ``file``, wherever that is."""
    try:
        manifest = json.loads(data)
        found, version = manifest["kind"], manifest["format_version"]
        if not isinstance(version, int) or not isinstance(manifest["files"], dict):
            raise TypeError("format_version must be a number, files a table")
        if broken := [name for name, entry in manifest["files"].items() if not _is_entry(entry)]:
            raise TypeError(f"no size and sha256 for {broken[0]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{file} is damaged: {error}; restore the folder from where it came") from error
    if found != kind:
        raise FileFormatError(f"{file} describes a {found}, expected a {kind}")
    if version > FORMAT_VERSION:
        raise FileFormatError(f"{file} has format {version}, this cellplane reads up to {FORMAT_VERSION}; upgrade cellplane")
    if sealed({key: value for key, value in manifest.items() if key != "manifest_sha256"}) != data:
        raise IntegrityError(f"{file} was changed after it was written; restore the folder from where it came")
    return dict(manifest)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def read_verified(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and content of every file it lists, each checked against its size and sha256.

    Raises IntegrityError that names the file, what was found and what was expected; an unlisted file of a kind that we
    read (safetensors, JSON) is one too many.
    """
    manifest = read_manifest(path, kind)
    listed = {*manifest["files"], MANIFEST}
    if extra := sorted(file.name for file in Path(path).iterdir() if file.suffix in READ_SUFFIXES and file.name not in listed):
        raise IntegrityError(f"{path} holds {extra[0]}, which its manifest does not know; restore the folder from where it came")
    contents: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise IntegrityError(f"{path}: the manifest names {name!r}, which is not a plain file name")
        file = Path(path) / name
        if not file.is_file() or file.is_symlink():
            raise IntegrityError(f"{file} is missing; the manifest expects {expected['bytes']} bytes")
        contents[name] = file.read_bytes()
        if len(contents[name]) != expected["bytes"]:
            raise IntegrityError(f"{file} has {len(contents[name])} bytes, the manifest expects {expected['bytes']}")
        if (found := hashlib.sha256(contents[name]).hexdigest()) != expected["sha256"]:
            raise IntegrityError(f"{file} is damaged: sha256 {found[:16]}..., the manifest expects {expected['sha256'][:16]}...")
    return manifest, contents


def verify_model(path: Path) -> dict[str, Any]:
    """Checks every file of a model folder and returns its manifest; IntegrityError or FileFormatError otherwise."""
    return _read_model_files(path)[0]


def _read_model_files(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest, contents = read_verified(path, "cellplane-model")
    if missing := [name for name in CONTENT if name not in contents]:
        raise IntegrityError(f"{path}: the manifest does not list {', '.join(missing)}")
    if _identity({name: manifest["files"][name]["sha256"] for name in CONTENT}) != manifest.get("model_sha256"):
        raise IntegrityError(f"{path}: the manifest's model_sha256 does not match its files")
    return manifest, contents


def load_model(path: Path) -> ModelFolder:
    """The verified model of a folder; raises IntegrityError, FileFormatError or DataError when anything does not fit."""
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no model folder at {path}")
    manifest, contents = _read_model_files(path)
    try:
        described, genes = json.loads(contents[CONFIG]), json.loads(contents[VOCABULARY])
        model = ModelFolder(
            config=TypeAdapter(ModelConfig).validate_python(described["model"]),
            weights=load_safetensors(contents[WEIGHTS]),
            vocabulary=GeneVocabulary(gene_ids=tuple(genes["gene_ids"]), namespace=genes["namespace"]),
            task=described["task"],
            max_cells=int(described["max_cells"]),
            classes=tuple(described["classes"]),
            lineage=manifest["lineage"],
            card=contents.get(CARD, b"").decode(),
            manifest=manifest,
            attachments={name: data for name, data in contents.items() if name not in (*CONTENT, CARD)},
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FileFormatError(f"{path}: not a readable model: {' '.join(str(error).split())}") from error
    if model.vocabulary.fingerprint != manifest.get("vocabulary_fingerprint") or len(model.vocabulary) != model.config.n_genes:
        raise IntegrityError(f"{path}: {VOCABULARY} is not the vocabulary the model was trained with")
    outputs = model.config.n_classes or (len(model.classes) if JUDGEMENT in model.attachments else 0)  # none: reference cells vote
    if model.task not in TASKS or len(model.classes) != outputs:
        raise FileFormatError(
            f"{path}: a {model.task} model of {len(model.classes)} classes with {model.config.n_classes} outputs; "
            f"expected {' or '.join(TASKS)}, and an output for each class"
        )
    return model


def _what_it_is(config: ModelConfig) -> dict[str, Any]:
    """The network's configuration without how it is computed: that does not change a model's identity."""
    return {name: value for name, value in identifying(config.as_dict()).items() if name not in HOW_IT_IS_COMPUTED}


def _identity(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name}:{digests[name]}\n" for name in CONTENT).encode()).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def describe(model: ModelFolder) -> dict[str, Any]:
    """What a listing or an endpoint tells about a model, JSON-ready."""
    config = asdict(model.config)
    return {
        "task": model.task,
        "classes": list(model.classes),
        "n_genes": len(model.vocabulary),
        "vocabulary_fingerprint": model.vocabulary.fingerprint,
        "max_cells": model.max_cells,
        "reads_places": model.config.reads_places,
        "model_sha256": model.model_sha256,
        "latent_width": config["latent_width"],
        "lineage": dict(model.lineage),
    }
