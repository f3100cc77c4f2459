"""Every file in recipes/ can be planned after `make demo` and recipes/base.yaml, and says what it gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perennial.cli.main import main
from perennial.core import plugins
from perennial.data.prepare import PrepareSettings, prepare
from perennial.train.recipe import parse_recipe, read
from perennial.train.run import start
from tests.workspace import TINY

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def after_the_demo(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/, demo/corpora/ and runs/base, as small as can be."""
    root = tmp_path_factory.mktemp("collection")
    shutil.copytree(RECIPES[0].parent, root / "recipes")
    shutil.copytree(workspace.old, root / "demo/corpora/old")
    documents = [json.loads(line) for line in workspace.new_text.read_text(encoding="utf-8").splitlines()]
    lines = (json.dumps({**d, "module": d["id"]}) for d in documents)
    (root / "new.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = PrepareSettings(
        name="new",
        inputs=[str(root / "new.jsonl")],
        tokenizer=str(workspace.tokenizer),
        validation="10%",
        metadata_fields=["module"],
    )
    prepare(settings, root / "demo/corpora/new")
    for name, like in (("best", "new"), ("few", "new"), ("self", "old")):
        (root / f"demo/corpora/{name}").symlink_to(root / "demo/corpora" / like)
    (root / "runs/curriculum/corpora").mkdir(parents=True)
    for part in ("new-1of3", "new-2of3", "new-3of3"):  # of recipes/curriculum.yaml, which its command cuts
        (root / "runs/curriculum/corpora" / part).symlink_to(root / "demo/corpora/new")
    recipe = workspace.recipe(
        model={"options": {**TINY, "context": 128}}, batch={"sequences": 16, "sequence_length": 128}
    )
    recipe["stages"][0]["budget"] = "16384 tokens"
    start(parse_recipe(recipe), root / "runs/base", base=Path(), quiet=True)
    for member in range(1, 5):  # of recipes/ensemble.yaml, which its command trains
        (root / f"runs/ensemble-{member}").symlink_to(root / "runs/base")
    return root


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_collection_can_be_planned(
    path: Path, after_the_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = len(read(path).stages)
    passes = [f"stages.{i}.max_epochs=1000" for i in range(stages)]  # the text here is far shorter than the demo's
    code = main(["train", str(after_the_demo / "recipes" / path.name), "--dry-run", *passes])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "learning rate: starts at" in said.out


def test_every_continuation_has_a_recipe_that_says_what_it_gave() -> None:
    names = {path.stem for path in RECIPES}
    assert {{"rewarm": "rewarm_replay"}.get(name, name) for name in plugins.names("continuations")} <= names
    for path in RECIPES:
        header = path.read_text(encoding="utf-8").split("name:")[0]
        expected = header.partition("# expect:")[2]
        assert any(character.isdigit() for character in expected), f"{path.name}: what did it give?"
