"""Fixtures every room shares: where shared real data lies, and one Ray cluster for all tests that need one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cellplane  # noqa: F401  (sets the OpenMP waiting policy before torch is imported anywhere)

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a cluster of their own come first: a process can be in one at a time, and the shared one stays to the end.

    All that use Ray stay together: with `make test`, one of two processes runs them while the other runs the rest, a file at a time.
    """
    items.sort(key=lambda item: (item.get_closest_marker("own_cluster") is None, not _uses_ray(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _uses_ray(item) else item.path.relative_to(ROOT).as_posix()))


def _uses_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("cluster") is not None or "ray_cluster" in getattr(item, "fixturenames", ())


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
