"""The local stack: an MLflow server and a Ray head on this machine, up with one call and down with another.

Both outlive the caller; what runs where is written to CELLPLANE_HOME/stack.json, and only processes recorded there
are ever ended. MLflow listens on loopback alone. Ray asks for a token (its ports listen on every interface), which
lies beside the state, readable by its owner only. This is also the only place that connects to Ray: jobs use
``local_ray``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
from pydantic import Field, field_validator

from cellplane import haproxy
from cellplane.config import Config, home
from cellplane.errors import ConfigError, ServiceError
from cellplane.processes import (
    Member,
    end,
    http_status,
    listens,
    locked,
    port_for,
    short_temp_dir,
    spawn,
    tail,
    write_private,
)
from cellplane.tracking.runs import local_uri

logger = logging.getLogger(__name__)

MEMBERS = ("mlflow", "ray")
# Threads that spin while they wait take the cores from everybody else
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
Log = Callable[[str], None]


class StackConfig(Config):
    """What `cellplane up` starts. Port 0 means: any free one."""

    kind: Literal["cluster"] = "cluster"
    """The section's name, so that a file says what it is."""
    num_cpus: int | None = Field(None, ge=1, le=4096)
    """Cores Ray may hand out; None means all of the machine."""
    host: str = "127.0.0.1"
    """Address everything listens on and is reached at; loopback only, because MLflow has no login here."""
    mlflow_port: int = Field(5000, ge=0, le=65535)
    """MLflow's UI and API."""
    dashboard_port: int = Field(8265, ge=0, le=65535)
    """Ray's dashboard and job API."""
    ray_port: int = Field(0, ge=0, le=65535)
    """Where drivers find Ray."""
    serve_port: int = Field(8000, ge=0, le=65535)
    """Where the endpoints will listen once something is served."""
    proxy: Literal["auto", "serve", "haproxy"] = "auto"
    """What receives HTTP for the endpoints: Ray Serve's own proxy, or the HAProxy that comes with it on Linux and takes more (auto)."""
    max_requests: int = Field(48, ge=1)
    """HAProxy only: bodies let in at once; more get 503 with Retry-After at the door. `serve` has a limit of its own behind."""
    start_timeout_s: float = Field(120.0, gt=0)
    """How long `up` waits until everything answers."""

    @field_validator("host")
    @classmethod
    def _loopback(cls, host: str) -> str:
        if not host.startswith("127."):
            raise ValueError("the local stack listens on loopback only (127.0.0.1)")
        return host


@dataclass(frozen=True)
class Stack:
    """Where everything is. ``members`` maps "mlflow" and "ray" to their processes."""

    home: Path
    host: str
    mlflow_port: int
    dashboard_port: int
    ray_port: int
    serve_port: int
    temp_dir: Path
    members: Mapping[str, Member]

    @property
    def mlflow_uri(self) -> str:
        """Address of MLflow's API and UI."""
        return f"http://{self.host}:{self.mlflow_port}"

    @property
    def ray_address(self) -> str:
        """Address for drivers."""
        return f"{self.host}:{self.ray_port}"

    @property
    def dashboard_url(self) -> str:
        """Ray's dashboard; it asks for the token in ``token_path``."""
        return f"http://{self.host}:{self.dashboard_port}"

    @property
    def token_path(self) -> Path:
        """The file with Ray's token."""
        return self.home / "ray_token"

    def log_path(self, name: str) -> Path:
        """The log of a member."""
        return self.home / "logs" / f"{name}.log"

    def address(self, name: str) -> str:
        """Where a member is reached."""
        return self.mlflow_uri if name == "mlflow" else self.ray_address


@dataclass(frozen=True)
class MemberStatus:
    """A member as it is now; ``processes`` and ``rss_bytes`` include its children, 0 when it does not run."""

    name: str
    pid: int
    answers: bool
    address: str
    processes: int
    rss_bytes: int


