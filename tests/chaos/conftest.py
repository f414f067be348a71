"""The shards, runs and workers of the training room, for tests that kill what trains."""

from tests.train.conftest import cellplane_home, losses, run_config, run_workers, shards

__all__ = ["cellplane_home", "losses", "run_config", "run_workers", "shards"]
