"""Old against new: critical shares and trade-offs; mixtures, filtering, growing models."""

from __future__ import annotations

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.core.settings import check
from perennial.scaling.continual import effective_tokens, fit_replay_laws
from perennial.scaling.filtering import Pool, best_filtering, error_of_pools
from perennial.scaling.laws.average_parameters import average
from perennial.scaling.laws.domain_share import DomainShare
from perennial.scaling.laws.forgetting import Forgetting
from perennial.scaling.laws.mixture import Mixture
from perennial.scaling.laws.qat_share import QATShare, tokens_per_byte
from perennial.scaling.laws.quality_repetition import QualityRepetition
from perennial.scaling.laws.replay import Replay
from perennial.scaling.mixture_fit import fit_mixture_law

OLD = {"c": 2.9, "k": -9.0, "b": -1.2}
NEW = {"c": 2.2, "k": -2.0, "b": -0.5}
SHARES = np.array([0.0, 0.01, 0.05, 0.1, 0.25, 0.5])


def replay_table() -> dict[str, np.ndarray]:
    old = Replay().predict({"share": SHARES}, OLD)
    new = Replay().predict({"share": 1 - SHARES}, NEW)
    return {"replay_share": SHARES, "old_loss": old, "new_loss": new}


def test_critical_share_is_where_the_old_loss_meets_the_limit() -> None:
    laws = fit_replay_laws(replay_table(), bootstrap=0)
    limit = 3.0
    expected = (np.log(limit - OLD["c"]) - OLD["b"]) / OLD["k"]  # Ye et al. 2024
    assert laws.critical_share(limit) == pytest.approx(expected, abs=1e-5)
    assert laws.critical_share(10.0) == 0
    assert laws.critical_share(2.0) is None
    assert laws.old.coefficients == pytest.approx(OLD, rel=1e-6)
    assert laws.new.coefficients == pytest.approx(NEW, rel=1e-6)


def test_trade_off_marks_what_is_beaten_on_both() -> None:
    laws = fit_replay_laws(replay_table(), bootstrap=20)
    points = laws.pareto([0.0, 0.05, 0.25])
    assert all(point.is_efficient for point in points)
    assert [p.old for p in points] == sorted((p.old for p in points), reverse=True)
    assert [p.new for p in points] == sorted(p.new for p in points)
    assert all(p.old_interval[0] <= p.old <= p.old_interval[1] for p in points)
    helped = {**replay_table(), "new_loss": Replay().predict({"share": SHARES}, OLD)}  # replay helps both
    points = fit_replay_laws(helped, bootstrap=0).pareto([0.0, 0.25])
    assert [point.is_efficient for point in points] == [False, True]


def test_best_share_moves_with_the_weight() -> None:
    laws = fit_replay_laws(replay_table(), bootstrap=0)
    best = [laws.best_share(old_weight=weight) for weight in (0.0, 0.3, 0.9)]
    assert best == sorted(best)
    assert best[0] == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([3.0] * 6, [2.0] * 6),  # replay changes nothing
        ([3.60, 3.61, 3.62, 3.63, 3.70, 3.72], [2.3, 2.28, 2.2, 2.1, 2.0, 2.0]),  # it harms the old, helps the new
        ([3.6, 3.5, 3.3, 3.2, 3.25, 3.3], [2.0, 2.01, 2.0, 2.1, 2.2, 2.3]),  # it has a best share
    ],
)
def test_odd_curves_still_have_a_fit(old: list[float], new: list[float]) -> None:
    laws = fit_replay_laws({"replay_share": SHARES, "old_loss": old, "new_loss": new}, bootstrap=0)
    for found, (low, high) in ((laws.old, (min(old), max(old))), (laws.new, (min(new), max(new)))):
        assert found.mape <= 1e-6 + 100 * (high - low) / low / 2
        assert 0 <= laws.best_share() <= 1


def test_domain_share_reads_size_and_tokens() -> None:
    """Both domains of one table of runs, at a size and length that was not run."""
    truth = DomainShare.EXAMPLES[0]["coefficients"]
    sizes, tokens, shares = (
        values.ravel() for values in np.meshgrid([1e8, 3e8, 1e9], [1e9, 4e9, 1e10], [0.05, 0.1, 0.25, 0.5, 0.75])
    )
    at = {"parameters": sizes, "tokens": tokens}
    law = DomainShare()
    table = {
        **at,
        "replay_share": shares,
        "old_loss": law.predict({**at, "share": shares}, truth),
        "new_loss": law.predict({**at, "share": 1 - shares}, truth),
    }
    laws = fit_replay_laws(table, form="domain_share", bootstrap=0)
    old, new = laws.losses([0.15, 0.6], parameters=2e9, tokens=2e10)
    far = {"parameters": np.full(2, 2e9), "tokens": np.full(2, 2e10)}
    assert old == pytest.approx(law.predict({**far, "share": np.array([0.15, 0.6])}, truth), rel=1e-5)
    assert new == pytest.approx(law.predict({**far, "share": np.array([0.85, 0.4])}, truth), rel=1e-5)
    with pytest.raises(UserError, match="needs parameters and tokens"):
        laws.losses(0.1)


