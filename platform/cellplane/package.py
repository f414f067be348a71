"""What a submitted job takes along: this code, its configuration, and the working folder without data.

The code always goes, laid out as the wheel lays it out, so that a cluster runs exactly what checked the configuration,
whatever version is installed there. Packages are never installed at job start: they are the image's. What looks like
data, an environment, a secret or somebody's cache stays at home.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cellplane.config import configs_root, home
from cellplane.errors import ConfigError

LIMIT_BYTES = 100 * 1024**2  # Ray keeps packages in the memory of the head; its own limit is higher
MOST_FILES = 20_000  # a working folder of more is somebody's home
LARGEST = 5  # files named when it is too much
CODE = "platform/cellplane"  # where the code lies in the package
CONFIG = "submitted.yaml"  # the configuration, at the top of the package
HOME, SECRETS_FILE = "CELLPLANE_HOME", "CELLPLANE_SECRETS_FILE"  # what the job's process is told, both paths on the cluster
AT_THE_TOP = frozenset({"data", "shards", "models", "runs", "logs", "mlruns", "build", "dist"})
ANYWHERE = frozenset({"__pycache__", "node_modules", "secrets", "venv"})
DATA = (
    *(".h5ad", ".h5", ".hdf5", ".h5mu", ".loom", ".zarr", ".arrow", ".parquet", ".feather", ".mtx", ".npy", ".npz", ".rds"),
    *(".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".whl"),
    *(".db", ".sqlite", ".log", ".pyc"),
)
SECRET = ("credentials", "api_keys", "*.pem", "*.key", "*.p12", "*token", "*_password", "*_secret_key")


@dataclass(frozen=True)
class Package:
    """Files by their name in the package; ``config`` is written beside them as CONFIG."""

    files: Mapping[str, Path]
    config: str

    @property
    def size_bytes(self) -> int:
        """Of all files, before they are compressed."""
        return sum(path.stat().st_size for path in self.files.values())

    def holds(self, name: str) -> bool:
        """Whether a path or pattern relative to the working folder finds something in it."""
        plain = os.path.normpath(name)
        return any(file == plain or file.startswith(f"{plain}/") or fnmatchcase(file, plain) for file in self.files)

    def write(self, target: Path) -> Path:
        """The package as a zip file, the same bytes for the same content. ConfigError when it is too large."""
        self.check()
        with zipfile.ZipFile(target, "w") as archive:
            for name, content in self._contents():
                entry = zipfile.ZipInfo(name)  # of 1980: the time of a copy is no change
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
        return target

    def check(self) -> None:
        """ConfigError that names the largest files when the package exceeds LIMIT_BYTES."""
        if self.size_bytes <= LIMIT_BYTES:
            return
        sizes = sorted(((path.stat().st_size, name) for name, path in self.files.items()), reverse=True)
        named = ", ".join(f"{name} ({size / 1024**2:.0f} MiB)" for size, name in sizes[:LARGEST])
        raise ConfigError(
            f"the working folder would make a package of {self.size_bytes / 1024**2:.0f} MiB, {LIMIT_BYTES // 1024**2} may be sent; "
            f"largest: {named}; move them into data/, or name another folder with --working-dir"
        )

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        yield CONFIG, self.config.encode()
        for name in sorted(self.files):
            yield name, self.files[name].read_bytes()


def pack(working_dir: Path, config: str) -> Package:
    """What goes along: the files of the working folder that are no data, and this code over them."""
    if not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir} is no folder")
    files = dict(_limited(_files_in(working_dir), working_dir))
    files.pop(CONFIG, None)
    return Package({**files, **_code()}, config)


def _limited(found: Iterable[tuple[str, Path]], folder: Path) -> Iterator[tuple[str, Path]]:
    for number, item in enumerate(found):
        if number == MOST_FILES:
            raise ConfigError(f"{folder} holds more than {MOST_FILES} files beside data; name a smaller folder with --working-dir")
        yield item


def _code() -> dict[str, Path]:
    """The installed package, or the checkout it runs from, where serve/ and configs/ are folders of their own."""
    source = Path(__file__).resolve().parent
    serve = source / "serve" if (source / "serve").is_dir() else source.parents[1] / "serve"
    files = {f"{CODE}/{name}": path for name, path in _plain_files(source)}
    files |= {f"{CODE}/serve/{name}": path for name, path in _plain_files(serve)}
    return files | {f"{CODE}/configs/{name}": path for name, path in _plain_files(configs_root())}


def _plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part in ANYWHERE for part in name.parts):
            yield name.as_posix(), path


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of a working folder that are neither hidden nor data nor secret."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if _enters(Path(here), name, here == str(folder)))
        for name in sorted(names):
            path = Path(here) / name
            if _belongs(name) and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _enters(parent: Path, name: str, at_the_top: bool) -> bool:
    path = parent / name
    if name.startswith(".") or name in ANYWHERE or name.endswith((*DATA, ".egg-info")) or (at_the_top and name in AT_THE_TOP):
        return False
    is_environment, is_ours = (path / "pyvenv.cfg").is_file(), path.absolute() == home()
    return not (is_environment or is_ours or _is_folder_of_data(path))


def _is_folder_of_data(path: Path) -> bool:
    """Shards, a model or checkpoints, wherever they lie: a manifest beside binary files."""
    return (path / "manifest.json").is_file()


def _belongs(name: str) -> bool:
    return not (name.startswith(".") or name.lower().endswith(DATA) or any(fnmatchcase(name.lower(), secret) for secret in SECRET))
