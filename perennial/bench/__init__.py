"""Workloads with a target, and fair comparison of methods on them."""
