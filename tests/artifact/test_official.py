"""Released checkpoints: every key accounted for, anything unexpected refused, and no code in the file ever run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cellplane.artifact import official
from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.artifact.official import our_key, read_official
from cellplane.errors import FileFormatError, IntegrityError
from cellplane.inference import build_network
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from tests.tiny import GENES, TINY, random_batch

LATENT_KEYS = {"gmvae": "latent.layers.1.inference.", "vae": "latent.layers.1.hid_2", "ae": "latent.layers.1.lat_2lat."}
RELEASED = replace(TINY, n_heads=8, n_batches=3, n_datasets=2, unseen_batch="sum", kl_floor=5.0, kl_weight=5.0, cluster_weight=5.0)


def official_names(config: ModelConfig) -> dict[str, str]:
    """Our names of all weights -> the official keys, the key map read backwards."""
    stems = {ours: theirs for theirs, ours in official._LAYERS.items() if not theirs.startswith("latent")}
    stems |= {ours: theirs for theirs, ours in official._LAYERS.items() if theirs.startswith(LATENT_KEYS[config.latent])}
    for block in range(config.n_blocks):
        stems |= {f"encoder.blocks.{block}.{ours}": f"encoder.layers.{block}.{theirs}" for theirs, ours in official._BLOCK.items()}
    for table in ("batch", "dataset", "platform"):
        stems |= {f"decoder.{table}.{ours}": f"decoder.covariate_layers.0.{table}.{n}" for n, ours in ((1, "activation"), (2, "norm"))}
    exact = {ours: theirs for theirs, ours in official._EXACT.items()}
    names = {}
    for ours in new_model(config, 0).state_dict():
        stem, _, leaf = ours.rpartition(".")
        names[ours] = exact[ours] if ours in exact else f"{stems[stem]}.{leaf}"
    return names


def settings(config: ModelConfig) -> dict[str, Any]:
    return {
        "gene_list": list(GENES),
        "enc_hid": config.width,
        "enc_layers": config.n_blocks,
        "enc_mod": config.attention,
        "latent_mod": config.latent,
        "post_latent_dim": config.latent_width,
        "num_clusters": config.n_clusters,
        "dec_hid": config.decoder_width,
        "model_dropout": config.dropout,
        "lamda": config.kl_floor,
        "w_li": config.kl_weight,
        "w_en": config.cluster_weight,
        "norm": "groupnorm",
        "cat_pe": False,
        "dec_mod": "nbmlp",
    }


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a pair of official files after changing their content."""

    def writer(
        config: ModelConfig = RELEASED,
        state: Callable[[dict[str, Any]], None] = lambda state: None,
        raw: Mapping[str, Any] | None = None,
    ) -> Path:
        weights = new_model(config, 0).state_dict()
        theirs: dict[str, Any] = {name: weights[ours] for ours, name in official_names(config).items()}
        theirs |= {name: torch.zeros(3) for name in official.UNUSED}
        state(theirs)
        torch.save({"model_state_dict": theirs}, tmp_path / "tiny.best.ckpt")
        plain = {key: value for key, value in (settings(config) | dict(raw or {})).items() if value is not ...}
        (tmp_path / "tiny.config.json").write_text(json.dumps(plain))
        return tmp_path

    return writer


def folder_of(directory: Path) -> ModelFolder:
    config, vocabulary, weights = read_official(directory, "tiny")
    return ModelFolder(config=config, weights=weights, vocabulary=vocabulary, task="pretrain", max_cells=8)


def without_cluster_width(config: ModelConfig) -> ModelConfig:
    return replace(config, cluster_width=1, n_heads=8, gene_init_sd=1.0)


@pytest.mark.parametrize("latent", ["gmvae", "vae", "ae"])
@pytest.mark.parametrize("tables", [{}, {"n_platforms": 4}, {"n_batches": 0, "n_datasets": 0}], ids=["tables", "platforms", "no tables"])
def test_a_released_checkpoint_becomes_our_model_to_the_bit(write, latent, tables):
    config = replace(RELEASED, latent=latent, **tables, **(official.VAE_LATENT if latent == "vae" else {}))
    model = folder_of(write(config))
    assert without_cluster_width(model.config) == without_cluster_width(config)
    assert model.vocabulary.gene_ids == GENES
    expected = new_model(config, 0)
    assert all(torch.equal(model.weights[name], tensor) for name, tensor in expected.state_dict().items())
    batch = random_batch([5])
    assert torch.equal(build_network(model)(batch).latent, expected(batch).latent)


def test_an_imported_checkpoint_survives_as_a_model_folder(write, tmp_path):
    model = folder_of(write())
    again = load_model(save_model(model, tmp_path / "model"))
    assert again.config == model.config
    assert all(torch.equal(again.weights[name], model.weights[name]) for name in model.weights)


