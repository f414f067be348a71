"""The released CellPLM (PyPI `cellplm` 0.1.0.post2) as one side of a measurement, in an environment of its own.

Its pre-training code was never released, but the network, the masks and the loss were: a step here is what its
fine-tuning loop does around them. Two inputs are given by hand that its loaders would set: coordinates of -1, and the
measured genes.
"""

# C cells, G genes

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.benchmark.cells import random_cells
from cellplane.benchmark.worker import measured, resident_bytes, serve

OFFICIAL = {  # 20230926_85M.config.json; batch and dataset rows chosen so that the parameters are as many
    "enc_mod": "flowformer",
    "enc_hid": 1024,
    "enc_layers": 4,
    "latent_mod": "gmvae",
    "lamda": 5.0,
    "post_latent_dim": 512,
    "dec_mod": "nbmlp",
    "dec_hid": 1024,
    "dec_layers": 2,
    "model_dropout": 0.2,
    "mask_node_rate": 0.75,
    "mask_feature_rate": 0.25,
    "drop_node_rate": 0.0,
    "norm": "groupnorm",
    "w_li": 5.0,
    "w_en": 5.0,
    "num_clusters": 16,
    "cat_pe": False,
    "max_batch_size": 1_000_000,
    "dar": False,
    "input_covariate": False,
    "ecs": False,
    "dsbn": False,
    "dae": True,
    "mask_beta": True,
    "batch_num": 12_000,
    "dataset_num": 1_080,
}


class Original:
    """The network, its optimizer and the cells."""

    def __init__(self) -> None:
        self.runtime_bytes = 0
        self.model: Any = None
        self.optimizer: Any = None
        self.inputs: dict[str, Any] = {}

    def setup(self, genes: int, threads: int, folder: str | None = None, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Builds the network; with a folder also writes it there as an official checkpoint."""
        import torch
        from CellPLM.model import OmicsFormer

        torch.set_num_threads(threads)
        if not self.runtime_bytes:
            small = {"enc_hid": 128, "enc_layers": 2, "post_latent_dim": 64, "dec_hid": 128, "batch_num": 1, "dataset_num": 1}
            self.runtime_bytes = 1
            self.setup(64, threads, None, small)
            self.cells(8, 16)
            self.step()
            self.model = self.optimizer = None
            self.runtime_bytes = resident_bytes()  # libraries, threads and compiled kernels, before there is a network
        config = OFFICIAL | {"gene_list": [f"GENE{gene:05d}" for gene in range(genes)], "out_dim": genes} | (changes or {})
        torch.manual_seed(0)
        self.model = OmicsFormer(**config)
        if folder is not None:
            Path(folder, "measured.config.json").write_text(json.dumps(config))
            torch.save({"model_state_dict": self.model.state_dict()}, Path(folder, "measured.best.ckpt"))
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def cells(self, cells: int, nonzeros: int, seed: int = 0) -> None:
        """Makes the cells that the next commands run on."""
        import torch

        genes = self.model.embedder.feat_enc.emb.shape[0]
        crow, gene, value = random_cells(cells, nonzeros, genes, seed)
        place = torch.from_numpy(np.stack([np.repeat(np.arange(cells), np.diff(crow)), gene]))
        x = torch.sparse_coo_tensor(place, torch.from_numpy(value), (cells, genes)).coalesce()
        self.inputs = {
            "x_seq": x,
            "coord": torch.zeros(cells, 2) - 1,
            "batch": torch.zeros(cells, dtype=torch.int64),
            "dataset": torch.zeros(cells, dtype=torch.int64),
            "gene_mask": torch.ones(genes, dtype=torch.bool),
        }

    def embed(self, save: str | None = None) -> dict[str, Any]:
        """One forward to the latent; ``save`` keeps its inner values for a comparison."""
        import torch

        self.model.eval()
        kept: dict[str, Any] = {}
        hooks = self._hooks(kept) if save else []

        def _once() -> None:
            x_dict = dict(self.inputs)
            with torch.no_grad():
                self.model.mask_model.apply_mask(x_dict) if save else None
                x_dict["h"] = self.model.embedder(x_dict)
                x_dict["h"] = self.model.encoder(x_dict)["hidden"]
                x_dict["h"] = self.model.pre_latent_norm(x_dict)
                kept["hidden"] = x_dict["h"]
                kept["latent"] = self.model.latent(x_dict)[0]

        figures = measured(_once)
        if save:
            np.savez(save, **{name: tensor.numpy() for name, tensor in kept.items()})
        for hook in hooks:
            hook.remove()
        return figures

    def _hooks(self, kept: dict[str, Any]) -> list[Any]:
        cluster = self.model.latent.layers[1].inference.inference_qyx[0]
        return [cluster.register_forward_hook(lambda *called: kept.update(logits=called[-1][0], cluster=called[-1][2]))]

    def step(self) -> dict[str, Any]:
        """One optimizer step on all cells."""
        import torch

        self.model.train()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=1e-8)

        def _once() -> None:
            _, loss = self.model(dict(self.inputs))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
            self.optimizer.step()

        return measured(_once) | self._state()

    def _state(self) -> dict[str, int]:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.grad is not None)
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        return {"runtime_bytes": self.runtime_bytes, "state_bytes": 4 * (weights + 3 * trained)}


def main() -> None:
    """Serves until the input ends."""
    side = Original()
    serve({"setup": side.setup, "cells": side.cells, "embed": side.embed, "step": side.step})


if __name__ == "__main__":
    main()
