"""`cellplane k8s render` prints manifests for kubectl, or writes them."""

from __future__ import annotations

import yaml


def test_manifests_are_printed_with_the_values_given(run):
    said = run("k8s", "render", "base", "network", "--set", "namespace=cells")
    assert said.code == 0
    objects = list(yaml.safe_load_all(said.out))
    assert objects[0]["metadata"]["name"] == "cells"
    assert {o["metadata"].get("namespace", "cells") for o in objects} == {"cells"}


def test_manifests_are_written_to_a_folder(run, tmp_path):
    said = run("k8s", "render", "--out", tmp_path / "manifests", "--json")
    assert said.code == 0
    written = {path.stem: path for path in (tmp_path / "manifests").iterdir()}
    assert said.json == {name: str(path) for name, path in written.items()}
    assert all("${" not in path.read_text(encoding="utf-8") for path in written.values())


def test_a_wrong_value_and_a_wrong_name_end_as_usage_errors(run):
    wrong = run("k8s", "render", "--set", "namespase=cells")
    assert wrong.code == 2
    assert "did you mean 'namespace'" in wrong.err
    assert run("k8s", "render", "no-such").code == 2


def test_a_folder_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / "file").write_text("")
    said = run("k8s", "render", "--out", tmp_path / "file")
    assert said.code == 1
    assert "cannot write manifests" in said.err
