"""A copy of a model as Ray starts it: it loads behind whoever serves, and one copy of a machine after another.

Loading is seconds of a whole core, most of it importing. Copies that load all at once take the cores from those that
answer, just when a new version is to come unnoticed; so nothing heavy is imported here before it is this copy's turn.
"""

from __future__ import annotations

import fcntl
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .replica import Answer
    from .routes import Version
    from .tasks import Question

PATIENCE_S = 60.0  # then a copy loads whoever else does: one that hangs must not stop the others
LOWEST = 19  # of priorities; what Ray starts has 15
POLL_S = 0.1


class ModelCopy:
    """A `ModelReplica` that was loaded in turn; ``config`` and ``version`` are its arguments in plain JSON."""

    def __init__(self, config: Mapping[str, Any], version: Mapping[str, Any]) -> None:
        with in_turn(Path(tempfile.gettempdir()) / f"cellplane-loading-{os.getuid()}.lock"), behind():
            from .deployment import ServeConfig
            from .replica import ModelReplica
            from .routes import Version

            self._replica = ModelReplica(ServeConfig.model_validate(config), Version(**version))

    async def predict(self, question: Question) -> Answer:
        """See ModelReplica."""
        return await self._replica.predict(question)

    async def check(self) -> Version:
        """See ModelReplica."""
        return await self._replica.check()

    async def describe(self) -> dict[str, Any]:
        """See ModelReplica."""
        return await self._replica.describe()

    async def card(self) -> str:
        """See ModelReplica."""
        return await self._replica.card()

    async def genes(self) -> dict[str, Any]:
        """See ModelReplica."""
        return await self._replica.genes()

    async def load(self) -> dict[str, int]:
        """See ModelReplica."""
        return await self._replica.load()


@contextmanager
def in_turn(path: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a lock of this machine during the block; after ``patience_s``, or where no lock can be, go on without."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and not _taken(file):
            time.sleep(POLL_S)
        yield
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def behind() -> Iterator[None]:
    """Lowest priority during the block, for this process and threads it starts; nothing where the way back is not allowed."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if not _may_return_to(before):
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    try:
        yield
    finally:
        for thread in _threads():
            with suppress(OSError):  # it ended meanwhile
                os.setpriority(os.PRIO_PROCESS, thread, before)


def _threads() -> list[int]:
    """Linux has a priority for each thread, and new ones take that of their maker; elsewhere there is one for the process."""
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]


def _may_return_to(priority: int) -> bool:
    """Whether this process may lower its number again: root, or a limit that says so (20 - the limit is the lowest allowed)."""
    soft = resource.getrlimit(resource.RLIMIT_NICE)[0]
    return os.geteuid() == 0 or soft == resource.RLIM_INFINITY or 20 - soft <= priority
