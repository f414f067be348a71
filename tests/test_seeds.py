"""Seeds depend on their parts alone."""

from __future__ import annotations

import subprocess
import sys

from cellplane.seeds import keyed_seed


def test_a_keyed_seed_is_63_bits_and_depends_on_every_part_and_their_order():
    seeds = {keyed_seed(*parts) for parts in [(0, "a"), (1, "a"), (0, "b"), ("a", 0), (0, "a", 0), ("0a",)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_keyed_seed_is_the_same_in_another_process():
    code = "from cellplane.seeds import keyed_seed; print(keyed_seed(3, 'epoch', 7))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == keyed_seed(3, "epoch", 7)
