"""A small but real workspace: documentation and source of this Python, a tokenizer, two corpora, and a recipe."""

from __future__ import annotations

import json
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCES = ("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "datetime", "decimal", "difflib", "dis")
TINY = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 64, "context": 64}


@dataclass(frozen=True)
class Workspace:
    """Paths of the raw texts, the tokenizer and the prepared corpora."""

    root: Path
    old_text: Path
    new_text: Path
    tokenizer: Path
    old: Path
    new: Path

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A base recipe of 12 updates of 256 tokens on the old corpus; `changes` replace top-level settings."""
        stage = {
            "name": "pretrain",
            "budget": "3072 tokens",
            "mixture": {"old": "100%"},
            "schedule": {"name": "cosine", "peak": 5e-3, "warmup": "10%"},
        }
        return {
            "name": "base",
            "model": {"options": TINY},
            "corpora": {"old": str(self.old)},
            "stages": [stage],
            "batch": {"sequences": 8, "sequence_length": 32},
            "precision": "fp32",
            "evaluation": {"tokens": "2048 tokens", "every": "50%"},
            "checkpoints": {"every": "1024 tokens", "keep": 2},
            **changes,
        }


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Made once; tests read it and write elsewhere."""
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    root = tmp_path_factory.mktemp("workspace")
    library = Path(sysconfig.get_paths()["stdlib"])
    old = [{"id": k, "text": v} for k, v in sorted(pydoc_data.topics.topics.items())]
    new = []
    for name in SOURCES:
        text = (library / f"{name}.py").read_text(encoding="utf-8")
        new += [{"id": f"{name}-{i}", "text": text[i : i + 4000]} for i in range(0, len(text), 4000)]
    for name, documents in (("old", old), ("new", new)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    train_tokenizer([root / "old.jsonl"], root / "tokenizer", vocabulary_size=512)
    for name in ("old", "new"):
        settings = PrepareSettings(
            name=name, inputs=[str(root / f"{name}.jsonl")], tokenizer=str(root / "tokenizer"), validation="10%"
        )
        prepare(settings, root / "corpora" / name)
    return Workspace(
        root, root / "old.jsonl", root / "new.jsonl", root / "tokenizer", root / "corpora/old", root / "corpora/new"
    )
