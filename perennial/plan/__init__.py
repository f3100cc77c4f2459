"""A budget in, a recipe with predicted losses, time and memory out. Imports neither torch nor the training."""
