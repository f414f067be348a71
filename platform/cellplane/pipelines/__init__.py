"""The tasks as scikit-learn-like estimators on AnnData, with baselines, metrics and plots."""
