"""The tree of errors: exit codes, catchable as what they also are, and the way through Ray."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from cellplane import errors
from cellplane.errors import CellplaneError, DataError, PortInUseError, ServiceError, StorageError

TREE = sorted(
    (cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, CellplaneError)), key=lambda cls: cls.__name__
)
EXIT_CODES = {"ConfigError": 2, "ServiceError": 4, "PortInUseError": 4}
each_error = pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)


@each_error
def test_every_error_has_the_exit_code_that_its_docstring_draws(cls):
    expected = 3 if issubclass(cls, DataError) else EXIT_CODES.get(cls.__name__, 1)
    assert cls.exit_code == expected
    assert cls.__name__ in str(errors.__doc__)


@each_error
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(cls, protocol):
    error = cls("found 3, expected 4: count again")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is cls
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("cls", [ServiceError, PortInUseError])
def test_the_http_status_survives_pickling(cls):
    again = pickle.loads(pickle.dumps(cls("no", status=503)))
    assert (str(again), again.message, again.status) == ("no", "no", 503)


def test_notes_survive_pickling():
    error = DataError("wrong")
    error.add_note("while reading shard 3")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["while reading shard 3"]


def test_data_errors_are_value_errors_and_storage_errors_are_os_errors():
    assert issubclass(DataError, ValueError)
    assert issubclass(StorageError, OSError)
    assert str(StorageError("the disk is full")) == "the disk is full"
