"""`perennial laws`: fit, predict, plot and ledger through the command line, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.cli import main
from perennial.core import plugins
from perennial.scaling.choosing import Blend, fit_loss_law
from perennial.scaling.curves import Rates
from perennial.scaling.laws.annealing import Annealing
from perennial.scaling.laws.chinchilla import Chinchilla
from perennial.scaling.table import RunTable
from perennial.scaling.words import law_lines

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    parameters = 5e7 * 40 ** generator.random(24)
    tokens = parameters * 12 * 20 ** generator.random(24)
    loss = Chinchilla().predict({"parameters": parameters, "tokens": tokens}, Chinchilla.EXAMPLES[0]["coefficients"])
    lines = [f"{n / 1e6},{d},{x}" for n, d, x in zip(parameters, tokens, loss, strict=True)]
    path = tmp_path / "runs.csv"
    path.write_text("millions,D,loss\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def law(tmp_path: Path, table: Path, capsys: Capsys) -> Path:
    path = tmp_path / "law.json"
    assert (
        run("fit", table, "--column", "parameters=millions:M", "--form", "tied", "--resamples", 20, "--out", path) == 0
    )
    assert "written to" in capsys.readouterr().out
    return path


def write(path: Path, columns: dict[str, Any]) -> Path:
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(repr, row)) for row in rows)]) + "\n")
    return path


def run(*arguments: object) -> int:
    return main.main(["laws", *map(str, arguments)])


def refusal(capsys: Capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    return captured.err


def test_fit_prints_json(table: Path, capsys: Capsys) -> None:
    assert run("fit", table, "--column", "parameters=millions:M", "--resamples", 20, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 24
    assert facts["identifiable"]
    assert facts["columns"]["parameters"] == "millions:M"
    assert {"coefficients", "intervals", "active_bounds", "left_out_mape", "weight"} <= facts["members"][0].keys()


def test_a_form_that_runs_wild_where_rows_are_left_out_is_told_in_few_digits(table: Path) -> None:
    found = fit_loss_law(RunTable.read(table, ["parameters=millions:M"]).columns, bootstrap=0)
    assert isinstance(found, Blend)
    wild = replace(found, members=(replace(found.best, left_out_mape=(1.5, 3e33)), *found.members[1:]))
    assert "left out 1.50% and over 1000%" in "\n".join(law_lines(wild))


def test_predict_takes_a_run_or_a_budget(law: Path, capsys: Capsys) -> None:
    assert run("predict", law, "--params", "1.4B", "--tokens", "900B", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 1.4e9
    assert facts["tokens"] == 9e11
    assert facts["run_low"] < facts["mean"] < facts["run_high"]
    assert facts["warnings"]
    assert run("predict", law, "--flops", "3e20", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["flops"] == pytest.approx(3e20)
    assert run("predict", law, "--flops", "3e20") == 0
    assert "tokens per parameter" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "svg", "html"])
def test_plot(law: Path, table: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"law.{ending}"
    assert run("plot", law, "--out", out, "--table", table, "--column", "parameters=millions:M") == 0
    start = {"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype"}[ending]
    assert out.read_bytes().startswith(start)


def test_what_is_refused(law: Path, table: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert "no such law file" in refusal(capsys, "predict", tmp_path / "no.json", "--params", "1B", "--tokens", "1B")
    assert "needs --params, --tokens; say them, or --flops" in refusal(capsys, "predict", law)
    assert "needs --tokens" in refusal(capsys, "predict", law, "--params", "1B")
    assert "not two of them" in refusal(capsys, "predict", law, "--params", "1B", "--flops", "1e20")
    assert "Did you mean 'tokens'" in refusal(capsys, "predict", law, "--at", "token=1B")
    assert "only laws of the loss curve" in refusal(
        capsys, "predict", law, "--params", "1B", "--tokens", "1B", "--schedule", "wsd"
    )
    assert "--params 'big'" in refusal(capsys, "predict", law, "--params", "big", "--tokens", "1B")
    assert "more than 0" in refusal(capsys, "predict", law, "--flops", "0")
    assert ".png, .svg, .html" in refusal(capsys, "plot", law, "--out", tmp_path / "law.gif")
    assert "Did you mean 'tied'" in refusal(capsys, "fit", table, "--form", "tide")
    assert "Did you mean 'outliers'" in refusal(capsys, "fit", table, "--drop", "outlier")
    assert "--column parameters=NAME" in refusal(capsys, "fit", table)
    assert "no run folder" in refusal(capsys, "ledger", tmp_path, "--out", tmp_path / "ledger.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["law.json", "runs.csv"]


def test_fit_says_which_columns_it_read(table: Path, capsys: Capsys) -> None:
    said = ("fit", table, "--column", "parameters=millions:M", "--form", "tied", "--resamples", 20)
    assert run(*said) == 0
    assert "\ncolumns: parameters = millions:M, tokens = D, loss = loss\n" in capsys.readouterr().out
    assert run(*said, "--json") == 0
    wanted = {"loss": "loss", "parameters": "millions:M", "tokens": "D"}
    assert json.loads(capsys.readouterr().out)["columns"] == wanted


def test_what_is_contradictory_is_refused(law: Path, table: Path, capsys: Capsys) -> None:
    asked = ("predict", law, "--params", "1B", "--tokens", "20B")
    assert "--tokens 20B and --at tokens=... both say tokens" in refusal(capsys, *asked, "--at", "tokens=5B")
    twice = ("--at", "parameters=1B", "--at", "parameters=2B")
    assert "parameters is given already" in refusal(capsys, "predict", law, *twice)
    assert "not two of them" in refusal(capsys, "predict", law, "--flops", "3e20", "--at", "tokens=5B")
    said = refusal(capsys, *asked, "--unique", "1B")
    assert "--unique: this law reads no unique_tokens, but parameters, tokens" in said
    assert refusal(capsys, "predict", law, "--flops", "3e20", "--unique", "1B") == said
    assert "--seed -1 must be 0 or more" in refusal(capsys, "fit", table, "--seed", -1)


def test_a_place_where_nothing_can_be_written_is_refused_before_the_fit(
    law: Path, table: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("perennial.cli._laws.read_for", lambda *_, **__: pytest.fail("the table was read"))
    (tmp_path / "link.csv").symlink_to(table)
    (tmp_path / "notes.json").write_text('{"format": "notes"}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, words in (
        (".", ".: is a folder"),
        ("", ".: is a folder"),
        (table, "is read as well and would be overwritten"),
        ("./link.csv", "is read as well and would be overwritten"),
        ("notes.json", "is no law file"),
        ("notes.json/law.json", "there is a file where it needs a folder"),
        ("/proc/x.json", "/proc/x.json: cannot be written: "),
        ("x" * 250, "cannot be written: File name too long"),
    ):
        said = refusal(capsys, "fit", table, "--form", "tied", "--out", out)
        assert words in said
        assert ".tmp" not in said
    for out in (law, table, tmp_path):
        assert "error: " in refusal(capsys, "plot", law, "--table", table, "--out", out)
    page = law.rename(tmp_path / "law.svg")
    assert "would be overwritten" in refusal(capsys, "plot", page, "--out", page)
    page.rename(law)
    assert "is a folder" in refusal(capsys, "ledger", tmp_path, "--out", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_law_file_may_be_written_again(law: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for out in (law, tmp_path / "empty.json", tmp_path / "new" / "folder" / "law.json"):
        said = ("fit", table, "--column", "parameters=millions:M", "--form", "tied", "--resamples", 20, "--out", out)
        assert run(*said) == 0
        assert out.read_text().startswith('{\n  "format": "perennial law"')


def test_every_law_is_fitted_and_predicts_its_rows(tmp_path: Path, capsys: Capsys) -> None:
    for name, changes in (
        ("steps_to_target", ()),
        ("mixture", ("--set", "domains=web,code,books")),
    ):
        component = plugins.load("laws", name)
        example = component.EXAMPLES[0]
        fitted, problems = plugins.build("laws", {"name": name, **example["settings"]})
        assert not problems
        inputs = fitted.draw(example["inputs"], 24, np.random.default_rng(0))
        inputs[fitted.TARGET.name] = fitted.predict(inputs, example["coefficients"])
        table, out = write(tmp_path / f"{name}.csv", inputs), tmp_path / f"{name}.json"
        assert run("fit", table, "--form", name, *changes, "--resamples", 20, "--out", out, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["coefficients"] == pytest.approx(example["coefficients"], rel=1e-4)
        assert run("predict", out, "--table", table, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert len(facts["rows"]) == 24
        assert facts["mape"] == pytest.approx(0, abs=1e-3)
        assert run("plot", out, "--out", tmp_path / f"{name}.svg", "--table", table) == 0
        capsys.readouterr()


def test_laws_of_curves_take_one_file_a_curve_and_predict_a_schedule(tmp_path: Path, capsys: Capsys) -> None:
    truth = Annealing.EXAMPLES[0]["coefficients"]
    steps, files = np.arange(1, 401), []
    for name, shape in (("cosine", (1 + np.cos(np.pi * steps / 400)) / 2), ("held", np.where(steps < 300, 1.0, 0.3))):
        rates = 1e-3 * np.minimum(1.0, steps / 20) * shape
        label = np.empty(400, dtype=object)
        label[:] = Rates(rates)
        loss = Annealing().predict({"curve": label, "step": steps.astype(float)}, truth)
        files.append(write(tmp_path / f"{name}.csv", {"step": steps, "lr": rates, "loss": loss}))
    out = tmp_path / "curve.json"
    assert run("fit", *files, "--form", "annealing", "--resamples", 20, "--out", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["coefficients"] == pytest.approx(truth, rel=1e-3)
    assert {flag["kind"] for flag in facts["flags"]} == {"warm-up"}
    settings = ("--set", "peak=1e-3", "--set", "warmup=5%", "--set", "final=0")
    assert run("predict", out, "--schedule", "cosine", "--updates", 400, *settings, "--json") == 0
    predicted = json.loads(capsys.readouterr().out)["mean"]
    assert run("predict", out, "--table", files[0], "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert predicted == pytest.approx(rows[-1]["loss"], rel=0.02)  # the warm-up ends elsewhere
    assert rows[-1]["step"] == 400
    assert run("plot", out, "--out", tmp_path / "curve.svg", "--table", files[1]) == 0
    assert "--table" in refusal(capsys, "plot", out, "--out", tmp_path / "no.svg")
    assert "--schedule over --updates" in refusal(capsys, "predict", out)


def test_a_missing_column_is_one_error_with_the_nearest_name(tmp_path: Path, capsys: Capsys) -> None:
    table = write(tmp_path / "steps.csv", {"batch": [1e5, 1e6, 1e7], "num stepz": [9.0, 3.0, 2.0]})
    said = refusal(capsys, "fit", table, "--form", "steps_to_target", "--column", "steps=num_stepz")
    assert "no column 'num_stepz'. Did you mean 'num stepz'?" in said
    said = refusal(capsys, "fit", table, "--form", "steps_to_target")
    assert "no column of steps (" in said
    assert "map it with --column steps=NAME" in said
    assert "Did you mean 'num stepz'?" in said
    assert "domains: is required" in refusal(capsys, "fit", table, "--form", "mixture")
    assert "only for laws of loss by size" in refusal(
        capsys, "fit", table, "--form", "steps_to_target", "--drop", "worse"
    )
