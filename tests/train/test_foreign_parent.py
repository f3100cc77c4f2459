"""Continuing a Hugging Face folder that has no lineage: what is assumed, said, recorded and carried on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.cli import main
from perennial.core import lineage
from perennial.core.errors import UserError
from perennial.core.files import verify_manifest, write_manifest
from perennial.core.lineage import newest_checkpoint
from perennial.evals.shift import Shift
from perennial.model.card import BEGIN, front_matter
from perennial.model.inspection import weights_id
from perennial.report.comparison import compare
from perennial.report.show import show, to_text
from perennial.train.continuing import continue_run, derive
from perennial.train.measuring import evaluate_checkpoint
from perennial.train.origin import stated_facts
from perennial.train.recipe import parse_recipe, read
from perennial.train.run import make_run, start, train
from perennial.train.starting import read_parent

TOKENS = "4096 tokens"
CARD = "---\nlicense: cc0-1.0\n---\n\n# Somebody's model\n"
GENERATION = b'{"temperature": 0.6, "eos_token_id": [0, 1]}\n'


@pytest.fixture(autouse=True, scope="module")
def _no_speed_test() -> Iterator[None]:
    """Runs start without measuring the machine, which would be most of the time here."""
    from perennial.train import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "matmul_rate", lambda precision, device: 1e11)
        yield


@pytest.fixture(scope="module")
def foreign(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it comes from elsewhere: weights, tokenizer, card, licence, generation defaults; no lineage."""
    root = tmp_path_factory.mktemp("elsewhere")
    start(parse_recipe(workspace.recipe()), root / "run", base=Path(), quiet=True)
    folder = root / "somebodys-model"
    shutil.copytree(newest_checkpoint(root / "run"), folder, ignore=shutil.ignore_patterns("perennial", "README.md"))
    shutil.rmtree(root / "run")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("You may.\n")
    (folder / "generation_config.json").write_bytes(GENERATION)
    return folder


