"""Seeds by name: stable across machines, different for every purpose."""

from __future__ import annotations

from perennial.core.seeds import derive


def test_values_never_change() -> None:
    """Data orders and initialisations of finished runs hang on these."""
    assert derive(0, "model") == 5628843996446412408
    assert derive(7, "order", "ab12", 3) == 2228454864185854369


def test_every_name_counts() -> None:
    seeds = {
        derive(s, *names) for s in range(3) for names in ((), ("a",), ("b",), ("a", 0), ("a", 1), ("a", "b"), ("ab",))
    }
    assert len(seeds) == 21
    assert all(0 <= s < 2**63 for s in seeds)


def test_many_seeds_do_not_collide() -> None:
    assert len({derive(0, "row", i) for i in range(20_000)}) == 20_000
