"""The same conversion on a real Ray cluster: same bytes, a killed worker costs nothing, errors keep their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import convert, convert_with, write_part
from cellplane.data.shards import verify_shards
from cellplane.errors import CellplaneError, DataError, ServiceError

pytestmark = pytest.mark.cluster


def config_for(out: Path, *inputs: Path) -> ConvertConfig:
    keys = DataKeys(batch_key="batch", labels_key="cell_type")
    return ConvertConfig(inputs=tuple(map(str, inputs)), out=str(out), keys=keys, max_cells=16, shard_bytes=8000)


def test_without_ray_the_error_says_how_to_start_it(h5ad, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        convert(config_for(tmp_path / "shards", h5ad))
    assert not (tmp_path / "shards").exists()


def test_ray_tasks_write_the_same_bytes_as_one_process(ray_cluster, h5ad, tmp_path):
    report = convert(config_for(tmp_path / "ray", h5ad))
    assert report.cells == 120
    assert report.shards_new > 1
    alone = convert_with(config_for(tmp_path / "alone", h5ad), lambda tasks: map(write_part, tasks), lambda _: None)
    assert alone.shards_new == report.shards_new
    for path in (tmp_path / "alone").iterdir():
        if not path.name.startswith("."):
            assert path.read_bytes() == (tmp_path / "ray" / path.name).read_bytes()
    again = convert(config_for(tmp_path / "ray", h5ad))
    assert (again.shards_new, again.shards_reused) == (0, report.shards_new)


def test_a_bad_source_keeps_its_own_error_through_ray(ray_cluster, cells, h5ad, tmp_path, monkeypatch):
    monkeypatch.setattr("cellplane.data.planning.stamp_of", lambda path: (1, 1))  # as if it was looked at when it was another one
    with pytest.raises(DataError, match=rf"{h5ad.name} changed while it was converted") as caught:
        convert(config_for(tmp_path / "shards", h5ad))
    assert isinstance(caught.value, CellplaneError)
    assert not list((tmp_path / "shards").glob("*.arrow"))


def test_a_killed_worker_costs_nothing(ray_cluster, h5ad, tmp_path, monkeypatch):
    flag = tmp_path / "killed"
    monkeypatch.setenv("FAULT_AT", f"after_shard:0:{flag}")
    report = convert(config_for(tmp_path / "shards", h5ad))
    assert flag.exists()
    assert report.cells == 120
    assert verify_shards(tmp_path / "shards").cells == 120
