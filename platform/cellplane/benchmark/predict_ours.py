"""One process of a prediction's measurement: the bare network on cells that lie ready, and whole files answered."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from cellplane.benchmark.worker import measured, serve

CLASSES = 10
READY = 10_000  # cells that lie ready for the bare network: a whole sample, in the packs that a whole file is read in


def make(path: str, cells: int, genes: int, nonzeros: int) -> None:
    """An h5ad of random cells."""
    from cellplane.benchmark.data_convert import make as make_cells

    make_cells(path, cells, genes, nonzeros, gzip=False)


class Prediction:
    """A model folder of random weights, and its predictor."""

    def __init__(self) -> None:
        self.predictor: Any = None
        self.packs: list[Any] = []

    def model(self, path: str, config: Mapping[str, Any], genes: int) -> dict[str, Any]:
        """An annotator of this configuration at ``path``."""
        from dataclasses import replace

        from cellplane.artifact.folder import ModelFolder, save_model
        from cellplane.data.sentences import PlanConfig
        from cellplane.genes import GeneVocabulary
        from cellplane.model.cellplm import new_model
        from cellplane.train.config import PretrainConfig

        plain = PretrainConfig.model_validate({"model": config}).model
        plain = replace(plain, n_genes=genes, n_classes=CLASSES, latent="ae", decoder="none", n_batches=0, n_datasets=0)
        network = new_model(plain, 0)
        vocabulary = GeneVocabulary.from_ids([f"GENE{gene:05d}" for gene in range(genes)])
        classes = tuple(f"type {number}" for number in range(CLASSES))
        cells = PlanConfig().cells_per_micro_batch
        folder = ModelFolder(
            config=plain, weights=network.state_dict(), vocabulary=vocabulary, task="annotate", max_cells=cells, classes=classes
        )
        save_model(folder, Path(path))
        return {"parameters": network.n_parameters()}

    def ready(self, model: str, path: str) -> None:
        """The first packs of a file, and the network."""
        from cellplane.data.config import DataKeys
        from cellplane.data.sources import read_h5ad
        from cellplane.inference import CELLS_PER_FORWARD, Predictor, packs, read_cells

        self.predictor = Predictor.load(Path(model))
        cells = read_h5ad(Path(path), backed=True)
        few = cells[:READY].to_memory()
        store = read_cells(few, self.predictor.vocabulary, DataKeys(), self.predictor.max_cells).store
        self.packs = [store.read(sentences) for sentences in packs(store.sizes, CELLS_PER_FORWARD)]

    def bare(self, packs: int) -> dict[str, float]:
        """`s_per_cell` of the network alone, by the median pack, and `cpu_s_per_cell` of all packs."""
        import torch

        seconds, cells, cpu = [], 0, time.process_time()
        for number in range(packs):
            batch = self.packs[number % len(self.packs)]
            began = time.perf_counter()
            with torch.inference_mode():
                self.predictor.model(batch).logits.softmax(-1).numpy()
            seconds.append((time.perf_counter() - began) / batch.n_cells)
            cells += batch.n_cells
        return {"s_per_cell": median(seconds), "cpu_s_per_cell": (time.process_time() - cpu) / cells}


def predict(model: str, path: str, out: str, cells: int) -> dict[str, float]:
    """A whole file read, answered and written: `s_per_cell` and `cpu_s_per_cell`, also `without_loading`, and what `measured` says."""
    from cellplane.batch import predict_file
    from cellplane.data.config import DataKeys
    from cellplane.inference import Predictor

    keys = DataKeys(batch_key="batch")
    found = measured(lambda: predict_file("annotate", Path(model), keys, (Path(path), Path(out))))
    began = time.perf_counter()
    Predictor.load(Path(model))
    loading = time.perf_counter() - began
    return {
        **found,
        "s_per_cell": found["wall_s"] / cells,
        "cpu_s_per_cell": found["cpu_s"] / cells,
        "without_loading": (found["wall_s"] - loading) / cells,
    }


def threads(number: int) -> None:
    """Of the network."""
    import torch

    torch.set_num_threads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)


if __name__ == "__main__":
    prediction = Prediction()
    serve(
        {
            "make": make,
            "threads": threads,
            "model": prediction.model,
            "ready": prediction.ready,
            "bare": prediction.bare,
            "predict": predict,
        }
    )
