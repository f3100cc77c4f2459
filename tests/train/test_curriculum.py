"""The new text in stages: their order, shares and schedule, the parts of one corpus, resuming, and the spikes shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core import lineage as lineages
from perennial.core import plugins, records
from perennial.core.amounts import parse
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.data.corpus import Corpus
from perennial.data.prepare import PrepareSettings, prepare
from perennial.report.comparison import compare
from perennial.report.page import render
from perennial.report.runs import read_run
from perennial.report.switches import greatest, switches
from perennial.train.around_the_run import best_part
from perennial.train.choosing import named
from perennial.train.continuations.base import Planned
from perennial.train.continuing import continue_run
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from perennial.train.selecting import parts
from tests.train.test_continuations import situation

SMALL: dict[str, Any] = {"quiet": True, "replay": "25%"}
SETTINGS = ["evaluation.tokens=256 tokens"]


@pytest.fixture(scope="module")
def model(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few updates on the old corpus."""
    folder = tmp_path_factory.mktemp("teacher") / "base"
    recipe = workspace.recipe(
        evaluation={"tokens": "256 tokens", "every": None}, checkpoints={"every": None, "keep": 1}
    )
    start(parse_recipe(recipe), folder, base=Path(), quiet=True)
    return folder


def planned(settings: dict[str, Any], **changes: Any) -> Planned:
    return named({"name": "curriculum", **settings}, "--recipe")[1].plan(situation(**changes))


SEVERAL: dict[str, Any] = {"fresh": ("law", "code: old", "news"), "fresh_shares": (0.5, 0.3, 0.2)}


def test_several_corpora_follow_each_other_under_one_schedule() -> None:
    plan = planned({"order": "given"}, **SEVERAL)
    assert [s["name"] for s in plan.stages] == ["1-law", "2-code--old", "3-news"]
    assert [parse(s["budget"]).value for s in plan.stages] == [250_000, 150_000, 100_000]
    assert [s["mixture"] for s in plan.stages] == [{name: 0.75, "replay": 0.25} for name in SEVERAL["fresh"]]
    schedules = [plugins.build("schedules", s["schedule"])[0] for s in plan.stages]
    whole = plugins.build("schedules", plan.stages[0]["schedule"]["of"])[0]
    at = 0.0
    for stage, schedule in zip(plan.stages, schedules, strict=True):
        tokens = parse(stage["budget"]).value
        assert schedule.rate(0, tokens) == pytest.approx(whole.rate(at, 500_000), rel=1e-6)
        at += tokens
        assert schedule.rate(tokens, tokens) == pytest.approx(whole.rate(at, 500_000), rel=1e-6)
    assert parse(plan.evaluation["every"]).value == pytest.approx(1 / 24)


@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_mixing_moves_text_between_stages_and_not_between_corpora(mixed: float) -> None:
    plan = planned({"order": "given", "mixed": f"{mixed:.0%}"}, **SEVERAL)
    drawn = dict.fromkeys([*SEVERAL["fresh"], "replay"], 0.0)
    for stage, own, share in zip(plan.stages, SEVERAL["fresh"], SEVERAL["fresh_shares"], strict=True):
        assert stage["mixture"][own] == pytest.approx(0.75 * (1 - mixed + mixed * share))
        for name, part in stage["mixture"].items():
            drawn[name] += part * parse(stage["budget"]).value / 500_000
    assert drawn == pytest.approx({"law": 0.375, "code: old": 0.225, "news": 0.15, "replay": 0.25})
    if mixed == 1:
        assert len({tuple(stage["mixture"].items()) for stage in plan.stages}) == 1


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UserError, match="order given goes through several corpora"):
        planned({"order": "given"})
    with pytest.raises(UserError, match="2 updates of 1000 tokens are too few for the 3 stages"):
        planned({}, budget="2000 tokens")
    for wrong in ({"mixed": "120%"}, {"parts": 1}, {"order": "best"}):
        with pytest.raises(UserError, match=f"--recipe curriculum: {next(iter(wrong))}"):
            planned(wrong)


def test_parts_are_equal_in_tokens_and_ranked() -> None:
    rng = np.random.default_rng(0)
    means, sizes = rng.normal(3, 1, 900), rng.integers(1, 200, 900)
    places = parts(means, sizes, 4)
    assert sorted(set(places.tolist())) == [0, 1, 2, 3]
    for part in range(4):
        assert sizes[places == part].sum() == pytest.approx(sizes.sum() / 4, abs=200)
    for part in range(3):
        assert means[places == part].max() <= means[places == part + 1].min()
    assert parts(np.zeros(3), np.zeros(3, np.int64), 2).tolist() == [0, 0, 0]


