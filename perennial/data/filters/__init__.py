"""Filters: which documents are left out, and why. One per file; base.py is the contract."""
