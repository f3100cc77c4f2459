"""Predicted and measured: what is compared, what is not and why, and what the page and the last line of a run say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core.predictions import fingerprints
from perennial.report.comparison import compare
from perennial.report.foretold import Foretold, Outcome, _words, outcome, outcome_of
from perennial.report.page import render
from perennial.report.runs import read_run

from .synthetic import BATCH, Draw, Plan, write_run

TOKENS = 40 * BATCH
MIXTURE = [Draw("new", 0.95), Draw("old", 0.05, "replay")]
LOSSES = {"old": (4.55, 4.80), "new": (6.10, 4.20)}


def foretold(folder: Path, **changes: Any) -> dict[str, Any]:
    """Predictions of a run that was written, right but for a few percent."""
    resolved = json.loads((folder / "resolved.json").read_text(encoding="utf-8"))
    after = read_run(folder).after
    tokens = after["old"].tokens
    costs = {
        "tokens": {"value": float(TOKENS), "basis": "given: budget"},
        "flops": {"value": TOKENS * 1.3e7, "basis": "counted: tokens x FLOPs per token"},
        "seconds": {"value": 10.0, "basis": "own runs: measured here"},
        "memory_bytes": {"value": 6e8, "basis": "counted: closed form"},
        "energy_kwh": {"value": 1e-3, "basis": "assumed: 16 W"},
        "device": "cpu",
        "devices": 1,
    }
    losses = {
        "old": {"value": 4.7, "low": 4.6, "high": 4.9, "basis": "own runs: law", "corpora": {"old": tokens}},
        "new": {"value": 4.1, "low": 4.05, "high": 4.15, "basis": "own runs: law", "corpora": {"new": None}},
    }
    curve = [{"share": s, "old": [4.7, 4.6, 4.9], "new": [4.1, 4.05, 4.15]} for s in (0.0, 0.05, 0.5)]
    return {
        "version": 1,
        "fingerprints": fingerprints(resolved),
        "losses": losses,
        "costs": costs,
        "curve": curve,
        **changes,
    }


def run_with(root: Path, *, stop_at: float = 1.0, text: str | None = None, **changes: Any) -> Path:
    """A run folder whose recipe carries predictions, or the text that is given."""
    base = write_run(root, Plan("base", {"old": (8.3, 4.55), "new": (8.4, 6.1)}, [Draw("old", 1.0)], TOKENS, (0, 1, 0)))
    plan = Plan("update", LOSSES, MIXTURE, TOKENS, (1e-4, 1e-3, 1e-4))
    folder = write_run(root, plan, parent=base, stop_at=stop_at).folder
    block = yaml.safe_dump({"predictions": foretold(folder, **changes)}) if text is None else text
    with open(folder / "recipe.yaml", "a", encoding="utf-8") as file:
        file.write(block)
    return folder


def found(folder: Path) -> Outcome:
    result = outcome(read_run(folder))
    assert result is not None
    return result


def by_name(result: Outcome) -> dict[str, Foretold]:
    return {one.name: one for one in result.numbers}


def test_each_number_beside_what_was_measured(tmp_path: Path) -> None:
    folder = run_with(tmp_path)
    result = found(folder)
    numbers = by_name(result)
    old, new = numbers["Old loss (old)"], numbers["New loss (new)"]
    assert (old.measured, new.measured) == (pytest.approx(4.80), pytest.approx(4.20))
    assert (old.is_inside, new.is_inside) == (True, False)
    assert new.difference == pytest.approx(4.20 / 4.10 - 1)
    assert numbers["Tokens"].difference == 0
    assert numbers["FLOPs"].difference == pytest.approx(0)
    assert numbers["Time"].measured == read_run(folder).wall_seconds
    assert numbers["Memory per device"].difference == pytest.approx(0.02)
    assert numbers["Energy, kWh"].why_not == "a run does not measure it"
    assert result.notes == ()
    line = result.line()
    assert "Old loss (old) 4.700 [4.600, 4.900], 4.800 (+2.1%, inside)" in line
    assert "4.200 (+2.4%, outside)" in line
    assert "Energy" not in line
    assert outcome_of(folder) == result
    plain = old.to_json()
    assert plain["is_inside"] is True
    assert plain["predicted"] == {"value": 4.7, "low": 4.6, "high": 4.9, "basis": "own runs: law"}


def test_a_run_without_predictions_has_no_section(tmp_path: Path) -> None:
    folder = run_with(tmp_path, text="")
    assert outcome(read_run(folder)) is None
    assert outcome_of(folder) is None
    assert 'id="foretold"' not in render(compare([folder]))


def test_what_depends_on_the_end_is_not_compared_before_it(tmp_path: Path) -> None:
    result = found(run_with(tmp_path, stop_at=0.5))
    numbers = by_name(result)
    for name in ("Old loss (old)", "New loss (new)", "Tokens", "FLOPs", "Time"):
        assert numbers[name].difference is None
        assert numbers[name].is_inside is None
        assert "not reached its end" in numbers[name].why_not
    assert numbers["Memory per device"].difference is not None
    assert any("is not compared" in note for note in result.notes)


@pytest.mark.parametrize(("part", "is_all"), [("stages", True), ("text", True), ("computing", False)])
def test_another_run_than_was_planned_is_told(tmp_path: Path, part: str, is_all: bool) -> None:
    folder = run_with(tmp_path)
    block = foretold(folder)
    prints = {**block["fingerprints"], part: "0" * 16}
    path = folder / "recipe.yaml"
    path.write_text(
        path.read_text().split("predictions:")[0] + yaml.safe_dump({"predictions": {**block, "fingerprints": prints}})
    )
    result = found(folder)
    compared = {name for name, one in by_name(result).items() if one.difference is not None}
    assert compared == (set() if is_all else {"Old loss (old)", "New loss (new)", "Tokens", "FLOPs"})
    (note,) = result.notes
    assert (f"({part})" if is_all else "time and memory are not compared") in note
    assert "Predicted and measured" in render(compare([folder]))


def test_losses_on_other_text_are_not_compared(tmp_path: Path) -> None:
    folder = run_with(tmp_path)
    losses = foretold(folder)["losses"]
    for corpora, words in (
        ({"old": 17}, "predicted for 17 validation tokens"),
        ({"third": None}, "not measured on third"),
    ):
        changed = run_with(tmp_path / words[:5], losses={"old": {**losses["old"], "corpora": corpora}})
        (old, *_) = found(changed).numbers
        assert words in old.why_not
        assert old.difference is None


def test_times_of_another_device_are_not_compared(tmp_path: Path) -> None:
    costs = foretold(run_with(tmp_path))["costs"]
    same = (("cpu", "cpu"), ("A100-40GB", "NVIDIA A100-SXM4-40GB"), ("RTX-4090", "NVIDIA GeForce RTX 4090"))
    assert all(_words(sheet) <= _words(driver) for sheet, driver in same)
    assert not _words("A10") <= _words("NVIDIA A100-SXM4-80GB")
    for device, devices, words in (("H200", 1, "planned for 1 x H200, ran on cpu"), ("cpu", 2, "ran in 1 process")):
        folder = run_with(tmp_path / f"{device}{devices}", costs={**costs, "device": device, "devices": devices})
        numbers = by_name(found(folder))
        assert words in numbers["Time"].why_not
        assert words in numbers["Memory per device"].why_not
        assert numbers["FLOPs"].difference is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("predictions: {version: 3}\n", "version 3; this version of Perennial reads version 1"),
        ("predictions: [1, 2]\n", "the predictions of the recipe cannot be read"),
        ("predictions: {version: 1\n", "the recipe cannot be read"),
    ],
)
def test_damaged_predictions_are_told_and_break_nothing(tmp_path: Path, text: str, words: str) -> None:
    folder = run_with(tmp_path, text=text)
    result = found(folder)
    assert result.predictions is None
    assert words in result.line()
    assert words in render(compare([folder]))


def test_the_page(tmp_path: Path) -> None:
    folder = run_with(tmp_path, unknown=["new loss: cannot know: <no> calibration"])
    (section,) = re.findall(r'<section id="foretold".*?</section>', render(compare([folder])), flags=re.S)
    assert section.count("<tr>") >= 8
    for words in ("Old loss (old)", "4.600 to 4.900", "+2.4%", '<span class="bad">no</span>', "&lt;no&gt; calibration"):
        assert words in section
    row = next(row for row in re.findall(r"<tr>.*?</tr>", section) if ">5%</th>" in row)
    assert "4.800" in row
    assert "4.200" in row
