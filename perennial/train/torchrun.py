"""torchrun that tells how it ended in one line and in Perennial's exit codes: `python -m perennial.train.torchrun`.

Takes the arguments of `torchrun` and does what it does. For many machines, where each has its own torchrun and no
process sees them all; on one machine `--processes` of the commands does more.

Exit codes: 0 complete; 130 stopped by a signal, which the processes took as a request to save; 2 bad input; 1 a crash.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any


def main(arguments: list[str]) -> int:
    """Runs torchrun with these arguments and returns the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # its own account of what is told below
    try:
        run(parse_args(arguments))
    except SignalException:
        print("stopped", file=sys.stderr)
        return 130
    except ChildFailedError as error:
        code, message = verdict(error.failures)
        print(message, file=sys.stderr)
        return code
    return 0


def verdict(failures: Mapping[int, Any]) -> tuple[int, str]:
    """(exit code, message) of the processes of this machine that failed, by rank; torchrun's ProcessFailure each."""
    codes = {failure.exitcode for failure in failures.values()}
    if codes == {130}:
        return 130, "stopped"
    if 2 in codes:  # the process has told it
        return 2, "stopped, because of the error above"
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp, item[0]))
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"failed (exit code {failure.exitcode})"
    return 1, f"process {rank} {how}; see above, and what the other machines say"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
