"""Processes of a start find each other, whatever earlier starts have left in the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from perennial.train.meeting import fresh_store, name_of_start


class Table:
    """torchrun's store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value.encode()
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout=20):
                raise TimeoutError(key)
            return self.values[key]

    def add(self, key: str, amount: int) -> int:
        with self.changed:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
            return total

    def check(self, keys: list[str]) -> bool:
        with self.changed:
            return all(key in self.values for key in keys)


def start(table: Table, size: int) -> list[str]:
    with ThreadPoolExecutor(size) as pool:
        late_first = [pool.submit(name_of_start, table, rank, size, 20.0) for rank in reversed(range(size))]
        return [future.result() for future in late_first]


def test_all_hear_one_name_and_each_start_has_another() -> None:
    table = Table()
    names = [start(table, 4) for _ in range(3)]
    assert all(len(set(heard)) == 1 for heard in names)
    assert len({heard[0] for heard in names}) == 3


def test_those_who_died_while_asking_disturb_nobody() -> None:
    table = Table()
    table.add("perennial/asking", 1)  # killed between the two
    table.add("perennial/asking", 1)
    table.set("perennial/asking/2", "killed before it heard the answer")
    assert len(set(start(table, 3))) == 1


def test_a_process_that_does_not_come_is_not_waited_for_for_ever() -> None:
    with pytest.raises(TimeoutError, match="of 2 processes, not all came"):
        name_of_start(Table(), 0, 2, 0.1)


def test_without_torchrun_torch_does_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert fresh_store(0, 1, timedelta(seconds=1)) is None
