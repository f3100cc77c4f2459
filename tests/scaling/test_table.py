"""Tables of runs: columns, units, flags, and one clear error for what is of no use."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.scaling.laws.chinchilla import Chinchilla
from perennial.scaling.table import RunTable
from perennial.scaling.words import flag_lines

TRUTH = Chinchilla.EXAMPLES[0]["coefficients"]


def runs(rows: int = 30, *, noise: float = 0.002, seed: int = 0) -> dict[str, np.ndarray]:
    """N, D and losses of a law with noise, all above 10 tokens per parameter."""
    generator = np.random.default_rng(seed)
    parameters = 5e7 * 40 ** generator.random(rows)
    tokens = parameters * 12 * 20 ** generator.random(rows)
    loss = Chinchilla().predict({"parameters": parameters, "tokens": tokens}, TRUTH)
    return {"N": parameters, "D": tokens, "loss": loss * np.exp(noise * generator.standard_normal(rows))}


def write(path: Path, columns: dict[str, Any]) -> Path:
    names = list(columns)
    rows = list(zip(*columns.values(), strict=True))
    if path.suffix == ".json":
        path.write_text(json.dumps([dict(zip(names, r, strict=True)) for r in rows], default=float))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, r, strict=True)), default=float) + "\n" for r in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(rows)
    return path


def error(path: Path, *mappings: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        RunTable.read(path, mappings, **options)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl"])
def test_reads_usual_names_in_every_format(tmp_path: Path, ending: str) -> None:
    columns = runs()
    table = RunTable.read(write(tmp_path / f"runs{ending}", columns))
    np.testing.assert_allclose(table.columns["parameters"], columns["N"], rtol=1e-12)
    np.testing.assert_allclose(table.columns["flops"], 6 * columns["N"] * columns["D"], rtol=1e-12)
    assert not table.flags


def test_maps_columns_with_units(tmp_path: Path) -> None:
    columns = runs()
    odd = {"size (M)": columns["N"] / 1e6, "billions": columns["D"] / 1e9, "bpt": columns["loss"] / math.log(2)}
    mappings = ("parameters=size (M):M", "tokens=billions:1e9", "loss=bpt:bits")
    table = RunTable.read(write(tmp_path / "runs.csv", odd), mappings)
    for name, wanted in (("parameters", "N"), ("tokens", "D"), ("loss", "loss")):
        np.testing.assert_allclose(table.columns[name], columns[wanted], rtol=1e-9)


def test_cells_may_carry_a_multiplier(tmp_path: Path) -> None:
    columns = runs()
    words = {**columns, "N": [f"{n / 1e6:.6f}M" for n in columns["N"]]}
    table = RunTable.read(write(tmp_path / "runs.csv", words))
    np.testing.assert_allclose(table.columns["parameters"], columns["N"], rtol=1e-6)


def test_tokens_follow_from_flops(tmp_path: Path) -> None:
    columns = runs()
    given = {"N": columns["N"], "C": 6 * columns["N"] * columns["D"], "loss": columns["loss"]}
    table = RunTable.read(write(tmp_path / "runs.csv", given))
    np.testing.assert_allclose(table.columns["tokens"], columns["D"], rtol=1e-9)


def test_flags_what_is_odd_and_drops_what_is_told(tmp_path: Path) -> None:
    columns = {name: values.copy() for name, values in runs().items()}
    columns["loss"][4] *= 1.2
    for name in columns:
        columns[name][7] = columns[name][2]
    words: dict[str, Any] = {**columns, "loss": [*columns["loss"][:-1], ""]}
    path = write(tmp_path / "runs.csv", words)
    table = RunTable.read(path)
    assert [(f.row, f.kind, f.is_dropped) for f in table.flags] == [
        (30, "no loss", True),
        (8, "duplicate", True),
        (5, "outlier", False),
    ]
    assert len(table) == 28
    assert "  outlier, kept: 1 row; see --drop outliers" in flag_lines(table.flags)
    assert len(RunTable.read(path, drop=["outliers"])) == 27


def test_flags_a_sweep_and_keeps_its_best_where_told(tmp_path: Path) -> None:
    columns = {name: np.repeat(values, 2) for name, values in runs().items()}
    columns["loss"] = columns["loss"] * np.tile([1.0, 1.05], 30)
    path = write(tmp_path / "sweep.csv", columns)
    table = RunTable.read(path)
    assert [f.row for f in table.flags if f.kind == "worse"] == list(range(2, 61, 2))
    assert len(table) == 60
    assert RunTable.read(path, drop=["worse"]).rows.tolist() == list(range(1, 61, 2))


def test_settings_that_are_no_numbers_do_not_matter(tmp_path: Path) -> None:
    columns = {**runs(), "batch": ["auto"] * 30, "flops": [-1.0] * 30}
    table = RunTable.read(write(tmp_path / "runs.csv", columns))
    assert "batch" not in table.columns
    np.testing.assert_allclose(table.columns["flops"], 6 * table.columns["parameters"] * table.columns["tokens"])


def test_leaves_out_under_trained_rows_that_lie_off_the_law(tmp_path: Path) -> None:
    columns = runs(40)
    few = np.arange(40) < 6
    columns["D"] = np.where(few, columns["N"] * 3, columns["D"])
    on_law = Chinchilla().predict({"parameters": columns["N"], "tokens": columns["D"]}, TRUTH)
    kept = RunTable.read(write(tmp_path / "on.csv", {**columns, "loss": on_law}))
    assert len(kept) == 40
    assert {(f.kind, f.is_dropped) for f in kept.flags} == {("under-trained", False)}
    off = RunTable.read(write(tmp_path / "off.csv", {**columns, "loss": on_law * np.where(few, 1.1, 1.0)}))
    assert len(off) == 34
    assert "off the law" in off.flags[0].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {k: v[:2] for k, v in c.items()}, "2 rows to fit"),
        (lambda c: {**c, "N": np.full(30, 1e8)}, "not identifiable: one model size in all 30 rows"),
        (lambda c: {**c, "D": 1e20 / c["N"]}, "not identifiable: one budget"),
        (lambda c: {**c, "loss": np.where(np.arange(30) == 3, -2.0, c["loss"])}, "row 4: loss -2 must be above 0"),
        (lambda c: {**c, "N": np.where(np.arange(30) == 3, 0.3, c["N"])}, "mixed units in column 'N'"),
        (lambda c: {**c, "N": c["N"] / 1e9}, "--column parameters=N:M or :B"),
        (
            lambda c: {"N": c["N"], "D": c["D"], "lozz": c["loss"]},
            "no column of loss (nats per token); map",
        ),
        (lambda c: {"N": c["N"], "D": c["D"], "smooth loss": c["loss"]}, "Did you mean 'smooth loss'?"),
        (lambda c: {"N": c["N"], "loss": c["loss"]}, "no column of tokens"),
        (lambda c: {**c, "N": ["many", *c["N"][1:]]}, "row 1: 'N' is 'many', which is no number"),
        (lambda c: {**c, "domain": ["a", *["b"] * 29]}, "losses of 2 domains (a, b)"),
    ],
)
def test_one_clear_error(tmp_path: Path, change: Any, words: str) -> None:
    assert words in error(write(tmp_path / "runs.csv", change(runs())))


def test_rows_of_one_domain_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", {**runs(), "domain": ["a", "b"] * 15})
    table = RunTable.read(path, where=["domain=b"])
    assert len(table) == 15
    assert table.rows[0] == 2
    assert "Did you mean" in error(path, where=["domian=b"])
    assert "'domain' is a, b" in error(path, where=["domain=c"])


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ("parameters", "must look like NAME=COLUMN"),
        ("paramters=N", "Did you mean 'parameters'?"),
        ("parameters=M", "no column 'M'"),
        ("parameters=N:meters", "unit 'meters'"),
    ],
)
def test_mappings_are_checked(tmp_path: Path, mapping: str, words: str) -> None:
    assert words in error(write(tmp_path / "runs.csv", runs()), mapping)


def test_a_column_is_mapped_once(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", runs())
    assert "'parameters' is mapped already, to 'N'" in error(path, "parameters=N", "parameters=D")


def test_a_unit_is_applied_once(tmp_path: Path) -> None:
    columns = {**runs(), "N": ["10M", *runs()["N"][1:]]}
    said = error(write(tmp_path / "runs.csv", columns), "parameters=N:M")
    assert "row 1: 'N' is '10M': cells of 'N' already carry a unit; say --column without ':M'" in said
    RunTable.read(write(tmp_path / "runs.csv", columns), ["parameters=N"])


@pytest.mark.parametrize("cell", ["2,5M", "1.2.3M", "1,00,000K"])
def test_what_could_be_two_numbers_is_none(tmp_path: Path, cell: str) -> None:
    assert "which is no number" in error(write(tmp_path / "runs.csv", {**runs(), "N": [cell, *runs()["N"][1:]]}))


def test_thousands_may_have_commas_before_a_multiplier(tmp_path: Path) -> None:
    table = RunTable.read(write(tmp_path / "runs.csv", {**runs(), "N": ["1,234M", *runs()["N"][1:]]}))
    assert table.columns["parameters"][0] == 1.234e9


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_flags_columns_that_might_have_been_meant(tmp_path: Path, ending: str) -> None:
    columns = runs()
    more = {
        **columns,
        "val_loss": columns["loss"] + 0.1,
        "test_loss": np.round(columns["loss"], 2),  # the same, rounded
        "model_size": ["small"] * 30,
    }
    table = RunTable.read(write(tmp_path / f"runs{ending}", more))
    assert [(f.row, f.kind, f.is_dropped) for f in table.flags] == [(None, "other column", False)]
    assert flag_lines(table.flags) == [
        "  other column: 'val_loss' differs from 'loss', which was read as loss, in 30 of 30 rows; choose with "
        "--column loss=loss or --column loss=val_loss"
    ]
    assert table.mapped == {"loss": "loss", "parameters": "N", "tokens": "D"}
    assert not RunTable.read(tmp_path / f"runs{ending}", ["loss=val_loss"]).flags


def test_flags_flops_that_are_far_from_those_of_the_laws(tmp_path: Path) -> None:
    columns = runs()
    counted = 6 * columns["N"] * columns["D"]
    assert not RunTable.read(write(tmp_path / "near.csv", {**columns, "C": 1.5 * counted})).flags
    table = RunTable.read(write(tmp_path / "far.csv", {**columns, "C": 3 * counted, "lr": [1e-3] * 30}))
    said = "'C' is 3 times 6 N D in the median row; read were 'N' and 'D', not 'C'"
    assert [(f.row, f.kind, f.text) for f in table.flags] == [(None, "FLOPs", said)]
    assert list(table.mapped) == ["parameters", "tokens", "loss"]
    del columns["N"]
    assert "flops" in RunTable.read(write(tmp_path / "alone.csv", {**columns, "C": counted})).mapped


def text_of(columns: dict[str, Any], separator: str, *, comma: bool = False) -> list[str]:
    rows = [separator.join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    return [separator.join(columns), *(row.replace(".", ",") if comma else row for row in rows)]


@pytest.mark.parametrize(("separator", "comma"), [(",", False), (";", False), (";", True), ("\t", False), ("\t", True)])
def test_the_heading_says_how_cells_are_separated(tmp_path: Path, separator: str, comma: bool) -> None:
    columns = {**runs(), "date": ["22/11/2026"] * 30}
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(["# of the first cluster, in nats", "", *text_of(columns, separator, comma=comma)]))
    table = RunTable.read(path)
    for name, wanted in (("parameters", "N"), ("tokens", "D"), ("loss", "loss")):
        np.testing.assert_allclose(table.columns[name], columns[wanted], rtol=1e-12)


def test_decimal_commas_that_may_be_something_else_are_refused(tmp_path: Path) -> None:
    lines = text_of(runs(), ";", comma=True)
    path = tmp_path / "runs.csv"
    for cell in ("2.51", "1,000,000", "1.000,5", "1.4B"):
        path.write_text("\n".join([*lines[:3], f"1e8;1e9;{cell}", *lines[3:]]))
        said = error(path)
        assert f"{path}: line 4: 'loss' is '{cell}'" in said
        assert "all with a decimal comma" in said


def test_a_first_column_may_be_named_like_a_comment(tmp_path: Path) -> None:
    assert len(RunTable.read(write(tmp_path / "runs.csv", {"#": range(30), **runs()}))) == 30


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "N,D,loss,loss\n1e8,1e9,3,4\n", "the heading has column 'loss' twice"),
        ("a.jsonl", '{"N": 1e8, "loss": 3, "loss": 4}\n', "'loss' is given twice in one object"),
        ("a.csv", "# note\nN,D,loss\n1e8,1e9,3\n1,000,1e9,3\n", "line 4: 4 cells under 3 columns"),
    ],
)
def test_what_a_reader_might_pass_over(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    assert words in error(tmp_path / name)


def test_says_which_cell_a_short_row_lacks(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", runs())
    path.write_text(path.read_text() + "1e8,1e9\n2e8,2e9,\n")
    assert [(f.row, f.kind, f.text) for f in RunTable.read(path).flags] == [
        (31, "no loss", "the cell of 'loss' is missing"),
        (32, "no loss", "no finite loss"),
    ]
    path = write(tmp_path / "sizes.csv", {name: runs()[name] for name in ("loss", "N", "D")})
    path.write_text(path.read_text() + "3,1e8,,\n3,1e8\n")  # one cell more that is empty says nothing
    assert [(f.kind, f.text) for f in RunTable.read(path).flags] == [
        ("no size", "a size is missing"),
        ("no size", "the cell of 'D' is missing"),
    ]


@pytest.mark.parametrize("condition", ["replica=1e1", "replica=10", "replica=0.01K"])
def test_numbers_are_chosen_as_numbers(tmp_path: Path, condition: str) -> None:
    path = write(tmp_path / "runs.csv", {**runs(), "replica": [10.0, "x", ""] * 10})
    assert RunTable.read(path, where=[condition]).rows.tolist() == list(range(1, 31, 3))


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", ""), ("a.csv", "# N\n"), ("a.json", "{"), ("a.jsonl", "[1]\n"), ("a.json", "[]")]
)
def test_what_is_no_table(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert name in error(tmp_path / name)
    assert "no such file" in error(tmp_path / "missing.csv")
