"""Model cards: what was there stays byte for byte, one section comes from the lineage, licences are carried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perennial.core.lineage import Fact, Lineage, Origin
from perennial.model.card import (
    BEGIN,
    CARD,
    END,
    GENERATION_CONFIG,
    Companions,
    front_matter,
    license_of,
    read_companions,
    updated_card,
    write_companions,
)

CARD_TEXT = "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n\n# A model\n\nSome words, 100% of them true.\n"


def stage(**changes: Any) -> dict[str, Any]:
    """A stage record with the least that is asked for."""
    return {
        "run": "update",
        "stage": "update",
        "recipe_hash": "h",
        "parent": "0123456789abcdef",
        "seed": 0,
        "tokens": 1000,
        "complete": True,
        "flops": 1e9,
        "seconds": 1.0,
        "sequence_length": 10,
        "batch_tokens": 100,
        "precision": "fp32",
        "schedule": {"name": "rewarm"},
        "optimizer": {},
        "objective": {},
        "rate_start": 1e-5,
        "rate_peak": 1e-4,
        "rate_end": 1e-5,
        "sources": [{"name": "new", "tokens": 750}, {"name": "old", "tokens": 250}],
        **changes,
    }


def lineage(*, is_foreign: bool = True, **changes: Any) -> Lineage:
    """A lineage of one stage, of a model from elsewhere or from random weights."""
    guess = Fact(value=1e-3, is_estimate=True, basis="a rule")
    known = Fact(value=2e12, is_estimate=False, basis="stated")
    origin = Origin(
        name="org/model",
        model_type="llama",
        weights="0123456789abcdef",
        parameters=10,
        through="native",
        tokens=known,
        peak=guess,
        rate=guess,
        flops=guess,
    )
    loss = {"nats_per_token": 2.0, "bits_per_byte": 1.0}
    facts: dict[str, Any] = {
        "checkpoint": "fedcba9876543210",
        "stages": [stage(parent="0123456789abcdef" if is_foreign else None)],
        "evaluation": {"before": {"old": loss}, "after": {"old": loss, "new": loss}},
        "origin": origin if is_foreign else None,
    }
    return Lineage(**{**facts, **changes})


def test_the_card_keeps_everything_and_names_its_base() -> None:
    card = updated_card(CARD_TEXT, lineage())
    assert card.startswith("---\nlicense: apache-2.0\nlanguage: [en, de]\nbase_model: org/model\n---\n\n# A model\n")
    assert "\n\nSome words, 100% of them true.\n\n<!-- perennial -->\n" in card
    assert front_matter(card) == {"license": "apache-2.0", "language": ["en", "de"], "base_model": "org/model"}


def test_the_section_says_what_was_done() -> None:
    section = updated_card(CARD_TEXT, lineage()).split(BEGIN)[1].split(END)[0]
    assert "Began as **org/model** (llama, 10 parameters, weights `0123456789abcdef`)" in section
    assert "tokens 2T (stated), peak learning rate 0.001 (estimate), final learning rate 0.001 (estimate)" in section
    assert "| update, update | `0123456789abcdef` | 1K | new 75.0%, old 25.0% | 1e-05, 0.0001, 1e-05 |" in section
    assert "| old | 2.0000 (1.0000) | 2.0000 (1.0000) |" in section
    assert "| new | - | 2.0000 (1.0000) |" in section


def test_a_later_section_takes_the_place_of_the_first() -> None:
    first = updated_card(CARD_TEXT + "The end.\n", lineage())
    again = updated_card(first, lineage(stages=[stage(), stage(run="second")]))
    assert again.count(BEGIN) == again.count(END) == again.count("base_model") == 1
    assert "| second, update |" in again
    assert updated_card(again, lineage()) == first


def test_a_base_that_is_named_stays() -> None:
    card = CARD_TEXT.replace("license:", "base_model: other/base\nlicense:")
    assert front_matter(updated_card(card, lineage()))["base_model"] == "other/base"
    assert "base_model" not in updated_card(CARD_TEXT, lineage(is_foreign=False))


def test_a_card_without_front_matter_gets_one() -> None:
    assert updated_card("# Words\n", lineage()).startswith("---\nbase_model: org/model\n---\n\n# Words\n")
    assert updated_card("# Words\n", lineage(is_foreign=False)).startswith("# Words\n")


def test_front_matter_that_cannot_be_read_is_left_alone() -> None:
    broken = "---\nlicense: [apache\n---\n# Words\n"
    assert updated_card(broken, lineage()).startswith(broken)
    assert front_matter(broken) == front_matter("words") == front_matter("---\n- a list\n---\n") == {}


def test_windows_lines_stay_windows_lines() -> None:
    card = updated_card(CARD_TEXT.replace("\n", "\r\n"), lineage())
    assert "base_model: org/model\r\n---\r\n" in card
    assert "\n" not in card.replace("\r\n", "")


def test_a_new_model_has_a_card_that_invents_no_licence() -> None:
    card = updated_card(None, lineage(is_foreign=False))
    assert front_matter(card) == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "# update\n" in card
    assert "| update, update | random weights |" in card
    assert "licen" not in card


def test_companions_are_read_and_written_as_they_are(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    (parent / "LICENSE_FOLDER").mkdir(parents=True)
    child.mkdir()
    card = CARD_TEXT.encode() + b"bytes that are no text: \xff\xfe\n"
    kept = {"LICENSE.txt": b"terms \xff", "Notice": b"notice", "USE_POLICY.md": b"use", GENERATION_CONFIG: b"{ }"}
    for name, content in {**kept, CARD: card, "other.txt": b"x", "licensed.py": b"x"}.items():
        (parent / name).write_bytes(content)
    write_companions(read_companions(parent), child, lineage())
    assert {path.name for path in child.iterdir()} == {*kept, CARD}
    assert all((child / name).read_bytes() == content for name, content in kept.items())
    assert (child / CARD).read_bytes().startswith(card.replace(b"\n---\n\n", b"\nbase_model: org/model\n---\n\n"))
    (tmp_path / "empty").mkdir()
    assert read_companions(tmp_path / "empty") == Companions()


@pytest.mark.parametrize(
    ("card", "files", "expected"),
    [
        (CARD_TEXT, ["LICENSE"], "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", [], "other (llama3.1)"),
        ("---\nlicense: [mit, cc0-1.0]\n---\n", [], "mit, cc0-1.0"),
        ("# no front matter\n", ["NOTICE", "LICENSE.md"], "LICENSE.md"),
        (None, ["NOTICE"], None),
    ],
)
def test_where_the_licence_is_found(tmp_path: Path, card: str | None, files: list[str], expected: str | None) -> None:
    for name in files:
        (tmp_path / name).write_text("terms")
    if card is not None:
        (tmp_path / CARD).write_text(card)
    assert license_of(tmp_path) == expected
