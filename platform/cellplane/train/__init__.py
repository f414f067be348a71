"""One readable training loop, its engines, checkpoints and its launch on Ray Train."""
