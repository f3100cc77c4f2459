"""Families of models: how each Hugging Face model type spells its configuration and its tensors, one file each."""