SOON_MISSED = {  # a Serve proxy that died is replaced within seconds: 10 s and 10 s are the defaults, three of which must fail
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}


def up(config: StackConfig, folder: Path | None = None, log: Log = logger.info) -> Stack:
    """Start what does not run yet and wait until all of it answers; calling it again reuses what runs.

    Members that died are cleaned up and started anew. ``log`` receives one line per event. Raises PortInUseError
    naming the port and the option that changes it, ServiceError with the end of the log when a member dies or does
    not answer within ``start_timeout_s``; then nothing that this call started is left.
    """
    folder = (folder or home()).absolute()
    deadline = time.monotonic() + config.start_timeout_s
    with locked(folder / "stack.lock", config.start_timeout_s):
        stack = kept = _surviving(folder, config, log)
        try:
            for name in MEMBERS:
                if name not in stack.members:
                    log(f"starting {name} at {stack.address(name)}")
                    stack = replace(stack, members={**stack.members, name: _start(stack, name, config)})
                    _write_state(stack)
            for name in MEMBERS:
                _wait_until_it_answers(stack, name, deadline)
        except BaseException:
            _end_members(stack, [name for name in stack.members if name not in kept.members])
            raise
    log(f"MLflow {stack.mlflow_uri}, Ray {stack.ray_address}, its dashboard {stack.dashboard_url}")
    return stack


def down(folder: Path | None = None, log: Log = logger.info) -> bool:
    """End exactly the recorded processes and their children and remove their temp dir; False when nothing was recorded."""
    folder = (folder or home()).absolute()
    if not _state_path(folder).is_file():
        return False
    with locked(folder / "stack.lock", 60.0):
        stack = _read_state(folder)
        if stack is None:
            return False
        log(f"stopping {' and '.join(stack.members)}")
        _end_members(stack, list(stack.members))
    return True


def running(folder: Path | None = None) -> Stack | None:
    """The stack of this home when all its members live, else None."""
    stack = _read_state((folder or home()).absolute())
    return stack if stack and set(_living(stack)) == set(MEMBERS) else None


def status(folder: Path | None = None) -> list[MemberStatus]:
    """Each recorded member as it is now; empty when nothing is recorded."""
    stack = _read_state((folder or home()).absolute())
    return [] if stack is None else [_member_status(stack, name) for name in stack.members]


def _member_status(stack: Stack, name: str) -> MemberStatus:
    family = stack.members[name].family()
    rss_bytes = 0
    for process in family:
        with suppress(psutil.Error):
            rss_bytes += process.memory_info().rss
    return MemberStatus(name, stack.members[name].pid, PROBES[name](stack), stack.address(name), len(family), rss_bytes)


def connect(stack: Stack, log_to_driver: bool = False) -> None:
    """Make this process a driver of the stack's Ray; ServiceError when nobody answers there or the token is refused."""
    if not listens(stack.host, stack.ray_port):
        raise ServiceError(f"no Ray answers at {stack.ray_address}; start it: cellplane up")
    token = os.environ.get("RAY_AUTH_TOKEN") or stack.token_path.read_text(encoding="utf-8").strip()
    if http_status(stack.host, stack.dashboard_port, "/api/jobs/", token) in (401, 403):
        raise ServiceError(f"the Ray at {stack.ray_address} refused the token of {stack.token_path}; unset RAY_AUTH_TOKEN, or down and up")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(stack.token_path))
    _init_ray({"address": stack.ray_address, "log_to_driver": log_to_driver}, stack.home)


