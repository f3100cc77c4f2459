"""Checkpoint to checkpoint: changes to a model that are not training, such as rows for new tokens."""
