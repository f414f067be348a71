"""The bill of materials names every installed package once, with versions, licences and who needs whom."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

from cellplane.cli.main import main
from cellplane.inventory import inventory, normal
from tests.house.source import ROOT

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
INSTALLED = list(metadata.distributions())
FOUND = inventory(INSTALLED, NOW)


def test_it_has_the_shape_of_cyclonedx() -> None:
    assert (FOUND["bomFormat"], FOUND["specVersion"], FOUND["version"]) == ("CycloneDX", "1.5", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", FOUND["serialNumber"])
    assert FOUND["metadata"]["timestamp"] == "2026-01-02T03:04:05+00:00"
    assert FOUND["metadata"]["component"]["name"] == "cellplane"
    for component in FOUND["components"]:
        assert component["type"] == "library"
        assert component["purl"] == component["bom-ref"]
        assert re.fullmatch(r"pkg:pypi/[a-z0-9-]+@[A-Za-z0-9.!%-]+", component["purl"])


def test_every_installed_package_is_there_once_with_its_version() -> None:
    listed = {component["name"]: component["version"] for component in FOUND["components"]}
    assert len(listed) == len(FOUND["components"])
    installed = {normal(one.metadata["Name"]) for one in INSTALLED} - {"cellplane"}
    assert set(listed) == installed
    assert listed["torch"] == metadata.version("torch")


def test_what_the_project_is_made_of_is_what_it_depends_on() -> None:
    needs = {entry["ref"]: entry["dependsOn"] for entry in FOUND["dependencies"]}
    (root,) = [ref for ref in needs if ref.startswith("pkg:pypi/cellplane@")]
    names = {ref.partition("@")[0].removeprefix("pkg:pypi/") for ref in needs[root]}
    assert {"torch", "ray", "deepspeed", "mlflow", "anndata", "pyarrow"} <= names
    assert "pytest" not in names, "extras are not what the product needs"
    known = {component["bom-ref"] for component in FOUND["components"]} | {root}
    assert {ref for refs in needs.values() for ref in refs} | set(needs) <= known


def test_most_packages_say_their_licence_and_none_a_whole_text() -> None:
    licensed = [component for component in FOUND["components"] if "licenses" in component]
    assert len(licensed) > 0.9 * len(FOUND["components"])
    texts = [next(iter(entry.values())) for component in licensed for entry in component["licenses"]]
    names = [text if isinstance(text, str) else text["name"] for text in texts]
    assert not [name for name in names if "\n" in name or len(name) > 200]


def test_the_same_packages_have_the_same_number() -> None:
    again = inventory(INSTALLED)
    assert again["serialNumber"] == FOUND["serialNumber"]
    assert again["serialNumber"] != inventory([metadata.distribution("numpy")])["serialNumber"]


def test_the_command_writes_it(tmp_path: Path) -> None:
    assert main(["inventory", "--out", str(tmp_path / "deep" / "sbom.json")]) == 0
    written = json.loads((tmp_path / "deep" / "sbom.json").read_text())
    assert {"torch", "ray", "mlflow"} <= {component["name"] for component in written["components"]}
    (tmp_path / "file").write_text("")
    assert main(["inventory", "--out", str(tmp_path / "file" / "sbom.json")]) == 1


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/threat-model.md"])
def test_what_pages_on_security_point_to_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for place in re.findall(r"`((?:tests|configs|serve|platform|docs)/[A-Za-z0-9_./-]+)`", text):
        assert (ROOT / place).exists(), place
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
