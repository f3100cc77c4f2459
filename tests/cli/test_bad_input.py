"""Bad input through the commands: exit code 2, one clear error that says what to mend, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from perennial.cli import main
from perennial.core import lineage
from perennial.core.lineage import newest_checkpoint
from perennial.core.records import Recorder
from tests.workspace import Workspace

Capsys = pytest.CaptureFixture[str]
Refused = Callable[..., str]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change, so that nothing new or touched goes unseen."""
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path): (facts.st_size, 0 if path.is_dir() else facts.st_mtime_ns) for path, facts in found}


@pytest.fixture
def refused(tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command line that must be refused, with every trace of it looked for; returns the error.

    The command runs in `tmp_path`; `leaves` is a folder that it may leave there.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, leaves: str | None = None) -> str:
        capsys.readouterr()
        before = contents(tmp_path)
        code = main.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert captured.err.count("error: ") == 1
        assert "Traceback" not in captured.err
        after = contents(tmp_path)
        if leaves is not None:
            after = {path: facts for path, facts in after.items() if not Path(path).is_relative_to(tmp_path / leaves)}
        assert after == before
        return captured.err.partition("error: ")[2]

    return run


@pytest.fixture(autouse=True, scope="module")
def _no_speed_test() -> Iterator[None]:
    """Runs start without measuring the machine, which would be most of the time here."""
    from perennial.train import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "matmul_rate", lambda precision, device: 1e11)
        yield


