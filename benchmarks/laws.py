"""Every figure of the scaling laws beside its bar: published tables reproduced, extrapolations, intervals, timing.

Run: python benchmarks/laws.py   (a few minutes on one core; tables in ../shared/law_data, absent ones are skipped).
Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import laws_of_loss, laws_of_training
from benchmarks.law_rows import Row, show


def main() -> int:
    """Prints all rows; 1 when a bar is missed."""
    rows: list[Row] = []
    for part in (laws_of_loss, laws_of_training):
        rows += show(part.rows())
    missed = [row for row in rows if row.passed is False]
    met = sum(row.passed is True for row in rows)
    print(f"\n{met} bars met, {len(missed)} missed" + "".join(f"\n  missed: {row.id} {row.what}" for row in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
