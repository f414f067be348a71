"""Experiment tracking and the model registry; the one room that talks to MLflow."""