@pytest.fixture(scope="module")
def base(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests read it, or copy it first."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = recipe_file(workspace, folder)
    assert main.main(["train", str(recipe), "--out", str(folder / "base"), "--json"]) == 0
    return folder / "base"


@pytest.fixture(scope="module")
def foreign(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that was prepared with another tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    text, tokenizer = str(workspace.new_text), str(folder / "tokenizer")
    assert main.main(["tokenizer", "train", text, "--vocabulary-size", "400", "--out", tokenizer, "--json"]) == 0
    corpus = ["--tokenizer", tokenizer, "--validation", "10%", "--out", str(folder / "corpus")]
    assert main.main(["prepare", text, *corpus, "--json"]) == 0
    return folder / "corpus"


def recipe_file(workspace: Workspace, folder: Path, stage: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The workspace's recipe as a file, with settings of its stage and of the top level changed."""
    recipe = workspace.recipe(**changes)
    recipe["stages"] = [{**recipe["stages"][0], **(stage or {})}] if stage else recipe["stages"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def continuation(parent: Path, *data: str, tokens: str = "1K tokens") -> list[str]:
    """The arguments of a short continuation; `data` are texts of the form NAME=PATH."""
    given = [part for one in data for part in ("--data", one)]
    return ["continue", str(parent), *given, "--tokens", tokens, "--validation", "10%", "--out", "child"]


# Raw text

RAW: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["empty.jsonl: is empty"]),
    "blank.jsonl": (b"\n \n\n", ["blank.jsonl: is empty"]),
    "latin.txt": ("Stra\xdfe".encode("latin-1"), ["latin.txt:1: not UTF-8", "0xdf at offset 4", "convert"]),
    "latin.jsonl": (b'{"text":"ok"}\n{"text":"Stra\xdfe"}\n', ["latin.jsonl:2: not UTF-8", "0xdf"]),
    "broken.jsonl": (b'{"text":"one"}\n{"text":"two"}\n{"text":"thr\n', ["broken.jsonl:3: broken JSON"]),
    "list.jsonl": (b"[1, 2]\n", ["list.jsonl:1: not a JSON object"]),
    "number.jsonl": (b'{"text": 5}\n', ["number.jsonl:1:", "'text' (text_field) is a number"]),
    "absent.jsonl": (b'{"body":"x","title":"y"}\n', ["absent.jsonl:1: no field 'text'", "'body', 'title'"]),
    "later.jsonl": (b'{"text":"x"}\n{"txt":"y"}\n', ["later.jsonl:2: no field 'text'", "Did you mean 'txt'?"]),
    "torn.jsonl.gz": (gzip.compress(b'{"text":"abc"}\n' * 999)[:-20], ["torn.jsonl.gz:", "cut off or damaged"]),
    "plain.jsonl.gz": (b'{"text":"abc"}\n', ["plain.jsonl.gz:", "cut off or damaged"]),
    "bad.parquet": (b"PAR1 nonsense", ["bad.parquet: not a readable parquet file"]),
    "odd.xyz": (b"some text", ["odd.xyz:", "does not say the format", "jsonl, parquet, text"]),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("command", ["tokenizer", "prepare", "continue"])
def test_raw_text_that_cannot_be_read(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, command: str, name: str
) -> None:
    content, words = RAW[name]
    (tmp_path / name).write_bytes(content)
    arguments = {
        "tokenizer": ["tokenizer", "train", name, "--vocabulary-size", "300", "--out", "a/tokenizer"],
        "prepare": ["prepare", name, "--tokenizer", workspace.tokenizer, "--out", "corpus"],
        "continue": continuation(base, f"new={name}"),
    }[command]
    error = refused(*arguments)
    assert all(word in error for word in words), error


def test_what_the_error_of_an_unreadable_text_says_to_do_works(
    workspace: Workspace, refused: Refused, tmp_path: Path, capsys: Capsys
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "latin.txt").write_bytes("Stra\xdfe".encode("latin-1"))
    for number in range(20):
        (mixed / f"{number}.txt").write_text(f"The {number} houses of the street stand in a row.\n" * 3)
    prepare = ["prepare", "mixed", "--tokenizer", str(workspace.tokenizer), "--validation", "20%", "--json"]
    advice = "leave such files out: perennial prepare "
    error = refused(*prepare, "--out", "corpus")
    assert advice in error
    assert main.main([*prepare, "--out", "corpus", *shlex.split(error.partition(advice)[2])]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert (counts["kept"], counts["dropped"]) == (20, {"not UTF-8": 1})
    train = ["tokenizer", "train", "mixed", "--vocabulary-size", "280", "--out", "trained"]
    refused(*train)
    assert main.main([*train, "--reader", "text broken=drop"]) == 0


@pytest.mark.parametrize("command", ["tokenizer", "prepare", "continue"])
def test_missing_and_empty_places(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, command: str
) -> None:
    (tmp_path / "hollow").mkdir()
    for name, words in [("nowhere.jsonl", "no such file or folder"), ("hollow", "the folder is empty")]:
        arguments = {
            "tokenizer": ["tokenizer", "train", name, "--vocabulary-size", "300", "--out", "tokenizer"],
            "prepare": ["prepare", name, "--tokenizer", workspace.tokenizer, "--out", "corpus"],
            "continue": continuation(base, f"new={name}"),
        }[command]
        error = refused(*arguments)
        assert name in error
        assert words in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokenizer", "nowhere"], ["nowhere: no such tokenizer folder"]),
        (["--tokenizer", "."], ["no tokenizer.json", "Hugging Face"]),
        (["--text-field", "txt"], ["no field 'txt' (text_field)", "Did you mean 'text'?"]),
        (["--id-field", "key"], ["no field 'key' (id_field)", "'id', 'text'"]),
        (["--metadata-field", "autor"], ["no field 'autor' (metadata_fields)", "'id', 'text'"]),
        (["--split-by", "title"], ["'title' (split_by)"]),
        (["--validation", "0.1"], ["validation: '0.1' has no unit", "'10%'"]),
        (["--validation", "0%"], ["validation: 0%", "above 0%"]),
        (["--against", "nowhere"], ["nowhere"]),
        (["--filter", ""], ["1 problem", "filters"]),
        (["--filter", "length 300"], ["--filter 'length 300'", "key=value"]),
        (["--filter", "length min_bytes=["], ["--filter", "not valid YAML"]),
        (["--reader", ""], ["1 problem", "reader"]),
        (["--reader", "text drop"], ["--reader 'text drop'", "key=value"]),
        (["--reader", "text broken=dorp"], ["reader: broken", "Did you mean 'drop'?"]),
        (["--reader", "text borken=drop"], ["unknown setting 'borken'", "Did you mean 'broken'?"]),
        (["--max-document-bytes", "1"], ["max_document_bytes", "greater than or equal to 64"]),
        (["--out", "taken"], ["taken: holds something that is not a prepared corpus", "another place"]),
        (["--out", "taken/precious.txt"], ["precious.txt: holds something", "another place"]),
        (["--out", "taken/precious.txt/corpus"], ["precious.txt"]),
    ],
)
def test_settings_of_prepare(
    workspace: Workspace, refused: Refused, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious.txt").write_text("mine")
    given = ["--tokenizer", str(workspace.tokenizer), "--out", "corpus", *options]  # of an option, the last one counts
    error = refused("prepare", workspace.old_text, *given)
    assert all(word in error for word in words), error


def test_settings_of_tokenizer_train(workspace: Workspace, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for size, out, words in [
        ("10", "tokenizer", "vocabulary_size 10: must be above 257"),
        ("1000000", "tokenizer", "vocabulary_size 1000000: the text gives only"),
        ("300", "file", "file: exists already; choose another place"),
        ("300", "file/tokenizer", "there is a file where it needs a folder"),
    ]:
        assert words in refused("tokenizer", "train", workspace.old_text, "--vocabulary-size", size, "--out", out)


# Recipes


def test_every_mistake_of_a_recipe_is_listed_at_once(workspace: Workspace, refused: Refused, tmp_path: Path) -> None:
    text = f"""name: three
sede: 3
model: {{preset: 2m, options: {{widht: 64}}}}
corpora:
  old: {workspace.old}
stages:
  - name: pretrain
    budget: 3072
    mixture: {{odl: 100%}}
    schedule: {{name: cosin, peak: 5e-3}}
batch: {{sequences: 8, sequence_lenght: 32}}
"""
    (tmp_path / "three.yaml").write_text(text)
    for arguments in (["--out", "run"], ["--dry-run"]):
        lines = refused("train", "three.yaml", *arguments).splitlines()
        assert lines[0] == "three.yaml: 6 problems"
        for line, words in zip(
            lines[1:],
            [
                "line 2: sede: unknown setting 'sede'. Did you mean 'seed'?",
                "line 3: model.options.widht: unknown setting 'widht'. Did you mean 'width'?",
                "line 8: stages.0.budget: an amount with a unit is needed, such as '2B tokens'",
                "line 9: stages.0.mixture.odl: no corpus 'odl' under 'corpora'. Did you mean 'old'?",
                "line 10: stages.0.schedule.name: no schedules component 'cosin'; there are: anneal, constant, cosine,",
                "line 11: batch.sequence_lenght: unknown setting 'sequence_lenght'. Did you mean 'sequence_length'?",
            ],
            strict=True,
        ):
            assert words in line
        assert "Did you mean 'cosine'?" in lines[5]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: there are no settings in it"),
        (b"just words", "must be a mapping of settings, not str"),
        (b"name: x\n\tseed: 1\n", "line 2: not valid YAML"),
        (b"name: a\nname: b\n", "line 2: not valid YAML: key 'name' is given twice"),
        (b"name: Stra\xdfe\n", "not UTF-8: byte 0xdf at offset 10"),
    ],
)
def test_files_that_are_no_recipe(refused: Refused, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    error = refused("train", "bad.yaml", "--out", "run")
    assert error.startswith("bad.yaml: ")
    assert words in error


COSINE = {"name": "cosine", "peak": 5e-3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": {"budget": "0 tokens"}}, ["line", "stages.0.budget: '0 tokens' must be above 0"]),
        ({"stage": {"budget": "-5 tokens"}}, ["stages.0.budget: '-5 tokens'"]),
        ({"stage": {"budget": "10%"}}, ["stages.0.budget: '10%'", "'2B tokens' or '1e18 FLOPs' or '3 h'"]),
        ({"stage": {"budget": "3 tokns"}}, ["unit 'tokns'", "Did you mean 'tokens'?"]),
        ({"stage": {"budget": "2B tokens"}}, ["stage 'pretrain'", "'old'", "max_epochs", "Lower the stage"]),
        ({"stage": {"schedule": {"name": "cosin", "peak": 1}}}, ["'cosin'", "Did you mean 'cosine'?"]),
        ({"stage": {"schedule": {"name": "cosine", "peek": 1}}}, ["2 problems", "Did you mean 'peak'?"]),
        (
            {"stage": {"schedule": {**COSINE, "warmup": "6K tokens"}}},
            ["stage 'pretrain': schedule: warmup 6000 tokens"],
        ),
        ({"stage": {"schedule": {"name": "rewarm", "start": "parent", "peak": 1}}}, ["start", "needs a parent"]),
        ({"stage": {"schedule": {"name": "my.own", "peak": 1}}}, ["my.own", "Python path"]),
        ({"stage": {"optimizer": "adam"}}, ["'adam'", "Did you mean 'adamw'?"]),
        ({"stage": {"objective": "next_tokn"}}, ["Did you mean 'next_token'?"]),
        ({"stage": {"mixture": {"old": "90%"}}}, ["stages.0.mixture: the shares add up to 90"]),
        ({"stage": {"mixture": {"old": "80%", "replay": "20%"}}}, ["replay needs a 'parent'"]),
        ({"batch": {"sequences": 8, "sequence_length": 128}}, ["sequence_length 128", "context of 64", "lower it"]),
        ({"model": {"preset": "2M"}}, ["line 3: model.preset: no model preset '2M'", "Did you mean '2m'?"]),
        ({"model": {}}, ["line 2: model: give a preset (1m, 2m,"]),
        ({"model": {"options": {"width": 33, "layers": 2, "heads": 2, "mlp_width": 64}}}, ["width 33", "heads 2"]),
        ({"model": {"preset": "2m", "options": {"vocabulary_size": 33}}}, ["vocabulary_size of 33", "512 ids"]),
        ({"model": None}, ["exactly one of 'parent'", "'model'"]),
        ({"model": None, "parent": "nowhere"}, ["nowhere: no such folder"]),
        ({"corpora": {"old": "nowhere"}}, ["nowhere: no such prepared corpus folder"]),
        ({"evaluation": {"every": "0%"}}, ["evaluation.every: '0%' must be above 0; null:"]),
        ({"evaluation": {"tokens": "50%"}}, ["evaluation.tokens: '50%'", "'100%' for all"]),
        ({"checkpoints": {"every": "0 tokens"}}, ["checkpoints.every: '0 tokens' must be above 0"]),
        ({"precision": "bf61"}, ["'bf61'", "Did you mean 'bf16'?"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"model": {"preset": "70b"}}, ["parameters need at least", "GiB", "Take a smaller model"]),
    ],
)
def test_recipes_that_cannot_be_run(
    workspace: Workspace, refused: Refused, tmp_path: Path, changes: dict[str, Any], words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from perennial.train import limits

    monkeypatch.setattr(limits, "machine_memory_bytes", lambda: {"total": 8 << 30, "available": 1 << 30})
    recipe_file(workspace, tmp_path, **changes)
    error = refused("train", "recipe.yaml", "--out", "runs/run")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "override 'seed' must look like key=value"),
        ("sede=3", "Did you mean 'seed'?"),
        ("stages.5.budget=1K tokens", "'5' is not one of the positions 0 to 0"),
        ("seed=[", "override 'seed=[': the value is not valid YAML"),
    ],
)
def test_overrides(workspace: Workspace, refused: Refused, tmp_path: Path, override: str, words: str) -> None:
    recipe_file(workspace, tmp_path)
    assert words in refused("train", "recipe.yaml", override, "--out", "run")


