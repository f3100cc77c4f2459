"""Trains several runs one after the other in the processes of one `torchrun`, which take seconds to start.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.train.many_runs RUNS.json

RUNS.json: [{"out": run folder, "recipe": recipe to start, or null to resume, "parallel": how, when it is resumed,
"behind": whether to save while training goes on}]
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def run_all(runs: list[dict[str, Any]], processes: int, work: Path, *, seconds: float = 170) -> None:
    """Does so; fails with what the processes said when one of them fails."""
    listed = work / f"runs-{processes}-{len(list(work.glob('runs-*')))}.json"
    listed.write_text(json.dumps(runs))
    done = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "tests.train.many_runs", str(listed)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-4000:]


def main() -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # a process that waits for one that failed says where
    from perennial.train import run, saving
    from perennial.train.parallel import join_world, leave_world
    from perennial.train.recipe import parse_recipe

    run.leave_world = lambda world: None  # a process group cannot be joined twice under one torchrun
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        saving.LARGE_BYTES = 0 if asked.get("behind") else 1 << 28
        if asked["recipe"] is None:
            run.train(Path(asked["out"]), parallel=asked.get("parallel", ()), quiet=True)
        else:
            run.start(parse_recipe(asked["recipe"]), Path(asked["out"]), base=Path(), quiet=True)
    leave_world(join_world())


if __name__ == "__main__":
    main()
