"""Where the processes of one start find each other, apart from what earlier starts have left behind.

torchrun keeps one key-value store for all its restarts, and torch (2.13, for one) puts the addresses of the processes
there under the same names each time: a process that is early after a restart reads the address of one that was killed,
and the start fails or hangs. So rank 0 thinks of a name that was never used, every process asks for it under a name of
its own, and all that follows is written below that.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

_PAUSE = 0.02
"""Seconds between two looks of rank 0 at who has come."""


def fresh_store(rank: int, size: int, timeout: timedelta) -> Any:
    """torchrun's store below a name of this start alone, for `init_process_group`; None without torchrun.

    Every process has to call it. Raises TimeoutError when not all do.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"perennial/{name_of_start(store, rank, size, timeout.total_seconds())}", store)


def name_of_start(store: Any, rank: int, size: int, seconds: float) -> str:
    """The name that rank 0 has thought of for this start; it answers whoever asks until all have heard it."""
    if rank > 0:
        asked = uuid.uuid4().hex
        number = store.add("perennial/asking", 1)
        store.set(f"perennial/asking/{number}", asked)
        name = bytes(store.get(f"perennial/answer/{asked}")).decode()
        store.add(f"perennial/{name}/heard", 1)
        return name
    name, answered, until = uuid.uuid4().hex, set[int](), time.monotonic() + seconds
    while store.add(f"perennial/{name}/heard", 0) < size - 1:
        for number in range(1, store.add("perennial/asking", 0) + 1):
            if number not in answered and store.check([f"perennial/asking/{number}"]):
                asked = bytes(store.get(f"perennial/asking/{number}")).decode()
                store.set(f"perennial/answer/{asked}", name)
                answered.add(number)
        if time.monotonic() > until:
            raise TimeoutError(f"of {size} processes, not all came within {seconds:.0f} seconds")
        time.sleep(_PAUSE)
    return name
