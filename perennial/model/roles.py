"""What each parameter is for, by its name: what optimizers, growth and the cost table go by.

Roles: 'embedding', the input embedding (also the head when they are tied) and that of positions; 'head', the output
projection when it has weights of its own; 'norm', the gain of a norm; 'bias', of a matrix or a norm; 'matrix', every
other two-dimensional weight.
"""

from __future__ import annotations

ROLES = ("embedding", "head", "matrix", "norm", "bias")

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def role_of(name: str) -> str:
    """The role of the parameter of this name. Raises ValueError for a name that no rule covers."""
    module, _, kind = name.rpartition(".")
    layer = module.rpartition(".")[2]
    if kind == "bias":
        return "bias"
    if kind == "weight":
        if layer in ("embed_tokens", "embed_positions"):
            return "embedding"
        if layer == "lm_head":
            return "head"
        if layer.endswith("norm"):
            return "norm"
        if layer in _MATRICES:
            return "matrix"
    raise ValueError(f"parameter '{name}' has no role: its name follows none of the rules in perennial/model/roles.py")
