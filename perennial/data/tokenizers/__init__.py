"""Tokenizers: opening a Hugging Face tokenizer folder, encoding with the fastest exact engine, training a new one."""
