"""Old against new: how much replay keeps the old loss, and what it costs on the new domain.

Two laws, one per domain, are fitted to the same runs: `replay` where runs differ only in the replay share,
`domain_share` where model size and tokens vary too. From them follow the critical share and the trade-off curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from perennial.core.errors import UserError
from perennial.scaling.fitting import Fit, as_columns, fit
from perennial.scaling.laws.base import Law
from perennial.scaling.laws.domain_share import DomainShare
from perennial.scaling.laws.replay import Replay
from perennial.scaling.ledger import NEW, OLD, LedgerRun

PUBLISHED_SHARES: Mapping[float, float] = {0.46e9: 0.298, 0.94e9: 0.349, 1.6e9: 0.414, 3.1e9: 0.478}
"""Largest share of new (finance) data that lets the old loss rise by at most 0.05 nats in 20B tokens, by parameters.

Source: Gu et al. 2024, arXiv 2407.17467, section 4.
"""
_GRID = 1001


@dataclass(frozen=True)
class Tradeoff:
    """Both losses at one replay share, nats per token, with their intervals."""

    replay_share: float
    old: float
    new: float
    old_interval: tuple[float, float]
    new_interval: tuple[float, float]
    is_efficient: bool
    """Whether no other share on the curve is better on both domains."""


@dataclass(frozen=True)
class ReplayLaws:
    """Laws of the old and of the new domain's loss, fitted to the same runs."""

    old: Fit
    new: Fit

    def losses(
        self, replay_share: ArrayLike, *, parameters: float | None = None, tokens: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(old, new) loss at replay shares, shape (shares,); size and tokens where the laws read them."""
        share = np.atleast_1d(np.asarray(replay_share, dtype=np.float64))
        old = self.old.law.predict(_inputs(self.old.law, share, parameters, tokens), self.old.coefficients)
        new = self.new.law.predict(_inputs(self.new.law, 1 - share, parameters, tokens), self.new.coefficients)
        return old, new

    def critical_share(
        self, limit: float, *, parameters: float | None = None, tokens: float | None = None
    ) -> float | None:
        """The smallest replay share with an old loss of at most `limit`, nats per token; None when none keeps it."""
        shares = np.linspace(0, 1, _GRID)
        old, _ = self.losses(shares, parameters=parameters, tokens=tokens)
        kept = np.flatnonzero(old <= limit)
        if not len(kept):
            return None
        first = int(kept[0])
        if first == 0:
            return 0.0
        above, below = old[first - 1] - limit, limit - old[first]
        return float(shares[first - 1] + (shares[1] - shares[0]) * above / (above + below))

    def pareto(
        self, shares: ArrayLike, *, parameters: float | None = None, tokens: float | None = None
    ) -> list[Tradeoff]:
        """Both losses at each replay share, and which of the shares are not beaten on both."""
        share = np.atleast_1d(np.asarray(shares, dtype=np.float64))
        old = self.old.predict(_inputs(self.old.law, share, parameters, tokens))
        new = self.new.predict(_inputs(self.new.law, 1 - share, parameters, tokens))
        points = np.stack([old.mean, new.mean], axis=1)
        return [
            Tradeoff(
                replay_share=float(share[i]),
                old=float(old.mean[i]),
                new=float(new.mean[i]),
                old_interval=(float(old.low[i]), float(old.high[i])),
                new_interval=(float(new.low[i]), float(new.high[i])),
                is_efficient=not bool(((points <= points[i]).all(axis=1) & (points < points[i]).any(axis=1)).any()),
            )
            for i in range(len(share))
        ]

    def best_share(
        self, *, old_weight: float = 0.5, parameters: float | None = None, tokens: float | None = None
    ) -> float:
        """The replay share with the lowest weighted loss; the old domain counts `old_weight`, the new one the rest."""
        shares = np.linspace(0, 1, _GRID)
        old, new = self.losses(shares, parameters=parameters, tokens=tokens)
        return float(shares[int(np.argmin(old_weight * old + (1 - old_weight) * new))])


def fit_replay_laws(
    table: Mapping[str, ArrayLike],
    *,
    form: Literal["replay", "domain_share"] = "replay",
    bootstrap: int = 200,
    seed: int = 0,
) -> ReplayLaws:
    """Fits both laws from columns replay_share, old_loss and new_loss (and parameters, tokens for 'domain_share').

    Raises UserError for a missing column and for a share outside 0 to 1.
    """
    columns = as_columns(table)
    for name in ("replay_share", "old_loss", "new_loss"):
        if name not in columns:
            raise UserError(f"the table has no column '{name}'; needed are replay_share, old_loss and new_loss")
    share = columns["replay_share"]
    if share.min() < 0 or share.max() > 1:
        raise UserError(f"replay_share {share[np.argmax(np.abs(share - 0.5))]:g} must be a share from 0 to 1")
    law: Law = Replay() if form == "replay" else DomainShare()
    fits = []
    for name, own in (("old_loss", share), ("new_loss", 1 - share)):
        size, tokens = columns.get("parameters"), columns.get("tokens")
        inputs = _inputs(law, own, size, tokens)
        fits.append(fit(law, {**inputs, "loss": columns[name]}, bootstrap=bootstrap, seed=seed))
    return ReplayLaws(*fits)


def replay_table(runs: Sequence[LedgerRun]) -> dict[str, np.ndarray]:
    """Columns for `fit_replay_laws` from the finished updates of a ledger that were measured on both sides."""
    rows = [
        (run.replay, old, new, run.parameters, run.tokens)
        for run in runs
        if run.is_update
        and (old := run.mean(OLD, run.losses)) is not None
        and (new := run.mean(NEW, run.losses)) is not None
    ]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    return dict(zip(("replay_share", "old_loss", "new_loss", "parameters", "tokens"), columns, strict=True))


def effective_tokens(transferred: ArrayLike, tokens: ArrayLike) -> np.ndarray:
    """Tokens of the new domain and those that earlier training is worth: D + D_T, for a law of loss from scratch.

    Source: Hernandez et al. 2021, "Scaling Laws for Transfer", arXiv 2102.01293, section 1.
    """
    return np.asarray(tokens, dtype=np.float64) + np.asarray(transferred, dtype=np.float64)


def _inputs(
    law: Law, share: np.ndarray, parameters: ArrayLike | None, tokens: ArrayLike | None
) -> dict[str, np.ndarray]:
    """What the law reads, from the share of its own domain."""
    if isinstance(law, Replay):
        return {"share": share}
    if parameters is None or tokens is None:
        raise UserError("'domain_share' needs parameters and tokens besides the replay share")
    return {
        "share": share,
        "parameters": np.broadcast_to(np.asarray(parameters, dtype=np.float64), share.shape),
        "tokens": np.broadcast_to(np.asarray(tokens, dtype=np.float64), share.shape),
    }
