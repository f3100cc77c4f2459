"""How processes that hold copies of the model keep them together."""
