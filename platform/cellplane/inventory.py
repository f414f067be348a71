"""What is installed, as a CycloneDX bill of materials: for whoever has to answer which software runs here.

Everything comes from the packages' own metadata, so it works offline, in an image as in an environment. What is compiled
into wheels (CUDA, OpenBLAS, Arrow's C++) is not told apart there, and so not here.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

SPECIFICATION = "1.5"
LONGEST_LICENSE = 80  # some packages put the whole text where its name belongs
OF = "cellplane"


def inventory(distributions: Iterable[metadata.Distribution] | None = None, now: datetime | None = None) -> dict[str, Any]:
    """A CycloneDX document of these packages; of all that Python finds where none are given."""
    found = {normal(one.metadata["Name"]): one for one in reversed([*(distributions or metadata.distributions())])}
    components = {name: _component(name, one) for name, one in sorted(found.items())}
    root = components.pop(OF, None) or {"type": "application", "bom-ref": OF, "name": OF}
    plain = {
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "components": list(components.values()),
        "dependencies": [{"ref": _ref(name, one), "dependsOn": _needs(one, found)} for name, one in sorted(found.items())],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(plain, sort_keys=True))  # the same packages, the same number
    time = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    return {**plain, "serialNumber": f"urn:uuid:{serial}", "metadata": {"timestamp": time, "component": {**root, "type": "application"}}}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _ref(name: str, distribution: metadata.Distribution) -> str:
    """The package's URL in the scheme of CycloneDX and of the databases of vulnerabilities; a local version is told apart."""
    return f"pkg:pypi/{name}@{distribution.version.replace('+', '%2B')}"


def _component(name: str, distribution: metadata.Distribution) -> dict[str, Any]:
    ref = _ref(name, distribution)
    component = {"type": "library", "bom-ref": ref, "name": name, "version": distribution.version, "purl": ref}
    licenses = _licenses(distribution)
    return {**component, "licenses": licenses} if licenses else component


def _licenses(distribution: metadata.Distribution) -> list[dict[str, Any]]:
    """What the package says of its licence: an SPDX expression, else its classifiers, else a short text."""
    about = distribution.metadata
    if "License-Expression" in about:
        return [{"expression": about["License-Expression"]}]
    classified = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License :: ")]
    said = (about.get_all("License") or [""])[0].strip()
    names = classified or ([said] if said and len(said) <= LONGEST_LICENSE and "\n" not in said else [])
    return [{"license": {"name": name}} for name in dict.fromkeys(names)]


def _needs(distribution: metadata.Distribution, found: dict[str, metadata.Distribution]) -> list[str]:
    """The installed packages it asks for, extras left out."""
    asked = [text for text in distribution.requires or [] if "extra ==" not in text]
    names = {normal(re.split(r"[\s\[<>=!~;(]", text.strip(), maxsplit=1)[0]) for text in asked}
    return sorted(_ref(name, found[name]) for name in names & found.keys())