def test_half_precision_weights_become_float32(write):
    def halve(state: dict[str, Tensor]) -> None:
        state.update({name: tensor.half() for name, tensor in state.items()})

    assert {tensor.dtype for tensor in folder_of(write(state=halve)).weights.values()} == {torch.float32}


def test_positions_are_off_as_released(write):
    assert folder_of(write()).config.positions == "none"


def sinusoid(width: int) -> Tensor:
    """The released table, row 100 x + y: interleaved sines and cosines, of y's bin first."""
    rows = [[0.0] * width for _ in range(10_000)]
    for cell in range(10_000):
        for half, place in ((0, cell % 100), (width // 2, cell // 100)):
            for k in range(width // 4):
                angle = place * 10_000 ** (-2 * k / (width / 2))
                rows[cell][half + 2 * k], rows[cell][half + 2 * k + 1] = math.sin(angle), math.cos(angle)
    return torch.tensor(rows)


def test_positions_can_be_switched_on_with_the_released_vector_for_missing_ones(write):
    missing = torch.linspace(-1, 1, RELEASED.width)

    def with_positions(state: dict[str, Tensor]) -> None:
        state.update({official.MISSING_PE: missing, official.SINUSOID: sinusoid(RELEASED.width)})

    config, _, weights = read_official(write(state=with_positions), "tiny", positions="grid")
    assert config.positions == "grid"
    assert torch.equal(weights["embedder.positions.missing_D"], missing)


@pytest.mark.parametrize(
    ("table", "said"),
    [(torch.zeros(10_000, 16), "not the released 100 x 100 sinusoid"), (torch.zeros(3), r"\(3,\) instead of \(10000, 16\)")],
)
def test_another_table_of_positions_is_refused_where_they_are_on(write, table, said):
    directory = write(state=lambda state: state.update({official.MISSING_PE: torch.zeros(16), official.SINUSOID: table}))
    with pytest.raises(IntegrityError, match=said):
        read_official(directory, "tiny", positions="grid")


def test_without_positions_in_the_checkpoint_they_cannot_be_switched_on(write):
    with pytest.raises(IntegrityError, match="missing_pe"):
        read_official(write(state=lambda state: state.pop(official.MISSING_PE)), "tiny", positions="grid")


def test_the_single_gaussian_keeps_its_released_warm_up(write):
    config = folder_of(write(replace(RELEASED, latent="vae"))).config
    assert (config.kl_weight, config.kl_floor, config.kl_warmup_steps, config.kl_drop_below) == (1.0, 0.0, 10_000, 1.0)


def test_the_number_of_heads_is_the_released_codes_where_the_file_does_not_say(write):
    assert folder_of(write()).config.n_heads == 8
    assert folder_of(write(raw={"enc_head": 2})).config.n_heads == 2


@pytest.mark.parametrize("key", sorted(official.UNUSED))
def test_what_the_released_forward_never_uses_is_left_out(key):
    assert our_key(key) is None


@pytest.mark.parametrize(
    "key",
    ["encoder.layers.0.self_attn.rotary", "encoder.layers.x.norm1.weight", "extra", "decoder.covariate_layers.0.donor.0.weight", ""],
)
def test_an_unknown_key_is_an_error_that_names_it(write, key):
    with pytest.raises(IntegrityError, match=f"no released CellPLM has: {key!r}"):
        read_official(write(state=lambda state: state.update({key: torch.zeros(2)})), "tiny")


def test_a_checkpoint_of_two_kinds_at_once_is_refused(write):
    with pytest.raises(IntegrityError, match="two kinds"):
        read_official(write(state=lambda state: state.update({"latent.layers.1.hid_2mu.weight": torch.zeros(2)})), "tiny")


@pytest.mark.parametrize("ours", ["encoder.blocks.1.query.weight", "latent.prior_mean.bias", "decoder.mean.weight"])
def test_a_missing_tensor_is_named(write, ours):
    directory = write(state=lambda state: state.pop(official_names(RELEASED)[ours]))
    with pytest.raises(IntegrityError, match=f"missing .*{ours}"):
        build_network(folder_of(directory))


def test_a_missing_tensor_that_sizes_are_read_from_is_named(write):
    with pytest.raises(IntegrityError, match=r"have 'embedder\.genes_GD'"):
        read_official(write(state=lambda state: state.pop("embedder.feat_enc.emb")), "tiny")


@pytest.mark.parametrize("ours", ["embedder.genes_GD", "encoder.blocks.0.up.weight", "latent.mean.weight", "decoder.log_dispersion_G"])
def test_a_misshapen_tensor_is_named(write, ours):
    def misshape(state: dict[str, Tensor]) -> None:
        key = official_names(RELEASED)[ours]
        state[key] = torch.cat([state[key], state[key]], dim=-1)

    with pytest.raises(IntegrityError, match=f"{ours}: .* instead of"):
        build_network(folder_of(write(state=misshape)))


def test_as_many_genes_must_be_named_as_have_vectors(write):
    with pytest.raises(IntegrityError, match="23 genes are named but 24 have vectors"):
        read_official(write(raw={"gene_list": list(GENES[:-1])}), "tiny")


@pytest.mark.parametrize("key", sorted(settings(RELEASED)))
def test_a_missing_setting_is_named(write, key):
    with pytest.raises(IntegrityError, match=key):
        read_official(write(raw={key: ...}), "tiny")


@pytest.mark.parametrize(
    "raw", [{"enc_mod": "transformer"}, {"latent_mod": "split"}, {"enc_hid": "wide"}, {"enc_hid": 15}, {"gene_list": 3}], ids=str
)
def test_a_setting_that_we_do_not_have_is_refused(write, raw):
    with pytest.raises(FileFormatError, match="not what a released checkpoint holds") as caught:
        read_official(write(raw=raw), "tiny")
    assert "15" in str(caught.value) or "gene_list" in raw or f"{next(iter(raw))} is {next(iter(raw.values()))!r}" in str(caught.value)


OTHER_NETWORKS = {
    "norm": "layernorm",
    "cat_pe": True,
    "dec_mod": "mlp",
    "mask_type": "hidden",
    "head_type": "annotation",
    "dsbn": True,
    "dar": True,
    "ecs": True,
    "input_covariate": True,
}


@pytest.mark.parametrize("name", sorted(OTHER_NETWORKS))
def test_a_setting_that_means_another_network_is_refused_by_name(write, name):
    with pytest.raises(IntegrityError, match=f"{name} is {OTHER_NETWORKS[name]!r} but only a network with"):
        read_official(write(raw={name: OTHER_NETWORKS[name]}), "tiny")


@pytest.mark.parametrize("name", ["norm", "cat_pe"])
def test_a_setting_left_out_means_what_the_released_code_would_take(write, name):
    with pytest.raises(IntegrityError, match=f"{name} is .*the released code's value where a file does not say"):
        read_official(write(raw={name: ...}), "tiny")


def test_every_setting_that_is_refused_is_tried_here():
    assert OTHER_NETWORKS.keys() == official.FIXED.keys()


def test_a_number_that_is_no_switch_is_refused(write):
    with pytest.raises(IntegrityError, match="dsbn is 0 "):
        read_official(write(raw={"dsbn": 0}), "tiny")


@pytest.mark.parametrize("name", ["batch_num", "dataset_num", "platform_num"])
def test_a_table_must_have_the_rows_that_the_settings_say(write, name):
    with pytest.raises(IntegrityError, match=f"{name} is 17, but the checkpoint's {name.removesuffix('_num')} table has"):
        read_official(write(raw={name: 17}), "tiny")


@pytest.mark.parametrize("raw", [{"mask_beta": False}, {"epochs": 7}, {"batch_num": 3, "dataset_num": 2}], ids=str)
def test_settings_of_training_do_not_matter(write, raw):
    assert folder_of(write(raw=raw)).config == folder_of(write()).config


@pytest.mark.parametrize("value", [3, [1], None, "text"], ids=str)
def test_what_is_no_tensor_is_refused(write, value):
    with pytest.raises(FileFormatError, match="not what a released checkpoint holds"):
        read_official(write(state=lambda state: state.update({"embedder.extra_linear.0.bias": value})), "tiny")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(write, kept):
    path = write() / "tiny.best.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(FileFormatError, match="not a readable official checkpoint"):
        read_official(path.parent, "tiny")


@pytest.mark.parametrize("content", [[], {}, {"other": 1}], ids=str)
def test_a_checkpoint_without_a_state_is_refused(write, content):
    directory = write()
    torch.save(content, directory / "tiny.best.ckpt")
    with pytest.raises(FileFormatError, match="not a readable official checkpoint"):
        read_official(directory, "tiny")


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_broken_settings_are_refused(write, text):
    directory = write()
    (directory / "tiny.config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FileFormatError, match="not a readable official checkpoint"):
        read_official(directory, "tiny")


@pytest.mark.parametrize("name", ["tiny.config.json", "tiny.best.ckpt"])
def test_a_missing_file_says_which_two_are_needed(write, name):
    directory = write()
    (directory / name).unlink()
    with pytest.raises(FileFormatError, match=r"tiny\.config\.json and tiny\.best\.ckpt are needed"):
        read_official(directory, "tiny")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["state", "tensor"])
def test_code_in_a_checkpoint_is_refused_and_not_run(write, tmp_path, place):
    directory, mark = write(), tmp_path / "ran"
    content = Bomb(mark) if place == "state" else {"embedder.feat_enc.emb": Bomb(mark)}
    torch.save({"model_state_dict": content}, directory / "tiny.best.ckpt")
    with pytest.raises(FileFormatError, match="not a readable official checkpoint"):
        read_official(directory, "tiny")
    assert not mark.exists()
