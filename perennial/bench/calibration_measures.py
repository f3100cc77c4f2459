"""What a calibration measures beside its runs: speed and memory, gradient noise, the shift before the update."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perennial.bench.calibration_runs import EVALUATION_TOKENS, Setting
from perennial.core.errors import UserError
from perennial.core.files import write_json
from perennial.core.settings import stable_hash
from perennial.evals.shift import Shift, shift_between

if TYPE_CHECKING:
    from perennial.train.starting import Parent

NOISE_ROWS = 16
"""Rows of the big batch of the noise scale; the small one is one row."""
NOISE_BATCHES = 4


def speed_of(
    setting: Setting, parent: Parent | None, say: Callable[[str], None], *, samples: int = 1
) -> dict[str, float]:
    """Speed and memory of the model itself in a process of its own, or of its small copy where it is too large.

    The speed is the median of the first so many samples of a few seconds, those of earlier calls included: a machine
    that others use as well, or that grows hot, is not equally fast all the time.
    """
    config = setting.config
    last = parent.lineage.stages[-1] if parent and parent.lineage.stages else None
    length = last.sequence_length if last else setting.length
    place = setting.task.work / "speed.json"
    asked = {
        "model": config.model_dump(mode="json"),
        "sequences": max(1, round(setting.batch_tokens / length)),
        "sequence_length": length,
        "micro_batch": last.micro_batch if last else None,
        "optimizer": setting.optimizer,
    }
    key = stable_hash(asked)
    taken: list[dict[str, float]] = []
    if place.is_file():
        known = json.loads(place.read_text(encoding="utf-8"))
        taken = known.get("samples") or [known["speed"]] if known["key"] == key else []  # one, before there were more
    while len(taken) < samples:
        say(f"calibrate: speed and memory of an update, sample {len(taken) + 1}")
        taken.append(_sample(asked))
        write_json(place, {"key": key, "samples": taken})
    # A later sample may be of a smaller copy, where memory has become scarce: FLOPs compare, tokens do not.
    rates = [sample["tokens_per_second"] * sample["flops_per_token"] for sample in taken[:samples]]
    return {**taken[0], "flops_per_second": statistics.median(rates)}


def _sample(asked: Mapping[str, object]) -> dict[str, float]:
    """What `calibration_speed` measures. Raises UserError when it cannot."""
    done = subprocess.run(
        [sys.executable, "-m", "perennial.bench.calibration_speed"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"the speed of an update could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def losses_before(setting: Setting, parent: Parent | None) -> tuple[Shift | None, float | None]:
    """The shift that the model sees, and its old loss in nats per token, where it is small enough for this machine."""
    from perennial.core.environment import memory_bytes
    from perennial.model.foreign import state_bytes
    from perennial.train.measuring import evaluate_checkpoint

    there = memory_bytes()["available"]
    if parent is None or (there is not None and state_bytes(setting.config, 0) > there):
        return None, None
    found = evaluate_checkpoint(
        parent.path, {**setting.old, **setting.task.data}, max_tokens=EVALUATION_TOKENS, sequence_length=setting.length
    )["corpora"]
    old_before = sum(float(found[name]["nats_per_token"]) for name in setting.old) / len(setting.old)
    return shift_between(found, setting.old, setting.task.data), old_before


def noise_of(bases: Sequence[Path], setting: Setting) -> float | None:
    """Gradient noise scale in tokens of the largest copy on the new text; None where there is none, or it drowned."""
    if not bases:
        return None
    import torch

    from perennial.core.lineage import newest_checkpoint
    from perennial.data.corpus import Corpus
    from perennial.model.huggingface import load_model
    from perennial.objectives.next_token import NextToken
    from perennial.scaling.batch import noise_scale
    from perennial.train.feeding import TorchBatch

    model = load_model(newest_checkpoint(bases[-1]))
    split = Corpus.open(next(iter(setting.task.data.values()))).train
    count = min(NOISE_ROWS * NOISE_BATCHES, split.num_rows(setting.length))
    batch_rows = count // NOISE_BATCHES
    if batch_rows < 2:
        return None
    small, big = [], []
    trained = [p for p in model.parameters() if p.requires_grad]
    for first in range(0, batch_rows * NOISE_BATCHES, batch_rows):
        total = [torch.zeros_like(p) for p in trained]
        for row in range(first, first + batch_rows):
            inputs, targets = (torch.from_numpy(part) for part in split.rows([row], setting.length))
            loss = NextToken().loss(model, TorchBatch(inputs, targets, None))
            (loss.total / setting.length).backward()
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
            small.append(sum(float(g.square().sum()) for g in gradients))
            for kept, gradient in zip(total, gradients, strict=True):
                kept += gradient / batch_rows
            model.zero_grad(set_to_none=True)
        big.append(sum(float(g.square().sum()) for g in total))
    found = noise_scale(
        small_batch=float(setting.length),
        small_norm=sum(small) / len(small),
        big_batch=float(setting.length * batch_rows),
        big_norm=sum(big) / len(big),
    ).batch
    return None if math.isnan(found) else found
