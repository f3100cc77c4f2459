"""`perennial plan` for a budget: from a checkpoint, from nothing, from raw text; what it writes; wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perennial.bench import calibration_measures, calibration_runs
from perennial.cli.main import main
from perennial.core.lineage import newest_checkpoint
from perennial.data.prepare import PrepareSettings, prepare
from perennial.plan.calibration import read
from perennial.plan.small_copies import SmallRun
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from tests.workspace import Workspace

SIZES = (30_000, 60_000, 120_000)


@pytest.fixture(scope="module")
def base(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 updates on the old corpus."""
    folder = tmp_path_factory.mktemp("planned") / "base"
    start(parse_recipe(workspace.recipe()), folder, base=workspace.root, quiet=True)
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """What `plan --json` says."""
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_can_be_trained(
    base: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "update.yaml"
    words = [base, "--data", f"new={workspace.new}", "--budget", "3000 tokens", "--out", recipe, "--energy"]
    found = planned(capsys, *words)
    assert found["stages"][0]["updates"] == 12
    assert [o["share"] for o in found["curve"]] == [0, 0.01, 0.05, 0.1, 0.25, 0.5]
    assert len(found["alternatives"]) >= 2
    assert {"new", "old"} == {text["name"] for text in found["corpora"]}
    assert all(number["source"] and number["kind"] for number in found["numbers"])
    names = {number["name"]: number for number in found["numbers"]}
    assert (names["new loss"]["kind"], names["old loss"]["kind"]) == ("unknown", "published")
    assert names["memory per device"]["value"] > 0
    assert names["energy"]["value"] > 0
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# Planned by `perennial plan` for 3000 tokens")
    assert "# peak learning rate: " in text
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "in 12 updates of new 95.0%, replay/old 5.0%" in capsys.readouterr().out
    assert main(["plan", *map(str, words)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_was_foretold_goes_with_the_recipe_and_is_compared(
    base: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "update.yaml", tmp_path / "run"
    words = [base, "--data", f"new={workspace.new}", "--budget", "1000 tokens", "--out", recipe]
    found = planned(capsys, *words, "--set", "evaluation.tokens=2048 tokens", "--set", "evaluation.every=null")
    assert not any("cannot compare the two" in warning for warning in found["warnings"])
    assert main(["train", str(recipe), "--out", str(run), "--json"]) == 0
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["foretold"]}
    old = told["Old loss (old)"]
    assert old["predicted"]["value"] == pytest.approx(found["outlook"]["old"]["mean"], rel=1e-5)
    assert old["why_not"] == ""
    assert old["difference"] == pytest.approx(old["measured"] / old["predicted"]["value"] - 1)
    assert told["FLOPs"]["difference"] == pytest.approx(0, abs=1e-6)
    assert told["Time"]["why_not"] in ("", "planned for 1 x cpu, ran on cpu")
    assert main(["report", str(run)]) == 0
    assert "Predicted and measured" in (run / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()

    other = tmp_path / "other"
    assert main(["train", str(recipe), "stages.0.budget=512 tokens", "--out", str(other)]) == 0
    assert "the recipe was changed after it was planned (stages)" in capsys.readouterr().out
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("predictions:\n  version: 1", "predictions:\n  version: 9"), encoding="utf-8")
    assert main(["train", str(recipe), "--out", str(tmp_path / "third")]) == 2
    assert "predictions.version: predictions of version 9" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_parent_that_was_measured_on_other_documents_is_told(
    base: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, base, "--data", f"new={workspace.new}", "--budget", "3000 tokens")
    assert any("plan with --set evaluation.tokens=" in warning for warning in found["warnings"])


def test_laws_and_a_ledger_of_ones_own(
    base: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, law = tmp_path / "ledger.jsonl", tmp_path / "law.json"
    table = [{"parameters": n, "tokens": d, "loss": 2 + 9 * n**-0.1 + 9 * d**-0.1} for n in SIZES for d in SIZES]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    fit = ["laws", "fit", str(tmp_path / "runs.jsonl"), "--form", "chinchilla", "--resamples", "20", "--out", str(law)]
    assert main(fit) == 0
    assert main(["laws", "ledger", str(base), "--out", str(ledger)]) == 0
    capsys.readouterr()
    words = [base, "--data", f"new={workspace.new}", "--budget", "3000 tokens"]
    found = planned(capsys, *words, "--ledger", ledger, "--laws", law)
    numbers = {number["name"]: number for number in found["numbers"]}
    assert numbers["loss of the parent"]["source"].startswith("law file law.json: chinchilla through 9 runs")
    assert numbers["loss of retraining"]["kind"] in ("own runs", "unknown")
    assert any("your ledger has no updates on this new text" in line for line in found["unknown"])
    ledger.write_text("{}", encoding="utf-8")
    assert main(["plan", *map(str, words), "--ledger", str(ledger)]) == 2
    assert "not a ledger: a row has no 'run'" in capsys.readouterr().err
    assert main(["plan", *map(str, words), "--laws", str(ledger)]) == 2
    assert "not a law file" in capsys.readouterr().err


def test_in_words_and_in_other_budgets(base: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", f"new={workspace.new}", "--replay", "25%"]
    assert main(["plan", str(base), *data, "--budget", "1e9 FLOPs", "--out", "x.yaml", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not Path("x.yaml").exists()
    for words in ("Recipe: rewarm", "<- this plan", "given: asked for with --replay", "cannot know", "Alternatives"):
        assert words in text
    data += ["--set", "evaluation.tokens=512 tokens"]  # or evaluations take most of so short a time
    found = planned(capsys, base, *data, "--budget", "0.0002 s on 1 x L4")
    assert found["cost"]["hours"] * 3600 == pytest.approx(0.0002, rel=0.05)
    assert any("MFU 0.4" in warning for warning in found["warnings"])
    found = planned(capsys, base, *data, "--budget", "$0.00000005 at $1/h on L4")
    assert found["cost"]["money"] == pytest.approx(5e-8, rel=0.05)


@pytest.mark.parametrize("case", ["new text", "a stand-in", "shorter rows"])
def test_the_measured_shift_is_that_of_continue(
    case: str, base: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", f"new={workspace.new}"]
    if case == "a stand-in":
        settings = {"inputs": [str(workspace.new_text)], "tokenizer": str(workspace.tokenizer), "validation": "20%"}
        prepare(PrepareSettings(name="web", **settings), tmp_path / "web")
        words += ["--replay", f"web={tmp_path / 'web'}"]
    if case == "shorter rows":
        words += ["--set", "batch.sequence_length=16"]
    found = planned(capsys, base, *words, "--budget", "3000 tokens", "--measure-shift")
    assert not any(line.startswith("shift") for line in found["unknown"])
    update = ["continue", str(base), *words, "--tokens", "3000 tokens", "--dry-run", "--json"]
    assert main([*update, "--out", str(tmp_path / "update")]) == 0
    chosen = next(reason for reason in json.loads(capsys.readouterr().out)["reasons"] if reason.startswith("replay"))
    assert "bits per byte on the new data" in chosen
    (share,) = (number for number in found["numbers"] if number["name"] == "share of old text")
    assert share["source"].startswith(chosen)


def test_a_shift_that_is_not_measured_is_told_and_raw_text_is_refused(
    base: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, base, "--data", f"new={workspace.new}", "--budget", "3000 tokens")
    (told,) = (line for line in found["unknown"] if line.startswith("shift between old and new text: not measured"))
    assert told.endswith("--measure-shift measures it, as `continue` without --replay does")
    raw = tmp_path / "new.jsonl"
    raw.write_text('{"text": "Words that nobody has prepared."}\n' * 2000, encoding="utf-8")
    assert main(["plan", str(base), "--data", f"new={raw}", "--budget", "3000 tokens", "--measure-shift"]) == 2
    assert "corpus 'new' is raw text; run `perennial prepare`" in capsys.readouterr().err


def test_named_old_text_is_known_by_its_content(
    base: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", f"new={workspace.new}", "--budget", "3000 tokens"]
    found = planned(capsys, base, *words, "--replay", f"somewhere={workspace.old}", "--replay", "10%")
    assert found["recipe"]["stages"][0]["mixture"] == {"new": 0.9, "replay": 0.1}
    assert found["recipe"]["moved"]


def test_raw_text_is_estimated(
    base: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [base, "--data", f"new={workspace.new_text}", "--budget", "3000 tokens"]
    found = planned(capsys, *words)
    (text,) = (text for text in found["corpora"] if text["name"] == "new")
    assert text["is_estimate"]
    assert any("are an estimate" in warning for warning in found["warnings"])
    counted = planned(capsys, base, "--data", f"new={workspace.new}", "--budget", "3000 tokens")
    (prepared,) = (text for text in counted["corpora"] if text["name"] == "new")
    assert text["tokens"] == pytest.approx(prepared["tokens"] / 0.9, rel=0.2)
    assert main(["plan", *map(str, words), "--out", str(tmp_path / "r.yaml")]) == 2
    assert "needs prepared corpora" in capsys.readouterr().err
    assert not (tmp_path / "r.yaml").exists()


def test_a_model_from_elsewhere(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without lineage: its past is estimated, old text has to be named."""
    from perennial.data.tokenizers.folder import TokenizerFolder
    from perennial.model.config import ModelConfig
    from perennial.model.huggingface import save_model
    from perennial.model.transformer import Transformer

    config = ModelConfig(vocabulary_size=512, width=32, layers=2, heads=2, mlp_width=64, context=64)
    save_model(Transformer(config), tmp_path / "model")
    TokenizerFolder.open(workspace.tokenizer).copy_to(tmp_path / "model")
    words = [tmp_path / "model", "--data", f"new={workspace.new}", "--budget", "100K tokens"]
    found = planned(capsys, *words, "--replay", f"old={workspace.old}", "--parent", "tokens=10M")
    assert found["recipe"]["stand_ins"] == ["old"]
    assert found["share"] == 0.05
    alone = planned(capsys, *words)
    assert alone["share"] == 0
    assert any("its past" in w or "past is estimated" in w for w in alone["warnings"])


def test_a_new_model(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "new.yaml"
    words = ["none", "--data", f"new={workspace.new}", "--replay", f"old={workspace.old}", "--sizes", "1m,2m"]
    found = planned(capsys, *words, "--budget", "3e12 FLOPs", "--out", recipe)
    assert found["recipe"]["model"] == {"preset": "1m"}
    assert sum(found["recipe"]["stages"][0]["mixture"].values()) == pytest.approx(1)
    assert len(found["alternatives"]) == 2
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert main(["plan", *words, "--budget", "3e12 FLOPs"]) == 0
    assert "loss: cannot know: published fits begin at" in capsys.readouterr().out


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of three updates on a machine that is fast at first."""
    few = [SmallRun(0, 1.0, 0.0), SmallRun(0, 1.0, 0.5), SmallRun(1, 1.0, 0.05)]
    monkeypatch.setattr(calibration_runs, "runs", lambda has_parent: few if has_parent else few[::2])
    rates = iter((1e3, 400.0, 500.0))
    sample = {"flops_per_token": 1e6, "parameters": 51360, "memory_bytes": 1e8, "planned_memory_bytes": 1e8}
    monkeypatch.setattr(calibration_measures, "_sample", lambda _: {**sample, "tokens_per_second": next(rates)})
    for module in (calibration_runs, calibration_measures):
        monkeypatch.setattr(module, "EVALUATION_TOKENS", 2048)


@pytest.mark.usefixtures("few_runs")
def test_calibrate_then_plan(
    base: Path,
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, data = tmp_path / "calibration.json", ["--data", f"new={workspace.new}"]
    words = ["plan", str(base), "--calibrate", *data, "--budget", "3072 tokens", "--out", str(out)]
    words += ["--minutes", "0.05"]  # which the first sample of the speed turns into the sizes of the runs
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "run 5 of 5" in captured.err
    assert "5 runs" in captured.out
    found = read(out)
    assert found.checkpoint is not None
    assert [run.kind for run in found.runs] == ["base", "update", "update", "base", "update"]
    assert all(run.old and run.new for run in found.runs if run.kind == "update")
    assert found.shift is not None
    assert found.speed.flops_per_second == 500 * 1e6  # the median; one sample before the runs, two after them
    assert captured.err.index("sample 1") < captured.err.index("run 1 of 5") < captured.err.index("sample 2")
    assert main(words) == 0
    assert "run 1 of 5" not in capsys.readouterr().err
    assert read(out) == found
    timed = out.with_suffix(".runs") / "speed.json"
    saved = json.loads(timed.read_text(encoding="utf-8"))
    sample = {"flops_per_token": 1e6, "parameters": 51360, "memory_bytes": 1e8, "planned_memory_bytes": 1e8}
    early = {"key": saved["key"], "speed": {**sample, "tokens_per_second": 1e3, "flops_per_second": 1e9}}
    timed.write_text(json.dumps(early), encoding="utf-8")  # as a version wrote it that took one sample
    monkeypatch.setattr(calibration_measures, "_sample", lambda _: {**sample, "tokens_per_second": 400.0})
    assert main(words) == 0
    assert "run 1 of 5" not in capsys.readouterr().err
    assert read(out).speed.flops_per_second == 400 * 1e6

    plan = planned(capsys, base, *data, "--budget", "6144 tokens", "--calibration", out)
    kinds = {number["name"]: number["kind"] for number in plan["numbers"]}
    assert kinds["new loss"] == kinds["old loss"] == kinds["share of old text"] == kinds["time"] == "own runs"
    assert plan["best_share"] == plan["share"]
    for outlook in plan["curve"]:
        assert outlook["new"]["low"] < outlook["new"]["mean"] < outlook["new"]["high"]


@pytest.mark.usefixtures("few_runs")
def test_calibrate_for_a_new_model(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "calibration.json", ["--data", f"new={workspace.new}"]
    words = ["plan", "none", "--calibrate", *data, "--budget", "20K tokens", "--minutes", "0.5", "--out", str(out)]
    assert main(words) == 0
    assert [run.kind for run in read(out).runs] == ["scratch", "scratch"]
    capsys.readouterr()
    plan = planned(capsys, "none", *data, "--budget", "20K tokens", "--sizes", "1m", "--calibration", out)
    (loss,) = (number for number in plan["numbers"] if number["name"] == "loss")
    assert loss["kind"] == "own runs"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "20 tokens"], "less than one update of 256 tokens"),
        (["--budget", "8 h on 1 x H20"], "Did you mean 'H200'?"),
        (["--budget", "$500"], "what does one device cost per hour?"),
        (["--budget", "many"], "not understood"),
        ([], "--budget: how much may be spent?"),
        (["--budget", "3000 tokens", "--set", "batch.sequences=100000"], "less than one"),
        (["--budget", "3000 tokens", "--recipe", "rewarn"], "Did you mean 'rewarm'?"),
        (["--budget", "3000 tokens", "--replay", "half"], "--replay"),
        (["--budget", "3000 tokens", "--mfu", "1.5"], "--mfu 1.5"),
        (["--budget", "3000 tokens", "--out", "recipe.txt"], "a recipe is a .yaml file"),
        (["--budget", "3000 tokens", "--sizes", "1m"], "--sizes: a checkpoint has its size"),
        (["--budget", "3000 tokens", "--calibration", "none.json"], "none.json"),
        (["--calibrate", "--out", "c.yaml"], "a calibration is a .json file"),
        (["--calibrate", "--out", "c.json", "--budget", "3 h"], "with --calibrate the tokens of the update"),
        (["--budget", "3000 tokens", "batch.sequences=3"], "belongs to --memory"),
        (["--calibrate", "--out", "c.json", "--measure-shift"], "a calibration does so by itself"),
    ],
)
def test_wrong_input(
    arguments: list[str], words: str, base: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(base), *arguments, "--data", f"new={workspace.new}"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", ","], "a new model needs sizes to choose from"),
        (["--sizes", "11m"], "Did you mean '1m'?"),
        (["--sizes", "70b"], "less than one update"),
        (["--recipe", "rewarm"], "--recipe: belongs to a checkpoint"),
        (["--measure-shift"], "a new model knows no text"),
    ],
)
def test_wrong_input_for_a_new_model(
    arguments: list[str], words: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    words_of = ["plan", "none", *arguments, "--data", f"new={workspace.new}", "--budget", "1e10 FLOPs"]
    assert main(words_of) == 2
    assert words in capsys.readouterr().err


def test_a_law_file_of_another_version(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"format": "perennial law", "version": 99}), encoding="utf-8")
    words = ["plan", "none", "--data", f"new={workspace.new}", "--budget", "1e13 FLOPs", "--laws", str(law)]
    assert main(words) == 2
    assert "version 99" in capsys.readouterr().err


def test_what_is_missing(base: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(base), "--budget", "1M tokens"]) == 2
    assert "--data: at least one NAME=PATH" in capsys.readouterr().err
    assert main(["plan", "recipe.yaml", "--budget", "1M tokens", "--data", f"new={workspace.new}"]) == 2
    assert "is planned with --memory" in capsys.readouterr().err
    assert main(["plan", "--budget", "1M tokens"]) == 2
    assert "name a checkpoint, 'none' for a new model" in capsys.readouterr().err


def test_the_planner_itself_loads_no_torch() -> None:
    modules = ["planner", "words", "calibration", "small_copies", "new_models", "text_size", "budgets", "transfer"]
    code = "import sys\n" + "".join(f"import perennial.plan.{name}\n" for name in modules)
    code += "import perennial.cli._plan, perennial.cli._plan_new, perennial.cli._plan_drafts\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_checkpoint_is_the_newest(base: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, base, "--data", f"new={workspace.new}", "--budget", "3000 tokens")
    assert found["model"] == str(newest_checkpoint(base))
