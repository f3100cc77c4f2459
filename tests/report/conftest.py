"""The demo's five runs, written once; and its comparison."""

from __future__ import annotations

import pytest

from perennial.report.comparison import Comparison, compare

from .synthetic import Written, demo


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    return demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def comparison(runs: dict[str, Written]) -> Comparison:
    return compare([run.folder for run in runs.values()])
