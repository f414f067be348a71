"""What `cellplane doctor` looks at: whether this machine can run the platform, and how to mend what is in the way.

Nothing heavy is imported: versions come from the installed packages' metadata, everything else from the system.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from cellplane.cluster import StackConfig, running
from cellplane.config import home
from cellplane.errors import CellplaneError
from cellplane.processes import listener, listens
from cellplane.tracking.runs import resolve_uri, shown

GIB = 1024**3
MIN_CORES = 2  # one worker and the rest
MIN_MEMORY_BYTES = 6 * GIB  # MLflow 0.5, Ray about 1.5, two training workers about 1 each, a replica
MIN_DISK_BYTES = 5 * GIB  # the demo leaves well under one; Ray refuses to spill when the disk is 95 % full
MIN_SHM_BYTES = 1 * GIB  # below this Ray falls back to files in its temp dir, which are slow
OPENMP_POLICY = "OMP_WAIT_POLICY"
TOKEN_FILES = ("RAY_AUTH_TOKEN_PATH", "CELLPLANE_API_KEYS_FILE")
TOKENS_IN_ENVIRONMENT = ("RAY_AUTH_TOKEN",)


@dataclass(frozen=True)
class Check:
    """One line of the report; ``fix`` says what to do and is empty when ``ok``."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """Every check, in the order a newcomer should mend them. Changes nothing but a probe file in CELLPLANE_HOME."""
    return [check for look in LOOKS for check in look()]


def _python() -> list[Check]:
    found = platform.python_version()
    return [_check("python", sys.version_info >= (3, 11), found, "install Python 3.11 or later and make a new environment with it")]


def _packages() -> list[Check]:
    """The installed versions against the ranges the package itself declares."""
    try:
        declared = metadata.requires("cellplane") or []
    except metadata.PackageNotFoundError:
        return [_check("cellplane", False, "not installed", "pip install -e . in the checkout")]
    return [_package(requirement) for requirement in declared if "extra ==" not in requirement]


def _package(requirement: str) -> Check:
    match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
    name, ranges = (match[1], match[2].strip()) if match else (requirement, "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _check(name, False, "not installed", f"pip install '{name}{ranges}'")
    return _check(name, _fits(version, ranges), f"{version} (needs {ranges or 'any'})", f"pip install '{name}{ranges}'")


def _fits(version: str, ranges: str) -> bool:
    """True when the release numbers satisfy every >=, < and == of the range."""
    have = _numbers(version)
    for operator, wanted in re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9A-Za-z.]*)", ranges):
        if not COMPARE[operator](have, _numbers(wanted)):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu": the release, padded so that 3 and 3.0 are equal."""
    release = re.match(r"[0-9.]*", version)
    numbers = [int(part) for part in (release[0] if release else "").split(".") if part]
    return tuple([*numbers, 0, 0, 0, 0][:4])


COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda have, wanted: have >= wanted,
    "<=": lambda have, wanted: have <= wanted,
    "==": lambda have, wanted: have == wanted,
    "<": lambda have, wanted: have < wanted,
    ">": lambda have, wanted: have > wanted,
}


def _cores() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [_check("cores", cores >= MIN_CORES, f"{cores}", f"{MIN_CORES} are needed for two workers; train with one: -o workers.count=1")]


def _memory() -> list[Check]:
    free = psutil.virtual_memory().available
    fix = f"{_gib(MIN_MEMORY_BYTES)} free are comfortable; end other programs or train with one worker"
    return [_check("memory", free >= MIN_MEMORY_BYTES, f"{_gib(free)} free of {_gib(psutil.virtual_memory().total)}", fix)]


def _home() -> list[Check]:
    folder = home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = _can_write(existing)
    free = shutil.disk_usage(existing).free
    return [
        _check("home", writable, str(folder), "set CELLPLANE_HOME to a folder you may write to"),
        _check("disk", free >= MIN_DISK_BYTES, f"{_gib(free)} free at {existing}", "free some, or set CELLPLANE_HOME to another disk"),
    ]


def _can_write(folder: Path) -> bool:
    """By doing it: permission bits say nothing about read-only and full disks."""
    probe = folder / f".cellplane-doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError:
        return False
    return True


def _shared_memory() -> list[Check]:
    if not os.path.isdir("/dev/shm"):
        return []
    size = shutil.disk_usage("/dev/shm").total
    return [_check("shared memory", size >= MIN_SHM_BYTES, f"{_gib(size)} at /dev/shm", "in a container start it with --shm-size=2g")]


def _temp_dir() -> list[Check]:
    fix = "point TMPDIR to a folder with free space that you may write to"
    path = next((path for path in (os.environ.get("TMPDIR"), "/tmp") if path and os.path.isdir(path)), os.getcwd())
    free = shutil.disk_usage(path).free
    return [_check("temp dir", _can_write(Path(path)) and free >= GIB, f"{_gib(free)} free at {path}", fix)]