def test_places_that_a_run_cannot_have(workspace: Workspace, refused: Refused, tmp_path: Path) -> None:
    recipe = recipe_file(workspace, tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.yaml").write_text("# with my notes\n" + recipe.read_text())
    for out, words in [
        ("recipe.yaml", "recipe.yaml: is a file, a run needs a folder"),
        ("recipe.yaml/run", "there is a file where it needs a folder"),
        ("taken", "taken: exists and is no run folder"),
        ("mine", "mine/recipe.yaml: is in the way"),
    ]:
        assert words in refused("train", "recipe.yaml", "--out", out)


# Run folders


def test_folders_that_are_no_run(workspace: Workspace, base: Path, refused: Refused, tmp_path: Path) -> None:
    for folder, words in [
        (tmp_path, "no run folder (resolved.json is missing)"),
        (workspace.old, "no run folder"),
        (newest_checkpoint(base), "It is a checkpoint: give the run folder that it lies in"),
    ]:
        assert words in refused("train", folder)
    assert "nowhere: no such file" in refused("train", "nowhere")
    assert "overrides and --out belong to a recipe file" in refused("train", base, "seed=3")


def test_a_finished_run_says_so(base: Path, capsys: Capsys) -> None:
    before = contents(base)
    assert main.main(["train", str(base)]) == 0
    assert "this run is complete" in capsys.readouterr().err
    assert main.main(["train", str(base), "--dry-run"]) == 0
    assert "12 updates" in capsys.readouterr().out
    assert contents(base) == before


@pytest.fixture
def stopped(base: Path, tmp_path: Path) -> Path:
    """A copy of the base run that stopped after its checkpoint at 2048 tokens."""
    run = tmp_path / "stopped"
    shutil.copytree(base, run)
    shutil.rmtree(run / "checkpoints/3072")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(x for x in lines if json.loads(x).get("tokens", 0) <= 2048))
    return run