@pytest.fixture(scope="module")
def child(workspace: Any, foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its continuation with a stand-in and one stated fact."""
    out = tmp_path_factory.mktemp("child") / "child"
    facts = stated_facts(["peak=5e-3"])
    new, old = {"new": workspace.new}, {"old": workspace.old}
    settings = ["precision=fp32", "evaluation.tokens=2048 tokens", "checkpoints.every=1024 tokens"]
    result = continue_run(
        foreign, new, budget=TOKENS, out=out, stand_ins=old, facts=facts, settings=settings, quiet=True
    )
    assert result["result"]["complete"]
    assert any(r.startswith("replay") and "on the stand-in" in r for r in result["reasons"])
    return out


def copy_of(foreign: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(foreign, folder)
    return folder


def short(workspace: Any, parent: Path, **choices: Any) -> Any:
    """A derived recipe for a small update on the new corpus."""
    return derive(parent, {"new": workspace.new}, budget=TOKENS, base=Path(), name="update", **choices)


# What is assumed and said


def test_the_recipe_of_a_first_update(workspace: Any, foreign: Path) -> None:
    derived = short(workspace, foreign, stand_ins={"old": workspace.old}, shift=lambda: Shift(2.0, 4.0))
    recipe = derived.recipe
    assert recipe.stages[0].mixture == {"new": 0.6, "old": 0.4}
    assert recipe.stand_ins == ["old"]
    assert (recipe.stages[0].optimizer, recipe.stages[0].optimizer_state) == ("adamw", "reset")
    assert (recipe.clip, recipe.document_mask, recipe.seed) == (1.0, False, 0)
    assert (recipe.batch.sequence_length, recipe.batch.sequences) == (64, 1)
    estimates = [reason for reason in derived.reasons if reason.startswith("estimate: ")]
    assert [sum(f"--parent {name}=" in e for e in estimates) for name in ("tokens", "flops", "peak", "rate")] == [1] * 4
    header = derived.header("perennial continue ...")
    assert header.startswith("# Derived from the parent's folder, which has no lineage")
    assert all(len(line) <= 120 and line.startswith("#") for line in header.splitlines() if line)
    assert not any(reason.startswith("warning") for reason in derived.reasons)


def test_a_small_update_decays_from_where_the_parent_was_left(workspace: Any, foreign: Path) -> None:
    facts = stated_facts(["tokens=1T", "peak=1e-3", "rate=1e-4"])
    schedule = short(workspace, foreign, facts=facts).recipe.stages[0].schedule
    assert (schedule["start"], schedule["peak"], schedule["final"]) == ("parent", 1e-4, 1e-5)
    large = short(workspace, foreign, facts=stated_facts(["tokens=8192", "peak=1e-3"])).recipe.stages[0].schedule
    assert large["final"] == 1e-4 < large["peak"] == pytest.approx(1e-3 * 0.5**0.7)


def test_without_a_stand_in_there_is_a_warning_with_figures(workspace: Any, foreign: Path) -> None:
    for replay in (None, "0%"):
        derived = short(workspace, foreign, replay=replay)
        (warning,) = [reason for reason in derived.reasons if reason.startswith("warning: ")]
        for words in ("2403.08763", "0.27", "1.39", "Small models", "records/2026-11-21_continual", "--replay NAME="):
            assert words in warning
        assert derived.recipe.stages[0].mixture == {"new": 1.0}


def test_the_figures_of_the_warning_are_those_of_the_record() -> None:
    record = Path(__file__).parents[2] / "records/2026-11-21_continual"
    for shift, stated in (("novels_en-peps", 1.7), ("novels_en-novels_de", 4.6)):
        rows = [line.split("|") for line in (record / shift / "summary.md").read_text().splitlines() if "|" in line]
        old = {row[1].strip()[:4]: float(row[2].split("+-")[0]) for row in rows if "+-" in row[2]}
        assert old["(b) "] - old["base"] == pytest.approx(stated, abs=0.05)
        assert old["(c) "] - old["base"] == pytest.approx(0.1, abs=0.05)


def test_a_share_needs_a_stand_in(workspace: Any, foreign: Path) -> None:
    with pytest.raises(UserError, match="--replay 25%: what .* was trained on is not known.*--replay NAME=PATH"):
        short(workspace, foreign, replay="25%")
    both = short(workspace, foreign, replay="10%", stand_ins={"old": workspace.old})
    assert both.recipe.stages[0].mixture == {"new": 0.9, "old": pytest.approx(0.1)}


def test_settings_change_the_derived_recipe(workspace: Any, foreign: Path, child: Path) -> None:
    for parent in (foreign, child):
        settings = ["batch.sequences=4", "stages.0.max_epochs=2", "clip=0.5"]
        changed = short(workspace, parent, replay="0%", settings=settings)
        assert (changed.recipe.batch.sequences, changed.recipe.stages[0].max_epochs, changed.recipe.clip) == (4, 2, 0.5)
        assert "set by the user: clip=0.5" in changed.reasons


def test_a_time_says_nothing_of_a_first_update(workspace: Any, foreign: Path, child: Path) -> None:
    with pytest.raises(UserError, match="--tokens '3 h': .*give it in tokens or FLOPs"):
        derive(foreign, {"new": workspace.new}, budget="3 h", base=Path(), name="u")
    # later ones are compared with what the parent's past would have taken at the speed that is known by then
    later = derive(child, {"more": workspace.new}, budget="1 s", base=Path(), name="u", replay="0%")
    assert 0 < later.recipe.stages[0].schedule["peak"] < lineage.read(newest_checkpoint(child)).peak


# What is recorded


def test_the_lineage_begins_with_the_origin(workspace: Any, foreign: Path, child: Path) -> None:
    found = lineage.read(newest_checkpoint(child))
    origin = found.origin
    assert origin is not None
    assert (origin.name, origin.model_type, origin.through) == ("somebodys-model", "llama", "native")
    assert (origin.license, origin.weights) == ("cc0-1.0", weights_id(foreign))
    assert (origin.peak.value, origin.peak.is_estimate) == (5e-3, False)
    assert (origin.rate.value, origin.rate.is_estimate) == (5e-4, True)
    assert found.tokens == 20 * origin.parameters + 4096
    assert found.flops == origin.flops.value + found.stages[0].flops
    assert (found.peak, found.rate) == (5e-3, found.stages[0].rate_end)
    assert found.stages[0].parent == origin.weights
    assert found.stages[0].rate_start == origin.rate.value
    assert {name: facts.get("stands_in", False) for name, facts in found.corpora.items()} == {"new": False, "old": True}


def test_the_facts_stand_in_the_recipe(workspace: Any, foreign: Path, child: Path, tmp_path: Path) -> None:
    assert yaml.safe_load((child / "recipe.yaml").read_text())["parent_facts"] == {"peak": 0.005}
    recipe = read(child / "recipe.yaml")
    result = start(recipe, tmp_path / "again", base=child, quiet=True)  # `perennial train RECIPE`
    assert result["tokens"] == 4096
    one, other = (lineage.read(newest_checkpoint(run)) for run in (child, tmp_path / "again"))
    assert (one.checkpoint, one.origin) == (other.checkpoint, other.origin)


def test_forgetting_is_stated_on_the_stand_in(workspace: Any, foreign: Path, child: Path) -> None:
    data = {"old": workspace.old, "new": workspace.new}
    measured = evaluate_checkpoint(newest_checkpoint(child), data, against=foreign)["against_parent"]
    assert (set(measured["forgetting"]), set(measured["adaptation"])) == ({"old"}, {"new"})
    recorded = lineage.read(newest_checkpoint(child)).evaluation
    assert set(recorded["before"]) == set(recorded["after"]) == {"new", "old"}
    assert compare([child]).rows[-1].roles == {"old": "old", "new": "new"}


def test_a_grandchild_replays_what_was_consumed_and_keeps_the_origin(
    workspace: Any, child: Path, tmp_path: Path
) -> None:
    facts = stated_facts(["tokens=1M"])
    data = {"more": workspace.new}
    run = tmp_path / "third"
    continue_run(child, data, budget="1K tokens", out=run, replay="50%", facts=facts, quiet=True)
    third = lineage.read(newest_checkpoint(run))
    assert third.origin is not None
    assert (third.origin.tokens.value, third.origin.tokens.is_estimate) == (1e6, False)
    assert (third.origin.peak.value, third.origin.peak.is_estimate) == (5e-3, False)  # as the first update was told
    assert {s["name"] for s in third.stages[1].sources} == {"more", "replay/new", "replay/old"}
    assert third.corpora["old"]["stands_in"]
    assert front_matter((newest_checkpoint(run) / "README.md").read_text())["base_model"] == "somebodys-model"


def test_facts_about_a_recorded_past_are_refused(workspace: Any, tmp_path: Path) -> None:
    start(parse_recipe(workspace.recipe()), tmp_path / "own", base=Path(), quiet=True)
    with pytest.raises(UserError, match="--parent peak.*has a lineage"):
        short(workspace, tmp_path / "own", facts=stated_facts(["peak=1e-3"]))


def test_results_on_tasks_are_read_with_the_lineage(child: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(newest_checkpoint(child), tmp_path / "checkpoint")
    (checkpoint / "perennial/tasks.json").write_text(json.dumps({"tasks": {"sums": {"accuracy": 0.5}}}))
    assert lineage.read(checkpoint).evaluation["tasks"] == {"sums": {"accuracy": 0.5}}
    (checkpoint / "perennial/tasks.json").write_text("[]")
    with pytest.raises(UserError, match=r"tasks.json: .*no 'tasks'"):
        lineage.read(checkpoint)


# What is carried on


def test_card_licence_and_generation_defaults_are_kept(foreign: Path, child: Path) -> None:
    checkpoint = newest_checkpoint(child)
    card = (checkpoint / "README.md").read_text()
    assert front_matter(card) == {"license": "cc0-1.0", "base_model": "somebodys-model"}
    assert "# Somebody's model\n" in card
    assert card.count(BEGIN) == 1
    assert "| child, update |" in card
    assert (checkpoint / "LICENSE").read_text() == "You may.\n"
    assert (checkpoint / "generation_config.json").read_bytes() == GENERATION
    listed = verify_manifest(checkpoint, "perennial/manifest.json")["files"]
    assert {"README.md", "LICENSE", "generation_config.json"} <= listed.keys()


def test_a_resumed_run_writes_the_same_card_without_its_parent(
    workspace: Any, foreign: Path, child: Path, tmp_path: Path
) -> None:
    """Every file but those that hold durations."""
    parent = copy_of(foreign, tmp_path / "somebodys-model")
    run = tmp_path / "child"
    recipe = read(child / "recipe.yaml")
    moved = {name: str((child / path).resolve()) for name, path in recipe.corpora.items()}
    recipe = recipe.model_copy(update={"parent": str(parent), "corpora": moved})
    start(recipe, run, base=Path(), quiet=True)
    shutil.rmtree(run / "checkpoints/4096")
    lines = [line for line in (run / "events.jsonl").read_text().splitlines() if '"done"' not in line]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(parent)
    assert train(run, quiet=True)["complete"]
    whole, resumed = child / "checkpoints/4096", run / "checkpoints/4096"
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(resumed)) for p in resumed.rglob("*") if p.is_file())
    timed = {"perennial/state.json", "perennial/lineage.json", "perennial/manifest.json"}
    different = {name for name in names if (whole / name).read_bytes() != (resumed / name).read_bytes()}
    assert different <= timed
    assert lineage.read(whole).corpora.keys() == lineage.read(resumed).corpora.keys()
    assert lineage.read(resumed).corpora["old"]["stands_in"]


def test_the_result_opens_in_transformers(child: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
    checkpoint = newest_checkpoint(child)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("def ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 3
    assert model.generation_config.eos_token_id == [0, 1]


def test_a_folder_of_transformers_continues(workspace: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="makes the model with transformers (extra: hf)")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=520, num_key_value_heads=1, max_position_embeddings=64, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    transformers.AutoTokenizer.from_pretrained(workspace.tokenizer).save_pretrained(tmp_path / "llama")
    run = tmp_path / "run"
    result = continue_run(tmp_path / "llama", {"new": workspace.new}, budget="1K tokens", out=run, quiet=True)
    assert result["result"]["complete"]
    stored = json.loads((newest_checkpoint(run) / "config.json").read_text())
    assert stored["vocab_size"] == 520


def test_show_tells_where_it_began(child: Path) -> None:
    text = to_text(show(newest_checkpoint(child), verify=True))
    assert "began as somebodys-model" in text
    assert "highest learning rate: 0.005 (stated)" in text
    assert "final learning rate: 0.0005 (estimate): " in text
    assert "FLOPs (with estimates), learning rate left at" in text
    assert "architecture  LlamaForCausalLM" in text


# Folders with an origin and no training yet


def extended(foreign: Path, folder: Path) -> Path:
    """As an operation that is not training leaves it: lineage with origin and a change, no stages."""
    copy_of(foreign, folder)
    begun = read_parent(foreign).lineage
    change = {"operation": "vocab extend", "added": 0}
    data = begun.model_copy(update={"changes": [change], "checkpoint": "fedcba9876543210"}).model_dump(mode="json")
    (folder / "perennial").mkdir()
    (folder / "perennial/lineage.json").write_text(json.dumps(data))
    write_manifest(folder, {"format": 1}, "perennial/manifest.json")
    return folder


def test_a_changed_model_that_was_not_trained_yet_continues(workspace: Any, foreign: Path, tmp_path: Path) -> None:
    parent = extended(foreign, tmp_path / "extended")
    facts = stated_facts(["rate=1e-4"])
    data, old = {"new": workspace.new}, {"old": workspace.old}
    run = tmp_path / "run"
    continue_run(parent, data, budget="1K tokens", out=run, stand_ins=old, facts=facts, quiet=True)
    found = lineage.read(newest_checkpoint(run))
    assert found.changes == [{"operation": "vocab extend", "added": 0}]
    assert found.origin is not None
    assert (found.origin.name, found.origin.weights) == ("somebodys-model", weights_id(foreign))
    assert (found.origin.rate.value, found.stages[0].rate_start) == (1e-4, 1e-4)
    assert found.stages[0].parent == "fedcba9876543210"
    assert "operation: vocab extend" in (newest_checkpoint(run) / "README.md").read_text()
    assert evaluate_checkpoint(parent, data)["id"] == "fedcba9876543210"


# Bad input, before any text is prepared


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs `perennial continue`, which must say one error and write nothing; returns the error."""
    capsys.readouterr()
    assert main.main(["continue", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1
    return captured.err.partition("error: ")[2]


def without(name: str) -> Any:
    """A change that deletes a file."""
    return lambda folder: (folder / name).unlink()


def with_more_tokens(folder: Path) -> None:
    """Gives the tokenizer a token more than the embedding has rows."""
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 512, "content": "<more>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**token, "normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def with_an_unknown_shard(folder: Path) -> None:
    """Replaces the weights by an index of a shard that is not there."""
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (without("model.safetensors"), [], ["no weights", "model.safetensors"]),
        (with_an_unknown_shard, [], ["model-00001-of-00002.safetensors is missing"]),
        (without("tokenizer.json"), [], ["no tokenizer.json in it"]),
        (with_more_tokens, [], ["vocabulary_size of 512", "which has 513 ids", "a row for each"]),
        (None, ["--set", "batch.sequence_length=128"], ["batch.sequence_length 128", "context of 64 tokens"]),
        (None, ["--set", "batch.sequence_lenght=32"], ["'sequence_lenght'", "Did you mean 'sequence_length'?"]),
        (None, ["--set", "clip"], ["'clip'", "key=value"]),
        (None, ["--parent", "peek=1e-3"], ["--parent 'peek=1e-3'", "Did you mean 'peak'?"]),
        (None, ["--parent", "tokens=many"], ["--parent tokens=many"]),
        (None, ["--replay", "25%"], ["--replay 25%", "is not known", "--replay NAME=PATH"]),
        (None, ["--tokens", "3 h"], ["--tokens '3 h'", "tokens or FLOPs"]),
    ],
)
def test_what_is_wrong_is_said_before_text_is_prepared(
    workspace: Any, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    change: Any, options: list[str], words: list[str],
) -> None:  # fmt: skip
    def too_early(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("text was prepared, which may take hours, before the request was found wrong")

    monkeypatch.setattr("perennial.data.prepare.prepare", too_early)
    parent = foreign
    if change is not None:
        parent = copy_of(foreign, tmp_path / "model")
        change(parent)
    out = tmp_path / "run"
    given = [parent, "--data", f"new={workspace.new_text}", "--tokens", TOKENS, "--out", out]
    error = refused(capsys, *given, *options)
    assert all(word in error for word in words), error
    assert not out.exists()


def test_weights_that_changed_since_the_run_was_planned(workspace: Any, foreign: Path, tmp_path: Path) -> None:
    parent = copy_of(foreign, tmp_path / "model")
    recipe = short(workspace, parent).recipe
    make_run(recipe, tmp_path / "run", base=Path())
    content = bytearray((parent / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (parent / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="no longer the checkpoint that this run was planned from"):
        train(tmp_path / "run", quiet=True)


# The command


def test_the_command_says_what_must_not_be_missed(
    workspace: Any, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["continue", str(foreign), "--data", f"new={workspace.new}", "--tokens", "1K tokens", "--out", "run"]
    given += ["--parent", "tokens=5M"]
    assert main.main([*given, "--dry-run", "--json"]) == 0
    planned = capsys.readouterr()
    assert planned.err.startswith("warning: nothing that somebodys-model was trained on is replayed.")
    assert json.loads(planned.out)["recipe"]["parent_facts"] == {"tokens": "5000000 tokens"}
    assert main.main(given) == 0
    said = " ".join(capsys.readouterr().err.split())  # its lines are wrapped
    assert said.count("warning: ") == 1
    assert [said.count(f"--parent {name}=") for name in ("tokens", "flops", "peak", "rate")] == [0, 1, 1, 1]
    assert "by estimate left at" in said
    recipe = (tmp_path / "run/recipe.yaml").read_text()
    header = " ".join(line.removeprefix("#").strip() for line in recipe.splitlines() if line.startswith("#"))
    assert "estimate: somebodys-model had the peak learning rate 0.001" in header
    assert "stated: somebodys-model was trained on 5M tokens" in header
    assert "warning: nothing that somebodys-model was trained on is replayed." in header
    assert main.main(given) == 0  # the same command again finds the finished run
