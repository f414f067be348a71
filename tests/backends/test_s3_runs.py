"""Training from a bucket and into it, and models that lie there: what a fault of the network interrupts goes on to the same end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cellplane.artifact.folder import save_model
from cellplane.cells import CellBatch
from cellplane.data.remote import send_shards
from cellplane.errors import CellplaneError, IntegrityError, ServiceError
from cellplane.inference import Predictor
from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import list_models, register, resolve_model
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri
from tests.backends.conftest import S3, mlflow_server
from tests.tiny import random_batch, tiny_folder
from tests.train.conftest import STEPS

KEPT = 3  # steps between checkpoints


@pytest.fixture(scope="module")
def undisturbed(run_config, run_workers, tmp_path_factory) -> list[float]:
    """Losses of the run from local shards, without any copy."""
    home = tmp_path_factory.mktemp("undisturbed")
    assert run_workers(run_config("r"), home, 1) == [0]
    return losses_of(home)[1]


def losses_of(home: Path) -> tuple[list[int], list[float]]:
    rows = Journal(home / "runs" / "r" / "journal.jsonl").rows()
    return [row.step for row in rows], [row.metrics["train/loss"] for row in rows]


def in_bucket(run_config, shards: Path, bucket: str):
    """The same run, everything of it in a bucket."""
    send_shards(shards, f"{bucket}/shards")
    return run_config("r", {"shards": f"{bucket}/shards", "checkpoint": {"folder": f"{bucket}/runs"}})


def test_another_machine_goes_on_from_the_bucket_alone(s3, bucket, run_config, shards, run_workers, undisturbed, tmp_path):
    config = in_bucket(run_config, shards, bucket)
    assert run_workers(config, tmp_path / "here", 1, f"step_rank0:{KEPT + 1}") == [-9]
    assert run_workers(config, tmp_path / "there", 1) == [0], (tmp_path / "there/rank-0.log").read_text()[-3000:]
    steps, losses = losses_of(tmp_path / "there")
    assert steps == list(range(KEPT + 1, STEPS + 1)), "it began after the checkpoint that was copied"
    assert losses == undisturbed[KEPT:]


@pytest.mark.parametrize(("mode", "after"), [("503", 4), ("503", 30), ("cut", 45)])
def test_a_run_whose_bucket_breaks_ends_with_a_word_and_goes_on(
    s3, bucket, run_config, shards, run_workers, undisturbed, tmp_path, mode, after
):
    config = in_bucket(run_config, shards, bucket)
    with s3.network.broken(mode, after):
        assert run_workers(config, tmp_path, 1) == [1]
    assert "StorageError: could not" in (tmp_path / "rank-0.log").read_text()
    assert run_workers(config, tmp_path, 1) == [0], (tmp_path / "rank-0.log").read_text()[-3000:]
    assert losses_of(tmp_path) == (list(range(1, STEPS + 1)), undisturbed)


@pytest.fixture(scope="module")
def tracker(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """An MLflow server whose artifacts lie in a bucket: its address and theirs."""
    folder = tmp_path_factory.mktemp("mlflow")
    artifacts = f"s3://{s3_server.bucket()}/mlflow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the server
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "25")  # of its clients: it may be at work on a request that was given up
        server, uri = mlflow_server(folder, local_uri(folder), artifacts)
        server.start()
        yield uri, artifacts
        server.kill()


def opened(uri: str, key: str) -> TrackedRun:
    return TrackedRun.open(RunSpec(run_key=key, experiment="cellplane/finetune/annotate", name=key), uri)


def test_a_model_in_a_bucket_predicts_what_it_predicted_here(tracker, s3, tmp_path):
    uri, artifacts = tracker
    folder = save_model(tiny_folder(), tmp_path / "model")
    run = opened(uri, "predicting")
    run.log_artifacts(folder, "model")
    assert register(folder, run.run_id, "predicting", uri) == 1
    assert any(key.endswith("model/weights.safetensors") for key in s3.objects(artifacts)), "it lies in the bucket"
    found = resolve_model("models:/predicting/1", uri, tmp_path / "cache")
    assert found.path != folder
    store = OneSentence()
    assert Predictor.load(found.path).logits(store)[0].tolist() == Predictor.load(folder).logits(store)[0].tolist()


class OneSentence:
    """Eight cells that are one another's context."""

    sizes = np.array([8])

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """They, whatever is asked for."""
        assert list(sentences) == [0]
        return random_batch([8])


@pytest.mark.parametrize(("mode", "after"), [("503", 0), ("503", 1), ("503", 2), ("cut", 1), ("hang", 2)])
def test_a_model_that_was_logged_in_part_is_not_registered(tracker, s3, model_folder, tmp_path, mode, after):
    uri, _ = tracker
    name = f"broken-{mode.replace('_', '-')}-{after}"
    folder, run = model_folder(name), opened(tracker[0], name)
    with s3.network.broken(mode, after), pytest.raises(CellplaneError):
        run.log_artifacts(folder, "model")
    with suppress(ServiceError):
        list_models(uri)  # MLflow drops the connection of a request that failed in it, and the client learns that now
    with pytest.raises(CellplaneError, match=r"incompletely or not at all|no artifacts"):
        register(folder, run.run_id, name, uri)
    assert name not in {version.name for version in list_models(uri)}
    run.log_artifacts(folder, "model")
    assert register(folder, run.run_id, name, uri) == 1
    found = resolve_model(f"models:/{name}/1", uri, tmp_path / "cache").path
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_download_that_breaks_off_leaves_nothing_that_looks_like_a_model(tracker, s3, model_folder, tmp_path):
    uri, _ = tracker
    folder, run = model_folder("away"), opened(tracker[0], "away")
    run.log_artifacts(folder, "model")
    register(folder, run.run_id, "away", uri)
    for after in range(4):
        with s3.network.broken("503", after), pytest.raises(CellplaneError):
            resolve_model("models:/away/1", uri, tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())
    assert resolve_model("models:/away/1", uri, tmp_path / "cache").path.is_dir()


def test_a_bit_that_flipped_in_the_bucket_is_named(tracker, s3, model_folder, tmp_path):
    uri, artifacts = tracker
    folder, run = model_folder("flipped"), opened(tracker[0], "flipped")
    run.log_artifacts(folder, "model")
    register(folder, run.run_id, "flipped", uri)
    (key,) = [key for key in s3.objects(artifacts) if run.run_id in key and key.endswith("model.safetensors")]
    content = bytearray(s3.objects(artifacts)[key])
    content[7] ^= 1
    s3.put(f"{artifacts}/{key}", bytes(content))
    with pytest.raises(IntegrityError, match=r"model\.safetensors is missing or damaged"):
        resolve_model("models:/flipped/1", uri, tmp_path / "cache")
