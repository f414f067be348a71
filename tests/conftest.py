"""Fixtures every room shares: where shared real data lies, and one Ray cluster for all tests that need one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import cellplane  # noqa: F401  (sets the OpenMP waiting policy before torch is imported anywhere)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a cluster of their own come first: a process can be in one at a time, and the shared one stays to the end."""
    items.sort(key=lambda item: (item.get_closest_marker("own_cluster") is None, not _uses_ray(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `make test`, one of two processes runs every file that uses Ray, while the other runs the rest, a file at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class RayTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if _uses_ray(ROOT / file) else file

    return RayTogether(config, log)


@cache
def _uses_ray(file: Path) -> bool:
    """Whether a file of tests asks for a cluster, by its text: the process that deals tests out knows no more of them."""
    text = file.read_text(encoding="utf-8")
    return any(word in text for word in ("ray_cluster", "mark.cluster", "mark.own_cluster"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real evaluation data beside the checkout; tests that need it skip when it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared/data, which are not here")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of two CPUs for the whole test session; its workers' lines would land in other tests' output."""
    import ray

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    with tempfile.TemporaryDirectory(prefix="cp-", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()