def _ports() -> list[Check]:
    """The default ports, unless it is our own stack that holds them."""
    config = StackConfig()
    try:
        if running():
            return [_check("ports", True, "held by the running stack", "")]
    except CellplaneError as error:
        return [_check("ports", False, "unknown", str(error))]
    checks = []
    for option in ("mlflow_port", "dashboard_port", "serve_port"):
        port = getattr(config, option)
        busy = listens(config.host, port)
        fix = f"end it if it is yours, or: cellplane up -o {option}=0 takes a free one"
        checks.append(_check(f"port {port}", not busy, f"used by {listener(port)}" if busy else "free", fix))
    return checks


def _tracker() -> list[Check]:
    try:
        address = resolve_uri()
    except CellplaneError as error:
        return [_check("tracker", False, os.environ.get("MLFLOW_TRACKING_URI", ""), str(error))]
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return [_check("tracker", True, shown(address))]
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answers = parts.hostname is not None and listens(parts.hostname, port)
    fix = "start it (cellplane up), or unset MLFLOW_TRACKING_URI to use the local file"
    return [_check("tracker", answers, f"{shown(address)} {'answers' if answers else 'does not answer'}", fix)]


def _threads() -> list[Check]:
    """Spinning OpenMP threads made a small matrix product 100 times slower on shared cores."""
    found = os.environ.get(OPENMP_POLICY, "unset")
    ok = found.lower() == "passive" and os.environ.get("GOMP_SPINCOUNT") == "0"
    fix = f"export {OPENMP_POLICY}=passive GOMP_SPINCOUNT=0, or import cellplane before torch"
    return [_check("threads", ok, f"{OPENMP_POLICY}={found}", fix)]


def _gpus() -> list[Check]:
    """NVIDIA cards by their driver's own list, and whether the installed torch can use them."""
    drivers = Path("/proc/driver/nvidia/gpus")
    cards = len(list(drivers.iterdir())) if drivers.is_dir() else 0
    if not cards:
        return [_check("gpus", True, "none; the CPU computes")]
    built = _installed("torch")
    fix = "install the CUDA build of the torch version in requirements.lock"
    return [_check("gpus", "+cpu" not in built, f"{cards}; torch {built or 'is not installed'}", fix)]


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _tokens() -> list[Check]:
    """Every file that lets its reader in: the local stack's token, and those that the environment names."""
    named = [os.environ[variable] for variable in TOKEN_FILES if os.environ.get(variable)]
    paths = dict.fromkeys([*(path for path in [home() / "ray_token"] if path.exists()), *(Path(name).expanduser() for name in named)])
    checks = [_token(path) for path in paths]
    if (open_ones := [name for name in TOKENS_IN_ENVIRONMENT if os.environ.get(name)]) and not named:
        found = f"{', '.join(open_ones)}: children and crash reports see it"
        checks.append(_check("token in environment", True, f"{found}; a file of mode 600 is safer ({TOKEN_FILES[0]})"))
    return checks or [_check("tokens", True, "none yet; `cellplane up` makes one")]


def _token(path: Path) -> Check:
    name = f"token {path.name}"
    if not path.is_file():
        return _check(name, False, f"{path} is not there", f"put the cluster's token there, or unset {' and '.join(TOKEN_FILES)}")
    mode = path.stat().st_mode & 0o777
    if not os.access(path, os.R_OK) or not path.stat().st_size:
        return _check(name, False, f"{path} is empty or not readable", "put the cluster's token there, readable for you alone")
    return _check(name, not mode & 0o077, f"{path} has mode {mode:o}", f"others can read it: chmod 600 {path}")


def _cluster() -> list[Check]:
    """The Ray cluster that the environment names, by its head's port; without one the local stack is used."""
    address = next((os.environ[name] for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if os.environ.get(name)), "")
    parts = urlsplit(address if "//" in address else f"ray://{address}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if address in ("", "auto", "local"):
        return [_check("cluster", True, f"RAY_ADDRESS={address}" if address else "none named; jobs run on this machine")]
    if parts.hostname is None or port is None:
        return [_check("cluster", False, address, "RAY_ADDRESS is host:port of the cluster's head, e.g. 10.0.0.4:6379")]
    answers = listens(parts.hostname, port)
    fix = "start the cluster's head, open the port to this machine, or unset RAY_ADDRESS to work locally"
    return [_check("cluster", answers, f"{address} {'answers' if answers else 'does not answer'}", fix)]


def _gene_tables() -> list[Check]:
    """Which species' names can be translated; without tables data must name genes as the model does, which is no fault."""
    from cellplane.data.gene_tables import table_manifests

    try:
        tables = table_manifests()
    except CellplaneError as error:
        return [_check("gene tables", False, "damaged", str(error))]
    found = ", ".join(f"{table['species']} ({table['genes']} genes)" for table in tables)
    return [_check("gene tables", True, found or "none; symbols and Ensembl ids are translated after `cellplane data genes install`")]


def _check(name: str, ok: bool, found: str, fix: str = "") -> Check:
    return Check(name, ok, found, "" if ok else fix)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


LOOKS: tuple[Callable[[], list[Check]], ...] = (
    _python,
    _packages,
    _cores,
    _memory,
    _home,
    _temp_dir,
    _shared_memory,
    _threads,
    _gpus,
    _ports,
    _tokens,
    _cluster,
    _tracker,
    _gene_tables,
)
