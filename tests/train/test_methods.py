"""Teachers, pulls and other layouts of rows inside the loop: what they do to old and new loss, and that they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.cli.main import main
from perennial.core import lineage, records
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.data.prepare import PrepareSettings, prepare
from perennial.evals.loss import losses_to_text
from perennial.train.parallel import World
from perennial.train.recipe import parse_recipe, read
from perennial.train.resolve import resolve
from perennial.train.run import start, train
from tests.workspace import Workspace

RATE = 1e-2


@pytest.fixture(scope="module")
def base(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of every run here: 200 updates on the old corpus."""
    root = tmp_path_factory.mktemp("methods")
    recipe = workspace.recipe(checkpoints={"every": None})
    recipe["stages"][0] |= {"budget": f"{256 * 200} tokens", "optimizer": "muon"}
    start(parse_recipe(recipe), root / "base", base=root, quiet=True)
    return root / "base"


def continued(
    base: Path, workspace: Workspace, *, updates: int = 24, recipe: Any = None, **stage: Any
) -> dict[str, Any]:
    """A recipe that goes on with the base on new data; `stage` are further settings of its stage."""
    changes = dict(recipe or {})
    made = workspace.recipe(
        **{"name": "child", "parent": str(base), "corpora": {"new": str(workspace.new)}, **changes},
    )
    del made["model"]
    made["stages"] = [
        {
            "name": "update",
            "budget": f"{256 * updates} tokens",
            "mixture": {"new": "100%"},
            "schedule": {"name": "constant", "peak": RATE},
            "optimizer": "muon",
            **stage,
        }
    ]
    return made


