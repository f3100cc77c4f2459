"""Table files: the rows of CSV, JSON or JSONL by column; what could be misread is refused.

Cells of CSV are separated by what the heading has: commas, or else semicolons or tabs. Lines above it that are empty or
begin with '#' are passed over.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError

_COMMENT = re.compile(r"#(?![,;\t])")  # a first column may be named '#'
_NUMERIC = re.compile(r"\s*[+-]?\d[\d.,_]*([eE][+-]?\d+)?\s*([KkMBGT]\s*\w*)?\s*")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, JSON (a list of objects, or an object of lists) or JSONL file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line, object_pairs_hook=_object) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            data = json.loads(text, object_pairs_hook=_object)
            if isinstance(data, dict) and data and all(isinstance(v, list) for v in data.values()):
                data = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
            records = data
        else:
            records = _csv_rows(path, text.splitlines())
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: must hold a list of rows, each with named columns")
    if not records:
        raise UserError(f"{path}: there are no rows in it")
    return records


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a name that is given twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is given twice in one object")
    return result


def _csv_rows(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    """Rows by the names in the heading; cells that a short row lacks are None. Raises UserError for a longer one."""
    above = len(list(itertools.takewhile(lambda line: not line.strip() or _COMMENT.match(line), lines)))
    if above == len(lines):
        return []
    separator = "," if "," in lines[above] else max(";\t", key=lines[above].count)
    reader = csv.reader(lines[above:], delimiter=separator)
    heading = next(reader)
    if twice := [name for name in heading if name and heading.count(name) > 1]:
        raise UserError(f"{path}: the heading has column '{twice[0]}' twice; give each column a name of its own")
    rows = {}
    for cells in reader:
        line = above + reader.line_num
        if any(cell.strip() for cell in cells[len(heading) :]):
            raise UserError(
                f"{path}: line {line}: {len(cells)} cells under {len(heading)} columns; write numbers without commas "
                "between thousands, and texts that hold the separator in quotes"
            )
        if cells:
            rows[line] = dict(itertools.zip_longest(heading, cells[: len(heading)]))
    return list(rows.values()) if separator == "," else _with_points(path, rows)


def _with_points(path: Path, rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with points for decimal commas. Raises UserError where a comma may stand between thousands instead."""
    numeric = [
        (line, name, cell)
        for line, row in rows.items()
        for name, cell in row.items()
        if cell is not None and _NUMERIC.fullmatch(cell)
    ]
    commas = [place for place in numeric if "," in place[2]]
    if not commas:
        return list(rows.values())
    unclear = next((place for place in numeric if not _is_plain(place[2])), None)
    if unclear is not None:
        line, name, cell = unclear
        raise UserError(
            f"{path}: line {line}: '{name}' is {cell!r}, but line {commas[0][0]}: '{commas[0][1]}' is "
            f"{commas[0][2]!r}; write all numbers with a decimal point, or all with a decimal comma, and nothing "
            "between thousands"
        )
    for line, name, cell in commas:
        rows[line][name] = cell.replace(",", ".")
    return list(rows.values())


def _is_plain(cell: str) -> bool:
    """Whether a number has no point and one comma at most; several points are a date or a version."""
    commas, points = cell.count(","), cell.count(".")
    return commas <= 1 and points != 1 and not (commas and points)
