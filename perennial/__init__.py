"""Continue the pre-training of a language model on new data, without forgetting, and prove it."""

__version__ = "0.1.0"