def test_bad_replay_tables() -> None:
    table = replay_table()
    with pytest.raises(UserError, match="no column 'new_loss'"):
        fit_replay_laws({name: values for name, values in table.items() if name != "new_loss"})
    with pytest.raises(UserError, match="from 0 to 1"):
        fit_replay_laws({**table, "replay_share": 100 * SHARES})
    short = {name: values[:3] for name, values in table.items()}
    assert not fit_replay_laws(short, bootstrap=0).old.identifiable


def test_one_percent_of_old_data_prevents_most_forgetting() -> None:
    law, coefficients = Forgetting(), Forgetting.EXAMPLES[0]["coefficients"]
    at = {"parameters": np.full(2, 1e9), "tokens": np.full(2, 1e7), "start_loss": np.full(2, 2.8)}
    none, some = law.predict({**at, "replay_share": np.array([0.0, 0.01])}, coefficients) - 2.8
    assert 0 < some < 0.5 * none


def test_effective_tokens_add() -> None:
    assert effective_tokens([1e9, 0.0], 2e9) == pytest.approx([3e9, 2e9])


# Mixtures


def test_best_mixture_respects_what_a_corpus_can_give() -> None:
    generator = np.random.default_rng(0)
    rows = generator.dirichlet(np.ones(3), 24)
    shares = dict(zip(("web", "code", "books"), rows.T, strict=True))
    law = Mixture(domains=("web", "code", "books"))
    truths = {
        "prose": {"c": 2.5, "t_web": -0.3, "t_code": 1.0, "t_books": -0.8},
        "programs": {"c": 1.0, "t_web": 0.4, "t_code": -1.5, "t_books": 0.8},
    }
    losses = {name: law.predict(shares, truth) for name, truth in truths.items()}
    found = fit_mixture_law(shares, losses, weights={"prose": 3.0, "programs": 1.0})
    grid = np.array([(i, j, 20 - i - j) for i in range(21) for j in range(21 - i)]) / 20
    best = found.best()
    assert sum(best.values()) == pytest.approx(1)
    assert found.total([list(best.values())])[0] <= found.total(grid).min() + 1e-9
    capped = found.best({"books": (0.0, 0.2), "code": (0.1, 1.0)})
    assert capped["books"] <= 0.2 + 1e-9
    assert capped["code"] >= 0.1 - 1e-9
    with pytest.raises(UserError, match="no mixture"):
        found.best({"web": (0.0, 0.1), "code": (0.0, 0.1), "books": (0.0, 0.1)})
    with pytest.raises(UserError, match="no losses for validation domain 'poems'"):
        fit_mixture_law(shares, losses, weights={"poems": 1.0})


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    law = Mixture(domains=("a", "b"))
    refused = law.refusal({"a": np.array([0.5, 50.0]), "b": np.array([0.5, 50.0])})
    assert refused == "the shares of row 2 sum to 100, not 1"
    assert check(Mixture, {"domains": ["a"]})[1][0].message.startswith("two or more different domains")


# Filtering, quantization, growth


def test_one_pool_is_the_law_of_one_pool() -> None:
    coefficients = QualityRepetition.PUBLISHED["best_10_percent"]["coefficients"]
    law = QualityRepetition()
    for samples in (5e7, 1.28e8, 7e8):
        one = error_of_pools([Pool("best", 1.28e8, 0.16, 6.7)], samples)
        inputs = {"unique_samples": np.array([1.28e8]), "samples": np.array([samples])}
        assert law.predict(inputs, coefficients)[0] == pytest.approx(one)


def test_more_compute_wants_laxer_filters() -> None:
    """The message of the paper, with its constants: strict for few samples, lax for many."""
    published = QualityRepetition.PUBLISHED
    pools = [Pool(name, 1.28e7, e["coefficients"]["b"], e["coefficients"]["tau"]) for name, e in published.items()]
    used = [len(best_filtering(pools, samples)[0].pools) for samples in (1.28e7, 1.28e8, 1.28e9)]
    assert used == sorted(used)
    assert used[0] == 1
    assert used[-1] > 1
    with pytest.raises(UserError, match="one pool or more"):
        error_of_pools([], 1e6)


def test_share_of_quantization_aware_training() -> None:
    """The paper's worked case: 1B parameters, 100B tokens, 4 bits."""
    size = tokens_per_byte(tokens=1e11, parameters=1e9, bits=4)
    assert size == 200
    share = QATShare().predict(
        {"tokens_per_byte": np.array([size, 0.5])}, QATShare.PUBLISHED["dremov_2025"]["coefficients"]
    )
    assert share == pytest.approx([0.2808, 0.0], abs=1e-3)


def test_average_size_of_a_growing_model() -> None:
    assert average([(0, 1e8), (4e9, 1e8), (4e9, 3e8), (8e9, 3e8)]) == pytest.approx(2e8)
    assert average([(0, 4e8), (1e10, 0)]) == pytest.approx(2e8)
    for wrong in ([(0.0, 1e8)], [(1.0, 1e8), (0.0, 1e8)]):
        with pytest.raises(UserError, match="in order of tokens"):
            average(wrong)
