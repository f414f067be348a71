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
    "loaders": (("torch==2.13.0",), ("torch==2.13.0", "scdataset==0.3.0", "bionemo-scdl==0.1.3")),
    "annbatch": (("annbatch==0.3.1", "zarrs==0.2.3", "h5py"),),  # hands out scipy's CSR, so needs no torch
}
PYTHONS = {"annbatch": "3.12"}  # the oldest that a package accepts, where ours may be older


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
    _run([_interpreter(name), "-m", "venv", str(folder)])
    index = os.environ.get("TORCH_INDEX")
    for number, packages in enumerate(ENVIRONMENTS[name]):
        chosen = ["--index-url", index] if index and number == 0 and packages[0].startswith("torch") else []
        _run([str(_python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *chosen, *packages])
    (folder / ".installed").write_text(_recipe(name))
    return _python(name)


def installed(name: str) -> Path | None:
    """The Python of an environment that is there, complete and as ENVIRONMENTS says now; else None."""
    done = _folder(name) / ".installed"
    return _python(name) if done.is_file() and done.read_text() == _recipe(name) else None


def _interpreter(name: str) -> str:
    """The Python that an environment is made with: our own unless a package needs a newer one."""
    needed = PYTHONS.get(name)
    if needed is None or sys.version_info[:2] >= tuple(map(int, needed.split("."))):
        return sys.executable
    places = [shutil.which(f"python{needed}"), *Path.home().glob(f".pyenv/versions/{needed}*/bin/python{needed}")]
    for place in filter(None, places):  # one that is there may still be a stand-in that does not run
        if subprocess.run([str(place), "--version"], capture_output=True, check=False).returncode == 0:
            return str(place)
    raise BenchmarkError(f"{name} needs Python {needed}, this is {sys.version.split()[0]}; install python{needed} and put it on the PATH")


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
