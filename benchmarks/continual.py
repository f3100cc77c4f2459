"""The reproduction of continual pre-training on ../shared/corpora, with its records; a thin form of `perennial bench`.

    python benchmarks/continual.py [--records records/DATE_continual] [options of `perennial bench continual`]

Resumable: run it again, or twice at the same time with OMP_NUM_THREADS=1. `--list` says what is left and how long it
takes. Needs ../shared/corpora unless --corpora, or --old and --new, say otherwise; see docs/bench.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from perennial.cli.main import main

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"

if __name__ == "__main__":
    given = sys.argv[1:]
    if not {"--corpora", "--old", "--help", "-h"} & set(given):
        if not CORPORA.is_dir():
            sys.exit(f"{CORPORA} is not here; give --corpora FOLDER, or --old and --new")
        given = ["--corpora", str(CORPORA), *given]
    sys.exit(main(["bench", "continual", *given]))
