"""Environments of other packages, made once under $CELLPLANE_HOME/cache so that they cannot disturb our own."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cellplane.config import home
from cellplane.errors import BenchmarkError

log = logging.getLogger(__name__)

# Installed in this order; the first line of each is torch, in the version we measure ourselves with.
ENVIRONMENTS: Mapping[str, Sequence[Sequence[str]]] = {
    "original": (
        ("torch==2.13.0",),
        ("--no-deps", "cellplm==0.1.0.post2"),
        ("einops", "torchmetrics", "hdf5plugin", "mygene", "anndata==0.12.19", "scanpy", "scikit-learn"),
    ),
    # torch is named again so that nothing replaces it; scvi-tools 1.4.3 and later need Python 3.12
    "peers": (("torch==2.13.0",), ("torch==2.13.0", "transformers==5.14.1", "scvi-tools==1.4.2")),
}


def environment(name: str) -> Path:
    """The Python of an environment; made when it is not there yet. Raises BenchmarkError with pip's last line when it cannot be.

    $TORCH_INDEX, as for `make venv`, is the index that torch comes from: elsewhere than here pip's own choice has CUDA in it.
    """
    found = installed(name)
    if found is not None:
        return found
    folder = _folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    log.info("making the environment of %s (a minute or two)", name)
    _run([sys.executable, "-m", "venv", str(folder)])
    index = os.environ.get("TORCH_INDEX")
    for number, packages in enumerate(ENVIRONMENTS[name]):
        chosen = ["--index-url", index] if index and number == 0 else []
        _run([str(_python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *chosen, *packages])
    (folder / ".installed").write_text(_recipe(name))
    return _python(name)


def installed(name: str) -> Path | None:
    """The Python of an environment that is there, complete and as ENVIRONMENTS says now; else None."""
    done = _folder(name) / ".installed"
    return _python(name) if done.is_file() and done.read_text() == _recipe(name) else None


def _folder(name: str) -> Path:
    return home() / "cache" / "environments" / name


def _python(name: str) -> Path:
    return _folder(name) / "bin" / "python"


def _recipe(name: str) -> str:
    return "\n".join(" ".join(line) for line in ENVIRONMENTS[name])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchmarkError(f"the environment could not be made: {' '.join(command[1:])}: {last}")
