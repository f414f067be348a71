"""cellplane's CellPLM as one side of a measurement: the network, engine and predictor that users run."""

# C cells, G genes

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cellplane.benchmark.cells import random_cells
from cellplane.benchmark.worker import measured, resident_bytes, serve


class Ours:
    """The network, its optimizer and the cells."""

    def __init__(self) -> None:
        self.runtime_bytes = 0
        self.folder: Any = None
        self.precision: Any = "float32"
        self.engine: Any = None
        self.predictor: Any = None
        self.batch: Any = None

    def setup(self, threads: int, precision: str, folder: str | None = None, model: str = "85m", genes: int = 19_374) -> dict[str, Any]:
        """Reads the official checkpoint in ``folder``, or builds the shipped configuration ``model`` over that many genes."""
        import torch

        torch.set_num_threads(threads)
        self.precision = precision
        self.folder = _configured("tiny", 64)
        self.cells(8, 16)
        self.step()
        self.engine = self.batch = None
        self.runtime_bytes = resident_bytes()  # libraries, threads and compiled kernels, before there is a network
        self.folder = _configured(model, genes) if folder is None else _official(folder)
        return {"parameters": sum(weight.numel() for weight in self.folder.weights.values())}

    def cells(self, cells: int, nonzeros: int, seed: int = 0, sentence: int | None = None) -> None:
        """Makes the cells that the next commands run on, in sentences of this many (None: one)."""
        import torch

        from cellplane.cells import single_panel_batch

        genes = self.folder.config.n_genes
        crow, gene, value = (torch.from_numpy(column) for column in random_cells(cells, nonzeros, genes, seed))
        lengths = [cells] if sentence is None else [sentence] * (cells // sentence)
        batch = single_panel_batch(crow, gene, value, torch.ones(genes, dtype=torch.bool), lengths)
        first = torch.zeros(cells, dtype=torch.int64)
        self.batch = replace(batch, batch_index=first, dataset_index=first.clone())

    def embed(self, save: str | None = None) -> dict[str, Any]:
        """One forward to the latent; ``save`` keeps what a comparison needs."""
        import numpy as np
        import torch

        kept: dict[str, Any] = {}

        def _once() -> None:
            with torch.inference_mode():
                kept["latent"] = self._predictor().model(self.batch).latent

        self._predictor()
        figures = measured(_once)
        if save:
            network = self._predictor().model
            with torch.inference_mode():
                hidden = network.encoder(network.embedder(self.batch, None, None), self.batch, None)
            np.savez(save, hidden=hidden.float().numpy(), latent=kept["latent"].float().numpy())
        return figures

    def posterior(self, hidden: str, save: str) -> None:
        """The latent mean from another model's hidden state and cluster sample."""
        import numpy as np
        import torch

        arrays = np.load(hidden)
        with torch.inference_mode():
            given = torch.from_numpy(arrays["hidden"]), torch.from_numpy(arrays["cluster"])
            np.savez(save, latent=self._predictor().model.latent.posterior(*given)[0].float().numpy())

    def separate(self) -> dict[str, Any]:
        """One forward for each sentence: what `embed` does at once."""
        import torch

        parts = list(self.batch.sentences())
        model = self._predictor().model

        def _once() -> None:
            with torch.inference_mode():
                for part in parts:
                    model(part)

        return measured(_once)

    def step(self) -> dict[str, Any]:
        """One optimizer step on all cells, masks included."""
        import numpy as np
        import torch

        from cellplane.model.config import MaskingConfig
        from cellplane.model.masking import mask_genes
        from cellplane.train.objective import Work

        engine, masking = self._engine(), MaskingConfig(drop_cell_rate=0.0)
        sizes = self.batch.cu_seqlens.diff().numpy()
        steps = np.random.default_rng(0)

        def _once() -> None:
            mask = mask_genes(self.batch, sizes, masking)
            engine.step([Work(self.batch, mask, torch.from_numpy(sizes).float(), int(steps.integers(1 << 60)))], float(sizes.sum()), 0)

        figures = measured(_once)
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        return figures | {"runtime_bytes": self.runtime_bytes, "state_bytes": 16 * parameters}

    def _predictor(self) -> Any:
        from cellplane.inference import Predictor

        if self.predictor is None:
            self.predictor = Predictor(self.folder, precision=self.precision)
        return self.predictor

    def _engine(self) -> Any:
        from cellplane.inference import build_network
        from cellplane.train.config import OptimizerConfig
        from cellplane.train.engine import TorchEngine

        if self.engine is None:
            network = build_network(self.folder, self.precision)
            self.folder = replace(self.folder, weights={})  # a training process does not keep a second copy
            self.engine = TorchEngine(network, OptimizerConfig(lr=2e-4, weight_decay=1e-8, schedule="constant", clip=2.0))
        return self.engine


def _official(folder: str) -> Any:
    from cellplane.artifact.folder import ModelFolder
    from cellplane.artifact.official import read_official

    config, vocabulary, weights = read_official(Path(folder), "measured")
    return ModelFolder(config=config, weights=weights, vocabulary=vocabulary, task="pretrain", max_cells=2048)


def _configured(model: str, genes: int) -> Any:
    from cellplane.artifact.folder import ModelFolder
    from cellplane.config import load_config
    from cellplane.genes import GeneVocabulary
    from cellplane.model.cellplm import new_model
    from cellplane.model.config import ModelConfig
    from cellplane.train.config import ModelFile

    values = load_config(ModelFile, model, "model").model_dump()
    config = ModelConfig(**values | {"n_genes": genes})
    vocabulary = GeneVocabulary.from_ids([f"GENE{gene:05d}" for gene in range(genes)])
    return ModelFolder(config=config, weights=new_model(config, 0).state_dict(), vocabulary=vocabulary, task="pretrain", max_cells=2048)


def main() -> None:
    """Serves until the input ends."""
    side = Ours()
    commands = (side.setup, side.cells, side.embed, side.posterior, side.separate, side.step)
    serve({command.__name__: command for command in commands})


if __name__ == "__main__":
    main()
