"""Reading the released CellPLM checkpoints: `{prefix}.config.json` beside `{prefix}.best.ckpt`.

Every key of the file is accounted for: used, or knowingly unused; anything else is an error, and so is a setting that
means another network than ours. Loaded with weights_only=True, so no code in the file runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cellplane.errors import CellplaneError, FileFormatError, IntegrityError
from cellplane.genes import GeneVocabulary
from cellplane.model.config import ModelConfig

MISSING_PE, SINUSOID = "embedder.pe_enc.missing_pe", "embedder.pe_enc.pe_enc.weight"
UNUSED = {
    "embedder.norm0.weight": "never applied in the released forward",
    "embedder.norm0.bias": "never applied in the released forward",
    MISSING_PE: "positions are switched off in the released forward",
    SINUSOID: "positions are switched off in the released forward; a fixed table, computed where positions are on",
}

# Settings that would make another network: what ours has, and what the released code takes where a file does not say (... = it must).
FIXED: dict[str, tuple[Any, Any]] = {
    "norm": ("groupnorm", "layernorm"),
    "cat_pe": (False, True),
    "dec_mod": ("nbmlp", ...),
    "mask_type": ("input", "input"),
    "head_type": (None, None),
    "dsbn": (False, False),
    "dar": (False, False),
    "ecs": (False, False),
    "input_covariate": (False, False),
}
# Our setting -> the released one that it is read from.
SETTINGS = {
    "width": "enc_hid",
    "n_blocks": "enc_layers",
    "attention": "enc_mod",
    "latent": "latent_mod",
    "latent_width": "post_latent_dim",
    "n_clusters": "num_clusters",
    "decoder_width": "dec_hid",
    "dropout": "model_dropout",
    "kl_floor": "lamda",
    "kl_weight": "w_li",
    "cluster_weight": "w_en",
}
HEADS = 8  # enc_head of the released code, which its files do not say
GRID, FREQUENCY_BASE = 100, 10_000.0  # of the released sinusoid
VAE_LATENT = {"kl_weight": 1.0, "kl_floor": 0.0, "kl_warmup_steps": 10_000, "kl_drop_below": 1.0}  # fixed in the released code

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
    "decoder.covariate_layers.0.platform.0.weight": "decoder.platform.table",
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
    if match := re.fullmatch(r"decoder\.covariate_layers\.0\.(batch|dataset|platform)\.(1|2)", stem):
        return f"decoder.{match[1]}.{'activation' if match[2] == '1' else 'norm'}.{leaf}"
    raise IntegrityError(f"the checkpoint has a key that no released CellPLM has: {key!r}; is it of another version or model?")


def our_weights(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, float32. Raises IntegrityError for an unknown key, or two of one meaning."""
    names = {key: name for key in official if (name := our_key(key)) is not None}
    if len(set(names.values())) < len(names):
        raise IntegrityError("the checkpoint mixes keys of two kinds of latent space; expected those of one released model")
    return {name: official[key].float().contiguous() for key, name in names.items()}


def read_official(
    directory: Path, prefix: str, positions: Literal["none", "grid"] = "none"
) -> tuple[ModelConfig, GeneVocabulary, dict[str, Tensor]]:
    """Config, vocabulary and weights of a released checkpoint.

    Positions are off, as its training had them; ``grid`` switches its 100 x 100 sinusoid over [0, 1] on, with its vector
    for missing coordinates. Raises FileFormatError for missing or unreadable files, and IntegrityError for keys, shapes
    or settings that do not belong.
    """
    raw, official = _read(directory, prefix)
    try:
        weights = our_weights(official)
        if positions == "grid":
            weights["embedder.positions.missing_D"] = _checked_grid(official)
        vocabulary = GeneVocabulary.from_ids(raw["gene_list"])
        if len(vocabulary) != len(weights["embedder.genes_GD"]):
            raise IntegrityError(f"{prefix}: {len(vocabulary)} genes are named but {len(weights['embedder.genes_GD'])} have vectors")
        _check_settings(raw, weights, prefix)
        return _model_config(raw, weights, positions), vocabulary, weights
    except CellplaneError:
        raise
    except KeyError as error:
        raise IntegrityError(f"{prefix}: the released checkpoints have {error.args[0]!r}, this one does not") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{prefix}: not what a released checkpoint holds: {_first_line(error)}") from error


def _read(directory: Path, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    return raw, official


def _checked_grid(official: Mapping[str, Tensor]) -> Tensor:
    """The vector for missing coordinates, once the stored sinusoid is the one that we compute."""
    missing, table = official[MISSING_PE].float(), official[SINUSOID].float()
    width = len(missing)
    if table.shape != (GRID * GRID, width) or width % 4:
        raise IntegrityError(f"{SINUSOID}: {tuple(table.shape)} instead of {(GRID * GRID, width)}, the width of {MISSING_PE}")
    frequency = torch.exp(torch.arange(width // 4) * (-math.log(FREQUENCY_BASE) / (width // 4)))
    angle = torch.arange(GRID)[:, None] * frequency
    side = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    expected = torch.cat([side.repeat(GRID, 1), side.repeat_interleave(GRID, 0)], dim=1)  # row = 100 * bin of x + bin of y
    if not torch.allclose(table, expected, rtol=0, atol=1e-4):
        raise IntegrityError(f"{SINUSOID} is not the released 100 x 100 sinusoid; import with positions none")
    return missing.contiguous()


def _check_settings(raw: Mapping[str, Any], weights: Mapping[str, Tensor], prefix: str) -> None:
    """Raises IntegrityError for a setting of another network than the one we build, or that contradicts the tensors."""
    for name, (ours, default) in FIXED.items():
        found = raw[name] if default is ... else raw.get(name, default)
        if found != ours or isinstance(found, bool) != isinstance(ours, bool):
            said = "" if name in raw else ", the released code's value where a file does not say,"
            raise IntegrityError(f"{prefix}: {name} is {found!r}{said} but only a network with {ours!r} can be imported")
    for name, table in (("batch_num", "batch"), ("dataset_num", "dataset"), ("platform_num", "platform")):
        rows = _rows(weights, f"decoder.{table}.table")
        if raw.get(name, rows) != rows:
            raise IntegrityError(f"{prefix}: {name} is {raw[name]!r}, but the checkpoint's {table} table has {rows} rows")


def _rows(weights: Mapping[str, Tensor], key: str) -> int:
    return len(weights[key]) if key in weights else 0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _model_config(raw: Mapping[str, Any], weights: Mapping[str, Tensor], positions: Literal["none", "grid"]) -> ModelConfig:
    """Our configuration. Raises FileFormatError that names a setting whose value we do not have."""
    values = {ours: raw[theirs] for ours, theirs in SETTINGS.items()} | {
        "n_genes": _rows(weights, "embedder.genes_GD"),
        "n_heads": raw.get("enc_head", HEADS),
        "positions": positions,
        "cluster_width": _rows(weights, "latent.inner.weight") or ModelConfig.cluster_width,
        "decoder_bottleneck": _rows(weights, "decoder.bottleneck.weight"),
        "n_batches": _rows(weights, "decoder.batch.table"),
        "n_datasets": _rows(weights, "decoder.dataset.table"),
        "n_platforms": _rows(weights, "decoder.platform.table"),
        "unseen_batch": "sum",
    }
    if values["latent"] == "vae":
        values |= VAE_LATENT
    try:
        return TypeAdapter(ModelConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        found = f"{SETTINGS.get(ours, ours)} is {first['input']!r}: " if ours else ""
        raise FileFormatError(f"not what a released checkpoint holds: {found}{first['msg']}") from error
