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


@pytest.mark.parametrize(("name", "content"), [("a.csv", ""), ("a.json", "{"), ("a.jsonl", "[1]\n"), ("a.json", "[]")])
def test_what_is_no_table(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert name in error(tmp_path / name)
    assert "no such file" in error(tmp_path / "missing.csv")
