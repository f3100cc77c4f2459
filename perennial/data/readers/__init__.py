"""Readers: files to documents, a little at a time. One per file format; base.py is the contract."""
