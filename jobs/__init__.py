"""Cluster jobs: arguments -> config -> one call into the platform. Run as `python -m jobs.NAME`."""
