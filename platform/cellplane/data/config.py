"""What a person may choose about data: where counts and columns lie in an AnnData, how to convert, what to simulate."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellplane.config import Config

MIB = 1024 * 1024
UNLABELLED = ("", "nan", "NA", "None")  # texts in a label column that mean: no label


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
    repeated_genes: Literal["error", "sum", "first"] = "error"
    """Genes whose name stands in the file twice: refuse the file, add their columns up, or take the first column."""
    ignore_gene_case: bool = False
    """Find genes under another spelling (c1ORF112) too, where only one gene fits; never those of another species."""


class ConvertConfig(Config):
    """From h5ad files and zarr folders to a folder of shards."""

    kind: Literal["data"] = "data"
    """Which kind of configuration this is."""
    inputs: Annotated[tuple[str, ...], Field(min_length=1)]
    """h5ad files, zarr folders, folders of them, globs or fsspec URLs; each file is a data set."""
    out: str
    """Folder of the shards and their manifest; to an fsspec URL such as s3://bucket/shards they are copied, the manifest last."""
    keys: DataKeys = DataKeys()
    """Where counts and columns lie; the same for all inputs."""
    datasets: tuple[str, ...] | None = None
    """Name of each input file; None takes the file names without suffix."""
    vocabulary: str | None = None
    """Text file of gene ids, one a line, or model folder, fixing the genes and their order; None takes the union of the inputs'."""
    values: Literal["counts", "any"] = "counts"
    """"any" stores X (or the layer named in keys) as it stands, without looking for raw counts or checking for them."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Cells of a sample: shuffled (with positions: along a space-filling curve), or as they stand in the file."""
    fov_key: str | None = None
    """obs column of the field of view: no sentence crosses one."""
    replace: bool = False
    """True: data sets that the folder holds and the inputs do not name are dropped from it; else they are named and nothing is done."""
    full_hash: bool = False
    """Hash every byte of the sources; false samples those above 256 MiB, which notices nearly every change."""
    max_cells: Annotated[int, Field(ge=1)] = 2048
    """Largest number of cells in a sentence; a longer donor is split evenly."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffle inside a donor."""
    shard_bytes: Annotated[int, Field(ge=1)] = 256 * MIB
    """Aim for the size of a shard: large enough to read in one sweep, small enough to retry."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Shards written at the same time; None uses every CPU of the cluster."""

    @model_validator(mode="after")
    def _every_input_once(self) -> Self:
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("an input file stands in the list twice: its cells would count double")
        return self


class NicheConfig(Config):
    """The planted effect of neighbours, in spatial simulations: senders make a ligand that switches on a programme around them."""

    strength: Annotated[float, Field(ge=0)] = 0.5
    """What one sender of average ligand level adds to the programme's rates of each neighbour, as a share of them; 0 plants nothing."""
    radius_um: Annotated[float, Field(gt=0)] = 30.0
    """How far a ligand reaches, in micrometres."""
    n_genes: Annotated[int, Field(ge=1)] = 10
    """Genes of the receptor programme; a quarter of all genes at most."""
    sender_type: Annotated[int, Field(ge=0)] = 0
    """The cell type that expresses the ligand."""
    receiver_type: Annotated[int, Field(ge=0)] | None = None
    """The cell type that answers; None lets every type answer."""


class KnockoutConfig(Config):
    """Perturbed cells: a knock-out lowers its gene and shifts its targets; two in one cell add up on the log scale."""

    n_genes: Annotated[int, Field(ge=1)] = 5
    """Genes knocked out one at a time."""
    n_pairs: Annotated[int, Field(ge=0)] = 0
    """Pairs of them knocked out together."""
    n_targets: Annotated[int, Field(ge=1)] = 20
    """Genes each knock-out acts on; a quarter of all genes at most."""
    control_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of cells left alone."""
    efficiency: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the gene's own expression that is lost."""
    effect_sigma: Annotated[float, Field(ge=0)] = 0.7
    """Spread of the targets' log fold changes around 0."""


class SimulateConfig(Config):
    """Synthetic cells with known truth: the same configuration gives the same cells."""

    kind: Literal["simulate"] = "simulate"
    """Which kind of configuration this is."""
    n_cells: Annotated[int, Field(ge=1)] = 300
    """Number of cells."""
    n_genes: Annotated[int, Field(ge=1)] = 200
    """Number of genes."""
    gene_ids: Literal["plain", "human", "mouse", "installed"] = "plain"
    """GENE0001, GENE0002, ..., or ids of an installed gene table; "installed" takes the human table where there is one."""
    n_types: Annotated[int, Field(ge=1)] = 4
    """Number of cell types, each with marker genes of its own."""
    n_batches: Annotated[int, Field(ge=1)] = 2
    """Number of technical batches, each with a mild effect on every gene."""
    n_donors: Annotated[int, Field(ge=1)] | None = None
    """Number of donors, dealt evenly to the batches; None makes every batch one donor."""
    spatial: bool = False
    """Whether cells get positions: types gather in niches, and neighbours act on one another (see ``niche``)."""
    niche: NicheConfig = NicheConfig()
    """The planted effect of neighbours; not used without positions."""
    knockouts: KnockoutConfig | None = None
    """Perturbed cells; None perturbs none."""
    mean_counts: Annotated[float, Field(gt=0)] | None = None
    """Counts of an average cell before dropout; None takes 1.5 for every gene, a small targeted panel."""
    gene_shape: Annotated[float, Field(gt=0)] = 1.0
    """Shape of the gamma law of the genes' mean expression; smaller concentrates the counts on fewer genes."""
    marker_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the genes that are markers of each type, as long as genes last; one gene at least."""
    marker_fold: Annotated[float, Field(gt=0)] = 8.0
    """How much more a type expresses its markers."""
    depth_sigma: Annotated[float, Field(ge=0)] = 0.3
    """Spread of the cells' log library sizes."""
    batch_sigma: Annotated[float, Field(ge=0)] = 0.15
    """Spread of the log fold change of a gene in a batch."""
    donor_sigma: Annotated[float, Field(ge=0)] = 0.0
    """Spread of the log fold change of a gene in a donor."""
    dispersion: Annotated[float, Field(gt=0)] = 2.0
    """Theta of the negative binomial: variance = mean + mean^2 / theta."""
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the non-zero counts lost at random."""
    spacing_um: Annotated[float, Field(gt=0)] = 15.0
    """Mean distance of neighbouring cells in micrometres."""
    field_cells: Annotated[int, Field(ge=1)] = 1000
    """Cells of a field of view; each belongs to one donor. Without positions only how many cells are drawn together."""
    true_rates: bool = False
    """Keep every expected count in layers["true_rate"]: dense, so it needs 4 bytes for every cell and gene."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.n_donors is not None and self.n_donors < self.n_batches:
            raise ValueError(f"{self.n_donors} donors for {self.n_batches} batches: every batch needs a donor")
        highest = max(self.niche.sender_type, self.niche.receiver_type or 0)
        if self.spatial and highest >= self.n_types:
            raise ValueError(f"niche names type {highest}, but there are {self.n_types} types, counted from 0")
        if self.knockouts is not None:
            genes, pairs = self.knockouts.n_genes, self.knockouts.n_pairs
            if genes > self.n_genes or pairs > genes * (genes - 1) // 2:
                raise ValueError(f"{genes} knock-outs and {pairs} pairs of them do not fit into {self.n_genes} genes")
        return self