def altered(path: Path) -> None:
    """Changes one bit of a file and keeps its length."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def shortened(path: Path) -> None:
    """Cuts the end of a file off."""
    path.write_bytes(path.read_bytes()[:-100])


PARTS = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "perennial/optimizer.safetensors",
    "perennial/state.json",
]


@pytest.mark.parametrize("part", [*PARTS, "perennial/manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, altered, shortened])
def test_a_damaged_checkpoint_is_set_aside_by_name(
    stopped: Path, capsys: Capsys, part: str, damage: Callable[[Path], None]
) -> None:
    damage(stopped / "checkpoints/2048" / part)
    assert main.main(["train", str(stopped)]) == 0
    told = capsys.readouterr().err
    assert part in told
    assert "It is kept as 2048.damaged" in told
    assert (stopped / "checkpoints/2048.damaged").is_dir()


@pytest.mark.parametrize("part", [*PARTS, "perennial/lineage.json", "perennial/manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, altered])
def test_a_damaged_checkpoint_is_neither_continued_nor_measured(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, part: str, damage: Callable[[Path], None]
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(newest_checkpoint(base), parent)
    damage(parent / part)
    for arguments in (
        continuation(parent, f"new={workspace.new}"),
        continuation(parent, f"new={workspace.new_text}"),
        ["eval", parent, "--data", f"new={workspace.new}"],
        ["show", parent, "--verify"],
    ):
        error = refused(*arguments)
        assert "parent" in error
        assert part in error


def test_the_checkpoint_of_another_recipe(
    workspace: Workspace, stopped: Path, refused: Refused, tmp_path: Path
) -> None:
    recipe = recipe_file(workspace, tmp_path, seed=5, stage={"budget": "1K tokens"})
    assert main.main(["train", str(recipe), "--out", str(tmp_path / "other"), "--json"]) == 0
    shutil.copytree(tmp_path / "other/checkpoints/1024", stopped / "checkpoints/2560")
    error = refused("train", stopped)
    assert "checkpoints/2560: this checkpoint was written by another recipe" in error
    assert "To go on from the one before it (2048), delete" in error


def test_the_run_folder_of_another_recipe(workspace: Workspace, base: Path, refused: Refused, tmp_path: Path) -> None:
    recipe_file(workspace, tmp_path, seed=5)
    before = contents(base)
    error = refused("train", "recipe.yaml", "--out", base)
    assert "this run folder was made by another recipe (differs in: seed)" in error
    assert f"perennial train {base}" in error
    error = refused(*continuation(base, f"new={workspace.new}")[:-1], base)
    assert "made by another recipe" in error
    assert contents(base) == before


def test_a_resolved_recipe_that_was_edited(stopped: Path, refused: Refused) -> None:
    path = stopped / "resolved.json"
    path.write_text(path.read_text().replace('"sequences": 8', '"sequences": 16'))
    assert "resolved.json: was changed by hand" in refused("train", stopped)
    path.write_text("[]")
    assert "resolved.json" in refused("train", stopped)
    assert "resolved.json: not a resolved recipe" in refused("show", stopped)
    path.write_text('{"name": ')
    assert "resolved.json: not a readable resolved recipe" in refused("train", stopped)


@pytest.mark.parametrize("line", [b'{"event": "run"\n', b"[1]\n", b"\xff\xfe\n", b'{"tokens": 1}\n'])
def test_events_that_are_none(stopped: Path, refused: Refused, line: bytes) -> None:
    path = stopped / "events.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + line + rest)
    for arguments in (["train", stopped], ["show", stopped], ["report", stopped, "--out", "page.html"]):
        assert "events.jsonl: line 2: not an event of a run" in refused(*arguments)


def test_a_run_that_another_process_trains(stopped: Path, refused: Refused) -> None:
    descriptor = os.open(stopped, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert "another process is training this run" in refused("train", stopped)
    finally:
        os.close(descriptor)
    assert main.main(["train", str(stopped), "--json"]) == 0


# Corpora


@pytest.fixture
def corpus(workspace: Workspace, tmp_path: Path) -> Path:
    """A copy of the old corpus, to be damaged."""
    return Path(shutil.copytree(workspace.old, tmp_path / "corpus"))


@pytest.mark.parametrize("part", ["train/00000.ds", "validation/00000.ds", "validation/00000.ds.index"])
@pytest.mark.parametrize("damage", [Path.unlink, altered, shortened])
def test_a_damaged_corpus(
    workspace: Workspace, base: Path, corpus: Path, refused: Refused, tmp_path: Path,
    part: str, damage: Callable[[Path], None],
) -> None:  # fmt: skip
    damage(corpus / part)
    recipe_file(workspace, tmp_path, corpora={"old": "corpus"})
    lines = [
        ["train", "recipe.yaml", "--out", "runs/run"],
        continuation(base, "again=corpus"),
        ["show", "corpus", "--verify"],
    ]
    if damage is not altered or part.startswith("validation"):  # what is not read is not hashed either
        lines.append(["eval", str(base), "--data", "old=corpus"])
    for arguments in lines:
        error = refused(*arguments)
        assert f"corpus: the prepared corpus is {'incomplete' if damage is Path.unlink else 'damaged'}: {part}" in error
        assert "Bring that file back from a copy" in error


def test_a_manifest_that_is_none(base: Path, corpus: Path, refused: Refused) -> None:
    for content, words in [
        ('{"format": 1', "not a readable corpus manifest"),
        ("[]", "not a prepared corpus"),
        ('{"format": 9, "splits": {}, "tokenizer": {}, "files": {}}', "corpus format 9"),
        ('{"format": 1, "splits": {}, "tokenizer": {}, "files": {}}', "manifest.json is broken"),
    ]:
        (corpus / "manifest.json").write_text(content)
        assert words in refused("eval", base, "--data", "old=corpus")
        assert words in refused("show", "corpus")


def test_a_corpus_of_another_tokenizer(
    workspace: Workspace, base: Path, foreign: Path, refused: Refused, tmp_path: Path
) -> None:
    for arguments in (
        continuation(base, f"new={foreign}"),
        continuation(base, f"text={workspace.new_text}", f"new={foreign}"),  # before any text is prepared
        ["eval", str(base), "--data", f"new={foreign}"],
    ):
        error = refused(*arguments)
        assert f"corpus 'new' ({foreign}) was prepared with another tokenizer" in error
        assert f"Prepare it again with `--tokenizer {newest_checkpoint(base)}`" in error
    both = {"old": str(workspace.old), "new": str(foreign)}
    recipe_file(workspace, tmp_path, corpora=both, stage={"mixture": {"old": "50%", "new": "50%"}})
    assert "Prepare all corpora with one tokenizer" in refused("train", "recipe.yaml", "--out", "run")


def test_a_tokenizer_with_more_ids_than_the_model(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path
) -> None:
    """A folder from elsewhere, without a manifest, whose tokenizer was replaced by a larger one."""
    shutil.copytree(newest_checkpoint(base), tmp_path / "model", ignore=shutil.ignore_patterns("perennial"))
    tokenizer = ["--vocabulary-size", "600", "--out", "tokenizer", "--json"]
    assert main.main(["tokenizer", "train", str(workspace.old_text), *tokenizer]) == 0
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    corpus = ["--tokenizer", "model", "--validation", "10%", "--out", "corpus", "--json"]
    assert main.main(["prepare", str(workspace.old_text), *corpus]) == 0
    error = refused("eval", "model", "--data", "old=corpus")
    assert "a vocabulary_size of 512 does not match the tokenizer" in error
    assert "600 ids" in error


def test_things_that_are_no_corpus(workspace: Workspace, base: Path, refused: Refused) -> None:
    assert "is raw text" in refused("eval", base, "--data", f"new={workspace.new_text}")
    assert "no such prepared corpus" in refused("eval", base, "--data", "new=nowhere")
    for path in (base, newest_checkpoint(base)):
        assert "this is a run or a checkpoint" in refused(*continuation(base, f"new={path}"))
    assert "no document is left" in refused(*continuation(base, f"again={workspace.old_text}"))


# Continuing and measuring


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "corpora/new"], ["--data 'corpora/new' must look like NAME=PATH"]),
        (["--data", "new=x"], ["--data: the name 'new' is given twice"]),
        (["--data", "replay=x"], ["'replay' cannot be the name of a corpus"]),
        (["--tokens", "1e9"], ["--tokens: '1e9' has no unit", "'2B tokens'"]),
        (["--tokens", "0 tokens"], ["--tokens '0 tokens': must be above 0"]),
        (["--tokens", "10%"], ["--tokens: '10%'", "'3 h'"]),
        (["--tokens", "1T tokens"], ["'new'", "max_epochs"]),
        (["--replay", "150%"], ["--replay 150%: must be below 100%"]),
        (["--replay", "0.25"], ["--replay: '0.25' has no unit", "'10%'"]),
        (["--replay", "other=nowhere"], ["other=nowhere: no such file or folder"]),
        (["--moved", "odl=x"], ["no corpus 'odl'", "Did you mean 'old'?"]),
        (["--moved", "old=nowhere"], ["'old' cannot be read", "--moved old=PATH"]),
        (["--peak", "0"], ["--peak 0: must be a learning rate above 0"]),
        (["--peak", "nan"], ["--peak nan"]),
        (["--peak", "1e-3", "--schedule", "constant"], ["--peak 0.001", "--schedule constant"]),
        (["--schedule", "rewram"], ["--schedule 'rewram'", "Did you mean 'rewarm'?"]),
        (["--optimizer-state", "kep"], ["'kep'", "Did you mean 'keep'?"]),
        (["--seed=-3"], ["--seed -3: must be 0 or more"]),
        (["--out", "taken"], ["taken: exists and is no run folder"]),
        (["--out", "taken/precious.txt"], ["precious.txt: is a file"]),
    ],
)
@pytest.mark.parametrize("kind", ["corpus", "text"])
def test_settings_of_continue(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, options: list[str], words: list[str],
    kind: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious.txt").write_text("mine")
    if kind == "text" and "1T tokens" not in options:  # its tokens must be counted first, which is kept

        def too_early(*arguments: Any, **settings: Any) -> None:
            raise AssertionError("text was prepared, which may take hours, before the request was found wrong")

        monkeypatch.setattr("perennial.data.prepare.prepare", too_early)
    data = workspace.new if kind == "corpus" else workspace.new_text
    error = refused(*continuation(base, f"new={data}"), *options, leaves="child")
    assert all(word in error for word in words), error
    assert not (tmp_path / "child/recipe.yaml").exists()
    assert (tmp_path / "child").exists() == (kind == "text" and "1T tokens" in options)


def test_the_share_for_validation_of_raw_text(workspace: Workspace, base: Path, refused: Refused) -> None:
    error = refused(*continuation(base, f"new={workspace.new_text}"), "--validation", "80%")
    assert "80% must be above 0% and at most 50%" in error


def test_checkpoints_that_are_none(workspace: Workspace, base: Path, refused: Refused, tmp_path: Path) -> None:
    data = f"new={workspace.new}"
    plain = tmp_path / "plain"
    shutil.copytree(newest_checkpoint(base), plain, ignore=shutil.ignore_patterns("perennial"))
    (plain / "model.safetensors").unlink()
    assert "no weights" in refused(*continuation(plain, data))
    for path, words in [("nowhere", "no such folder"), (str(workspace.old), "neither a checkpoint")]:
        assert words in refused(*continuation(Path(path), data))
        assert words in refused("eval", path, "--data", data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "corpora/new"], "--data 'corpora/new' must look like NAME=PATH"),
        (["--max-tokens", "100"], "--max-tokens: '100' has no unit"),
        (["--max-tokens", "0 tokens"], "--max-tokens 0 tokens: give tokens"),
        (["--max-tokens", "50%"], "'100%' for all"),
        (["--sequence-length", "0"], "sequence_length 0: at least 1"),
        (["--sequence-length", "4096"], "sequence_length 4096 is longer than the model's context of 64"),
        (["--precision", "fp16"], "'fp16'"),
    ],
)
def test_settings_of_eval(workspace: Workspace, base: Path, refused: Refused, options: list[str], words: str) -> None:
    assert words in refused("eval", base, "--data", f"new={workspace.new}", *options)


# Looking


def test_what_show_does_not_know(workspace: Workspace, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("[]")
    for path, words in [
        ("nowhere", "no such file or folder"),
        ("folder", "neither a prepared corpus (manifest.json), a checkpoint (config.json) nor a run"),
        (str(workspace.old_text), "neither a prepared corpus"),
        ("model", "not a model configuration"),
    ]:
        error = refused("show", path)
        assert path in error
        assert words in error


def test_what_cannot_be_reported(workspace: Workspace, base: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, workspace.old):
        assert "no run folder (events.jsonl is missing)" in refused("report", path)
    assert "no such folder" in refused("report", "nowhere")
    assert "not a checkpoint inside it" in refused("report", newest_checkpoint(base))
    assert "given twice" in refused("report", base, base)
    assert "is a folder" in refused("report", base, "--out", tmp_path)
    assert "there is a file where it needs a folder" in refused("report", base, "--out", "file/page.html")


def test_misspelt_commands(refused: Refused) -> None:
    for arguments, words in [
        (["contineu", "x"], "there is no command 'contineu'. Did you mean 'continue'?"),
        (["eval", "x", "--dta", "a=b", "--data", "a=b"], "'--dta'. Did you mean '--data'?"),
        (["train"], "required: RECIPE\n"),
        (["list", "optimizer"], "Did you mean 'optimizers'?"),
        (["demo", "--minutes", "nan"], "--minutes nan"),
        (["demo", "--old", "nowhere", "--new", "nowhere"], "--old nowhere: no such file or folder"),
        (["demo", "--old", "nowhere"], "--old and --new belong together"),
    ]:
        assert words in refused(*arguments)


# A full disk


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int = 0) -> Iterator[None]:
    """Calls of `owner.name` fail for want of space, but for the first `after` of them."""
    original, calls = getattr(owner, name), []

    def write(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, write)
        yield
    assert len(calls) > after, f"{name} was not called {after + 1} times"


@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_full_disk_while_preparing(
    workspace: Workspace, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    from perennial.data.shards import AppendFile

    arguments = ["prepare", str(workspace.old_text), "--tokenizer", str(workspace.tokenizer), "--validation", "10%"]
    with full_disk(monkeypatch, AppendFile, "write", after):
        error = refused(*arguments, "--out", "corpus", leaves="corpus.partial")
    assert "corpus.partial: the disk is full" in error
    assert "run the same command again to go on" in error
    assert main.main([*arguments, "--out", "corpus", "--json"]) == 0
    assert not (tmp_path / "corpus.partial").exists()
    one, other = (json.loads((c / "manifest.json").read_text()) for c in (workspace.old, tmp_path / "corpus"))
    assert one["fingerprint"] == other["fingerprint"]


def test_an_interrupted_preparation_is_no_corpus(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perennial.data.shards import AppendFile

    prepare = ["prepare", workspace.new_text, "--tokenizer", workspace.tokenizer, "--validation", "10%"]
    with full_disk(monkeypatch, AppendFile, "write", 3):
        refused(*prepare, "--out", "corpus", leaves="corpus.partial")
    recipe_file(workspace, tmp_path, corpora={"old": "corpus"})
    for name in ("corpus", "corpus.partial"):
        for arguments in (
            ["eval", base, "--data", f"new={name}"],
            continuation(base, f"new={name}"),
            ["show", name],
        ):
            error = refused(*arguments)
            assert "interrupted" in error
            assert "run the same `perennial prepare` again" in error
    assert "interrupted" in refused("train", "recipe.yaml", "--out", "run")


def saving_fails(where: str) -> tuple[Any, str, int]:
    """A function that saving needs, and how many of its calls succeed: those of the first checkpoint."""
    from perennial.core import files
    from perennial.model import storage
    from perennial.train import tensor_files

    return {
        "weights": (storage, "save_file", 1),
        "optimizer": (tensor_files, "write_file", 1),
        "manifest": (files, "write_manifest", 1),
        "renaming": (files, "publish", 1),
        "events": (Recorder, "write", 9),
    }[where]


@pytest.mark.parametrize("where", ["weights", "optimizer", "manifest", "renaming", "events"])
def test_a_full_disk_while_training(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    recipe_file(workspace, tmp_path)
    with full_disk(monkeypatch, *saving_fails(where)):
        error = refused("train", "recipe.yaml", "--out", "run", leaves="run")
    assert "run" in error.split(":")[0]
    assert "the disk is full" in error
    assert "Free some space and run the same command again" in error
    assert [p.name for p in lineage.checkpoints_of(tmp_path / "run")] == ["1024"]
    assert not list((tmp_path / "run").rglob(".*"))
    assert main.main(["train", "recipe.yaml", "--out", "run", "--json"]) == 0
    weights = [(newest_checkpoint(run) / "model.safetensors").read_bytes() for run in (base, tmp_path / "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_before_training(
    workspace: Workspace, base: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Not even the folder is left when the first files of a run cannot be written."""
    recipe_file(workspace, tmp_path)
    arguments = (["train", "recipe.yaml", "--out", "runs/run"], continuation(base, f"new={workspace.new}"))
    for one in arguments:
        with full_disk(monkeypatch, os, "fsync", after):
            assert "the disk is full" in refused(*one)


