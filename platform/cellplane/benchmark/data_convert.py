"""Our side of converting: simulated cells as an h5ad, and their conversion. Loads what a conversion loads, and no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplane.benchmark.cells import random_cells
from cellplane.benchmark.worker import measured, serve
from cellplane.data.config import ConvertConfig, DataKeys

CELLS_AT_ONCE = 2000  # a sample has 5 times as many
DISTINCT = 25  # times as many cells are drawn; a larger file repeats them, since drawing takes longer than converting
LARGE = 400_000  # cells, from which on they repeat
MODES: dict[str, dict[str, Any]] = {
    "bare": {"values": "any", "order": "file"},  # as the cells stand, nothing looked for
    "full": {},  # checks, hashes, mapping, shuffle
}


def make(path: str, cells: int, genes: int, nonzeros: int, gzip: bool) -> None:
    """An h5ad of random cells in samples of 10,000."""
    from cellplane.data.writing import write_in_parts

    write_in_parts(Path(path), _parts(cells, genes, nonzeros), lambda _: None, gzip)


def _parts(cells: int, genes: int, nonzeros: int) -> Iterator[Any]:
    from cellplane.data.sources import AnnData

    samples = [f"sample{number}" for number in range(-(-cells // (5 * CELLS_AT_ONCE)))]
    var = pd.DataFrame(index=[f"GENE{gene:05d}" for gene in range(genes)])
    draw = cache(_block) if cells > LARGE else _block
    for start in range(0, cells, CELLS_AT_ONCE):
        size = min(CELLS_AT_ONCE, cells - start)
        matrix = draw(size, genes, nonzeros, start % (DISTINCT * CELLS_AT_ONCE) if cells > LARGE else start)
        sample = pd.Categorical([samples[start // (5 * CELLS_AT_ONCE)]] * size, categories=samples)
        yield AnnData(X=matrix, obs=pd.DataFrame({"batch": sample}, index=[f"cell{row}" for row in range(start, start + size)]), var=var)


def _block(size: int, genes: int, nonzeros: int, seed: int) -> sp.csr_matrix:
    crow, gene, value = random_cells(size, nonzeros, genes, seed)
    return sp.csr_matrix((value, gene.astype(np.int32), crow.astype(np.int32)), shape=(size, genes))


def convert(source: str, out: str, mode: str) -> dict[str, float]:
    """A whole conversion, its tasks one after another in this process."""
    from cellplane.data.convert import convert_with
    from cellplane.data.work import write_part

    config = ConvertConfig(inputs=(source,), out=out, keys=DataKeys(batch_key="batch"), **MODES[mode])
    return measured(lambda: convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None))


if __name__ == "__main__":
    serve({command.__name__: command for command in (make, convert)})
