"""The released CellPLM's own arrays, stage by stage: embedder, blocks, latent, decoder, loss, gradients, one optimizer step.

The arrays in ../shared/oracle were computed by the released package (0.1.0.post2) on one thread in float32; a released
model's answers must be ours to rtol 1e-4, atol 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane.artifact.official import our_key, read_official
from cellplane.model.cellplm import CellPLM
from cellplane.model.masking import mask_of
from tests.model.dense import reconstruction
from tests.model.released import GivenNoise, batch_of, by_sample, load, near, no_attention_dropout, sentences_of


@pytest.mark.parametrize("name", ["embed_scrna", "embed_subset", "embed_first20"])
def test_embedding_equals_the_released_model_at_every_stage(oracle: Path, name: str) -> None:
    arrays, model = np.load(oracle / f"{name}.npz"), load(oracle, "tiny_gmvae")
    batch = batch_of(arrays["x"], arrays.get("gene_index"))
    with torch.no_grad():
        near(model.embedder.gene_sum(batch, None), arrays["gene_sum"])
        hidden = model.embedder(batch, None, None)
        near(hidden, arrays["embed"])
        for index, block in enumerate(model.encoder.blocks):
            near(block.out(block.attention(hidden, batch.cu_seqlens)), arrays[f"attn{index}"])
            hidden = block(hidden, batch.cu_seqlens, None)
            near(hidden, arrays[f"enc{index}"])
        near(model.encoder.norm(hidden), arrays["preln"])
        near(model.latent.cluster(model.encoder.norm(hidden)), arrays["lat_logits"])
        if "mean_at_argmax_cluster" in arrays:
            near(model(batch).latent, arrays["mean_at_argmax_cluster"])


def test_posterior_given_the_released_cluster_sample_is_the_same(oracle: Path) -> None:
    arrays, model = np.load(oracle / "embed_scrna.npz"), load(oracle, "tiny_gmvae")
    with torch.no_grad():
        mean, variance = model.latent.posterior(torch.from_numpy(arrays["preln"]), torch.from_numpy(arrays["lat_categorical"]))
    near(mean, arrays["lat_mean"])
    near(variance, arrays["lat_var"])


@pytest.mark.parametrize(
    ("key", "batches", "datasets"), [("mean", True, True), ("mean_nolabels", False, False), ("mean_batch_only", True, False)]
)
def test_decoder_equals_the_released_one_with_and_without_labels(oracle: Path, key: str, batches: bool, datasets: bool) -> None:
    arrays, model = np.load(oracle / "decoder.npz"), load(oracle, "tiny_gmvae")
    batch = batch_of(arrays["x"])
    unknown = batch.batch_index
    batch = replace(
        batch,
        batch_index=torch.from_numpy(arrays["batch"]) if batches else unknown,
        dataset_index=torch.from_numpy(arrays["dataset"]) if datasets else unknown,
    )
    with torch.no_grad():
        mean, dispersion = model.decoder(torch.from_numpy(arrays["z"]), batch, None)
    near(mean, arrays[key])
    near(dispersion, arrays["disp"][0])


@pytest.mark.parametrize("lamda", [0, 5])
def test_pretraining_loss_gradients_and_one_step_equal_the_released_code(oracle: Path, lamda: int) -> None:
    arrays = np.load(oracle / "pretrain_loss.npz")
    model = load(oracle, "tiny_gmvae", kl_floor=float(lamda), dropout=0.0)
    batch = replace(batch_of(arrays["x"]), batch_index=torch.from_numpy(arrays["batch"]), dataset_index=torch.from_numpy(arrays["dataset"]))
    mask = mask_of(batch, torch.from_numpy(arrays["mask"]))
    noise = GivenNoise(torch.from_numpy(arrays["U"]), torch.from_numpy(arrays["eps"]))
    with no_attention_dropout():
        output = model(batch, mask, noise)
        assert output.loss is not None
        nb, hidden, kl, cluster = output.loss.parts[:, 0]
        near(output.latent, arrays[f"lamda{lamda}_z"])
        near(kl, arrays[f"lamda{lamda}_gauss_raw"])
        near(cluster, arrays[f"lamda{lamda}_cat_raw"])
        near(nb + hidden, arrays[f"lamda{lamda}_recon_loss"])
        near(output.loss.total[0], arrays[f"lamda{lamda}_loss"])
        output.loss.total.sum().backward()
        ours = dict(model.named_parameters())
        for name, norm in zip(arrays[f"lamda{lamda}_gradnorm_names"], arrays[f"lamda{lamda}_gradnorms"], strict=True):
            near(ours[our_key(str(name))].grad.norm(), norm)
        assert all(parameter.grad is not None for parameter in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)  # the stored full gradients are clipped ones
        for name in (key for key in arrays.files if key.startswith(f"lamda{lamda}_grad:")):
            near(ours[our_key(name.split(":", 1)[1])].grad, arrays[name])
        torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=1e-8).step()
        after = model(batch, mask, noise).loss
        near(after.total[0], arrays[f"lamda{lamda}_loss_after_step"])


def test_annotation_logits_and_loss_equal_the_released_head(oracle: Path) -> None:
    arrays = np.load(oracle / "annotation.npz")
    config, _, weights = read_official(oracle, "tiny_gmvae")
    model = CellPLM(replace(config, latent="ae", decoder="none", n_classes=5))
    kept = {name: tensor for name, tensor in weights.items() if name.startswith(("embedder.", "encoder."))}
    new = {our_key(key[2:]): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("w:")}
    model.load_state_dict(kept | new, strict=True)
    batch = replace(batch_of(arrays["x"]), labels=torch.from_numpy(arrays["label"]))
    with torch.no_grad():
        output = model(batch)
    near(output.logits, arrays["logits"])
    near(output.latent, arrays["latent"])
    near(output.loss.total[0], arrays["eval_ce_loss"])


def test_vae_embedding_equals_the_released_one_and_depends_on_the_context(oracle: Path) -> None:
    arrays, model = np.load(oracle / "vae.npz"), load(oracle, "tiny_vae")
    batch = batch_of(arrays["x"], n_genes=120)
    with torch.no_grad():
        near(model(batch).latent, arrays["emb_one_context"])
        packed, order = sentences_of(arrays["x"], by_sample(arrays["batch"]), 120)
        near(model(packed).latent, arrays["emb_by_batch"][order])


def test_reconstruction_ignores_unmeasured_genes(oracle: Path) -> None:
    arrays, model = np.load(oracle / "embed_subset.npz"), load(oracle, "tiny_gmvae")
    batch = batch_of(arrays["x"], arrays["gene_index"])
    mask = mask_of(batch, torch.ones(40, 200, dtype=torch.bool))
    with torch.no_grad():
        mean, dispersion = model.decoder(model(batch).latent, batch, None)
        changed = mean.clone()
        changed[:, ~batch.panels[0]] = 1e5
        before, after = reconstruction(batch, mask, mean, dispersion), reconstruction(batch, mask, changed, dispersion)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
