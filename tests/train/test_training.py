"""The loop: it learns, resumes bit for bit after kills, stops when it must, and leaves whole checkpoints only."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from perennial.core import lineage, records
from perennial.core.errors import TrainingStopped, UserError
from perennial.core.lineage import newest_checkpoint
from perennial.core.patience import Patience, say_nothing
from perennial.train import checkpoint, tensor_files
from perennial.train.parallel import clip_gradients
from perennial.train.recipe import SpikeSettings, parse_recipe
from perennial.train.run import start, train
from perennial.train.session import Session
from perennial.train.spikes import is_spike


def two_stages(workspace: Any, **changes: Any) -> dict[str, Any]:
    """A run that changes mixture, schedule and optimizer at its middle."""
    recipe = workspace.recipe(corpora={"old": str(workspace.old), "new": str(workspace.new)}, **changes)
    first = {**recipe["stages"][0], "name": "first", "budget": "2048 tokens"}
    second = {
        "name": "second",
        "budget": "2048 tokens",
        "mixture": {"old": "30%", "new": "70%"},
        "schedule": {"name": "rewarm", "start": "parent", "peak": 4e-3, "final": 4e-4},
        "optimizer": "muon",
    }
    return {**recipe, "stages": [first, second]}


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(e["tokens"], e["loss"], e["gradient_norm"]) for e in records.read(run / "events.jsonl", "train")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(run) / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, gradient norms, evaluations and final weights are equal, with tolerance 0."""
    assert losses(one) == losses(other)
    evaluations = [
        [(e["tokens"], e["moment"], e["corpora"]) for e in records.read(r / "events.jsonl", "evaluation")]
        for r in (one, other)
    ]
    assert evaluations[0] == evaluations[1]
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    moments = [load_file(newest_checkpoint(r) / "perennial/optimizer.safetensors") for r in (one, other)]
    assert all(torch.equal(moments[0][k], moments[1][k]) for k in moments[0])


