"""The released CellPLM's arrays, second part: positions, prior, whole model, single Gaussian, contexts, imputation.

See tests/model/released.py for where they come from and how near ours must be.
"""

# C cells, G genes, M mixture components

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.cellplm import CellPLM
from cellplane.model.latent import SAMPLE_EPSILON, _log_normal
from cellplane.model.losses import kl_term
from cellplane.model.masking import mask_of
from cellplane.pipelines.metrics import gene_scores
from tests.model.released import GivenNoise, batch_of, by_sample, load, near, no_attention_dropout, sentences_of


@pytest.mark.parametrize("name", ["embed_scrna", "embed_subset", "embed_first20"])
def test_cluster_probabilities_and_the_prior_of_the_sampled_cluster_are_the_released_ones(oracle: Path, name: str) -> None:
    arrays, latent = np.load(oracle / f"{name}.npz"), load(oracle, "tiny_gmvae").latent
    logits, cluster = torch.from_numpy(arrays["lat_logits"]), torch.from_numpy(arrays["lat_categorical"])
    gumbel = logits - torch.log(-torch.log(torch.from_numpy(arrays["U"]) + 1e-20) + 1e-20)
    assert torch.equal(F.one_hot(gumbel.argmax(1), logits.shape[1]).float(), cluster)
    with torch.no_grad():
        near(logits.softmax(1), arrays["lat_prob_cat"])
        near(latent.prior_mean(cluster), arrays["lat_y_mean"])
        near(F.softplus(latent.prior_variance(cluster)), arrays["lat_y_var"])
        mean, variance = latent.posterior(torch.from_numpy(arrays["preln"]), cluster)
    near(mean, arrays["z"])
    near(mean + torch.from_numpy(arrays["eps"]) * torch.sqrt(variance + SAMPLE_EPSILON), arrays["lat_gaussian"])


def spatial(arrays: dict[str, np.ndarray], missing: bool = False) -> CellBatch:
    coordinates = torch.from_numpy(arrays["coord"])
    return replace(batch_of(arrays["x"]), coordinates=torch.full_like(coordinates, torch.nan) if missing else coordinates)


def stages(model: CellPLM, batch: CellBatch) -> dict[str, Tensor]:
    """What the oracle calls embed, enc1 and preln."""
    with torch.no_grad():
        embed = hidden = model.embedder(batch, None, None)
        for block in model.encoder.blocks:
            hidden = block(hidden, batch.cu_seqlens, None)
        return {"embed": embed, "enc1": hidden, "preln": model.encoder.norm(hidden)}


def hard_cluster(arrays: dict[str, np.ndarray], logits: Tensor) -> Tensor:
    """The cluster that the released code samples at inference, given its uniforms."""
    gumbel = logits - torch.log(-torch.log(torch.from_numpy(arrays["U"]) + 1e-20) + 1e-20)
    return F.one_hot(gumbel.argmax(1), logits.shape[1]).float()


def test_released_positions_are_off_so_coordinates_change_nothing(oracle: Path) -> None:
    arrays, model = np.load(oracle / "embed_srt.npz"), load(oracle, "tiny_gmvae")
    found = stages(model, spatial(arrays))
    near(found["embed"], arrays["released_embed"])
    with torch.no_grad():
        cluster = hard_cluster(arrays, model.latent.cluster(found["preln"]))
        near(model.latent.posterior(found["preln"], cluster)[0], arrays["released_z"])


def test_the_grid_encoding_is_the_released_sinusoid(oracle: Path) -> None:
    arrays, model = np.load(oracle / "embed_srt.npz"), load(oracle, "tiny_gmvae", positions="grid")
    near(model.embedder.positions(spatial(arrays)), arrays["pe"])


def test_positions_switched_on_give_the_released_modules_answers(oracle: Path) -> None:
    arrays, model = np.load(oracle / "embed_srt.npz"), load(oracle, "tiny_gmvae", positions="grid")
    found = stages(model, spatial(arrays))
    for stage, tensor in found.items():
        near(tensor, arrays[f"pe_on_{stage}"])
    with torch.no_grad():
        logits = model.latent.cluster(found["preln"])
        near(logits, arrays["pe_on_lat_logits"])
        near(model.latent.posterior(found["preln"], hard_cluster(arrays, logits))[0], arrays["pe_on_z"])


def test_missing_coordinates_get_the_released_vector(oracle: Path) -> None:
    arrays, model = np.load(oracle / "embed_srt.npz"), load(oracle, "tiny_gmvae", positions="grid")
    found = stages(model, spatial(arrays, missing=True))
    near(found["embed"], arrays["pe_on_missing_embed"])
    near(found["enc1"], arrays["pe_on_missing_enc1"])
    with torch.no_grad():
        cluster = hard_cluster(arrays, model.latent.cluster(found["preln"]))
        near(model.latent.posterior(found["preln"], cluster)[0], arrays["pe_on_missing_z"])


