"""Checkpoint to numbers: validation losses, forgetting and adaptation."""
