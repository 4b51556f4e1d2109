"""Tasks: how a batch and a model's outputs become rows."""
