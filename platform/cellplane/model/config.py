"""What a CellPLM is made of. A frozen standard-library dataclass, so that the model runs where only torch is installed.

Defaults are the released 85M configuration (Wen et al., CellPLM, ICLR 2024) unless a line says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

Precision = Literal["float32", "bfloat16"]


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
    positions: Literal["none", "continuous", "grid"] = "none"
    """Coordinates added to each cell: off as released, continuous in micrometres, or the released 100 x 100 grid over [0, 1]."""
    local_blocks: int = 0
    """Blocks after the others in which a cell sees only its nearest neighbours in the tissue; 0 = none, as released."""
    local_neighbours: int = 16
    """Neighbours a cell sees there, itself not counted."""
    local_radius_um: float = 0.0
    """Farthest a neighbour may be, in micrometres; 0 = any distance."""
    latent: Literal["gmvae", "vae", "ae"] = "gmvae"
    """Latent space: Gaussian mixture, one Gaussian, or a plain projection (fine-tuning)."""
    latent_width: int = 512
    """Z, width of a cell's embedding."""
    n_clusters: int = 16
    """M, mixture components of gmvae."""
    cluster_width: int = 512
    """Hidden width of gmvae's q(z | x, y)."""
    decoder: Literal["negative_binomial", "gaussian", "residual", "none"] = "negative_binomial"
    """What recovers the counts, or (gaussian) their logarithm per 10,000; residual: what a perturbation changes; none: only annotates."""
    decoder_width: int = 1024
    """Width of the decoder."""
    decoder_bottleneck: int = 128
    """Width before the gene outputs."""
    n_batches: int = 0
    """Rows of the decoder's batch table; 0 = the decoder knows no batches."""
    n_datasets: int = 0
    """Rows of the decoder's dataset table."""
    n_platforms: int = 0
    """Rows of the decoder's table of measuring platforms."""
    platform_tokens: int = 0
    """Measuring platforms whose cells share a sentence: a learned vector and an output bias per gene for each; 0 = none."""
    query_weight: float = 1.0
    """With platform_tokens: what the cells of platform 0 (the query of an imputation) weigh in the loss, the others weigh 1."""
    input_total: float = 0.0
    """Each cell's visible counts are scaled to this total before log1p; 0 = raw counts, as released."""
    n_stimuli: int = 0
    """Stimuli that are no gene of the vocabulary (residual decoder): a free learned vector each, which cannot generalise."""
    change_weight: float = 1.0
    """Weight of the squared error of the population's change beside the cells' likelihood (residual decoder)."""
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
    kl_warmup_steps: int = 0
    """Optimizer steps over which the weight of the latent Gaussian term grows from 0; released vae: 10,000."""
    kl_drop_below: float = 0.0
    """A sentence whose weighted latent Gaussian term is smaller does without it; released vae: 1."""
    n_classes: int = 0
    """Outputs of the annotation head; 0 = no head."""
    head_width: int = 0
    """Width of the head's hidden layer; 0 = a linear head, as released."""
    head_dropout: float = 0.5
    """Dropout before the annotation head (released fine-tuning recipe)."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping its inner values: for contexts of tens of thousands of cells."""
    precision: Precision = "float32"
    """What products are computed in; sums, norms, losses and parameters stay float32."""
    gene_init_sd: float = 0.005
    """Standard deviation of new gene embeddings."""
    hidden_fraction: bool = False
    """Tell the encoder, through one learned direction, which share of a cell's measured genes is hidden."""

    def __post_init__(self) -> None:
        _at_least(self, 1, ("width", "n_heads", "latent_width", "n_clusters", "cluster_width", "decoder_width", "decoder_bottleneck"))
        _at_least(self, 1, ("local_neighbours",))
        _at_least(self, 0, ("n_genes", "n_blocks", "n_batches", "n_datasets", "n_platforms", "n_classes", "local_blocks", "head_width"))
        _at_least(self, 0, ("local_radius_um", "kl_warmup_steps", "kl_drop_below"))
        _at_least(self, 0, ("platform_tokens", "query_weight", "input_total", "n_stimuli", "change_weight"))
        if self.width % 4 or self.decoder_width % 4:
            raise ValueError(f"width {self.width} and decoder_width {self.decoder_width} must be multiples of 4, the groups of GroupNorm")
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} must be a multiple of n_heads {self.n_heads}")
        if self.platform_tokens and self.decoder == "gaussian":
            raise ValueError("platform_tokens needs a decoder of counts: set decoder negative_binomial")
        if self.decoder == "residual" and (self.latent != "ae" or not self.input_total):
            raise ValueError(f"decoder residual needs latent ae and an input_total, found {self.latent} and {self.input_total}")
        if self.n_classes and (self.decoder != "none" or self.latent != "ae"):
            raise ValueError(
                "a head trains neither a decoder nor a variational latent: with n_classes set decoder none and latent ae, "
                f"found {self.decoder} and {self.latent}"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.head_dropout < 1:
            raise ValueError(f"dropout {self.dropout} and head_dropout {self.head_dropout} must lie in [0, 1)")

    @property
    def reads_places(self) -> bool:
        """Whether an answer depends on how far apart cells lie: then sentences are patches of tissue."""
        return self.local_blocks > 0

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
    gene_mask: Literal["beta", "fixed"] = "beta"
    """How such a cell gets its rate: drawn from Beta(alpha, beta), or the same gene_mask_rate for all."""
    gene_mask_rate: float = 0.25
    """The rate of every such cell when gene_mask is fixed (0.25: the paper's text, and the released fine-tuning)."""
    panel_rate: float = 0.0
    """Share of sentences that a step sees as if measured with a small random panel; learns to read targeted assays."""
    panel_min_genes: int = 30
    """Smallest random panel; sizes are log-uniform from here to all measured genes."""
    targeted_genes: int = 0
    """Cells with at most so many measured genes count as targeted (random panels too) and hide fewer of them; 0 = none does."""
    targeted_mask_scale: float = 1.0
    """What the hidden share of targeted cells is multiplied by (osmFISH, 33 genes: a rate of 0.1 beats 0.25, so 0.4)."""

    def __post_init__(self) -> None:
        if not (0 <= self.drop_cell_rate < 1 and 0 <= self.cell_mask_rate <= 1 and 0 <= self.gene_mask_cap <= 1):
            raise ValueError("drop_cell_rate must lie in [0, 1), cell_mask_rate and gene_mask_cap in [0, 1]")
        if self.gene_mask_alpha <= 0 or self.gene_mask_beta <= 0:
            raise ValueError("gene_mask_alpha and gene_mask_beta must be positive")
        if not (0 <= self.gene_mask_rate <= 1 and 0 <= self.panel_rate <= 1 and 0 <= self.targeted_mask_scale <= 1):
            raise ValueError("gene_mask_rate, panel_rate and targeted_mask_scale must lie in [0, 1]")
        _at_least(self, 1, ("panel_min_genes",))
        _at_least(self, 0, ("targeted_genes",))


# Settings that came after format 1, with the value that means what earlier versions did.
LATER = {
    name: getattr(cls, name)
    for cls, names in (
        (ModelConfig, ("local_blocks", "local_neighbours", "local_radius_um", "n_platforms", "kl_warmup_steps", "kl_drop_below")),
        (ModelConfig, ("head_width", "precision", "platform_tokens", "query_weight", "input_total", "n_stimuli", "change_weight")),
        (MaskingConfig, ("gene_mask", "gene_mask_rate", "panel_rate", "panel_min_genes", "targeted_genes", "targeted_mask_scale")),
    )
    for name in names
}


def identifying(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that tell one configuration from another: what came later counts where it is used.

    So a model or run of an earlier version keeps its identity.
    """
    return {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}


def _at_least(config: ModelConfig | MaskingConfig, least: int, names: tuple[str, ...]) -> None:
    if wrong := [name for name in names if not getattr(config, name) >= least]:
        raise ValueError(f"{', '.join(wrong)} must be at least {least}, found {getattr(config, wrong[0])}")