def test_the_whole_model_in_evaluation_equals_the_released_one(oracle: Path) -> None:
    arrays, model = np.load(oracle / "decoder.npz"), load(oracle, "tiny_gmvae")
    batch = replace(batch_of(arrays["x"]), batch_index=torch.from_numpy(arrays["batch"]), dataset_index=torch.from_numpy(arrays["dataset"]))
    with torch.no_grad():
        hidden = model.encoder(model.embedder(batch, None, None), batch, None)
        logits = model.latent.cluster(hidden)
        cluster = hard_cluster(arrays, logits)
        mean, variance = model.latent.posterior(hidden, cluster)
        near(mean, arrays["full_z"])
        counts, dispersion = model.decoder(mean, batch, None)
        near(counts, arrays["full_mean"])
        near(dispersion, arrays["full_disp_row"])
        one_gene_hidden = mask_of(batch, (torch.arange(200) == 0).expand(40, 200))  # cells that hide nothing are not scored
        likelihood = model.decoder(mean, batch, None, one_gene_hidden)[0]
        near(likelihood.mean(), arrays["full_target_loss"])
        latent_loss = released_latent_loss(model, arrays, cluster, (mean, variance))
        near(latent_loss, arrays["full_latent_loss"])
        near(latent_loss + likelihood.mean(), arrays["full_loss"])


def released_latent_loss(model: CellPLM, arrays: dict[str, np.ndarray], cluster: Tensor, posterior: tuple[Tensor, Tensor]) -> Tensor:
    """Of the released evaluation, from our parts: z drawn from the posterior at the hard cluster; the cluster term is inert at 5."""
    mean, variance = posterior
    z = mean + torch.from_numpy(arrays["eps"]) * torch.sqrt(variance + SAMPLE_EPSILON)
    prior = model.latent.prior_mean(cluster), F.softplus(model.latent.prior_variance(cluster))
    kl = (_log_normal(z, mean, variance) - _log_normal(z, *prior)).mean()
    return kl_term(kl[None], model.config, 0)[0] + model.config.cluster_weight * model.config.kl_floor


@pytest.mark.parametrize("lamda", [0, 5])
def test_the_rest_of_the_pretraining_arrays_agree(oracle: Path, lamda: int) -> None:
    arrays = np.load(oracle / "pretrain_loss.npz")
    model = load(oracle, "tiny_gmvae", kl_floor=float(lamda), dropout=0.0)
    batch = replace(batch_of(arrays["x"]), batch_index=torch.from_numpy(arrays["batch"]), dataset_index=torch.from_numpy(arrays["dataset"]))
    mask = mask_of(batch, torch.from_numpy(arrays["mask"]))
    near(model.embedder(batch, mask, None), arrays[f"lamda{lamda}_embed"])
    with no_attention_dropout():
        loss = model(batch, mask, GivenNoise(torch.from_numpy(arrays["U"]), torch.from_numpy(arrays["eps"]))).loss
    near(loss.total[0] - loss.parts[:2, 0].sum(), arrays[f"lamda{lamda}_latent_loss"])
    loss.total.sum().backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    near(norm, arrays[f"lamda{lamda}_total_gradnorm"])


def test_the_single_gaussians_training_loss_is_the_released_one_half_way_through_its_warm_up(oracle: Path) -> None:
    arrays, model = np.load(oracle / "vae.npz"), load(oracle, "tiny_vae", dropout=0.0)
    assert (model.config.kl_warmup_steps, model.config.kl_drop_below) == (10_000, 1.0)
    batch = batch_of(arrays["x"], n_genes=120)
    batch = replace(batch, batch_index=torch.from_numpy(arrays["batch_id"]), dataset_index=torch.from_numpy(arrays["dataset_id"]))
    noise = GivenNoise(None, torch.from_numpy(arrays["eps"]), step=round(10_000 * float(arrays["kl_weight"])))
    with no_attention_dropout(), torch.no_grad():
        output = model(batch, mask_of(batch, torch.from_numpy(arrays["mask"])), noise)
    nb, hidden, kl, _ = output.loss.parts[:, 0]
    near(output.latent, arrays["train_z"])
    near(nb + hidden, arrays["train_recon_loss"])
    near(0.5 * kl, arrays["train_latent_loss"])
    near(output.loss.total[0], arrays["train_loss"])


def test_embeddings_in_contexts_of_seven_cells_are_the_released_ones(oracle: Path) -> None:
    arrays, model = np.load(oracle / "vae.npz"), load(oracle, "tiny_vae")
    chunks = [chunk for rows in by_sample(arrays["batch"]) for chunk in np.split(rows, range(7, len(rows), 7))]
    packed, order = sentences_of(arrays["x"], chunks, 120)
    with torch.no_grad():
        near(model(packed).latent, arrays["emb_batch_size7"][order])


@pytest.fixture
def imputed(oracle: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The imputation arrays and our prediction: the decoder's mean, scaled to each cell's total."""
    arrays, model = dict(np.load(oracle / "imputation.npz")), load(oracle, "tiny_vae")
    packed, order = sentences_of(arrays["x"], by_sample(arrays["batch"]), 120)
    with torch.no_grad():
        mean = model.decoder(model(packed).latent, packed, None)[0]
        scaled = mean * (packed.totals() / mean.sum(1))[:, None]
    ours = np.empty_like(arrays["pred"])
    ours[order] = scaled.numpy()
    return arrays, ours


def test_imputed_counts_are_the_released_ones(imputed: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    arrays, ours = imputed
    near(ours, arrays["pred"])


def test_imputation_scores_are_the_released_ones(imputed: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    arrays, ours = imputed
    scores = gene_scores(arrays["truth"], ours[:, arrays["target_index"]])
    near(scores.pearson.mean(), arrays["score_corr"])
    near(scores.cosine.mean(), arrays["score_cos"])
    near(scores.mae.mean(), arrays["score_mae"])
    near((scores.rmse**2).mean(), arrays["score_mse"])
    # The released mean RMSE appends the whole list of genes so far for every gene: of three genes the first counts thrice.
    near(np.average(scores.rmse, weights=[3, 2, 1]), arrays["score_rmse"])
