"""Other loaders as sides of a measurement: annbatch, scDataset and bionemo SCDL, each set up as its authors advise.

All read the same cells in shuffled blocks of about 2,000 to CSR that PyTorch can use. Runs in an environment of theirs, one
library in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cellplane.benchmark.worker import measured, serve


def annbatch_convert(source: str, out: str) -> None:
    """Its own sharded zarr, shuffled, everything as by default."""
    from annbatch import DatasetCollection

    _zarrs()
    DatasetCollection(out).add_adatas([source])


def annbatch_read(source: str, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of its own format; scipy's CSR is taken for ready, since PyTorch would only wrap it."""
    from annbatch import DatasetCollection, Loader

    _zarrs()
    loader = Loader(chunk_size=block, preload_nchunks=1, batch_size=block, shuffle=True)
    for batch in loader.use_collection(DatasetCollection(source, mode="r")):
        yield batch["X"].shape[0], batch["X"].nnz


def _zarrs() -> None:
    """The fast pipeline that its documentation asks for on local disks."""
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def scdataset_read(source: str, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of the h5ad itself, opened backed."""
    import anndata
    from scdataset import BlockShuffling, scDataset

    cells = anndata.read_h5ad(source, backed="r")
    blocks = scDataset(
        cells,
        BlockShuffling(block_size=block),
        batch_size=block,
        fetch_factor=1,
        fetch_transform=lambda part: part.to_memory().X,
        batch_transform=_torch_csr,
    )
    for batch in blocks:
        yield batch.shape[0], batch.values().numel()


def _torch_csr(matrix: Any) -> Any:
    import torch

    crow, gene, value = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    return torch.sparse_csr_tensor(crow, gene, value, size=matrix.shape)


def scdl_convert(source: str, out: str) -> None:
    """Memory-mapped arrays, everything as by default but for where the counts are."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    SingleCellMemMapDataset(out, source, use_X_not_raw=True)


def scdl_read(source: str, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows through its own collation."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    cells = SingleCellMemMapDataset(source)
    starts = np.random.default_rng(0).permutation(np.arange(0, len(cells), block))
    for start in starts.tolist():
        batch = collate_sparse_matrix_batch([cells[index] for index in range(start, min(start + block, len(cells)))])
        yield batch.shape[0], batch.values().numel()


CONVERTERS: Mapping[str, Callable[[str, str], None]] = {"annbatch": annbatch_convert, "SCDL": scdl_convert}
READERS: Mapping[str, Callable[[str, int], Iterator[tuple[int, int]]]] = {
    "annbatch": annbatch_read,
    "scDataset": scdataset_read,
    "SCDL": scdl_read,
}


def convert(library: str, source: str, out: str) -> dict[str, float]:
    """A whole conversion of an h5ad."""
    return measured(lambda: CONVERTERS[library](source, out))


def read(library: str, source: str, block: int) -> dict[str, float]:
    """One epoch in shuffled blocks; ``cells`` and ``entries`` are what came."""
    seen: list[tuple[int, int]] = []
    found = measured(lambda: seen.extend(READERS[library](source, block)))
    return {**found, "cells": sum(cells for cells, _ in seen), "entries": sum(entries for _, entries in seen)}


if __name__ == "__main__":
    serve({"convert": convert, "read": read})
