"""Checkpoints of models: read tensor by tensor into an empty model, and written back the same way."""