def test_a_full_disk_while_reporting(base: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(monkeypatch, os, "fsync"):
        assert "page.html: the disk is full" in refused("report", base, "--out", "page.html")


def limited(num_bytes: int, *arguments: str | Path) -> SimpleNamespace:
    """The command line in a process of its own that may write no file longer than this; its exit code and error."""
    code = (
        "import resource, runpy, sys; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, {num_bytes})); "
        "runpy.run_module('perennial', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=110
    )
    return SimpleNamespace(code=done.returncode, error=done.stderr)


def test_no_room_for_a_file_in_a_real_process(workspace: Workspace, base: Path, tmp_path: Path) -> None:
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    prepare = [
        "prepare",
        workspace.old_text,
        "--tokenizer",
        workspace.tokenizer,
        "--validation",
        "10%",
        "--out",
        corpus,
    ]
    done = limited(200_000, *prepare)
    assert done.code == 2, done.error
    assert "Traceback" not in done.error
    assert "corpus.partial: the disk is full" in done.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.partial"]
    assert main.main([*map(str, prepare), "--json"]) == 0

    recipe = recipe_file(workspace, tmp_path)
    done = limited(300_000, "train", recipe, "--out", run)  # the weights fit, the moments of the optimizer do not
    assert done.code == 2, done.error
    assert "Traceback" not in done.error
    assert "run/checkpoints/1024: cannot be written" in done.error
    assert not list((run / "checkpoints").iterdir())
    assert main.main(["train", str(run), "--json"]) == 0
    weights = [(newest_checkpoint(one) / "model.safetensors").read_bytes() for one in (base, run)]
    assert weights[0] == weights[1]
