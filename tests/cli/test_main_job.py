"""The main job through the commands: raw text, tokenizer, corpora, base model, continuation, evaluation, report."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.cli import main
from perennial.core import plugins
from perennial.core.lineage import newest_checkpoint
from tests.workspace import TINY, Workspace

MEASURES = {"nats_per_token", "bits_per_byte", "tokens", "bytes"}
CORPUS = {"fingerprint", "tokenizer", "counts", "splits", "inputs", "settings"}
SUMMARY = {"run", "complete", "asked_to_stop", "tokens", "flops", "seconds", "evaluation"}
RECIPE = {
    "name": "base",
    "model": {"options": TINY},
    "corpora": {"old": "corpora/old"},
    "stages": [
        {
            "name": "pretrain",
            "budget": "20K tokens",
            "mixture": {"old": "100%"},
            "schedule": {"name": "cosine", "peak": 0.01, "warmup": "10%"},
        }
    ],
    "batch": {"sequences": 16, "sequence_length": 32},
    "precision": "fp32",
}


@dataclass
class Job:
    """A folder in which commands ran, and what each printed with --json."""

    folder: Path
    said: dict[str, Any] = field(default_factory=dict)

    def run(self, step: str, *arguments: str | Path) -> None:
        """Runs a command, which must succeed and print JSON alone."""
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main.main([*map(str, arguments), "--json"])
        assert (code, error.getvalue()) == (0, ""), step
        self.said[step] = json.loads(out.getvalue())


@pytest.fixture(scope="module")
def job(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Everything from raw text to the report, done once; the tests look at it."""
    job = Job(tmp_path_factory.mktemp("job"))
    prepare = ["--tokenizer", "tokenizer", "--validation", "10%"]
    update = ["continue", "runs/base", "--data", "new=corpora/new", "--tokens", "10K tokens", "--out", "runs/update"]
    data = ["--data", "old=corpora/old", "--data", "new=corpora/new"]
    with contextlib.chdir(job.folder):
        job.run("tokenizer", "tokenizer", "train", workspace.old_text, "--vocabulary-size", "512", "--out", "tokenizer")
        job.run("old", "prepare", workspace.old_text, *prepare, "--out", "corpora/old")
        job.run("new", "prepare", workspace.new_text, *prepare, "--out", "corpora/new", "--against", "corpora/old")
        Path("base.yaml").write_text(yaml.safe_dump(RECIPE))
        job.run("planned", "train", "base.yaml", "--dry-run")
        job.run("base", "train", "base.yaml")
        job.run("derived", *update, "--dry-run")
        job.said["left by the dry run"] = sorted(p.name for p in Path("runs").iterdir())
        job.run("update", *update)
        job.run("update again", *update)
        job.run("eval", "eval", "runs/update", *data, "--precision", "fp32")
        job.run("report", "report", "runs/base", "runs/update", "--out", "report.html")
        job.run("show run", "show", "runs/update", "--verify")
        job.run("show checkpoint", "show", newest_checkpoint(Path("runs/update")), "--verify")
        job.run("show corpus", "show", "corpora/new", "--verify")
        job.run("list", "list")
        job.run("list schedules", "list", "schedules")
        job.run("doctor", "doctor")
    return job


def test_tokenizer_and_corpora(job: Job) -> None:
    made = job.said["tokenizer"]
    assert made.keys() == {"tokenizer", "vocabulary_size", "separator_id", "fingerprint"}
    assert (made["tokenizer"], made["vocabulary_size"]) == ("tokenizer", 512)
    for name in ("old", "new"):
        manifest = job.said[name]
        assert manifest.keys() >= {"format", "name", "dtype", "files", *CORPUS}
        assert manifest["name"] == name
        assert manifest["tokenizer"]["fingerprint"] == made["fingerprint"]
        counts = manifest["counts"]
        read = counts["read"] + counts["added_by_cutting"]
        assert read == counts["kept"] + sum(counts["dropped"].values())
        assert all(split["tokens"] > 0 for split in manifest["splits"].values())
    assert job.said["old"]["fingerprint"] != job.said["new"]["fingerprint"]


def test_the_base_model(job: Job) -> None:
    planned, trained = job.said["planned"], job.said["base"]
    assert planned.keys() >= {"name", "recipe_hash", "tokens", "flops", "parameters", "corpora", "stages"}
    assert trained.keys() == SUMMARY
    assert (trained["run"], trained["complete"], trained["tokens"]) == ("runs/base", True, planned["tokens"])
    assert trained["flops"] == pytest.approx(planned["flops"])
    before, after = (trained["evaluation"][moment]["old"] for moment in ("before", "after"))
    assert before.keys() == after.keys() == MEASURES
    assert after["nats_per_token"] < before["nats_per_token"] - 0.5