def test_a_corpus_is_cut_once_and_trained_from_easy_to_hard(workspace: Any, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    choices: dict[str, Any] = {"budget": "3072 tokens", "out": run, "how": "curriculum", "settings": SETTINGS, **SMALL}
    dry = continue_run(model, {"new": workspace.new}, dry_run=True, **choices)
    assert not (run / "resolved.json").exists()
    texts = [run / "corpora" / f"new-{i}of3.jsonl" for i in (1, 2, 3)]
    written = [text.stat().st_mtime_ns for text in texts]
    rows = [[json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()] for text in texts]
    assert sum(map(len, rows)) == Corpus.open(workspace.new).train.num_documents
    losses = [[row["nats_per_token"] for row in part] for part in rows]
    assert max(losses[0]) <= min(losses[1])
    assert max(losses[1]) <= min(losses[2])
    tokens = [
        sum(s["tokens"] for s in Corpus.open(run / "corpora" / f"new-{i}of3").manifest["splits"].values())
        for i in (1, 2, 3)
    ]
    assert max(tokens) < 1.3 * min(tokens)
    result = continue_run(model, {"new": workspace.new}, **choices)
    assert [text.stat().st_mtime_ns for text in texts] == written, "ranked once"
    assert result["recipe"] == dry["recipe"]
    stages = lineages.read(newest_checkpoint(run)).stages[-3:]
    assert [[s["name"] for s in stage.sources] for stage in stages] == [
        [f"new-{i}of3", "replay/old"] for i in (1, 2, 3)
    ]
    assert "new" in result["recipe"]["evaluation"]["corpora"]
    again = continue_run(model, {"new": workspace.new}, **choices)
    assert again["result"]["complete"]
    hard = continue_run(
        model, {"new": workspace.new}, dry_run=True, **{**choices, "how": "{name: curriculum, order: hard}"}
    )
    assert [s["name"] for s in hard["recipe"]["stages"]] == ["1-new-3of3", "2-new-2of3", "3-new-1of3"]
    _the_report_shows_the_switches(run)


def _the_report_shows_the_switches(run: Path) -> None:
    evaluations = [e for e in records.read(run / "events.jsonl", "evaluation") if e["tokens"] > 0]
    ends = [sum(s.tokens for s in lineages.read(newest_checkpoint(run)).stages[-3:][:i]) for i in (1, 2, 3)]
    old = {e["tokens"]: e["corpora"]["old"]["nats_per_token"] for e in evaluations}
    second = {tokens: nats for tokens, nats in old.items() if ends[0] < tokens <= ends[1]}
    assert len(second) >= 3
    page = render(compare([run]))
    section = page.split('id="switches"')[1].split("</section>")[0]
    [row] = [r for r in section.split("<tr>") if ">2-new-2of3<" in r and ">old<" in r]
    for value in (old[ends[0]], max(second.values()), second[ends[1]]):
        assert f">{value:.3f}<" in row
    assert section.count(">3-new-3of3<") == len(evaluations[0]["corpora"])
    found = max(switches(read_run(run), "nats_per_token"), key=lambda switch: switch.spike)
    assert (f"'{found.corpus}' rose by {found.spike:.3f}" in greatest(run)) == (found.spike > 0)


def test_corpora_are_ordered_by_the_parents_loss(workspace: Any, model: Path, tmp_path: Path) -> None:
    data = {"new": workspace.new, "more": workspace.old}
    choices: dict[str, Any] = {
        "budget": "1024 tokens",
        "dry_run": True,
        "settings": [*SETTINGS, "evaluation.every=512 tokens"],
        **SMALL,
    }
    for order, names in (("easy", ["1-more", "2-new"]), ("hard", ["1-new", "2-more"]), ("given", ["1-new", "2-more"])):
        how = f"{{name: curriculum, order: {order}}}"
        recipe = continue_run(model, data, out=tmp_path / order, how=how, **choices)["recipe"]
        assert [stage["name"] for stage in recipe["stages"]] == names
        assert recipe["evaluation"] == {"every": "512 tokens", "tokens": "256 tokens"}, "what is asked for stays"
        assert not (tmp_path / order).exists()


def test_too_few_documents_leave_nothing_behind(workspace: Any, model: Path, tmp_path: Path) -> None:
    how = "{name: curriculum, parts: 40}"
    with pytest.raises(UserError, match="too few for 40 parts"):
        continue_run(model, {"new": workspace.new}, budget="40K tokens", out=tmp_path / "run", how=how, **SMALL)
    assert not (tmp_path / "run").exists()


def test_parts_of_a_corpus_hold_some_of_it_out(workspace: Any, model: Path, tmp_path: Path) -> None:
    lines = [{"text": f"{n} {chr(97 + n % 26) * 3} {n * n}"} for n in range(1500)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    inputs = [str(tmp_path / "many.jsonl")]
    settings = PrepareSettings(name="many", inputs=inputs, tokenizer=str(workspace.tokenizer), validation="5%")
    prepare(settings, tmp_path / "many")
    how: dict[str, Any] = {
        "checkpoint": newest_checkpoint(model),
        "out": tmp_path / "run",
        "text_field": "text",
        "validation": "5%",
    }
    many, options = tmp_path / "many", {**how, "against": [], "quiet": True}
    tokens = Corpus.open(many).train.num_tokens
    assert best_part(how["checkpoint"], {"many": many}, tokens, options) == {"many": many}, "it has no more"
    found = best_part(how["checkpoint"], {"many": many}, 0.5 * tokens, options)
    splits = Corpus.open(found["many-best"]).manifest["splits"]
    share = splits["validation"]["documents"] / (splits["train"]["documents"] + splits["validation"]["documents"])
    assert 0.02 < share < 0.09