def disconnect() -> None:
    """Leave Ray; a cluster that this process merely used goes on."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


@contextmanager
def local_ray(num_cpus: int | None = None, log_to_driver: bool = True) -> Iterator[None]:
    """Ray for the duration of a block, wherever it is: every job runs inside one.

    Uses in this order what this process is connected to already, $RAY_ADDRESS, the running stack, and at last a
    cluster of its own with ``num_cpus`` cores (None = all) that ends with the block.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    temp_dir: Path | None = None
    try:
        if address := os.environ.get("RAY_ADDRESS"):
            _init_ray({"address": address, "log_to_driver": log_to_driver}, home())
        elif stack := running():
            connect(stack, log_to_driver)
        else:
            temp_dir = short_temp_dir()
            own = {"address": "local", "num_cpus": num_cpus, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
            with _temporary_files_in(temp_dir):
                _init_ray({**own, "_temp_dir": str(temp_dir), "log_to_driver": log_to_driver}, home())
        yield
    finally:
        ray.shutdown()
        if temp_dir:
            shutil.rmtree(temp_dir, ignore_errors=True)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """What processes that start in the block leave behind lies here, not where this process has its own temporary files.

    Ray's dashboard ends without removing its forkserver's socket.
    """
    tempfile.gettempdir()  # remembered by this process from now on
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def _init_ray(options: Mapping[str, object], folder: Path) -> None:
    """ray.init with our token and quiet logs; ServiceError says what to do when it fails."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(_ensure_token(folder)))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

    # read when ray was imported, perhaps before the lines above; ray.init itself refreshes them only for new clusters
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        ray.init(logging_level=logging.WARNING, **options)
    except (ConnectionError, TimeoutError, RuntimeError, ray.exceptions.RayError) as error:
        hint = "is it up, and is its token in RAY_AUTH_TOKEN_PATH? see `cellplane status`"
        raise ServiceError(f"cannot use Ray at {options['address']}: {type(error).__name__}; {hint}") from error


# what is recorded


def _state_path(folder: Path) -> Path:
    return folder / "stack.json"


def _read_state(folder: Path) -> Stack | None:
    path = _state_path(folder)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        members = {name: Member(**member) for name, member in raw["members"].items()}
        return Stack(**{**raw, "home": folder, "temp_dir": Path(raw["temp_dir"]), "members": members})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} describes no stack ({type(error).__name__}); end what it lists, then remove it") from error


def _write_state(stack: Stack) -> None:
    plain = {**asdict(stack), "home": str(stack.home), "temp_dir": str(stack.temp_dir)}
    write_private(_state_path(stack.home), json.dumps(plain, indent=1))


def _living(stack: Stack) -> dict[str, Member]:
    return {name: member for name, member in stack.members.items() if member.process()}


def _surviving(folder: Path, config: StackConfig, log: Log) -> Stack:
    """What still runs of the recorded stack; what died is cleaned up and gets ports and a temp dir anew."""
    old = _read_state(folder)
    if old is None:
        return _fresh(folder, config)
    alive = _living(old)
    if set(alive) == set(MEMBERS):
        return old
    dead = [name for name in old.members if name not in alive]
    log(f"cleaning up after {', '.join(dead) or 'an interrupted start'}")
    _end_members(old, dead)
    if not alive:
        return _fresh(folder, config)
    if "ray" in alive:
        return replace(old, members=alive, mlflow_port=port_for(config.host, config.mlflow_port, "mlflow_port"))
    return replace(_fresh(folder, config, {"mlflow_port": old.mlflow_port}), members=alive)


def _fresh(folder: Path, config: StackConfig, given: Mapping[str, int] | None = None) -> Stack:
    options = ("mlflow_port", "dashboard_port", "ray_port", "serve_port")
    ports = {option: port_for(config.host, getattr(config, option), option) for option in options if option not in (given or {})}
    _ensure_token(folder)
    return Stack(home=folder, host=config.host, temp_dir=short_temp_dir(), members={}, **ports, **(given or {}))


def _ensure_token(folder: Path) -> Path:
    path = folder / "ray_token"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        write_private(path, secrets.token_hex(32))
    path.chmod(0o600)
    return path


def _end_members(stack: Stack, names: list[str]) -> None:
    """End these members and forget them; with the last one the state goes too, with Ray its temp dir."""
    end([stack.members[name] for name in names])
    left = {name: member for name, member in stack.members.items() if name not in names}
    if "ray" not in left:
        shutil.rmtree(stack.temp_dir, ignore_errors=True)
    if left:
        _write_state(replace(stack, members=left))
    else:
        _state_path(stack.home).unlink(missing_ok=True)


# what is started


def _start(stack: Stack, name: str, config: StackConfig) -> Member:
    command, environment = COMMANDS[name](stack, config)
    return spawn(command, stack.home, {**QUIET_THREADS, **environment}, stack.log_path(name))


def _mlflow_command(stack: Stack, config: StackConfig) -> tuple[list[str], dict[str, str]]:
    """A server on the database and artifact folder that runs without a server use too, so that either reads the other's."""
    artifacts = (stack.home / "artifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--host", config.host, "--port", str(stack.mlflow_port), "--workers", "1"]
    command += ["--backend-store-uri", local_uri(stack.home)]
    command += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    # without job execution: 2 processes and 5 s to start instead of 10 and 17 s
    return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _ray_command(stack: Stack, config: StackConfig) -> tuple[list[str], dict[str, str]]:
    options = {
        "port": stack.ray_port,
        "node-ip-address": config.host,
        "num-cpus": config.num_cpus or os.cpu_count() or 1,
        "temp-dir": stack.temp_dir,
        "include-dashboard": "true",
        "dashboard-host": config.host,
        "dashboard-port": stack.dashboard_port,
        # fixed by default, which would allow one stack per machine
        "dashboard-agent-listen-port": port_for(config.host, 0, "dashboard_port"),
        "ray-client-server-port": port_for(config.host, 0, "ray_port"),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(stack.token_path)}
    environment |= {"PYTHONPATH": _python_path(), "CELLPLANE_HOME": str(stack.home), "MLFLOW_TRACKING_URI": stack.mlflow_uri}
    environment |= {name: os.environ.get(name, value) for name, value in SOON_MISSED.items()}
    if config.proxy == "haproxy" or (config.proxy == "auto" and haproxy.is_there()):
        free_port = partial(port_for, config.host, 0, "serve_port")
        environment |= haproxy.environment(stack.temp_dir / "haproxy", config.host, config.max_requests, free_port)
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )  # `python` of submitted jobs
    return command + [f"--{name}={value}" for name, value in options.items()], environment


