"""A parent that Perennial did not train: what its folder says, what the user states, and estimates of the rest.

Continuing needs four numbers of the past: tokens, compute, the highest and the final learning rate. A Hugging Face
folder holds none of them. Those that the user does not state are estimated by published rules, and marked as estimates
wherever they are shown. How the update is trained (batch, optimizer) is chosen here too, as there is no stage before
it whose manner could be kept.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError, nearest
from perennial.core.lineage import Fact, Lineage, Origin
from perennial.core.settings import check
from perennial.model.card import license_of
from perennial.model.config import ModelConfig
from perennial.model.foreign import AnyConfig, num_parameters, row_limit
from perennial.model.inspection import raw_config, weights_id
from perennial.model.memory import estimate
from perennial.model.memory_terms import Training
from perennial.objectives.next_token import default_chunk
from perennial.train.recipe import ParentFacts

ESTIMATE, WARNING = "estimate: ", "warning: "
"""How the reasons begin that a user must not miss."""

TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556: about 20 are optimal."""

PEAKS = (
    (70e6, 1e-3),
    (125e6, 6e-4),
    (350e6, 3e-4),
    (760e6, 2.5e-4),
    (1.3e9, 2e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1e-4),
    (175e9, 0.6e-4),
)
"""(parameters, peak learning rate) as model families really used them.

From 125M on Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv 2005.14165, table 2.1, which many later
families took over; 70M from Biderman et al. 2023, "Pythia", arXiv 2304.01373, table 1, whose 14M model has the same.
Not taken from a law of the optimal rate: such laws are tied to their recipe and several times off on another's.
"""

FINAL_SHARE = 0.1
"""Final over peak learning rate: a cosine to a tenth, as in Hoffmann et al. 2022 (arXiv 2203.15556, section 3.1)."""

WHY_NOT_REWARM = (
    "the update is small against the parent's training (Parmar et al. 2024, arXiv 2407.07263: a decay from where the "
    "rate was left did best)"
)

MIN_UPDATES = 64
"""An update has at least this many optimizer steps where its tokens allow it: a fresh AdamW needs tens to settle."""

MIN_ROW_TOKENS = 128
"""Rows are not cut shorter than this for the sake of more steps."""

MAX_ROW_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Longest rows by default: attention's cost grows with the row, and most documents are shorter."""

NO_REPLAY = (
    "Without replay a model forgets. Ibrahim et al. 2024 (arXiv 2403.08763, table 2; 405M parameters, 200B to 300B "
    "tokens): loss on the old data up by 0.27 nats per token after a weak shift (English web text to other English web "
    "text), by 1.39 after a strong one (English to German); with 5% and 25% replay by 0.06 and 0.16. Small models of "
    "our own (1.5M parameters, 401K tokens, records/2026-11-21_continual): up by 1.7 (English novels to Python "
    "proposals) and 4.6 (English to German novels); with 25% replay by 0.1."
)
HOW_TO_REPLAY = (
    "Name a stand-in with --replay NAME=PATH: text of the kind that the model was trained on, such as a sample of "
    "public web text in its languages."
)


# The past


def stated_facts(texts: Iterable[str]) -> ParentFacts:
    """The facts in 'peak=3e-4', 'tokens=2T' and the like, as --parent takes them. Raises UserError."""
    facts: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in ParentFacts.model_fields:
            allowed = list(ParentFacts.model_fields)
            hint = nearest(name, allowed)
            raise UserError(f"--parent {text!r}: give FACT=VALUE with one of {', '.join(allowed)}.{hint}")
        if name in facts:
            raise UserError(f"--parent: '{name}' is given twice")
        facts[name] = _value(name, value)
    found, problems = check(ParentFacts, facts)
    if problems:
        raise UserError("--parent: " + "; ".join(".".join(map(str, p.loc)) + f" {p.message}" for p in problems).strip())
    assert found is not None
    return found


