"""The model folder: what a trained model is, by itself, on disk; saved, verified and loaded without pickle."""
