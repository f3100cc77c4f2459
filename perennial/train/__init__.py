"""Training: recipe, the one loop, checkpoints, continuing. `recipe` and `continuing` answer without torch."""
