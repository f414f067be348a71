"""The model folder: whole or absent, every bit vouched for, and nothing in it that could run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane import inference
from cellplane.artifact import folder
from cellplane.artifact.folder import describe, load_model, save_model, sealed, verify_model, write_folder
from cellplane.errors import DataError, FileFormatError, IntegrityError, StorageError
from tests.tiny import ANNOTATOR, TINY, tiny_folder

FILES = ("README.md", "config.json", "manifest.json", "vocabulary.json", "weights.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_folder(), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def forge(path: Path, changes: dict[str, object], files: dict[str, bytes] | None = None) -> None:
    """What somebody could write who knows the format: files replaced, all checksums made right again."""
    manifest = json.loads((path / "manifest.json").read_bytes()) | changes
    manifest.pop("manifest_sha256")
    for name, data in (files or {}).items():
        (path / name).write_bytes(data)
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = "".join(f"{name}:{manifest['files'].get(name, {}).get('sha256')}\n" for name in folder.CONTENT)
    manifest["model_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    (path / "manifest.json").write_bytes(sealed(manifest))


def edited(path: Path, name: str, change: Callable[[dict], None]) -> dict[str, bytes]:
    content = json.loads((path / name).read_bytes())
    change(content)
    return {name: json.dumps(content).encode()}


@pytest.mark.parametrize(
    "config", [ANNOTATOR, TINY, replace(TINY, latent="vae", n_batches=2, positions="continuous")], ids=["head", "gmvae", "vae"]
)
def test_what_is_saved_is_what_is_loaded(config, tmp_path):
    model = tiny_folder(config)
    again = load_model(save_model(model, tmp_path / "model"))
    assert replace(again, weights={}, manifest={}) == replace(model, weights={})
    assert again.weights.keys() == model.weights.keys()
    assert all(torch.equal(again.weights[name], model.weights[name]) for name in model.weights)


def test_the_folder_holds_the_listed_files_and_none_is_a_pickle(saved):
    assert tuple(sorted(path.name for path in saved.iterdir())) == FILES
    for path in saved.iterdir():
        start = path.read_bytes()[:4]
        assert not start.startswith((b"\x80", b"PK", b"\x1f\x8b")), f"{path.name} looks like a pickle or an archive"


def test_the_manifest_tells_what_the_model_is(saved):
    manifest, model = verify_model(saved), load_model(saved)
    assert manifest["kind"] == "cellplane-model"
    assert manifest["format_version"] == folder.FORMAT_VERSION == 1
    assert manifest["vocabulary_fingerprint"] == model.vocabulary.fingerprint
    assert model.model_sha256 == manifest["model_sha256"]
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert set(folder.TASKS) == set(inference.TASKS)


def test_the_description_is_ready_for_json(saved):
    described = json.loads(json.dumps(describe(load_model(saved))))
    assert described["classes"] == ["B", "NK", "T"]
    assert described["n_genes"] == 24


def test_the_identity_does_not_depend_on_the_card_the_lineage_or_the_time(saved, tmp_path, monkeypatch):
    model = load_model(saved)
    monkeypatch.setattr(folder, "datetime", Later)
    other = load_model(save_model(replace(model, card="# Another", lineage={"run_id": "other"}), tmp_path / "other"))
    assert other.manifest["created_at"] != model.manifest["created_at"]
    assert other.model_sha256 == model.model_sha256


class Later:
    @staticmethod
    def now(zone: object) -> Later:
        return Later()

    def isoformat(self, timespec: str) -> str:
        return "2099-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_cells": 9},
        {"classes": ("B", "T", "NK")},
        {"weights": tiny_folder(seed=1).weights},
        {"config": replace(ANNOTATOR, dropout=0.1)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_identity_depends_on_everything_that_changes_an_answer(saved, tmp_path, changes):
    other = load_model(save_model(replace(tiny_folder(), **changes), tmp_path / "other"))
    assert other.model_sha256 != load_model(saved).model_sha256


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unseen(copy, name):
    rng = np.random.default_rng(len(name))
    whole = (copy / name).read_bytes()
    for _ in range(40):  # of five files: two hundred
        position, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        (copy / name).write_bytes(flipped)
        with pytest.raises(DataError, match=name):
            verify_model(copy)
        with pytest.raises(DataError, match=name):
            load_model(copy)
    (copy / name).write_bytes(whole)
    verify_model(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(copy, name, kept):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=name):
        load_model(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(DataError, match=name):
        load_model(copy)


@pytest.mark.parametrize("name", ["more.safetensors", "more.json"])
def test_a_file_too_many_of_a_kind_that_is_read_is_named(copy, name):
    (copy / name).write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=name):
        load_model(copy)


def test_a_file_that_nobody_reads_does_no_harm(copy):
    (copy / ".DS_Store").write_bytes(b"x")
    (copy / "registered_model_meta").write_bytes(b"x")
    load_model(copy)


def test_the_file_of_another_model_is_named(copy, tmp_path):
    other = save_model(tiny_folder(seed=1), tmp_path / "other")
    shutil.copy(other / "weights.safetensors", copy)
    with pytest.raises(IntegrityError, match=r"weights\.safetensors is damaged"):
        load_model(copy)


def test_swapped_files_are_named(copy):
    (copy / "config.json").rename(copy / "x")
    (copy / "vocabulary.json").rename(copy / "config.json")
    (copy / "x").rename(copy / "vocabulary.json")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        load_model(copy)


def test_a_link_in_the_place_of_a_file_is_refused(copy, tmp_path):
    (copy / "config.json").rename(tmp_path / "config.json")
    (copy / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        load_model(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/secret", "..", ".", ""])
def test_a_manifest_cannot_point_outside_its_folder(copy, name):
    (copy.parent / "secret").write_bytes(b"secret")
    (copy / "sub").mkdir()
    (copy / "sub" / "secret").write_bytes(b"secret")
    files = json.loads((copy / "manifest.json").read_bytes())["files"]
    forge(copy, {"files": files | {name: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}})
    with pytest.raises(IntegrityError) as caught:
        load_model(copy)
    assert "secret" not in str(caught.value).replace(repr(name), "")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"format_version": 2}, FileFormatError, "format 2, this cellplane reads up to 1; upgrade"),
        ({"kind": "cellplane-checkpoint"}, FileFormatError, "describes a cellplane-checkpoint, expected a cellplane-model"),
        ({"format_version": "1"}, FileFormatError, "damaged"),
        ({"files": []}, FileFormatError, "damaged"),
        ({"vocabulary_fingerprint": "0" * 64}, IntegrityError, "not the vocabulary the model was trained with"),
    ],
    ids=["newer", "another kind", "text as version", "no table", "another vocabulary"],
)
def test_a_manifest_of_something_else_is_refused(copy, changes, error, says):
    if isinstance(changes.get("files"), list):
        manifest = json.loads((copy / "manifest.json").read_bytes()) | changes
        (copy / "manifest.json").write_bytes(sealed(manifest))
    else:
        forge(copy, changes)
    with pytest.raises(error, match=says):
        load_model(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"kind": "cellplane-model"}'])
def test_a_manifest_that_is_none_is_a_format_error(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"manifest\.json is damaged"):
        verify_model(copy)


@pytest.mark.parametrize("entry", [3, {}, {"bytes": 3}, {"bytes": "x", "sha256": 0}, None])
def test_a_manifest_with_a_broken_entry_is_refused(copy, entry):
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["files"]["README.md"] = entry
    manifest.pop("manifest_sha256")
    (copy / "manifest.json").write_bytes(sealed(manifest))
    with pytest.raises(DataError, match="README"):
        load_model(copy)


def test_an_edited_manifest_is_refused_even_where_it_only_tells(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"run_id": "abc"', '"run_id": "abd"'))
    with pytest.raises(IntegrityError, match=r"manifest\.json was changed"):
        load_model(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda config: config["model"].update(widht=3)),
        ("config.json", lambda config: config["model"].update(attention="all")),
        ("config.json", lambda config: config["model"].update(width="wide")),
        ("config.json", lambda config: config["model"].update(n_heads=0)),
        ("config.json", lambda config: config.pop("model")),
        ("config.json", lambda config: config.pop("max_cells")),
        ("config.json", lambda config: config.update(task="dance")),
        ("config.json", lambda config: config.update(classes=["B"])),
        ("vocabulary.json", lambda genes: genes.pop("gene_ids")),
        ("vocabulary.json", lambda genes: genes.update(gene_ids=["A", "A"])),
        ("vocabulary.json", lambda genes: genes.update(gene_ids=genes["gene_ids"][::-1])),
    ],
)
def test_a_forged_folder_is_refused_though_its_checksums_fit(copy, name, change):
    forge(copy, {}, edited(copy, name, change))
    with pytest.raises(DataError, match=str(copy)):
        load_model(copy)


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"\xff" * 100, b'\x08\0\0\0\0\0\0\0{"a": 1}'])
def test_forged_weights_are_refused_though_their_checksum_fits(copy, data):
    forge(copy, {}, {"weights.safetensors": data})
    with pytest.raises(FileFormatError, match="not a readable model"):
        load_model(copy)


def test_a_manifest_must_list_what_the_model_is_made_of(copy):
    files = json.loads((copy / "manifest.json").read_bytes())["files"]
    del files["weights.safetensors"]
    (copy / "weights.safetensors").unlink()
    forge(copy, {"files": files})
    with pytest.raises(IntegrityError, match=r"does not list weights\.safetensors"):
        load_model(copy)


def test_no_folder_and_an_empty_folder_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no model folder at"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileFormatError, match=r"has no manifest\.json"):
        load_model(tmp_path)


def test_saving_replaces_an_older_model_and_leaves_nothing_else(tmp_path):
    path = save_model(tiny_folder(), tmp_path / "model")
    save_model(tiny_folder(seed=1), path)
    assert torch.equal(load_model(path).weights["head.linear.weight"], tiny_folder(seed=1).weights["head.linear.weight"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_saving_works_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    path = save_model(tiny_folder(), tmp_path / "model")
    identity = load_model(save_model(tiny_folder(seed=1), path)).model_sha256
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, target: refuse() if Path(target) == path and not self.name.endswith(".old") else rename(self, target)
    )
    with pytest.raises(StorageError, match="no such luck"):
        save_model(tiny_folder(), path)
    assert load_model(path).model_sha256 == identity
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def refuse() -> None:
    raise OSError("no such luck")


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path):
    save_model(tiny_folder(), tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    identity = load_model(save_model(tiny_folder(seed=1), tmp_path / "link")).model_sha256
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "model").model_sha256 == identity
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "model"]


SOMETHING_ELSE = {
    "a folder of somebody else's": {"thesis.txt": "precious"},
    "a folder of shards": {"manifest.json": '{"format_version": 1}', "shard-0.arrow": "precious"},
    "a checkpoint": {"manifest.json": '{"kind": "cellplane-checkpoint"}', "optimizer.safetensors": "precious"},
}


@pytest.mark.parametrize("kind", SOMETHING_ELSE)
def test_what_is_not_a_model_is_never_replaced(tmp_path, kind):
    path = tmp_path / "results"
    path.mkdir()
    for name, text in SOMETHING_ELSE[kind].items():
        (path / name).write_text(text)
    with pytest.raises(StorageError, match="holds something else"):
        save_model(tiny_folder(), path)
    assert {file.name: file.read_text() for file in path.iterdir()} == SOMETHING_ELSE[kind]
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "results").write_text("precious")
    with pytest.raises(StorageError, match="holds something else"):
        save_model(tiny_folder(), tmp_path / "results")
    assert (tmp_path / "results").read_text() == "precious"


def test_an_empty_or_damaged_folder_of_ours_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    path = save_model(tiny_folder(), tmp_path / "model")
    (path / "manifest.json").unlink()
    load_model(save_model(tiny_folder(), path))
    (path / "notes.txt").write_text("a model with somebody's notes in it is still a model")
    load_model(save_model(tiny_folder(), path))


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .* bytes are free"):
        save_model(tiny_folder(), tmp_path / "file" / "model")


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from cellplane.artifact import folder
from cellplane.errors import StorageError

mode, target, *others = sys.argv[1], *map(Path, sys.argv[2:])
new = {"a.bin": b"new" * 1000, "b.bin": b"new" * 9000, "manifest.json": b"new"}


def killed_at(module, name, visit):
    original, visits = getattr(module, name), []

    def visited(*given):
        visits.append(name)
        if len(visits) == visit:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    setattr(module, name, visited)


def in_a_fork(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(module, name, visit):
    killed_at(module, name, visit)
    folder.write_folder(target, new)


def fill(target):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        folder.write_folder(target, new)
    except StorageError as error:
        os._exit(0 if "bytes are free there" in str(error) else 1)
    os._exit(2)


if mode == "kill":
    points = [(os, "fsync", 1), (os, "fsync", 2), (os, "fsync", 3), (folder, "_put", 1), (folder, "_exchange", 1)]
    print([in_a_fork(lambda: kill(*point)) for point in points])
else:
    print([in_a_fork(lambda: fill(path)) for path in (target, *others)])
"""