@pytest.fixture(scope="module")
def straight(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-stage run, uninterrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    start(parse_recipe(two_stages(workspace)), folder, base=Path(), quiet=True)
    return folder


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
def test_a_run_that_is_over_leaves_nothing_in_memory(workspace: Any, tmp_path: Path) -> None:
    """Corpora are mapped; many runs in one process would otherwise hold each one's pages, model and optimizer."""
    corpora = {name: str(shutil.copytree(getattr(workspace, name), tmp_path / name)) for name in ("old", "new")}
    recipe = {**two_stages(workspace), "corpora": corpora}
    start(parse_recipe(recipe), tmp_path / "run", base=Path(), quiet=True)
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert not any(corpus in mapped for corpus in corpora.values())


def test_a_batch_that_grows_from_stage_to_stage(workspace: Any, tmp_path: Path) -> None:
    """One order of rows, rates by tokens; 4 rows of 32 tokens, then the run's 8."""
    recipe = two_stages(workspace)
    recipe["stages"][0]["sequences"] = 4
    recipe["evaluation"] = {"every": "512 tokens", "tokens": "1024 tokens"}
    start(parse_recipe(recipe), tmp_path / "run", base=Path(), quiet=True)
    made = [(e["stage"], e["tokens"], e["step"]) for e in records.read(tmp_path / "run/events.jsonl", "train")]
    assert made[:16] == [("first", 128 * i, i) for i in range(1, 17)]
    assert made[16:] == [("second", 2048 + 256 * i, 16 + i) for i in range(1, 9)]
    measured = [e["tokens"] for e in records.read(tmp_path / "run/events.jsonl", "evaluation")]
    assert measured == [0, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096]
    stages = lineage.read(newest_checkpoint(tmp_path / "run")).stages
    assert [s.batch_tokens for s in stages] == [128, 256]
    assert [sum(source["rows"] for source in s.sources) for s in stages] == [64, 64]
    with pytest.raises(UserError, match="sequences 9 is above batch.sequences, 8"):
        parse_recipe({**recipe, "stages": [{**recipe["stages"][0], "sequences": 9}]})


def test_a_signal_in_the_last_moments_is_told_to_who_goes_on(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is complete all the same; a grid of runs would else begin the next one."""
    measure = Session.evaluate

    def evaluate(session: Session, moment: str) -> dict[str, Any]:
        if moment == "after":
            signal.raise_signal(signal.SIGTERM)
        return measure(session, moment)

    monkeypatch.setattr(Session, "evaluate", evaluate)
    result = start(parse_recipe(two_stages(workspace)), tmp_path / "run", base=Path(), quiet=True)
    assert result["complete"]
    assert result["asked_to_stop"]


def test_the_loss_falls_and_everything_is_recorded(straight: Path) -> None:
    seen = losses(straight)
    assert len(seen) == 16
    assert [t for t, _, _ in seen] == [256 * i for i in range(1, 17)]
    assert seen[7][1] < seen[0][1] - 0.2
    kinds = {e["event"] for e in records.read(straight / "events.jsonl")}
    assert kinds == {"run", "stage", "train", "evaluation", "checkpoint", "consumed", "done"}
    stages = records.read(straight / "events.jsonl", "stage")
    first_rates = [
        next(e["rate"] for e in records.read(straight / "events.jsonl", "train") if e["stage"] == s)
        for s in ("first", "second")
    ]
    assert stages[1]["rate_before"] == stages[1]["rate_start"] == pytest.approx(5e-4)
    assert first_rates[0] > 0
    history = lineage.read(newest_checkpoint(straight))
    assert [s.tokens for s in history.stages] == [2048, 2048]
    assert all(s.complete for s in history.stages)
    drawn = {s["name"]: s["rows"] for s in history.stages[1].sources}
    assert sum(drawn.values()) == 64
    assert abs(drawn["new"] - 45) <= 3
    offsets = {s["name"]: s["offset_rows"] for s in history.stages[1].sources}
    assert offsets == {"old": 64, "new": 0}  # the second stage goes on where the first stopped


def run_in_process(recipe: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return subprocess.Popen(
        [sys.executable, "-m", "perennial", "train", str(path), "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["first updates", "while saving", "second stage"])
def test_killed_and_resumed_equals_uninterrupted(workspace: Any, straight: Path, tmp_path: Path, moment: str) -> None:
    run = tmp_path / "run"
    process = run_in_process(two_stages(workspace), run)
    if moment == "first updates":
        wait_for(lambda: len(losses(run)) >= 2, process)
    elif moment == "while saving":
        wait_for(lambda: list((run / "checkpoints").glob(".saving-2*")), process)
    else:
        wait_for(lambda: len(losses(run)) >= 13, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in lineage.checkpoints_of(run):
        checkpoint.verify(folder)  # whatever is there is whole
    assert train(run, quiet=True)["complete"]
    assert_same_run(run, straight)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_kill_inside_every_step_of_saving_leaves_whole_checkpoints(
    workspace: Any, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving is cut off at each file operation in turn; what is left always resumes to the same run."""
    from perennial.core import files

    class Cut(BaseException):
        pass

    for point in ("write_json", "write_manifest", "publish"):
        run = tmp_path / point
        original, calls = getattr(files, point), []

        def cut(*args: Any, _original: Any = original, _calls: list[int] = calls, **kwargs: Any) -> Any:
            _calls.append(1)
            if len(_calls) > (4 if _original.__name__ == "write_json" else 1):
                raise Cut
            return _original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(files, point, cut)
            with pytest.raises(Cut):
                start(parse_recipe(two_stages(workspace)), run, base=Path(), quiet=True)
        for folder in lineage.checkpoints_of(run):
            checkpoint.verify(folder)
        assert train(run, quiet=True)["complete"]
        assert_same_run(run, straight)


def test_sigterm_saves_and_exits_cleanly(workspace: Any, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = run_in_process(two_stages(workspace), run)
    wait_for(lambda: len(losses(run)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    stop = records.read(run / "events.jsonl", "stop")
    assert stop
    assert newest_checkpoint(run).name == str(stop[0]["tokens"])
    assert train(run, quiet=True)["complete"]
    assert_same_run(run, straight)


def test_a_finished_run_is_not_repeated(straight: Path) -> None:
    before = (straight / "events.jsonl").read_bytes()
    assert train(straight, quiet=True)["tokens"] == 4096
    assert (straight / "events.jsonl").read_bytes() == before


def test_micro_batches_give_the_same_run(workspace: Any, tmp_path: Path) -> None:
    """Tolerance 1e-5: the same sums in another order of addition."""
    runs = []
    for size in (8, 4, 1):
        batch = {"sequences": 8, "sequence_length": 32, "micro_batch": size}
        start(parse_recipe(workspace.recipe(batch=batch)), tmp_path / str(size), base=Path(), quiet=True)
        runs.append([loss for _, loss, _ in losses(tmp_path / str(size))])
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert runs[2] == pytest.approx(runs[0], abs=1e-5)


def test_a_non_finite_gradient_stops_before_the_update(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, at=6)
    with pytest.raises(TrainingStopped, match=r"stage 'pretrain', update 6, rows 40 to 47.*gradient of"):
        start(parse_recipe(workspace.recipe()), tmp_path / "run", base=Path(), quiet=True)
    assert len(losses(tmp_path / "run")) == 5
    kept = weights(tmp_path / "run")
    assert all(torch.isfinite(v).all() for v in kept.values())


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Makes the loss of the `at`-th update not a number, once."""
    from perennial.objectives.next_token import NextToken

    original, calls = NextToken.loss, []

    def loss(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "q_proj" in n).register_hook(lambda g: g * float("nan"))
        return original(self, model, batch)

    monkeypatch.setattr(NextToken, "loss", loss)


def test_rollback_returns_to_the_checkpoint_and_passes_over_the_span(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perennial.train import loop

    original, calls = loop.make_update, []

    class NotFinite:
        def finish(self) -> None:
            raise loop.NonFinite("loss nan")

    def once_not_finite(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            return NotFinite()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "make_update", once_not_finite)
    recipe = workspace.recipe(spikes={"action": "rollback"})
    assert start(parse_recipe(recipe), tmp_path / "run", base=Path(), quiet=True)["complete"]
    events = records.read(tmp_path / "run/events.jsonl")
    back = next(e for e in events if e["event"] == "rollback")
    assert back["tokens"] == 1024
    assert back["skipped_rows"] == [32, 56]
    assert [t for t, _, _ in losses(tmp_path / "run")] == [256 * i for i in range(1, 13)]  # each position once
    record = lineage.read(newest_checkpoint(tmp_path / "run")).stages[0]
    assert record.skipped_rows == [(32, 56)]
    assert record.tokens == 3072
    assert record.sources[0]["rows"] == 96 + 24
    assert record.sources[0]["tokens"] == 3072  # what was passed over was not trained on
    one_update = record.flops / (12 + 2 + 1)  # two updates were made twice, one came to nothing
    assert one_update == pytest.approx(256 * resolved_flops(tmp_path / "run"))


def resolved_flops(run: Path) -> float:
    return float(json.loads((run / "resolved.json").read_text())["flops_per_token"])


def test_a_second_process_on_a_run_leaves_it_alone(workspace: Any, tmp_path: Path) -> None:
    import fcntl

    recipe = workspace.recipe()
    start(parse_recipe(recipe), tmp_path / "done", base=Path(), quiet=True)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "done", run, ignore=shutil.ignore_patterns("events.jsonl", "checkpoints"))
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        start(parse_recipe(recipe), run, base=Path(), quiet=True)
    os.close(descriptor)
    assert (run / "resolved.json").exists()
    assert (run / "recipe.yaml").exists()


def test_spikes_are_told_from_noise() -> None:
    settings = SpikeSettings()
    calm = [3.0 + 0.01 * (i % 7) for i in range(64)]
    assert is_spike(4.0, calm, settings)
    assert not is_spike(3.4, calm, settings)
    assert not is_spike(9.0, calm[:10], settings)
    assert not is_spike(9.0, calm, SpikeSettings(action="off"))


def test_another_recipe_is_refused(workspace: Any, straight: Path) -> None:
    with pytest.raises(UserError, match="another recipe.*seed"):
        start(parse_recipe(two_stages(workspace, seed=9)), straight, base=Path(), quiet=True)


def test_a_folder_with_other_things_is_refused(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="no run folder"):
        start(parse_recipe(workspace.recipe()), tmp_path, base=Path(), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "perennial/optimizer.safetensors", "perennial/lineage.json", "config.json"]
)
@pytest.mark.parametrize("how", ["missing", "altered", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name(straight: Path, tmp_path: Path, name: str, how: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(newest_checkpoint(straight), copy)
    if how == "missing":
        (copy / name).unlink()
    elif how == "truncated":
        (copy / name).write_bytes((copy / name).read_bytes()[:-3])
    else:
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).write_bytes(bytes(data))
    with pytest.raises(UserError, match=name):
        checkpoint.verify(copy)


def test_a_full_disk_while_saving_leaves_the_old_checkpoints(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = tmp_path / "run", []
    original = tensor_files.write_file

    def full(*given: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write_file", full)
        with pytest.raises(UserError, match="disk is full"):  # at the end; on the way training goes on
            start(parse_recipe(workspace.recipe()), run, base=Path(), quiet=True)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["1024"]
    assert [e["tokens"] for e in records.read(run / "events.jsonl", "save_failed")] == [2048, 2304, 2560, 2816]
    assert train(run, quiet=True)["complete"]


def test_a_save_that_failed_is_made_up_for_a_little_later(
    workspace: Any, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = tmp_path / "run", []
    original = tensor_files.write_file

    def full(*given: Any) -> None:
        calls.append(1)
        if len(calls) in (1, 2):
            raise OSError(28, "No space left on device")
        original(*given)

    monkeypatch.setattr(tensor_files, "write_file", full)
    assert start(parse_recipe(two_stages(workspace)), run, base=Path(), quiet=True)["complete"]
    events = records.read(run / "events.jsonl")
    assert [e["tokens"] for e in events if e["event"] == "save_failed"] == [1024, 1280]
    assert [e["tokens"] for e in events if e["event"] == "checkpoint"] == [1536, 2048, 3072, 4096]
    assert_same_run(run, straight)


def test_the_last_save_is_tried_again_for_a_while(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failed = tmp_path / "run", []
    original = checkpoint.save

    def full(checkpoints: Path, taken: Any, crew: Any) -> Path:
        if taken.progress.tokens == 3072 and len(failed) < 3:
            failed.append(1)
            raise UserError("the disk is full")
        return original(checkpoints, taken, crew)

    pauses: list[float] = []
    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(Patience.__init__, "__defaults__", (say_nothing, pauses.append))
    monkeypatch.setenv("PERENNIAL_PATIENCE", "1 min")
    assert start(parse_recipe(workspace.recipe()), run, base=Path(), quiet=True)["complete"]
    assert pauses == [1, 2, 4]


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_before_it(
    workspace: Any, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(x for x in lines if json.loads(x)["event"] != "done"))
    damaged = sorted((run / "checkpoints").iterdir(), key=lambda p: int(p.name))[-1]
    os.truncate(damaged / "model.safetensors", 1000)
    kept = (damaged / "model.safetensors").read_bytes()
    assert train(run, quiet=True)["complete"]
    aside = damaged.with_name(f"{damaged.name}.damaged")
    assert (aside / "model.safetensors").read_bytes() == kept
    assert_same_run(run, straight)
    event = records.read(run / "events.jsonl", "set_aside")[0]
    assert (event["tokens"], event["path"]) == (4096, aside.name)
    assert "model.safetensors has 1000 bytes" in event["reason"]


def test_when_every_checkpoint_is_damaged_the_run_begins_again(workspace: Any, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(x for x in lines if json.loads(x)["event"] != "done"))
    for path in (run / "checkpoints").iterdir():
        (path / "config.json").unlink()
    assert train(run, quiet=True)["complete"]
    assert_same_run(run, straight)
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.suffix)
    assert names == ["2048.damaged", "3072.damaged", "4096.damaged"]


def test_the_events_of_a_run_are_plain_json(straight: Path) -> None:
    for line in (straight / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"]


@pytest.mark.parametrize(("size", "limit"), [(1e-3, 1.0), (3.0, 1.0), (3.0, math.inf), (math.nan, 1.0)])
def test_gradients_are_clipped_as_by_torch_and_left_alone_below_the_limit(size, limit):
    ours, theirs = [[torch.nn.Parameter(torch.zeros(5, n)) for n in (3, 7)] for _ in range(2)]
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = size * torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel()))
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours, limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit), equal_nan=True, rtol=0, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, equal_nan=True, rtol=0, atol=0)