def _value(name: str, text: str) -> Any:
    """A fact's value: the name says what the unit is, so that '2T' is enough for tokens."""
    if name in ("tokens", "flops"):
        bare = re.fullmatch(r"[\d_,.eE+-]+[KkMBGT]?", text)
        try:
            return parse(f"{text} {name}" if bare else text, (name,))
        except ValueError as error:
            raise UserError(f"--parent {name}={text}: {error}") from None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--parent {name}={text}: a learning rate is needed, such as {name}=3e-4") from None


def estimated_peak(parameters: float) -> float:
    """The peak learning rate usual for a model of this size: `PEAKS` interpolated in the logarithms, held outside.

    Below the table a smaller model would bear more; held, the estimate errs to the side that changes the model less.
    """
    if parameters <= PEAKS[0][0]:
        return PEAKS[0][1]
    for (small, high), (large, low) in itertools.pairwise(PEAKS):
        if parameters <= large:
            way = math.log(parameters / small) / math.log(large / small)
            return rounded(high * (low / high) ** way)
    return PEAKS[-1][1]


def past(parameters: int, facts: ParentFacts) -> dict[str, Fact]:
    """Tokens, peak, rate and flops of a model's training so far: stated, or estimated from the rest."""
    tokens = _fact(facts.tokens) or _estimated_tokens(parameters, facts)
    peak = _fact(facts.peak) or _estimated_peak(parameters, facts)
    share = f"a tenth of the peak: a cosine to {FINAL_SHARE:.0%} (Hoffmann et al. 2022, arXiv 2203.15556)"
    rate = _fact(facts.rate) or Fact(value=rounded(FINAL_SHARE * peak.value), is_estimate=True, basis=share)
    flops = _fact(facts.flops) or Fact(
        value=6.0 * parameters * tokens.value, is_estimate=True, basis="6 x parameters x tokens"
    )
    return {"tokens": tokens, "peak": peak, "rate": rate, "flops": flops}


def _fact(given: Amount | float | None) -> Fact | None:
    if given is None:
        return None
    return Fact(value=given.value if isinstance(given, Amount) else given, is_estimate=False, basis="stated")


def _estimated_tokens(parameters: int, facts: ParentFacts) -> Fact:
    if facts.flops is not None:
        value = facts.flops.value / (6 * parameters)
        return Fact(value=value, is_estimate=True, basis="stated FLOPs / (6 x parameters)")
    basis = (
        f"{TOKENS_PER_PARAMETER} per parameter, the compute-optimal number (Hoffmann et al. 2022, arXiv 2203.15556); "
        "for most released models it is a lower bound"
    )
    return Fact(value=float(TOKENS_PER_PARAMETER * parameters), is_estimate=True, basis=basis)


def _estimated_peak(parameters: int, facts: ParentFacts) -> Fact:
    if facts.rate is not None:
        basis = "ten times the stated final rate: a cosine to a tenth (Hoffmann et al. 2022, arXiv 2203.15556)"
        return Fact(value=rounded(facts.rate / FINAL_SHARE), is_estimate=True, basis=basis)
    basis = "usual for this number of parameters (GPT-3's table 2.1, arXiv 2005.14165; below 125M Pythia's)"
    return Fact(value=estimated_peak(parameters), is_estimate=True, basis=basis)


def rounded(value: float) -> float:
    """Three digits: an estimate has no more, and the recipe stays readable."""
    return float(f"{value:.3g}")


def lineage_of(folder: Path, config: AnyConfig, known: Lineage | None, facts: ParentFacts) -> Lineage:
    """The lineage of a checkpoint with what the user states of its past; `known` is None for a folder without one.

    `config` is what `load_config` gives. Raises UserError for facts about a checkpoint whose past is recorded.
    """
    given = facts.model_dump(exclude_none=True)
    if known is None:
        origin = _origin(folder, config, facts)
        return Lineage(checkpoint=origin.weights, stages=[], origin=origin)
    if known.origin is None:
        if given:
            raise UserError(
                f"parent_facts (--parent {next(iter(given))}): {folder} has a lineage that says how it was trained; "
                "leave it out"
            )
        return known
    if not given:
        return known
    before = {name: getattr(known.origin, name) for name in ("tokens", "flops", "peak", "rate")}
    units = {"tokens": "tokens", "flops": "flops"}
    stated = {
        name: Amount(fact.value, units[name]) if name in units else fact.value
        for name, fact in before.items()
        if not fact.is_estimate
    }
    merged = ParentFacts.model_validate({**stated, **given})
    origin = known.origin.model_copy(update=past(known.origin.parameters, merged))
    return known.model_copy(update={"origin": origin})