def child(mode: str, *targets: Path) -> str:
    done = subprocess.run([sys.executable, "-c", CHILD, mode, *map(str, targets)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


OLD = {"a.bin": b"old", "manifest.json": b"old"}


def test_a_kill_at_any_point_leaves_the_older_folder_whole(tmp_path):
    write_folder(tmp_path / "model", OLD)
    assert child("kill", tmp_path / "model") == str([-9] * 5)
    assert content(tmp_path / "model") == OLD


def test_a_full_disk_is_a_storage_error_that_leaves_nothing_new(tmp_path):
    write_folder(tmp_path / "old", OLD)
    assert child("fill", tmp_path / "old", tmp_path / "new") == "[0, 0]"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert content(tmp_path / "old") == OLD


def test_a_reader_sees_the_old_or_the_new_folder_at_any_time(tmp_path):
    """A writer replaces a model again and again; the name is always there."""
    if not folder._exchange(*_pair(tmp_path)):
        pytest.skip("this file system cannot exchange two names at once")
    path = save_model(tiny_folder(), tmp_path / "model")
    files = {name: (path / name).read_bytes() for name in FILES}
    writer = threading.Thread(target=lambda: [write_folder(path, files) for _ in range(40)])
    writer.start()
    while writer.is_alive():
        assert path.is_dir()
        verify_patiently(path)
    writer.join()


def _pair(folder_path: Path) -> tuple[Path, Path]:
    pair = folder_path / "one", folder_path / "two"
    for path in pair:
        path.mkdir()
    return pair


def verify_patiently(path: Path) -> None:
    """A reader whose files were replaced under its hands may read again."""
    for attempt in range(5):
        try:
            verify_model(path)
            return
        except (OSError, DataError):
            if attempt == 4:
                raise


def test_a_model_has_no_identity_before_it_was_saved():
    assert tiny_folder().model_sha256 == ""
