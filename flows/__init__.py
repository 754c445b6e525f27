"""Prefect flows: in what order, where and how often the DVC stages run."""