def run(recipe: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Trains it; the losses at its end by corpus."""
    start(parse_recipe(recipe), folder, base=folder.parent, quiet=True)
    return records.read(folder / "events.jsonl", "evaluation")[-1]["corpora"]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(e["tokens"], e["loss"], e["gradient_norm"]) for e in records.read(folder / "events.jsonl", "train")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(folder) / "model.safetensors")


def distance(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


@pytest.fixture(scope="module")
def plain(base: Path, workspace: Workspace) -> Path:
    folder = base.parent / "plain"
    run(continued(base, workspace), folder)
    return folder


def at_end(folder: Path) -> dict[str, float]:
    corpora = records.read(folder / "events.jsonl", "evaluation")[-1]["corpora"]
    return {name: values["nats_per_token"] for name, values in corpora.items()}


def at_start(folder: Path) -> dict[str, float]:
    corpora = records.read(folder / "events.jsonl", "evaluation")[0]["corpora"]
    return {name: values["nats_per_token"] for name, values in corpora.items()}


# Distillation


def test_learning_from_the_parent_as_well_forgets_less(base: Path, plain: Path, workspace: Workspace) -> None:
    folder = base.parent / "distilled"
    run(continued(base, workspace, objective={"name": "distillation", "weight": 0.5}), folder)
    before, without, with_it = at_start(plain), at_end(plain), at_end(folder)
    assert without["old"] > before["old"] + 0.05, "there is nothing to forget in this test"
    assert with_it["old"] < without["old"] - 0.02
    assert with_it["new"] < before["new"] - 0.1
    stage = lineage.read(newest_checkpoint(folder)).stages[-1]
    settings = {"rows": "all", "teacher": "parent", "weight": 0.5, "temperature": 1.0, "chunk_tokens": None}
    assert stage.objective == {"name": "distillation", **settings}
    assert [model["name"] for model in stage.models] == ["parent"]
    assert stage.models[0]["checkpoint"] == lineage.read(newest_checkpoint(base)).checkpoint
    counted = continued(base, workspace, objective="distillation")
    counted["stages"][0]["budget"] = f"{lineage.read(newest_checkpoint(folder)).stages[-1].flops} FLOPs"
    assert resolve(parse_recipe(counted), base=Path(), precision="fp32").tokens == 24 * 256  # teachers are in a budget
    flops = [lineage.read(newest_checkpoint(f)).stages[-1].flops for f in (plain, folder)]
    assert flops[1] == pytest.approx(flops[0] * 4 / 3)  # a forward pass of the teacher


def test_at_weight_1_the_parent_is_where_it_stays(base: Path, plain: Path, workspace: Workspace) -> None:
    """Nothing is learned from a teacher that one already is; weight decay and rounding are all that moves."""
    folder = base.parent / "only-parent"
    run(continued(base, workspace, objective={"name": "distillation", "weight": 1.0}, optimizer_state="reset"), folder)
    before, after = at_start(folder), at_end(folder)
    assert after["old"] - before["old"] < 0.2 * (at_end(plain)["old"] - before["old"])


def test_an_ensemble_is_distilled_into_one_model(
    base: Path, plain: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student that learns from two continuations alone comes close to them on new data that it is not graded on."""
    other = base.parent / "other-seed"
    run(continued(base, workspace, recipe={"seed": 7}), other)
    members = [str(plain), str(other)]
    folder = base.parent / "student"
    objective = {"name": "distillation", "teacher": members, "weight": 1.0}
    run(continued(base, workspace, objective=objective), folder)
    assert at_end(folder)["new"] < at_start(folder)["new"] - 0.7 * (at_start(plain)["new"] - at_end(plain)["new"])
    arguments = ["eval", plain, "--ensemble", other, "--data", f"new={workspace.new}", "--max-tokens", "2048 tokens"]
    assert main([*map(str, arguments), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert "new, all 2" in losses_to_text(measured)
    together, alone = measured["ensemble"]["corpora"]["new"], measured["corpora"]["new"]
    mean = (alone["nats_per_token"] + at_end(other)["new"]) / 2
    assert together["nats_per_token"] < mean
    assert together["tokens"] == alone["tokens"]


def test_the_recipe_of_a_run_names_its_teachers_from_where_it_lies(
    base: Path, workspace: Workspace, tmp_path: Path
) -> None:
    recipe = continued(base, workspace, updates=2, objective={"name": "distillation", "teacher": ["base"]})
    start(parse_recipe(recipe), tmp_path / "run", base=base.parent, quiet=True)
    again = resolve(read(tmp_path / "run/recipe.yaml"), base=tmp_path / "run", precision="fp32")
    assert again.stages[0].models[0].path == str(newest_checkpoint(base))


def test_a_teacher_that_does_not_fit_is_refused(base: Path, workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(continued(base, workspace, objective={"name": "distillation", "teacher": ["nowhere"]}), tmp_path / "run")
    recipe = workspace.recipe()
    recipe["stages"][0]["objective"] = "distillation"
    with pytest.raises(UserError, match="begins without a 'parent'"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Pulls


@pytest.mark.parametrize(
    "pull",
    [{"name": "l2", "strength": 100.0}, {"name": "fisher", "strength": 100.0, "samples": 24}],
    ids=["l2", "fisher"],
)
def test_a_pull_keeps_the_model_near_its_parent(
    base: Path, plain: Path, workspace: Workspace, pull: dict[str, Any]
) -> None:
    folder = base.parent / f"pulled-{pull['name']}"
    run(continued(base, workspace, pull=pull), folder)
    before, without, with_it = at_start(plain), at_end(plain), at_end(folder)
    assert with_it["old"] < without["old"] - 0.02
    assert with_it["new"] < before["new"] - 0.05
    assert distance(folder, base) < 0.85 * distance(plain, base)
    stage = lineage.read(newest_checkpoint(folder)).stages[-1]
    assert stage.pull is not None
    assert stage.pull["strength"] == 100.0


def test_a_huge_strength_freezes(base: Path, plain: Path, workspace: Workspace, tmp_path: Path) -> None:
    run(continued(base, workspace, updates=4, pull={"name": "l2", "strength": 1e9}), tmp_path / "run")
    assert distance(tmp_path / "run", base) < 1e-4 * distance(plain, base)


def test_the_cut_into_micro_batches_does_not_matter(base: Path, workspace: Workspace, tmp_path: Path) -> None:
    pull = {"name": "l2", "strength": 100.0}
    for size in (8, 2):
        recipe = continued(base, workspace, updates=4, pull=pull, optimizer="adamw", optimizer_state="reset")
        recipe["batch"]["micro_batch"] = size
        run(recipe, tmp_path / str(size))
    assert distance(tmp_path / "8", tmp_path / "2") < 0.02 * distance(tmp_path / "8", base)


def test_a_pull_needs_a_parent_and_what_it_has(base: Path, workspace: Workspace, tmp_path: Path) -> None:
    recipe = workspace.recipe()
    recipe["stages"][0]["pull"] = {"name": "l2", "strength": 1.0}
    with pytest.raises(UserError, match="begins without a 'parent'"):
        run(recipe, tmp_path / "run")
    pull = {"name": "fisher", "strength": 1.0, "data": {"odl": "100%"}}
    with pytest.raises(UserError, match="no corpus 'odl'"):
        run(continued(base, workspace, pull=pull), tmp_path / "run")
    with pytest.raises(UserError, match=r"pull\.strength: is required"):
        run(continued(base, workspace, pull="l2"), tmp_path / "run")


# Rows laid out anew


@pytest.fixture(scope="module")
def titled(workspace: Workspace, base: Path) -> Path:
    """The new corpus with the first word of each document as its title."""
    lines = [json.loads(line) for line in workspace.new_text.read_text(encoding="utf-8").splitlines()]
    texts = [{**line, "title": line["id"].partition("-")[0]} for line in lines]
    raw = base.parent / "titled.jsonl"
    raw.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    settings = {"name": "new", "inputs": [str(raw)], "tokenizer": str(workspace.tokenizer), "validation": "10%"}
    prepare(PrepareSettings.model_validate({**settings, "metadata_fields": ["title"]}), base.parent / "titled")
    return base.parent / "titled"


def test_metadata_then_a_cooldown_without_goes_on_in_one_order(
    base: Path, workspace: Workspace, titled: Path, tmp_path: Path
) -> None:
    recipe = continued(base, workspace, updates=6, recipe={"corpora": {"new": str(titled)}})
    first = {**recipe["stages"][0], "objective": {"name": "metadata", "template": "{title}: "}}
    recipe["stages"] = [first, {**first, "name": "cooldown", "objective": "next_token", "budget": "512 tokens"}]
    run(recipe, tmp_path / "run")
    stages = lineage.read(newest_checkpoint(tmp_path / "run")).stages[-2:]
    assert [s.objective["name"] for s in stages] == ["metadata", "next_token"]
    assert [s.sources[0]["offset_rows"] for s in stages] == [0, 48]
    counts = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert all(0 < loss < 7 for loss in counts)
    recipe["stages"][0]["objective"] = {"name": "metadata", "template": "{author}"}
    with pytest.raises(UserError, match="metadata field 'author'"):
        run(recipe, tmp_path / "other")


@pytest.mark.parametrize("name", ["denoising", "prompt_template"])
def test_other_layouts_of_rows_train_and_are_measured_on_plain_text(
    base: Path, workspace: Workspace, tmp_path: Path, name: str
) -> None:
    objective = {"name": name, **({"template": "Text:\n{text}\nEnd."} if name == "prompt_template" else {})}
    run(continued(base, workspace, updates=16, objective=objective), tmp_path / "run")
    before, after = at_start(tmp_path / "run"), at_end(tmp_path / "run")
    assert name == "denoising" or after["new"] < before["new"]
    seen = losses(tmp_path / "run")
    assert sum(loss for _, loss, _ in seen[-4:]) < sum(loss for _, loss, _ in seen[:4])


# Resuming


METHODS: dict[str, dict[str, Any]] = {
    "l2": {"pull": {"name": "l2", "strength": 20.0}},
    "fisher": {"pull": {"name": "fisher", "strength": 20.0, "samples": 8}, "objective": "distillation"},
    "denoising": {"objective": "denoising"},
    "fewer rows": {"sequences": 4},
    "prompt_template": {"objective": {"name": "prompt_template", "template": "Text: {text}!"}},
}


def cut_off(run_folder: Path, folder: Path, tokens: int) -> None:
    """The run as a kill would have left it after so many tokens, in another folder."""
    folder.mkdir()
    for name in ("recipe.yaml", "resolved.json"):
        (folder / name).write_bytes((run_folder / name).read_bytes())
    kept = [json.loads(line) for line in (run_folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(e) + "\n" for e in kept if e.get("tokens", 0) <= tokens and e["event"] != "done"]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.copytree(run_folder / f"checkpoints/{tokens}", folder / f"checkpoints/{tokens}")


@pytest.mark.parametrize("method", METHODS)
def test_resumed_from_its_middle_it_is_the_same_to_the_bit(
    base: Path, workspace: Workspace, tmp_path: Path, method: str
) -> None:
    """Nothing of the parent is stored again."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    saved = {"checkpoints": {"every": "1024 tokens"}}
    run(continued(base, workspace, updates=8, recipe=saved, **METHODS[method]), straight)
    cut_off(straight, resumed, 1024)
    assert train(resumed, quiet=True)["complete"]
    assert losses(resumed) == losses(straight)
    a, b = weights(straight), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    moments = [load_file(newest_checkpoint(f) / "perennial/optimizer.safetensors") for f in (straight, resumed)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    stored = {path.name for path in (newest_checkpoint(straight) / "perennial").iterdir()}
    assert stored == {"state.json", "optimizer.safetensors", "lineage.json", "manifest.json"}


def test_a_parent_that_is_gone_is_missed_when_it_is_read_again(
    base: Path, workspace: Workspace, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(base, parent)
    saved = {"checkpoints": {"every": "1024 tokens"}}
    run(continued(parent, workspace, updates=8, recipe=saved, **METHODS["l2"]), tmp_path / "child")
    cut_off(tmp_path / "child", tmp_path / "resumed", 1024)
    shutil.rmtree(parent)
    with pytest.raises(UserError, match="no longer there"):
        train(tmp_path / "resumed", quiet=True)


# Many processes


def test_two_processes_compute_what_one_does(workspace: Workspace, tmp_path: Path) -> None:
    """Copies of the model, parts of it, divided matrices: with a teacher for replayed rows, and a pull."""
    from tests.train.many_runs import run_all

    shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context": 64}
    base = tmp_path / "base"
    run(workspace.recipe(model={"options": shape}, checkpoints={"every": None}), base)
    taught = {"name": "distillation", "rows": "replay"}
    methods = {"pull": {"name": "fisher", "strength": 20.0, "samples": 8}, "objective": taught}
    recipe = continued(base, workspace, updates=6, **methods, optimizer="adamw", optimizer_state="reset")
    recipe["stages"][0]["mixture"] = {"new": 0.5, "replay": 0.5}
    run(recipe, tmp_path / "one")
    layouts = {"copies": {"shard": "none"}, "parts": {"shard": "full"}, "divided": {"tensor": 2}}
    asked = [{"out": str(tmp_path / name), "recipe": {**recipe, "parallel": how}} for name, how in layouts.items()]
    run_all(asked, 2, tmp_path)
    for name in layouts:
        for (_, loss, norm), (_, wanted, wanted_norm) in zip(
            losses(tmp_path / name), losses(tmp_path / "one"), strict=True
        ):
            assert loss == pytest.approx(wanted, rel=1e-4)
            assert norm == pytest.approx(wanted_norm, rel=1e-3)
        assert distance(tmp_path / name, tmp_path / "one") < 0.02 * distance(tmp_path / "one", base)


# Memory


def test_what_is_held_beside_the_model_is_counted(base: Path, workspace: Workspace) -> None:
    from perennial.model.foreign import parse_config
    from perennial.model.memory import estimate
    from perennial.train.memory_advice import _training

    parts = {}
    for name, stage in {"plain": {}, **METHODS}.items():
        resolved = resolve(parse_recipe(continued(base, workspace, **stage)), base=Path(), precision="fp32")
        world = World(0, 1, torch.device("cpu"))
        config = parse_config(resolved.model)
        parts[name] = estimate(config, _training(resolved, world, config, resolved.stages[0])).parts()
    copies = {"plain": 0, "l2": 1, "fisher": 2, "denoising": 0, "fewer rows": 0, "prompt_template": 0}
    assert {name: found["other_models"] / found["parameters"] for name, found in parts.items()} == copies
