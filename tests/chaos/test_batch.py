"""Batch inference on Ray under kill -9: of the worker, which is replaced, and of the driver, whose job is run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cellplane.batch import PredictConfig, predict_files
from cellplane.config import to_yaml
from tests.chaos.test_training_elastic import wait_for
from tests.test_batch_killed import CELLS, POINTS, assert_alike, job, left_alone

__all__ = ["job"]

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
    return left_alone(job, tmp_path_factory.mktemp("never"))


@dataclass(frozen=True)
class Place:
    """The job's configuration as a file in a home of its own, and the environment of its driver on the cluster of the tests."""

    config: PredictConfig
    command: list[str]
    environment: dict[str, str]

    def with_fault(self, **faults: str) -> dict[str, str]:
        """The same for a driver whose workers, as those of a submitted job, have these variables."""
        return {**self.environment, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": faults}})}


@pytest.fixture
def place(ray_cluster, job, tmp_path):
    import ray

    config = job.model_copy(update={"out": str(tmp_path / "answers")})
    (tmp_path / "predict.yaml").write_text(to_yaml(config))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "CELLPLANE_HOME": str(tmp_path)}
    environment |= {"RAY_AUTH_TOKEN_PATH": str(Path.home() / ".ray" / "auth_token"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "platform"), str(ROOT)))}
    return Place(config, [sys.executable, "-m", "jobs.predict", "--config", str(tmp_path / "predict.yaml"), "--json"], environment)


def finished(place: Place, environment: dict[str, str]) -> dict[str, int]:
    """What the command reports."""
    done = subprocess.run(place.command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_answered_twice(place, uninterrupted, tmp_path, point):
    flag = tmp_path / "killed"
    report = finished(place, place.with_fault(FAULT_AT=f"{point.partition(':')[0]}:0:{flag}"))  # once, whoever comes there first
    assert flag.exists(), "nobody was killed"
    assert (report["new"], report["cells"]) == (2, sum(CELLS))
    assert_alike(Path(place.config.out), uninterrupted["h5ad"])


@pytest.mark.parametrize("point", POINTS)
def test_a_driver_that_is_killed_is_run_again_and_goes_on(place, uninterrupted, tmp_path, point):
    """It dies while a worker stands at the point; what was whole by then is kept."""
    flag = tmp_path / "stopped"
    environment = place.with_fault(FAULT_AT=f"{point.partition(':')[0]}:0:{flag}", FAULT_SIGNAL="SIGSTOP")
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(place.command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        wait_for(lambda: flag.exists() or driver.poll() is not None)
        assert driver.poll() is None, (tmp_path / "log").read_text()[-2000:]
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(30)
    report = finished(place, place.environment)
    assert report["new"] + report["reused"] == 2
    assert_alike(Path(place.config.out), uninterrupted["h5ad"])


def test_the_same_on_the_cluster_of_the_tests(ray_cluster, job, uninterrupted, tmp_path):
    report = predict_files(job.model_copy(update={"out": str(tmp_path / "answers"), "format": "parquet"}))
    assert report.cells == sum(CELLS)
    assert_alike(tmp_path / "answers", uninterrupted["parquet"])