def test_its_continuation(job: Job) -> None:
    derived, continued = job.said["derived"], job.said["update"]
    assert derived.keys() == {"recipe", "reasons", "resolved"}
    assert job.said["left by the dry run"] == ["base"]
    assert continued.keys() == {"recipe", "reasons", "result", "doubts"}
    assert continued["recipe"] == derived["recipe"]
    assert any(reason.startswith("replay") for reason in continued["reasons"])
    result = continued["result"]
    assert result.keys() == SUMMARY
    assert job.said["update again"]["result"] == result  # what is done is not done again
    before, after = (result["evaluation"][moment] for moment in ("before", "after"))
    # the base was measured in fp32, its continuation is in bf16 where that is native
    assert before["old"] == pytest.approx(job.said["base"]["evaluation"]["after"]["old"], rel=1e-4)
    assert after["new"]["nats_per_token"] < before["new"]["nats_per_token"]


def test_its_evaluation(job: Job) -> None:
    measured = job.said["eval"]
    assert measured.keys() == {"checkpoint", "sequence_length", "corpora", "id", "against_parent"}
    assert all(values.keys() == MEASURES for values in measured["corpora"].values())
    transfer = measured["against_parent"]
    assert transfer.keys() == {"forgetting", "adaptation", "backward_transfer"}
    assert (transfer["forgetting"].keys(), transfer["adaptation"].keys()) == ({"old"}, {"new"})
    forgotten = transfer["forgetting"]["old"]["nats_per_token"]
    assert transfer["backward_transfer"]["nats_per_token"] == -forgotten


def test_the_report(job: Job) -> None:
    report = job.said["report"]
    assert report.keys() == {"rows", "corpora", "unit", "same_roles", "notes"}
    assert report["corpora"] == ["old", "new"]
    base, update = report["rows"]
    assert (base["label"], update["label"]) == ("base", "update")
    after = job.said["update"]["result"]["evaluation"]["after"]
    assert update["after"]["old"]["nats_per_token"] == after["old"]["nats_per_token"]
    page = (job.folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert not re.findall(r"""(?:href|src|action|data)\s*=\s*["']?(?:https?:)?//|url\(\s*["']?(?:https?:)?//""", page)


def test_show(job: Job) -> None:
    run, checkpoint, corpus = (job.said[f"show {kind}"] for kind in ("run", "checkpoint", "corpus"))
    assert [facts["kind"] for facts in (run, checkpoint, corpus)] == ["run", "checkpoint", "corpus"]
    assert run.keys() >= {"name", "recipe_hash", "complete", "tokens", "stages", "evaluation", "checkpoints"}
    assert run["complete"]
    assert run["tokens"]["planned"] == run["tokens"]["trained"] == job.said["update"]["result"]["tokens"]
    assert checkpoint["verified"]
    assert checkpoint["lineage"]["checkpoint"] == job.said["eval"]["id"]
    stages = checkpoint["lineage"]["stages"]
    assert [stage["run"] for stage in stages] == ["base", "update"]
    assert {s["name"]: s["role"] for s in stages[1]["sources"]} == {"new": "fresh", "replay/old": "replay"}
    assert corpus.keys() == {"kind", "path", "verified", "name", *CORPUS}
    assert corpus["fingerprint"] == job.said["new"]["fingerprint"]


def test_list_and_doctor(job: Job) -> None:
    assert job.said["list"].keys() == plugins.kinds().keys()
    assert job.said["list schedules"].keys() >= {"cosine", "rewarm", "wsd"}
    assert job.said["doctor"].keys() >= {
        *("perennial", "python", "torch", "cpu", "cores", "threads", "devices", "precision"),
        *("matmul_flops_per_second", "memory_available_bytes", "disk_free_bytes", "packages", "advice"),
    }


def test_the_result_opens_in_transformers(job: Job) -> None:
    """The same logits within 1e-5, the same ids, and it writes what our own model would."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
    import torch

    from perennial.data.corpus import Corpus
    from perennial.model.huggingface import load_model

    folder = newest_checkpoint(job.folder / "runs/update")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_model(folder).eval()
    ids = torch.from_numpy(Corpus.open(job.folder / "corpora/new").validation.tokens(0, 4 * 64)).view(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.logits(ours(ids)), atol=1e-5, rtol=1e-5)

    text = "def permute(indices: list[int]) -> list[int]:\n    return sorted(indices)  # \u00fc\u00e4\n"
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(prompt[0]) == text
    with torch.no_grad():
        written = theirs.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        expected = prompt
        for _ in range(8):
            scores = ours.logits(ours(expected))[:, -1]
            scores[:, tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens does
            expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], dim=1)
    assert written.tolist() == expected.tolist()
