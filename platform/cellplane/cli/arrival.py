"""Where a submitted job begins on the cluster: `python -m cellplane.cli.arrival VERB ...`, as `cellplane submit` writes it.

What only the cluster can know is looked at first: where things are kept, and the file of secrets that the job was
promised. Then it is the verb, with its options and exit codes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cellplane.errors import CellplaneError, ConfigError, StorageError
from cellplane.package import HOME, SECRETS_FILE


def arrive() -> None:
    """Prepares this process and everything below it. ConfigError and StorageError say what the cluster lacks."""
    _check_home()
    _read_secrets()
    usual = Path.home() / ".ray" / "auth_token"
    if usual.is_file() and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(usual)


def _check_home() -> None:
    """A job's own folder goes with its cluster, and `.cellplane` would lie in it."""
    named = os.environ.get(HOME, "")
    if not Path(named).is_absolute():
        found = f"is {named!r}" if named else "is not set"
        raise ConfigError(
            f"{HOME} {found} on the cluster, and what the job keeps would go with its folder: "
            "submit with --home PATH, on storage that every node sees, or start Ray with the variable"
        )
    try:
        Path(named).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {named} on the cluster: {error.strerror or error}; name another folder with --home") from error


def _read_secrets() -> None:
    """Tokens, as lines of NAME=VALUE, for this process alone: workers need none, and Ray would show them."""
    if not (name := os.environ.get(SECRETS_FILE)):
        return
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"cannot read {name} on the cluster ({reason}), which --secrets or {SECRETS_FILE} names") from error
    for number, line in enumerate(lines, 1):
        key, equals, value = line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"line {number} of {name} is not of the form NAME=VALUE")
        os.environ[key.strip()] = value.strip()


def run() -> None:
    """Entry point."""
    try:
        arrive()
    except CellplaneError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    from cellplane.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    run()
