"""Tables for any law: its own columns, curves of several files, and one clear error for what is of no use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.scaling.asking import build
from perennial.scaling.curves import Rates
from perennial.scaling.law_table import LawTable, read_for
from perennial.scaling.laws.annealing import Annealing
from perennial.scaling.laws.replay import Replay
from perennial.scaling.table import RunTable, is_of_runs

ROWS = "part,final loss\n0,3.3\n5,3.1\n,3.0\n25,2.95\n25,2.95\n50,2.9\n100,2.88\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_reads_what_the_law_names_and_leaves_out_gaps_and_twins(tmp_path: Path) -> None:
    path = written(tmp_path / "replay.csv", ROWS)
    table = LawTable.read(path, Replay(), ["share=part:%", "loss=final loss"])
    np.testing.assert_allclose(table.columns["share"], [0, 0.05, 0.25, 0.5, 1])
    assert table.rows.tolist() == [1, 2, 4, 6, 7]
    assert [(f.row, f.kind) for f in table.flags] == [(3, "gap"), (5, "duplicate")]
    assert "5 rows" in table.summary


@pytest.mark.parametrize(
    ("text", "mappings", "words"),
    [
        (
            ROWS,
            ("share=part", "loss=final loss"),
            "row 7: share 100 must be from 0 to 1; if column 'part' is in",
        ),
        (ROWS, ("loss=final loss",), "no column of share (of the evaluated domain in the training tokens, share)"),
        (ROWS, ("share=part:%",), "Did you mean 'final loss'?"),
        ("share,loss\n0,3\n1,2\n", (), "2 rows to fit 3 coefficients"),
        ("share,loss\n0,3\n0.5,-1\n1,2\n0.1,2\n", (), "row 2: loss -1 must be above 0 nats/token"),
        ("share,loss\n,3\n,2\n", (), "no row has a number"),
        (ROWS, ("shares=part",), "Did you mean 'share'?"),
    ],
)
def test_one_clear_error(tmp_path: Path, text: str, mappings: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        LawTable.read(written(tmp_path / "runs.csv", text), Replay(), mappings)
    assert words in str(caught.value)


def test_flags_other_columns_and_short_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "batch.csv", "steps,batch,bs,loss\n9,1e5,10,3\n5,1e6,20,3\n3,1e7,30,3\n2\n")
    table = LawTable.read(path, _any("steps_to_target"))
    assert [(f.row, f.kind) for f in table.flags] == [(None, "other column"), (4, "gap")]
    assert (
        "'bs' differs from 'batch', which was read as batch, in 3 of 4 rows; choose with --column batch=batch"
        in table.flags[0].text
    )
    assert table.flags[1].text == "the cell of 'batch' is missing"


def test_curves_come_by_file_or_by_name(tmp_path: Path) -> None:
    rows = [
        (step, 1e-3 * min(1.0, step / 30) * (0.5 if step > 60 else 1.0), 4 - step / 100) for step in (10, 30, 50, 90)
    ]
    text = "".join(f"{s},{r},{x}\n" for s, r, x in rows)
    files = [written(tmp_path / f"{name}.csv", "iteration,lr,loss\n" + text) for name in ("a", "b")]
    named = "".join(f"{name},{line}\n" for name in "ab" for line in text.splitlines())
    whole = written(tmp_path / "whole.csv", "run,iteration,lr,loss\n" + named)
    for paths in (files, whole):
        table = LawTable.read(paths, Annealing())
        assert len(table) == 6  # two rows of the warm-up are left out
        assert table.curves.tolist() == ["a"] * 3 + ["b"] * 3
        assert isinstance(table.columns["curve"][0], Rates)
        assert len(set(map(id, table.columns["curve"]))) == 2
        assert table.cells(0) == {"row": 2, "curve": "a", "step": 30.0, "rate": 1e-3, "loss": 3.7}
    with pytest.raises(UserError, match="no column of rate"):
        LawTable.read(written(tmp_path / "bare.csv", "step,loss\n1,2\n"), Annealing())


def test_every_law_has_a_table() -> None:
    of_runs = {name for name in plugins.names("laws") if is_of_runs(_any(name))}
    assert of_runs == {
        *("chinchilla", "tied", "gamma", "tied_gamma", "farseer", "over_training", "repeated", "repeat_penalty")
    }


@pytest.mark.parametrize("name", plugins.names("laws"))
def test_columns_with_the_names_of_a_law_are_read(name: str, tmp_path: Path) -> None:
    law = _any(name)
    columns = law.draw(type(law).EXAMPLES[0]["inputs"], 24, np.random.default_rng(0))
    if "curve" in columns:  # as a file has it: rates at the rows in place of all of them
        columns = {**columns, "curve": np.full(24, "one"), "step": np.arange(1.0, 25.0), "rate": np.full(24, 1e-3)}
    elif "unique_tokens" in columns:
        columns["unique_tokens"] = np.minimum(columns["unique_tokens"], columns["tokens"])
    columns[law.TARGET.name] = np.linspace(0.3, 0.6, 24)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    table = read_for(law, written(tmp_path / "rows.csv", "\n".join(lines)))
    kept = [*table.rows - 1]
    for i in (*law.inputs, law.TARGET):
        if i.name in columns and i.name != "curve":
            np.testing.assert_allclose(table.columns[i.name], columns[i.name][kept])


def test_laws_of_size_and_tokens_keep_their_checks(tmp_path: Path) -> None:
    path = written(tmp_path / "runs.csv", "N,D,loss\n1e8,1e9,3\n1e8,2e9,2.9\n")
    with pytest.raises(UserError, match="2 rows to fit; 5 are the fewest"):
        read_for(_any("tied"), path)
    with pytest.raises(UserError, match="only for laws of loss by size"):
        read_for(Replay(), path, drop=["outliers"])
    assert RunTable.read.__doc__


def test_settings_of_a_law_are_given_as_texts() -> None:
    assert build("mixture", ["domains=web,code"]).coefficients[1].name == "t_web"
    with pytest.raises(UserError, match="Did you mean 'domains'"):
        build("mixture", ["domain=web,code"])


def _any(name: str):  # type: ignore[no-untyped-def]
    return plugins.build("laws", {"name": name, **plugins.load("laws", name).EXAMPLES[0]["settings"]})[0]
