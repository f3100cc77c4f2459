"""The size of a new model for a budget: of the presets, the one with the lowest predicted loss.

The law is that of the user's own runs (`--laws`, or a calibration) where there is one, else the published law of
repeated data (Muennighoff et al. 2023, arXiv 2305.16264), whose level belongs to another text and tokenizer: it orders
sizes, and its interval is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from perennial.core.errors import UserError
from perennial.model.config import ModelConfig
from perennial.model.cost import flops_per_token, num_parameters
from perennial.model.presets import PRESETS, shape
from perennial.plan.budgets import Budget
from perennial.plan.published import FREE_EPOCHS
from perennial.plan.transfer import Estimate, RunLaw, RunRow
from perennial.scaling.choosing import Blend
from perennial.scaling.fitting import Fit
from perennial.scaling.laws.base import published
from perennial.scaling.laws.repeated import Repeated

PRIOR_SPREAD = 0.25
"""Half width of the interval of a published law on another text. Assumption: a tokenizer alone changes it by 20%."""
PUBLISHED_FROM = (7e6, 1e8)
"""Parameters and tokens of the smallest runs of Muennighoff et al."""


class LossOf(Protocol):
    """Predicts the loss of a new model."""

    def __call__(self, size: Size, unique_tokens: float) -> Estimate:
        """Loss at the end."""


@dataclass(frozen=True)
class Size:
    """One size that the budget could be spent on."""

    name: str
    config: ModelConfig
    parameters: int
    flops_per_token: float
    tokens: float


@dataclass(frozen=True)
class Ranked:
    """A size with its predicted loss and how often it reads the text."""

    size: Size
    loss: Estimate
    epochs: float


def sizes_of(names: Sequence[str], vocabulary_size: int, budget: Budget, *, length: int = 1024) -> list[Size]:
    """The sizes of a budget; a budget in tokens has as many for each. Raises UserError for an unknown name."""
    found = []
    for name in names:
        shape(name)  # raises, with the nearest name
        config = ModelConfig.from_preset(name, vocabulary_size)
        per_token = float(flops_per_token(config, min(length, config.context)))
        parameters = num_parameters(config).total
        found.append(Size(name, config, parameters, per_token, budget.flops(per_token) / per_token))
    return found


def read_sizes(text: str | None) -> list[str]:
    """Names of presets in '1m,4m'; all of them without a text. Raises UserError for none."""
    names = list(PRESETS) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--sizes {text!r}: a new model needs sizes to choose from: {', '.join(PRESETS)}")
    return names


def ranked(sizes: Sequence[Size], unique_tokens: float, loss_of: LossOf, budget: Budget, least: float) -> list[Ranked]:
    """The sizes, the best first. Raises UserError when the budget trains none for `least` tokens.

    A budget in tokens cannot rank sizes by loss, as larger is always better: by how near they are to 20 tokens per
    parameter then. Repetition beyond four passes is left to the law, and avoided where a size without it is as good.
    """
    possible = [size for size in sizes if size.tokens >= least]
    if not possible:
        smallest = min(sizes, key=lambda size: size.flops_per_token)
        raise UserError(
            f"--budget {budget.text!r}: {smallest.tokens:.3g} tokens for the smallest size ({smallest.name}) are less "
            f"than one update of {least:.0f}; raise it, or name a smaller size with --sizes"
        )
    found = [Ranked(size, loss_of(size, unique_tokens), size.tokens / unique_tokens) for size in possible]
    if budget.amount.unit == "tokens":
        return sorted(found, key=lambda r: abs(np.log(r.size.tokens / r.size.parameters / 20.0)))
    by_loss = sorted(found, key=lambda r: r.loss.mean)
    near = [r for r in by_loss if r.loss.mean <= by_loss[0].loss.mean * 1.002 and r.epochs <= FREE_EPOCHS]
    first = near[0] if by_loss[0].epochs > FREE_EPOCHS and near else by_loss[0]
    return [first, *(r for r in by_loss if r is not first)]


def by_published_law(size: Size, unique_tokens: float) -> Estimate:
    """The loss of a new model by the published law of repeated data."""
    return published_loss(size.parameters, size.tokens, unique_tokens)


def published_loss(parameters: float, tokens: float, unique_tokens: float) -> Estimate:
    """What `by_published_law` says of a number of parameters."""
    law = Repeated()
    coefficients, _ = published(law, "muennighoff_2023")
    inputs = {"parameters": parameters, "tokens": tokens, "unique_tokens": min(unique_tokens, tokens)}
    mean = float(law.predict({name: np.array([float(value)]) for name, value in inputs.items()}, coefficients)[0])
    return Estimate(mean, mean * (1 - PRIOR_SPREAD), mean * (1 + PRIOR_SPREAD))


def reaches(size: Size, tokens: float) -> bool:
    """Whether the published law says anything of the loss of such a run, not only of which size is better."""
    return size.parameters >= PUBLISHED_FROM[0] and tokens >= PUBLISHED_FROM[1]


def by_law_file(law: Fit | Blend) -> LossOf:
    """The loss by a law that was fitted to own runs. It raises UserError where the law must not be asked."""

    def loss_of(size: Size, unique_tokens: float) -> Estimate:
        found = law.predict(_inputs(size, unique_tokens))
        return Estimate(float(found.mean[0]), float(found.low[0]), float(found.high[0]))

    return loss_of


def law_warnings(law: Fit | Blend, size: Size, unique_tokens: float) -> list[str]:
    """In what a size lies outside of the runs that a law was fitted to."""
    return list(law.predict(_inputs(size, unique_tokens)).warnings)


def _inputs(size: Size, unique_tokens: float) -> dict[str, list[float]]:
    return {
        "parameters": [float(size.parameters)],
        "tokens": [size.tokens],
        "unique_tokens": [min(unique_tokens, size.tokens)],
    }


def by_own_runs(law: RunLaw) -> LossOf:
    """The loss by the runs of a calibration; passes beyond the first are taken for new text."""

    def loss_of(size: Size, unique_tokens: float) -> Estimate:
        return law.predict(RunRow(size.flops_per_token, size.tokens))

    return loss_of
