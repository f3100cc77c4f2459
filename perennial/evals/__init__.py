"""Checkpoint to numbers: validation losses, forgetting and adaptation, scores on tasks."""
