"""CellPLM: embedder, encoder over cells, latent space, decoder. Needs torch and nothing else."""
