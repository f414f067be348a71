"""Reading the released CellPLM checkpoints: `{prefix}.config.json` beside `{prefix}.best.ckpt`.

Every key of the file is accounted for: used, or knowingly unused; anything else is an error. Loaded with
weights_only=True, so no code in the file runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from cellplane.errors import CellplaneError, FileFormatError, IntegrityError
from cellplane.genes import GeneVocabulary
from cellplane.model.config import ModelConfig

UNUSED = {
    "embedder.norm0.weight": "never applied in the released forward",
    "embedder.norm0.bias": "never applied in the released forward",
    "embedder.pe_enc.missing_pe": "positions are switched off in the released forward",
    "embedder.pe_enc.pe_enc.weight": "positions are switched off in the released forward",
}

_BLOCK = {
    "self_attn.query_projection": "query",
    "self_attn.key_projection": "key",
    "self_attn.value_projection": "value",
    "self_attn.out_projection": "out",
    "_ff_block.0": "up",
    "_ff_block.3": "down",
    "norm1": "norm1",
    "norm2": "norm2",
}

_LAYERS = {
    "embedder.extra_linear.0": "embedder.linear",
    "embedder.extra_linear.3": "embedder.norm",
    "pre_latent_norm.norm": "encoder.norm",
    "latent.layers.1.inference.inference_qyx.0.logits": "latent.cluster",
    "latent.layers.1.inference.inference_qzyx.0": "latent.inner",
    "latent.layers.1.inference.inference_qzyx.2.mu": "latent.mean",
    "latent.layers.1.inference.inference_qzyx.2.var": "latent.variance",
    "latent.layers.1.inference.y_mu": "latent.prior_mean",
    "latent.layers.1.inference.y_var": "latent.prior_variance",
    "latent.layers.1.hid_2mu": "latent.mean",
    "latent.layers.1.hid_2sigma": "latent.log_variance",
    "latent.layers.1.lat_2lat.0": "latent.linear",
    "decoder.layers.0.0": "decoder.linear",
    "decoder.layers.0.1": "decoder.activation",
    "decoder.layers.0.3": "decoder.norm",
    "decoder.out_layer.dec_1": "decoder.bottleneck",
    "decoder.out_layer.dec_mean.0": "decoder.mean",
    "head.mlp.1": "head.linear",
}

_EXACT = {
    "embedder.feat_enc.emb": "embedder.genes_GD",
    "decoder.out_layer.dec_disp": "decoder.log_dispersion_G",
    "decoder.covariate_layers.0.batch.0.weight": "decoder.batch.table",
    "decoder.covariate_layers.0.dataset.0.weight": "decoder.dataset.table",
}


def our_key(key: str) -> str | None:
    """Our name of an official key; None when it is knowingly unused. Raises IntegrityError for an unknown key."""
    if key in UNUSED:
        return None
    if key in _EXACT:
        return _EXACT[key]
    stem, _, leaf = key.rpartition(".")
    if stem in _LAYERS:
        return f"{_LAYERS[stem]}.{leaf}"
    if (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", stem)) and match[2] in _BLOCK:
        return f"encoder.blocks.{match[1]}.{_BLOCK[match[2]]}.{leaf}"
    if match := re.fullmatch(r"decoder\.covariate_layers\.0\.(batch|dataset)\.(1|2)", stem):
        return f"decoder.{match[1]}.{'activation' if match[2] == '1' else 'norm'}.{leaf}"
    raise IntegrityError(f"the checkpoint has a key that no released CellPLM has: {key!r}; is it of another version or model?")


def our_weights(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, float32. Raises IntegrityError for an unknown key, or two of one meaning."""
    names = {key: name for key in official if (name := our_key(key)) is not None}
    if len(set(names.values())) < len(names):
        raise IntegrityError("the checkpoint mixes keys of two kinds of latent space; expected those of one released model")
    return {name: official[key].float().contiguous() for key, name in names.items()}


def read_official(directory: Path, prefix: str) -> tuple[ModelConfig, GeneVocabulary, dict[str, Tensor]]:
    """Config, vocabulary and weights of a released checkpoint; positions off, as its training had them.

    Raises FileFormatError for missing or unreadable files and IntegrityError for keys or shapes that do not belong.
    """
    config_path, weights_path = directory / f"{prefix}.config.json", directory / f"{prefix}.best.ckpt"
    try:
        raw = json.loads(config_path.read_text(encoding="utf-8"))
        official = torch.load(weights_path, map_location="cpu", weights_only=True)["model_state_dict"]
    except FileNotFoundError as error:
        raise FileFormatError(
            f"no official checkpoint {prefix!r} in {directory}: {config_path.name} and {weights_path.name} are needed"
        ) from error
    except Exception as error:
        raise FileFormatError(f"{directory / prefix}: not a readable official checkpoint: {_first_line(error)}") from error
    try:
        weights = our_weights(official)
        vocabulary = GeneVocabulary.from_ids(raw["gene_list"])
        if len(vocabulary) != len(weights["embedder.genes_GD"]):
            raise IntegrityError(f"{prefix}: {len(vocabulary)} genes are named but {len(weights['embedder.genes_GD'])} have vectors")
        return _model_config(raw, weights), vocabulary, weights
    except CellplaneError:
        raise
    except KeyError as error:
        raise IntegrityError(f"{prefix}: the released checkpoints have {error.args[0]!r}, this one does not") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{prefix}: not what a released checkpoint holds: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _model_config(raw: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ModelConfig:
    def rows(key: str) -> int:
        return len(weights[key]) if key in weights else 0

    config = ModelConfig(
        n_genes=rows("embedder.genes_GD"),
        width=raw["enc_hid"],
        n_blocks=raw["enc_layers"],
        attention=raw["enc_mod"],
        latent=raw["latent_mod"],
        latent_width=raw["post_latent_dim"],
        n_clusters=raw["num_clusters"],
        cluster_width=rows("latent.inner.weight") or ModelConfig.cluster_width,
        decoder_width=raw["dec_hid"],
        decoder_bottleneck=rows("decoder.bottleneck.weight"),
        n_batches=rows("decoder.batch.table"),
        n_datasets=rows("decoder.dataset.table"),
        unseen_batch="sum",
        dropout=raw["model_dropout"],
        kl_floor=raw["lamda"],
        kl_weight=raw["w_li"],
        cluster_weight=raw["w_en"],
    )
    return TypeAdapter(ModelConfig).validate_python(config.as_dict())  # a kind that we do not have is found here
