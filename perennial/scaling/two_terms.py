"""What the laws of loss share: a term that model size lowers, a term that tokens lower, and where a search begins.

Symbols: N parameters, D tokens, C = 6 N D FLOPs; s = A / N^alpha, d = B / D^beta.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, column

PARAMETERS = Input("parameters", "parameters", "size of the model")
TOKENS = Input("tokens", "tokens", "tokens trained on, repeats counted")
UNIQUE = Input("unique_tokens", "tokens", "different tokens among them; all, where it is not given", optional=True)
LOSS = Input("loss", "nats/token", "validation loss")

IRREDUCIBLE = Coefficient("E", "nats/token", 1e-6, 20.0, True, "loss that neither size nor data lowers")
SIZE_WEIGHT = Coefficient("A", "nats/token", 0.0, np.inf, True, "weight of the size term", ("alpha", "parameters"))
DATA_WEIGHT = Coefficient("B", "nats/token", 0.0, np.inf, True, "weight of the data term", ("beta", "tokens"))
SIZE_EXPONENT = Coefficient("alpha", "1", 0.01, 2.0, False, "exponent of size")
DATA_EXPONENT = Coefficient("beta", "1", 0.01, 2.0, False, "exponent of data")
MAIN = (IRREDUCIBLE, SIZE_WEIGHT, DATA_WEIGHT, SIZE_EXPONENT, DATA_EXPONENT)
TIED = (
    IRREDUCIBLE,
    SIZE_WEIGHT,
    Coefficient("B", "nats/token", 0.0, np.inf, True, "weight of the data term", ("alpha", "tokens")),
    Coefficient("alpha", "1", 0.01, 2.0, False, "exponent of size and of data"),
)
"""The same with one exponent."""
REPEAT_DECAY = Coefficient(
    *("repeat_decay", "repeats", 0.05, 1e4, True, "repeats after which data have lost 63% of their value"),
    vanishing="high",
)
OUTER_EXPONENT = Coefficient("gamma", "1", 0.1, 10.0, True, "power of the sum of both terms")

FLOPS_PER_TOKEN_AND_PARAMETER = 6.0
"""Forward 2, backward 4."""
SAME_BUDGET = 1.3
"""Budgets closer than this ratio are one: runs of equal compute are so within 10 to 20%."""
_SAME = 1.05  # sizes, numbers of tokens or of epochs closer than this ratio are one
_ON_A_LINE = 0.9999  # correlation of ln N and ln D
_START_EXPONENTS = ((0.3, 0.3), (0.35, 0.5), (0.5, 0.35), (0.2, 0.25), (0.6, 0.6), (0.15, 0.45), (0.9, 0.4), (0.4, 0.9))


def compute(inputs: Columns) -> np.ndarray:
    """C = 6 N D, shape (rows,)."""
    return FLOPS_PER_TOKEN_AND_PARAMETER * column(inputs, "parameters") * column(inputs, "tokens")


def terms(inputs: Columns, c: Coefficients) -> tuple[np.ndarray, np.ndarray]:
    """s and d, shape (rows,); a law with one exponent has it under 'alpha'."""
    size = c["A"] * column(inputs, "parameters") ** -c["alpha"]
    return size, c["B"] * column(inputs, "tokens") ** -c.get("beta", c["alpha"])


def gradient(inputs: Columns, c: Coefficients) -> dict[str, np.ndarray]:
    """Derivatives of E + (s + d)^gamma by every coefficient it may have; gamma is 1 when there is none."""
    size, data = terms(inputs, c)
    total, power = size + data, c.get("gamma", 1.0)
    outer = power * total ** (power - 1)
    by_alpha = -outer * size * np.log(column(inputs, "parameters"))
    by_beta = -outer * data * np.log(column(inputs, "tokens"))
    result = {"E": np.ones_like(total), "A": outer * size / c["A"], "B": outer * data / c["B"]}
    result |= {"alpha": by_alpha, "beta": by_beta} if "beta" in c else {"alpha": by_alpha + by_beta}
    if "gamma" in c:
        result["gamma"] = total**power * np.log(total)
    return result


def starts(table: Columns, exponents: tuple[tuple[float, float], ...] = _START_EXPONENTS) -> list[dict[str, float]]:
    """(E, A, B, alpha, beta) that fit the table best for several pairs of exponents, the best pair first.

    With the exponents given the law is linear: E, A and B are a least-squares problem without negative numbers.
    """
    size, data, loss = (column(table, name) for name in ("parameters", "tokens", "loss"))
    middle = [float(np.exp(np.log(x).mean())) for x in (size, data)]
    found = []
    for alpha, beta in exponents:
        columns = np.stack([np.ones_like(loss), (size / middle[0]) ** -alpha, (data / middle[1]) ** -beta], axis=1)
        (e, a, b), misfit = nnls(columns / loss[:, None], np.ones_like(loss))
        floor = 0.05 * float(loss.min())  # a term that vanished would start where its gradient is 0
        values = [max(floor, float(x)) for x in (e, a, b)]
        scaled = [values[0], values[1] * middle[0] ** alpha, values[2] * middle[1] ** beta, alpha, beta]
        found.append((misfit, dict(zip(("E", "A", "B", "alpha", "beta"), scaled, strict=True))))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])]


def tied_starts(table: Columns) -> list[dict[str, float]]:
    """(E, A, B, alpha) of the starts with equal exponents."""
    return [
        {name: start[name] for name in ("E", "A", "B", "alpha")}
        for start in starts(table, tuple((e, e) for e in (0.3, 0.2, 0.45, 0.6, 0.12, 0.9)))
    ]


def groups(values: np.ndarray, *, same: float = _SAME) -> np.ndarray:
    """Number of the group of each row, shape (rows,): a group reaches from its smallest value to `same` times that."""
    result = np.empty(len(values), dtype=np.int64)
    group, smallest = -1, 0.0
    for row in np.argsort(values, kind="stable").tolist():
        if group < 0 or values[row] > same * smallest:
            group, smallest = group + 1, float(values[row])
        result[row] = group
    return result


def refusal(table: Columns) -> str | None:
    """'one model size' and its like: designs that cannot tell the two terms apart."""
    size, data = column(table, "parameters"), column(table, "tokens")
    for values, same, what in (
        (size, _SAME, "model size"),
        (data, _SAME, "number of tokens"),
        (size * data, SAME_BUDGET, "budget"),
    ):
        if values.max() <= same * values.min():
            return f"one {what} in all {len(size)} rows"
    if len(size) > 2 and abs(np.corrcoef(np.log(size), np.log(data))[0, 1]) > _ON_A_LINE:
        return "tokens follow from the model size: the rows lie on one line"
    return None


def refusal_of_repeats(table: Columns) -> str | None:
    """'no run of more than one epoch' and its like: nothing that could tell what repeats are worth."""
    if "unique_tokens" not in table:
        return "no column of unique tokens"
    epochs = column(table, "tokens") / column(table, "unique_tokens")
    if epochs.max() <= _SAME:
        return "no run of more than one epoch"
    if groups(epochs[epochs > _SAME]).max() == 0:
        return "one number of epochs besides the first"
    return None
