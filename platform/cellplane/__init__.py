"""cellplane: pre-train, fine-tune, version and serve cell language models, from AnnData to endpoint.

Names below are loaded on first use, so that `import cellplane` costs nothing. Importing it before torch also makes
OpenMP threads sleep instead of spin while they wait: spinning threads make everything that shares their cores slow.
"""

from __future__ import annotations

import importlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.1.0"

_HOMES = {
    "CellBatch": "cellplane.cells",
    "CellEmbeddingPipeline": "cellplane.pipelines.embedding",
    "CellTypeAnnotationPipeline": "cellplane.pipelines.annotation",
    "CellplaneError": "cellplane.errors",
    "Client": "cellplane.client",
    "DenoisingPipeline": "cellplane.pipelines.denoising",
    "GeneVocabulary": "cellplane.genes",
    "PerturbationPipeline": "cellplane.pipelines.perturbation",
    "Predictor": "cellplane.inference",
    "SpatialImputationPipeline": "cellplane.pipelines.imputation",
    "pl": "cellplane.pl",
}

__all__ = [
    "CellBatch",
    "CellEmbeddingPipeline",
    "CellTypeAnnotationPipeline",
    "CellplaneError",
    "Client",
    "DenoisingPipeline",
    "GeneVocabulary",
    "PerturbationPipeline",
    "Predictor",
    "SpatialImputationPipeline",
    "__version__",
    "pl",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cellplane' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)  # a module, or a name in one


def __dir__() -> list[str]:
    return sorted(__all__)