def _python_path() -> str:
    """Makes workers import this very code from a checkout; an installed package is found anyway."""
    source = Path(__file__).resolve().parents[1]
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = [] if str(source) == sysconfig.get_paths()["purelib"] else [str(source), str(source.parent)]
    return os.pathsep.join(dict.fromkeys([*ours, *inherited]))


def _wait_until_it_answers(stack: Stack, name: str, deadline: float) -> None:
    while not PROBES[name](stack):
        log_path = stack.log_path(name)
        if stack.members[name].process() is None:
            raise ServiceError(f"{name} ended while starting; the end of {log_path}:\n{tail(log_path)}")
        if time.monotonic() > deadline:
            advice = "raise start_timeout_s, or run `cellplane down` first"
            raise ServiceError(f"{name} did not answer at {stack.address(name)} in time; {advice}; {log_path} ends:\n{tail(log_path)}")
        time.sleep(0.1)


def _mlflow_answers(stack: Stack) -> bool:
    return http_status(stack.host, stack.mlflow_port, "/health") == 200


def _ray_answers(stack: Stack) -> bool:
    """Ray writes its address once the node is registered; the dashboard comes up a little later."""
    if not (stack.temp_dir / "ray_current_cluster").is_file() or not listens(stack.host, stack.ray_port):
        return False
    return http_status(stack.host, stack.dashboard_port, "/api/version") != 0


COMMANDS: dict[str, Callable[[Stack, StackConfig], tuple[list[str], dict[str, str]]]] = {"mlflow": _mlflow_command, "ray": _ray_command}
PROBES: dict[str, Callable[[Stack], bool]] = {"mlflow": _mlflow_answers, "ray": _ray_answers}
