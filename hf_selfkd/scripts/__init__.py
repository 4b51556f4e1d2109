"""Scripts that train, evaluate and share models: what `hf-selfkd train TASK` runs."""
