"""What a person may choose about data: where counts and columns lie in an AnnData, how to convert, what to simulate."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellplane.config import Config

MIB = 1024 * 1024


class DataKeys(Config):
    """Where things lie in an AnnData; None means: not used."""

    layer: str | None = None
    """Layer with raw counts ("X" and "raw" are allowed too). None searches layers["counts"], raw.X, X in this order."""
    batch_key: str | None = None
    """obs column of the donor, sample or slide: cells of two of them never share a sentence."""
    labels_key: str | None = None
    """obs column of the labels, e.g. cell_type."""
    spatial_key: str | None = None
    """obsm entry with coordinates in micrometres, e.g. spatial."""
    recover_counts: bool = False
    """Invert log1p-normalised values when the counts come back exactly; otherwise such files are refused."""


class ConvertConfig(Config):
    """From h5ad files to a folder of shards."""

    kind: Literal["data"] = "data"
    """Which kind of configuration this is."""
    inputs: Annotated[tuple[str, ...], Field(min_length=1)]
    """The h5ad files, one data set each."""
    out: str
    """Folder of the shards and their manifest."""
    keys: DataKeys = DataKeys()
    """Where counts and columns lie; the same for all inputs."""
    datasets: tuple[str, ...] | None = None
    """Name of each input; None takes the file names without suffix."""
    vocabulary: str | None = None
    """Text file of gene ids, one a line, fixing the genes and their order; None takes the union of the inputs' genes."""
    max_cells: Annotated[int, Field(ge=1)] = 2048
    """Largest number of cells in a sentence; a longer donor is split evenly."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffle inside a donor."""
    shard_bytes: Annotated[int, Field(ge=1)] = 256 * MIB
    """Aim for the size of a shard: large enough to read in one sweep, small enough to retry."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Shards written at the same time; None uses every CPU of the cluster."""

    @model_validator(mode="after")
    def _one_distinct_name_each(self) -> Self:
        if self.datasets is not None and len(self.datasets) != len(self.inputs):
            raise ValueError(f"{len(self.datasets)} dataset names for {len(self.inputs)} inputs: give one each, or none")
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("an input file stands in the list twice: its cells would count double")
        return self


class SimulateConfig(Config):
    """Synthetic cells for tests and first tries."""

    n_cells: Annotated[int, Field(ge=1)] = 300
    """Number of cells."""
    n_genes: Annotated[int, Field(ge=1)] = 200
    """Number of genes, named GENE0001, GENE0002, ..."""
    n_types: Annotated[int, Field(ge=1)] = 4
    """Number of cell types, each with marker genes of its own."""
    n_batches: Annotated[int, Field(ge=1)] = 2
    """Number of samples, each with a mild effect on every gene."""
    spatial: bool = False
    """Whether cells get positions: types gather in domains of a square millimetre."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed: the same configuration gives the same cells."""
