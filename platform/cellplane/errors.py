"""Every error cellplane raises on purpose, and the exit code the command line gives it.

    CellplaneError                1  something failed
    +-- ConfigError               2  a wrong option, key or value: nothing was started
    +-- DataError                 3  the input is not what the work needs (also a ValueError)
    |   +-- FileFormatError          not a readable h5ad, shard or JSON file
    |   +-- CountsNotFoundError      no raw counts in any known place
    |   +-- VocabularyError          genes do not match
    |   +-- ColumnError              an obs, obsm or layer key that is not there
    |   +-- IntegrityError           a checksum, size or structure that does not match its manifest
    +-- StorageError              1  no space left, no permission (also an OSError)
    +-- TrainingError             1  a run that cannot go on
    |   +-- CheckpointError          no valid checkpoint where one was promised
    +-- BenchmarkError            1  a measurement that could not be made
    +-- ServiceError              4  a cluster, tracker or endpoint that cannot be reached or said no
        +-- PortInUseError           somebody else listens there

Each message says what was found, what was expected and what to do. All survive pickling, so that Ray can carry them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CellplaneError(Exception):
    """Base of every error below; the message is meant for the person at the keyboard."""

    exit_code = 1


class ConfigError(CellplaneError):
    """A configuration or usage mistake, found before any work began."""

    exit_code = 2


class DataError(CellplaneError, ValueError):
    """Input data that cannot be used as it is."""

    exit_code = 3


class FileFormatError(DataError):
    """A file that is truncated or of another kind than its name says."""


class CountsNotFoundError(DataError):
    """No place in the AnnData holds raw counts; the message lists what each place holds."""


class VocabularyError(DataError):
    """Genes of the data and of the model do not match."""


class ColumnError(DataError):
    """A key that the data does not have; the message names the nearest ones."""


class IntegrityError(DataError):
    """A file whose bytes, size or structure are not those its manifest promises."""


class StorageError(CellplaneError, OSError):
    """The disk is full or may not be written."""


class TrainingError(CellplaneError):
    """A training run that cannot continue."""


class CheckpointError(TrainingError):
    """A checkpoint that is missing or does not verify."""


class BenchmarkError(CellplaneError):
    """A side of a measurement that failed, or an environment for it that could not be made."""


class ServiceError(CellplaneError):
    """A cluster, tracker or endpoint that is unreachable or refused the call.

    ``status`` is the HTTP status where there was one, else 0.
    """

    exit_code = 4

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.message, self.status = message, status

    def __str__(self) -> str:
        return self.message


class PortInUseError(ServiceError):
    """Another process listens on the port that was asked for."""


@contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Errors of the block name this file, unless they do already: of several the one that is wrong."""
    try:
        yield
    except CellplaneError as error:
        if str(path) in str(error) or isinstance(error, ServiceError):
            raise
        raise type(error)(f"{path}: {error}") from None
