"""What the documents say can be done: every command line parses, every recipe is valid, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from perennial.cli.main import commands, parser_of
from perennial.train.recipe import parse_recipe, read

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "BENCHMARKS.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(path: Path, language: str = "") -> Iterator[str]:
    """The fenced blocks of a document; with a language, only those marked with it."""
    for marked, text in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S):
        if marked == language:
            yield text


def command_lines() -> list[tuple[str, str]]:
    """Every line of a document's blocks, and every `code`, that begins with 'perennial'."""
    found = []
    for path in DOCUMENTS:
        if path.name == "modules.md":
            continue  # first lines of docstrings, which name commands and no arguments
        inline = re.findall(r"`(perennial [a-z]+ [^`]*)`", path.read_text(encoding="utf-8"))
        lines = [line for block in blocks(path) for line in block.splitlines() if line.startswith("perennial ")]
        found += [(path.name, line) for line in [*lines, *inline] if "..." not in line and "[" not in line]
    return found


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_a_command_in_the_documents_parses(document: str, line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    assert command in commands(), f"{document}: {line}"
    given = " ".join(arguments)
    if any(word.isupper() and word.isalpha() for word in arguments) and "--" not in given and command != "train":
        return  # a form such as `perennial show CHECKPOINT`, with the arguments left to the reader
    has_actions = command in ("tokenizer", "vocab", "laws")
    parse = parser_of(command).parse_args if has_actions else parser_of(command).parse_intermixed_args
    parse(arguments)


def test_the_documents_hold_commands() -> None:
    assert len(command_lines()) > 10


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_the_collection_is_valid_and_says_what_it_is(path: Path) -> None:
    assert read(path).name
    header = path.read_text(encoding="utf-8").split("name:")[0]
    assert all(f"# {word}:" in header for word in ("command", "cost", "expect"))


def test_the_recipe_in_the_documents_is_valid() -> None:
    (text,) = blocks(ROOT / "docs" / "recipe.md", "yaml")
    parse_recipe(yaml.safe_load(text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