def _origin(folder: Path, config: AnyConfig, facts: ParentFacts) -> Origin:
    parameters = num_parameters(config)
    return Origin(
        name=name_of(folder),
        model_type=str(raw_config(folder).get("model_type")),
        weights=weights_id(folder),
        license=license_of(folder),
        parameters=parameters,
        through="native" if isinstance(config, ModelConfig) else "transformers",
        **past(parameters, facts),
    )


def name_of(folder: Path) -> str:
    """What a model is called: its name on the hub where the folder or its configuration tell it, else the folder's."""
    folder = folder.resolve()
    cached = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    if cached and folder.parent.name == "snapshots":
        return f"{cached[1]}/{cached[2]}"
    stored = raw_config(folder).get("_name_or_path")
    if isinstance(stored, str) and re.fullmatch(r"[\w.-]+/" + re.escape(folder.name), stored, re.IGNORECASE):
        return stored
    return folder.name


def notes(origin: Origin) -> list[str]:
    """One line per number of the past: what is estimated, by which rule, and how to state it."""
    words = {
        "tokens": ("was trained on", human(origin.tokens.value, "tokens"), "2T"),
        "flops": ("was trained with", f"{origin.flops.value:.3g} FLOPs", "1e22"),
        "peak": ("had the peak learning rate", f"{origin.peak.value:.3g}", "3e-4"),
        "rate": ("was left at the learning rate", f"{origin.rate.value:.3g}", "3e-5"),
    }
    lines = []
    for name, (verb, number, example) in words.items():
        fact: Fact = getattr(origin, name)
        if fact.is_estimate:
            lines.append(f"{ESTIMATE}{origin.name} {verb} {number}: {fact.basis}. Known? --parent {name}={example}")
        else:
            lines.append(f"stated: {origin.name} {verb} {number}")
    return lines


def mark_of_rate(lineage: Lineage) -> str:
    """' (estimate)' when nobody knows the learning rate at which the model was left, else ''."""
    is_estimate = not lineage.stages and lineage.origin is not None and lineage.origin.rate.is_estimate
    return " (estimate)" if is_estimate else ""


def forgetting_warning(name: str) -> str:
    """What to expect of an update without a stand-in for what the parent was trained on."""
    return f"{WARNING}nothing that {name} was trained on is replayed. {NO_REPLAY} {HOW_TO_REPLAY}"


# The first update


@dataclass(frozen=True)
class Manner:
    """How an update is trained, apart from its data and learning rate."""

    seed: int
    batch: dict[str, int | None]
    clip: float | None
    document_mask: bool
    optimizer: Any
    optimizer_state: str
    objective: Any


