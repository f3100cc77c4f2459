"""What draws a model's weights back to those of its parent, one file per pull."""
