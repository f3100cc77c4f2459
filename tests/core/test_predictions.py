"""Predictions in a recipe: what is refused, and that a run which is another one is noticed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from perennial.core.predictions import Predictions, changed_parts, fingerprints
from perennial.core.settings import check


def resolved() -> dict[str, Any]:
    """The content of a resolved.json as far as predictions depend on it, and a little more."""
    source = {"name": "new", "corpus": "/somewhere", "fingerprint": "f", "weight": 0.95, "role": "fresh", "seed": 0}
    return {
        "name": "update",
        "seed": 0,
        "parent": {"path": "/parent", "checkpoint": "c" * 16},
        "model": {"width": 64},
        "corpora": {"new": {"path": "/somewhere", "fingerprint": "f", "tokenizer": "t", "role": "new"}},
        "stages": [{"name": "a", "tokens": 100, "schedule": {"name": "rewarm"}, "optimizer": {}, "sources": [source]}],
        "batch": {"sequences": 4, "sequence_length": 8, "micro_batch": None},
        "precision": "fp32",
        "evaluation_tokens": 65536,
        "evaluation_every_tokens": 25,
        "parallel": {"shard": "auto"},
    }


def predictions(**changes: Any) -> dict[str, Any]:
    """A valid block."""
    number = {"value": 100.0, "basis": "given: budget"}
    costs = {"tokens": number, "flops": number, "seconds": number, "device": "cpu", "devices": 1}
    loss = {"value": 3.0, "low": 2.9, "high": 3.2, "basis": "own runs: law", "corpora": {"new": None}}
    whole = {"version": 1, "fingerprints": fingerprints(resolved()), "losses": {"new": loss}, "costs": costs}
    return {**whole, **changes}


def read(**changes: Any) -> Predictions:
    found, problems = check(Predictions, predictions(**changes))
    assert not problems
    assert found is not None
    return found


def test_where_things_lie_and_what_they_are_called_is_no_other_run() -> None:
    moved = resolved()
    moved |= {"name": "other", "seed": 7, "precision": "bf16", "parent": {"path": "/moved", "checkpoint": "c" * 16}}
    moved["corpora"]["new"]["path"] = moved["stages"][0]["sources"][0]["corpus"] = "/elsewhere"
    moved["stages"][0]["sources"][0]["seed"] = 7
    assert changed_parts(read(), moved) == []


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        (("parent", "checkpoint"), "d" * 16, "model"),
        (("model", "width"), 32, "model"),
        (("corpora", "new", "fingerprint"), "g", "text"),
        (("stages", 0, "sources", 0, "weight"), 0.5, "text"),
        (("stages", 0, "tokens"), 200, "stages"),
        (("stages", 0, "schedule", "name"), "constant", "stages"),
        (("batch", "sequences"), 8, "batch"),
        (("evaluation_tokens",), 100, "evaluation"),
        (("batch", "micro_batch"), 2, "computing"),
        (("parallel", "shard"), "full", "computing"),
    ],
)
def test_what_decides_a_run_is_noticed(path: tuple[Any, ...], value: Any, part: str) -> None:
    other = copy.deepcopy(resolved())
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert changed_parts(read(), other) == [part]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "predictions of version 2; this version of Perennial reads version 1"),
        ({"losses": {"newest": predictions()["losses"]["new"]}}, "newest"),
        ({"losses": {"new": {**predictions()["losses"]["new"], "low": 3.1}}}, "must be in this order"),
        ({"losses": {"new": {**predictions()["losses"]["new"], "high": None}}}, "both 'low' and 'high'"),
        ({"losses": {"new": {**predictions()["losses"]["new"], "value": float("nan")}}}, "finite"),
        ({"cost": {}}, "Did you mean 'costs'?"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    found, problems = check(Predictions, predictions(**changes), ("predictions",))
    assert found is None
    assert any(words in problem.text({}) for problem in problems), [problem.text({}) for problem in problems]
