"""Power laws of model size and tokens, k * N^a * D^b: what learning rate, batch size and their like share.

Symbols: N parameters, D training tokens. Positive everywhere and a straight line in logarithms, so that a search starts
where linear regression ends.
"""

from __future__ import annotations

import math

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, column

PARAMETERS = Input("parameters", "parameters", "size of the model, without embeddings; of a mixture of experts, all")
TOKENS = Input("tokens", "tokens", "training tokens")
EXPONENTS = {"parameters": "a", "tokens": "b"}
"""Which exponent belongs to which input."""
SIZE_EXPONENT = Coefficient("a", "1", -4.0, 4.0, False, "exponent of size")
DATA_EXPONENT = Coefficient("b", "1", -4.0, 4.0, False, "exponent of tokens")


def weight(unit: str, about: str) -> Coefficient:
    """The coefficient k."""
    return Coefficient("k", unit, 1e-30, 1e30, True, about)


def predict(inputs: Columns, coefficients: Coefficients) -> np.ndarray:
    """k N^a D^b, shape (rows,); an exponent that is not among the coefficients is 0."""
    present = [name for name, exponent in EXPONENTS.items() if coefficients.get(exponent, 0.0)]
    some = column(inputs, next(name for name in EXPONENTS if name in inputs))
    logarithm = np.full(some.shape, math.log(coefficients["k"]))
    for name in present:
        logarithm = logarithm + coefficients[EXPONENTS[name]] * np.log(column(inputs, name))
    return np.exp(logarithm)


def gradient(inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
    """By k and the exponents that are there, shape (rows,) each."""
    predicted = predict(inputs, coefficients)
    slopes = {"k": predicted / coefficients["k"]}
    for name, exponent in EXPONENTS.items():
        if exponent in coefficients:
            slopes[exponent] = predicted * np.log(column(inputs, name))
    return slopes


def starts(table: Columns, target: str, names: tuple[str, ...]) -> list[Coefficients]:
    """Linear regression of the target's logarithm on those of the inputs `names`."""
    logarithm = np.log(column(table, target))
    design = np.stack([np.ones_like(logarithm), *(np.log(column(table, name)) for name in names)], axis=1)
    middle = design[:, 1:].mean(axis=0)
    design[:, 1:] -= middle  # centred: the constant is then well determined
    solved = np.linalg.lstsq(design, logarithm, rcond=None)[0]
    constant = float(solved[0] - solved[1:] @ middle)
    found = {"k": math.exp(min(69.0, max(-69.0, constant)))}
    return [found | {EXPONENTS[name]: float(slope) for name, slope in zip(names, solved[1:], strict=True)}]
