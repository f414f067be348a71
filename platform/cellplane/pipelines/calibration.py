"""Temperature scaling: one number that makes stated confidence honest, learned on cells that were not trained on.

Dividing all logits by it changes no label, only how sure the model says it is (Guo et al., "On calibration of modern
neural networks", ICML 2017).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

from cellplane.errors import DataError

LOWEST, HIGHEST = 0.1, 10.0
PRIOR_WEIGHT = 1.0  # pulls towards 1 with the strength of about one cell: where all answers are right nothing else would


def fit_temperature(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """The temperature under which these cells' true labels are most likely, in [0.1, 10]; 1 = as the network says.

    ``logits`` [C, K], ``truth`` [C] positions of the classes. DataError without cells, or for other shapes.
    """
    if logits.ndim != 2 or truth.shape != (len(logits),) or not len(logits):
        raise DataError(f"calibration needs one true class a cell, found logits {logits.shape} and labels {truth.shape}")
    exact = logits.astype(np.float64)

    def cost(log_temperature: float) -> float:
        log_proba = log_softmax(exact / math.exp(log_temperature), axis=1)
        return float(-log_proba[np.arange(len(truth)), truth].sum() + PRIOR_WEIGHT * log_temperature**2)

    found = minimize_scalar(cost, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-4})
    return float(math.exp(found.x))


def negative_log_likelihood(logits: NDArray[np.float32], truth: NDArray[np.int64], temperature: float = 1.0) -> float:
    """Mean surprise in nats at the true class; 0 is certain and right."""
    scaled = logits.astype(np.float64) / temperature
    return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]))
