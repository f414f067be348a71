"""What a CellPLM is made of. A frozen standard-library dataclass, so that the model runs where only torch is installed.

Defaults are the released 85M configuration (Wen et al., CellPLM, ICLR 2024) unless a line says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of one network; the sizes given by data (genes, batches, classes) are filled in by whoever builds it.

    Raises ValueError when the numbers cannot make a network.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    n_genes: int = 0
    """G, size of the gene vocabulary."""
    width: int = 1024
    """D, width of a cell inside the encoder; a multiple of 4 (GroupNorm) and of n_heads."""
    n_blocks: int = 4
    """Encoder blocks."""
    n_heads: int = 8
    """Attention heads."""
    attention: Literal["flowformer", "softmax"] = "flowformer"
    """Attention over the cells of a sentence: linear in their number, or exact."""
    positions: Literal["none", "continuous"] = "none"
    """Coordinates added to each cell: off as released, or continuous in micrometres."""
    latent: Literal["gmvae", "vae", "ae"] = "gmvae"
    """Latent space: Gaussian mixture, one Gaussian, or a plain projection (fine-tuning)."""
    latent_width: int = 512
    """Z, width of a cell's embedding."""
    n_clusters: int = 16
    """M, mixture components of gmvae."""
    cluster_width: int = 512
    """Hidden width of gmvae's q(z | x, y)."""
    decoder: Literal["negative_binomial", "none"] = "negative_binomial"
    """What recovers the counts; none for models that only annotate."""
    decoder_width: int = 1024
    """Width of the decoder."""
    decoder_bottleneck: int = 128
    """Width before the gene outputs."""
    n_batches: int = 0
    """Rows of the decoder's batch table; 0 = the decoder knows no batches."""
    n_datasets: int = 0
    """Rows of the decoder's dataset table."""
    unseen_batch: Literal["mean", "sum"] = "mean"
    """What stands in for an unknown batch: the mean of the table's rows, or their sum as in the released code."""
    dropout: float = 0.2
    """Dropout of embedder, blocks and decoder during training."""
    kl_floor: float = 0.0
    """Latent terms below this value are left alone; released: 5, which makes the cluster term inert."""
    kl_weight: float = 1.0
    """Weight of the latent Gaussian term; released: 5."""
    cluster_weight: float = 1.0
    """Weight of the cluster-entropy term; released: 5."""
    n_classes: int = 0
    """Outputs of the annotation head; 0 = no head."""
    head_dropout: float = 0.5
    """Dropout before the annotation head (released fine-tuning recipe)."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping its inner values: a fifth of the memory, a third more time."""
    gene_init_sd: float = 0.005
    """Standard deviation of new gene embeddings."""
    hidden_fraction: bool = False
    """Tell the encoder, through one learned direction, which share of a cell's measured genes is hidden."""

    def __post_init__(self) -> None:
        sizes = ("width", "n_heads", "latent_width", "n_clusters", "cluster_width", "decoder_width", "decoder_bottleneck")
        counts = ("n_genes", "n_blocks", "n_batches", "n_datasets", "n_classes")
        if wrong := [name for name in sizes if getattr(self, name) < 1] + [name for name in counts if getattr(self, name) < 0]:
            raise ValueError(f"{', '.join(wrong)} must be at least {1 if wrong[0] in sizes else 0}, found {getattr(self, wrong[0])}")
        if self.width % 4 or self.decoder_width % 4:
            raise ValueError(f"width {self.width} and decoder_width {self.decoder_width} must be multiples of 4, the groups of GroupNorm")
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} must be a multiple of n_heads {self.n_heads}")
        if self.n_classes and (self.decoder != "none" or self.latent != "ae"):
            raise ValueError(
                "a head trains neither a decoder nor a variational latent: with n_classes set decoder none and latent ae, "
                f"found {self.decoder} and {self.latent}"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.head_dropout < 1:
            raise ValueError(f"dropout {self.dropout} and head_dropout {self.head_dropout} must lie in [0, 1)")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How much of a sentence is dropped and hidden in training; defaults are the released pre-training setting."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    drop_cell_rate: float = 0.3
    """Share of a sentence's cells left out of a step."""
    cell_mask_rate: float = 0.75
    """Share of the remaining cells of which genes are hidden."""
    gene_mask_alpha: float = 5.0
    """Each such cell hides its genes at a rate ~ Beta(alpha, beta): mean 0.278."""
    gene_mask_beta: float = 13.0
    """See gene_mask_alpha."""
    gene_mask_cap: float = 0.9
    """No cell hides more than this share of its genes."""

    def __post_init__(self) -> None:
        if not (0 <= self.drop_cell_rate < 1 and 0 <= self.cell_mask_rate <= 1 and 0 <= self.gene_mask_cap <= 1):
            raise ValueError("drop_cell_rate must lie in [0, 1), cell_mask_rate and gene_mask_cap in [0, 1]")
        if self.gene_mask_alpha <= 0 or self.gene_mask_beta <= 0:
            raise ValueError("gene_mask_alpha and gene_mask_beta must be positive")
