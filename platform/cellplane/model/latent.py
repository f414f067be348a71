"""From a cell's hidden state to its embedding z: a Gaussian mixture, one Gaussian, or a projection.

Training samples z; without noise every kind is deterministic: gmvae takes the mean of the most probable component
(the released code samples even at inference, so that most cells change between two calls). Loss terms are per
sentence, because the floor on them is not linear.
"""

# C cells, S sentences, D width, Z latent, M mixture components

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.model.config import ModelConfig
from cellplane.model.fused import spared
from cellplane.model.linear import Linear
from cellplane.model.noise import Noise

GUMBEL_EPSILON = 1e-20
UNDECIDED = {"float32": 0.0, "bfloat16": 0.03}  # rounding of logits in their standard deviations: measured 0.02 at 85M
SAMPLE_EPSILON, DENSITY_EPSILON = 1e-10, 1e-8  # inside sqrt(var) and log N, as released
VAE_LOG_VAR_LIMIT, VAE_VAR_FLOOR = 5.0, 1e-4


class Latent(NamedTuple):
    """z [C, Z], and per cell the terms its loss is made of (None where the kind has none). A tuple: ZeRO 3 looks for tensors in it."""

    z_CZ: Tensor
    kl_C: Tensor | None = None
    cluster_C: Tensor | None = None


class _Kind(nn.Module):
    """What every kind is called by: inner values are computed again in the backward pass."""

    def forward(self, h_CD: Tensor, noise: Noise | None) -> Latent:
        """Sampled with noise, the most probable one without."""
        return spared(self.latent, h_CD, noise)

    def latent(self, h_CD: Tensor, noise: Noise | None) -> Latent:
        """The same, its inner values kept."""
        raise NotImplementedError


class GaussianMixture(_Kind):
    """q(y | x), q(z | x, y) and the prior p(z | y) with M components."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, z, m, inner = config.width, config.latent_width, config.n_clusters, config.cluster_width
        self.undecided = UNDECIDED[config.precision]
        self.cluster = Linear(width, m, exact=True)
        self.inner = Linear(width + m, inner)
        self.mean, self.variance = Linear(inner, z), Linear(inner, z)
        self.prior_mean, self.prior_variance = Linear(m, z), Linear(m, z)

    def latent(self, h_CD: Tensor, noise: Noise | None) -> Latent:
        """Sampled z and its terms with noise; the most probable component's mean without."""
        logits_CM = self.cluster(h_CD)
        if noise is None:
            return Latent(self.posterior(h_CD, _most_probable(logits_CM, self.undecided).to(h_CD.dtype))[0])
        uniform = noise.uniform(logits_CM, "latent.gumbel")
        y_CM = torch.softmax(logits_CM - torch.log(-torch.log(uniform + GUMBEL_EPSILON) + GUMBEL_EPSILON), dim=-1)
        mean_CZ, var_CZ = self.posterior(h_CD, y_CM)
        z_CZ = mean_CZ + noise.normal(mean_CZ, "latent.normal") * torch.sqrt(var_CZ + SAMPLE_EPSILON)
        prior_mean_CZ, prior_var_CZ = self.prior_mean(y_CM).float(), F.softplus(self.prior_variance(y_CM).float())
        kl_C = _log_normal(z_CZ, mean_CZ, var_CZ) - _log_normal(z_CZ, prior_mean_CZ, prior_var_CZ)
        log_probability = torch.log_softmax(logits_CM, dim=-1)
        entropy_C = -(log_probability.exp() * log_probability).sum(-1)
        return Latent(z_CZ, kl_C, math.log(logits_CM.shape[-1]) - entropy_C)

    def posterior(self, h_CD: Tensor, y_CM: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z | x, y), each [C, Z]."""
        inner = F.relu(self.inner(torch.cat([h_CD, y_CM], dim=-1)))
        return self.mean(inner).float(), F.softplus(self.variance(inner).float())


class SingleGaussian(_Kind):
    """A variational autoencoder's latent space with a standard normal prior."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mean, self.log_variance = (Linear(config.width, config.latent_width) for _ in range(2))

    def latent(self, h_CD: Tensor, noise: Noise | None) -> Latent:
        """Sampled z and its divergence with noise; the mean without."""
        mean_CZ = self.mean(h_CD)
        if noise is None:
            return Latent(mean_CZ)
        log_var_CZ = self.log_variance(h_CD).clamp(-VAE_LOG_VAR_LIMIT, VAE_LOG_VAR_LIMIT)
        sd_CZ = torch.sqrt(log_var_CZ.exp() + VAE_VAR_FLOOR)
        z_CZ = mean_CZ + noise.normal(mean_CZ, "latent.normal") * sd_CZ
        kl_C = -0.5 * (1 + 2 * sd_CZ.log() - mean_CZ.square() - sd_CZ.square()).sum(-1)
        return Latent(z_CZ, kl_C)


class Projection(_Kind):
    """One linear layer: what fine-tuning for annotation uses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = Linear(config.width, config.latent_width)

    def latent(self, h_CD: Tensor, noise: Noise | None) -> Latent:  # noqa: ARG002  (same call for every kind)
        """The projection; nothing is random."""
        return Latent(self.linear(h_CD))


def _most_probable(logits_CM: Tensor, undecided: float) -> Tensor:
    """One-hot [C, M] of the largest logit; where the two largest are nearer than ``undecided`` standard deviations, both by share.

    A cell halfway between two components would otherwise jump from one to the other with the rounding of half precision.
    """
    if undecided == 0 or logits_CM.shape[1] < 2:
        return F.one_hot(logits_CM.argmax(-1), logits_CM.shape[1])
    top, which = logits_CM.topk(2, dim=1)
    gap = (top[:, :1] - top[:, 1:]) / (undecided * logits_CM.std(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    first = (0.5 + gap / 2).clamp(max=1.0)
    return torch.zeros_like(logits_CM).scatter_(1, which, torch.cat([first, 1 - first], dim=1))


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    variance = variance + DENSITY_EPSILON
    return -0.5 * (math.log(2 * math.pi) + variance.log() + (x - mean).square() / variance).sum(-1)


LATENTS: dict[str, Callable[[ModelConfig], nn.Module]] = {"gmvae": GaussianMixture, "vae": SingleGaussian, "ae": Projection}
