"""The frame of the command line: finding commands, wrong spellings, exit codes; and the commands that train nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import perennial
from perennial.cli import doctor, main
from perennial.core import plugins
from perennial.core.errors import TrainingStopped, UserError

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox number {n} jumps over {m} lazy dogs, and every dog sleeps on for {n} more hours.\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with one .jsonl file of 60 documents, two of them equal."""
    folder = tmp_path / "raw"
    folder.mkdir()
    texts = [TEXT.format(n=i, m=i * i) * 4 for i in range(59)]
    lines = [json.dumps({"text": t, "key": f"k{i}"}) for i, t in enumerate([*texts, texts[0]])]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tokenizer(raw: Path, tmp_path: Path) -> Path:
    out = tmp_path / "tokenizer"
    assert main.main(["tokenizer", "train", str(raw), "--vocabulary-size", "300", "--out", str(out)]) == 0
    return out


# Finding commands


def test_commands_are_the_files_of_the_folder() -> None:
    found = main.commands()
    assert {"doctor", "list", "prepare", "tokenizer", "train", "continue", "eval", "report", "show", "demo"} <= set(
        found
    )
    assert found["continue"] == "continue_"
    assert not [name for name in found if name.startswith("_") or name == "main"]


def test_nothing_and_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for arguments in ([], ["-h"], ["--help"]):
        assert main.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"perennial {perennial.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian'. Did you mean 'train'?"),
        (["--versio"], "there is no option '--versio'. Did you mean '--version'?"),
        (["xyzzy"], "there is no command 'xyzzy'."),
        (["list", "--jsn"], "'--jsn'. Did you mean '--json'?"),
        (["list", "a", "b"], "there is no option or place for 'b'"),
        (["tokenizer", "trian"], "Did you mean 'train'?"),
        (["tokenizer", "train", "x", "--vocabulary-size", "9", "--out", "y", "--vocab=3"], "there is no option"),
        (["tokenizer", "train", "x", "--vocabulary-size", "many", "--out", "y"], "invalid int value: 'many'"),
        (["prepare", "x", "--out", "y"], "required: --tokenizer"),
        (["list", "schedule"], "Did you mean 'schedules'?"),
        (["show"], "required: PATH"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""


def test_options_may_stand_anywhere() -> None:
    parsed = main._parse(main.parser_of("train"), ["r.yaml", "--out", "run", "seed=3", "--json", "a.b=4"])
    assert (parsed.recipe, parsed.out, parsed.overrides, parsed.json) == ("r.yaml", "run", ["seed=3", "a.b=4"], True)


# Exit codes


def _command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int = 0) -> None:
    """Puts a command 'try' in place that raises `error` or returns `code`."""

    def run(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        return code

    module = SimpleNamespace(HELP="try", __doc__="Try.", arguments=lambda parser: None, run=run)
    monkeypatch.setattr(main, "commands", lambda: {"try": "try"})
    monkeypatch.setattr(main, "load", lambda command: module)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("file.jsonl:3: broken"), 2, "error: file.jsonl:3: broken\n"),
        (TrainingStopped("loss is nan"), 1, "error: loss is nan\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("run it again to go on"), 130, "run it again to go on\n"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _command(monkeypatch, error)
    assert main.main(["try"]) == code
    assert capsys.readouterr().err == message


def test_the_commands_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    _command(monkeypatch, None, 130)
    assert main.main(["try"]) == 130


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _command(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        main.main(["try"])


@pytest.mark.parametrize("arguments", [["--help"], ["list", "schedules"], ["prepare", "--help"]])
def test_a_reader_that_has_gone_away_is_no_error(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "perennial", *arguments],
            cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_is_this_function() -> None:
    entry = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "perennial"]
    if not entry:
        pytest.skip("perennial is not installed, only on the path")
    assert entry[0].value == "perennial.cli.main:main"


# list


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "schedules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == plugins.names("schedules")
    assert main.main(["list", "schedules", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plugins.describe("schedules")
    assert main.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == plugins.kinds().keys()


# doctor


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["python"]
    assert facts["torch"]
    assert facts["precision"] in ("fp32", "bf16")
    assert all(rate > 1e8 for rate in facts["matmul_flops_per_second"].values())
    assert facts["disk_free_bytes"] > 0
    assert isinstance(facts["advice"], list)


HEALTHY: dict[str, Any] = {
    "memory_available_bytes": 16 << 30,
    "disk_free_bytes": 100 << 30,
    "cores": 4,
    "threads": {"torch": 4, "cores": 4, "OMP_WAIT_POLICY": "PASSIVE"},
    "precision": "fp32",
    "matmul_flops_per_second": {"fp32": 2e11, "bf16": 1e11},
    "devices": [{"name": "some device"}],
    "packages": {"fastokens": "1.0"},
}


def test_advice() -> None:
    assert doctor.advice(HEALTHY) == []
    assert doctor.advice({**HEALTHY, "memory_available_bytes": None}) == []
    for change, word in [
        ({"memory_available_bytes": 1 << 30}, "2 GiB of memory"),
        ({"disk_free_bytes": 1 << 30}, "5 GiB is free"),
        ({"threads": {"torch": 1}}, "OMP_NUM_THREADS"),
        ({"threads": {"torch": 4, "OMP_WAIT_POLICY": "active"}}, "spin"),
        ({"matmul_flops_per_second": {"fp32": 1e11, "bf16": 2e11}}, "precision: bf16"),
        ({"packages": {"fastokens": None}}, "fastokens is not installed"),
    ]:
        (found,) = doctor.advice({**HEALTHY, **change})
        assert word in found


# tokenizer train, prepare


def test_from_raw_text_to_a_prepared_corpus(
    raw: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = ["prepare", str(raw), "--tokenizer", str(tokenizer), "--validation", "20%"]
    assert main.main([*prepare, "--out", str(tmp_path / "one"), "--id-field", "key"]) == 0
    text = capsys.readouterr().out
    assert "read        60 documents, kept 59, dropped: duplicate 1" in text
    assert "corpus 'one'" in text
    assert main.main([*prepare, "--out", str(tmp_path / "one"), "--id-field", "key", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["counts"]["kept"] == 59
    assert manifest["splits"]["validation"]["documents"] > 0

    assert main.main([*prepare, "--out", str(tmp_path / "two"), "--against", str(tmp_path / "one")]) == 2
    assert "duplicate of one" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ["--validation", "80%", "--filter", "lenth min_bytes=3"],
            ["2 problems", "at most 50%", "Did you mean 'length'"],
        ),
        (["--filter", "length min_byte=3"], ["Did you mean 'min_bytes'"]),
        (["--text-field", "txt"], ["a.jsonl:1", "Did you mean 'text'"]),
        (["--threads", "0"], ["--threads 0"]),
        (["--reader", "jsonll"], ["Did you mean 'jsonl'"]),
        (["--tokenizer", "nowhere"], ["nowhere"]),
    ],
)
def test_prepare_refuses_bad_settings(
    options: list[str],
    messages: list[str],
    raw: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    out = tmp_path / "corpus"
    assert main.main(["prepare", str(raw), "--tokenizer", str(tokenizer), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert all(message in error for message in messages), error
    assert not out.exists()


def test_filters_with_their_settings(
    raw: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = ["prepare", str(raw), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "c"), "--validation", "20%"]
    assert (
        main.main([*command, "--filter", "length min_bytes=1 max_bytes=380", "--metadata-field", "key", "--json"]) == 0
    )
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["counts"]["dropped"]["too long"] > 0
    lines = (tmp_path / "c" / "train" / "00000.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["metadata"]["key"].startswith("k")


def test_what_tokenizer_train_says(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "tokenizer")
    assert main.main(["tokenizer", "train", str(raw), "--vocabulary-size", "280", "--out", out, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["tokenizer"], facts["vocabulary_size"]) == (out, 280)
    assert captured.err == ""
    assert main.main(["tokenizer", "train", str(raw), "--vocabulary-size", "280", "--out", out + "2"]) == 0
    assert capsys.readouterr().out == f"{out}2: 280 tokens, documents end with id 0\n"


def test_a_tokenizer_is_not_written_over(raw: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tokenizer / "tokenizer.json").read_bytes()
    assert main.main(["tokenizer", "train", str(raw), "--vocabulary-size", "300", "--out", str(tokenizer)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tokenizer / "tokenizer.json").read_bytes() == before