@dataclass(frozen=True)
class Machine:
    """What the choice of a batch depends on."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    free_bytes: float | None
    """Memory that is free now, of the GPU where there is one; None when the system does not say."""


def this_machine() -> Machine:
    """The machine that this process runs on."""
    import torch

    from perennial.core.environment import memory_bytes
    from perennial.train.precision import native_precision

    on_gpu = torch.cuda.is_available()
    device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
    free = torch.cuda.mem_get_info()[0] if on_gpu else memory_bytes()["available"]
    precision: Literal["fp32", "bf16"] = "bf16" if native_precision(torch.device(device)) == "bf16" else "fp32"
    return Machine(device, precision, free)


def budget_tokens(amount: Amount, parameters: int, setting: str) -> float:
    """How many tokens a budget is, FLOPs by 6 per parameter and token. Raises UserError for a time."""
    if amount.unit == "seconds":
        raise UserError(
            f"{setting}: the learning rate and batch of the first update of a model from elsewhere follow from its "
            "size; give it in tokens or FLOPs"
        )
    return amount.value if amount.unit == "tokens" else amount.value / (6 * parameters)


def first_manner(
    config: AnyConfig, tokens: float, machine: Machine, *, micro_batch: int | None = None
) -> tuple[Manner, list[str]]:
    """How to train the first update, of `tokens` tokens, of a parent whose own manner is not known; and why.

    `micro_batch`: what an earlier call chose by the memory that was free then, if there was one.
    """
    context = row_limit(config)
    length = row_tokens(context, tokens, machine.device)
    rows = batch_rows(tokens, length)
    rows_at_once = micro_batch or micro_batch_rows(config, rows, length, machine)
    reasons = [
        f"rows of {length} tokens: at most {MAX_ROW_TOKENS[machine.device]} on a {_NAMES[machine.device]}, at most the "
        f"context ({context}), and short enough for {MIN_UPDATES} updates; change: --set batch.sequence_length=N",
        f"batch {rows} x {length} = {rows * length} tokens: the critical batch of an update of "
        f"{human(tokens, 'tokens')} is {human(critical_batch_tokens(tokens))} (Zhang et al. 2024, arXiv 2410.21676), "
        f"rounded to a power of two rows that leaves {MIN_UPDATES} updates; change: --set batch.sequences=N",
        f"micro_batch {rows_at_once}: as many rows at once as fit in half of the free memory; "
        "change: --set batch.micro_batch=N",
        "adamw with a fresh state, clip 1.0, next_token: the parent's are not known, its state is not in the folder",
    ]
    manner = Manner(
        seed=0,
        batch={"sequences": rows, "sequence_length": length, "micro_batch": rows_at_once},
        clip=1.0,
        document_mask=False,
        optimizer="adamw",
        optimizer_state="reset",
        objective="next_token",
    )
    return manner, reasons


_NAMES = {"cpu": "CPU", "cuda": "GPU"}


def row_tokens(context: int, tokens: float, device: str) -> int:
    """Length of the rows: the context, but no more than suits the device and leaves `MIN_UPDATES` rows."""
    longest = min(context, MAX_ROW_TOKENS[device])
    wanted = max(MIN_ROW_TOKENS, tokens / MIN_UPDATES)
    return longest if longest <= wanted else 1 << math.floor(math.log2(wanted))


def critical_batch_tokens(tokens: float) -> float:
    """Tokens per update up to which twice the batch needs nearly half the steps: 18.2 D^0.468, D tokens of training.

    Source: Zhang et al. 2024, "How Does Critical Batch Size Scale in Pre-training?", arXiv 2410.21676: it grows with
    the data, not with the model. Differs: refitted to the authors' table (theirs is 22.91 D^0.47 sequences of 512
    tokens, D in millions, which is 17.7 D^0.47 in tokens). A trained model bears larger batches than one that starts,
    so this errs to more steps.
    """
    return 18.2 * float(tokens) ** 0.468


def batch_rows(tokens: float, length: int) -> int:
    """Rows per update: the critical batch as a power of two, fewer where `MIN_UPDATES` ask for it; at least one."""
    most = tokens / (MIN_UPDATES * length)
    if most < 1:
        return 1
    wanted = max(1.0, critical_batch_tokens(tokens) / length)
    return 1 << min(round(math.log2(wanted)), math.floor(math.log2(most)))


def micro_batch_rows(config: AnyConfig, rows: int, length: int, machine: Machine) -> int:
    """The most rows (a power of two) whose training memory is at most half of what is free; at least one."""
    if machine.free_bytes is None:
        return rows
    wanted = rows
    while rows > 1 and _memory(config, rows, wanted // rows, length, machine) > machine.free_bytes / 2:
        rows //= 2
    return rows


def _memory(config: AnyConfig, rows: int, micro_batches: int, length: int, machine: Machine) -> int:
    training = Training(
        rows=rows,
        sequence_length=length,
        micro_batches=micro_batches,
        precision=machine.precision,
        device=machine.device,
        optimizer_bytes=8,  # AdamW's two moments
        chunk_tokens=default_chunk(machine.device),
        evaluates=False,  # an evaluation needs no less with smaller micro-batches
    )
    return estimate(config, training, process_bytes=0).total  # the process is there already
