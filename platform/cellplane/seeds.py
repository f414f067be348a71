"""Where all our randomness comes from: seeds that depend on what is done, never on who does it or when."""

from __future__ import annotations

import hashlib


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on these parts alone, the same on every machine: the root of all our randomness.

    Keys are (seed, epoch, sentence) or (seed, step, micro-batch), never a rank, so that the number of workers changes nothing.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
