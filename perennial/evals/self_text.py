"""Text that a model writes by itself, as a corpus: old data when those that it was trained on are gone.

Formula: rows of one batch are drawn together, token by token, from softmax(logits / temperature) cut to the likeliest
    that make up top_p, from the beginning of a document or a short prompt until a document ends or the context is
    full.
Source: Sun, Ho and Lee 2020, "LAMOL: LAnguage MOdeling for Lifelong Language Learning", arXiv 1909.03329, section 3.2
    (a language model replays what it generates); Lee et al. 2022, arXiv 2210.02871 (self-distillation further in
    training).
Differs: text of the whole model, no task tokens. Each batch has its own seed, a pure function of its number, so that a
    stopped job goes on with exactly the text that it would have written.
Limits: it replays what the model says, mistakes included, and rare text rarely; real old data are better by far.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.core import files
from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.core.seeds import derive
from perennial.evals.generation import Writer
from perennial.model.cache import KeyValueCache
from perennial.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the text is drawn."""

    tokens: int
    """Tokens to write in all; the last batch may go beyond."""
    prompts: tuple[str, ...] = ("",)
    """Beginnings, taken in turn; '' is the beginning of a document."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 32
    """Documents that are written at once."""
    length: int | None = None
    """Most tokens of a document; None: the model's context."""


def write_text(writer: Writer, out: Path, sampling: Sampling, *, name: str = "", quiet: bool = False) -> dict[str, Any]:
    """Writes `out`, .jsonl with 'id' and 'text', or goes on with it: {'out', 'documents', 'tokens'}. Raises UserError.

    name: of the checkpoint; a file that was begun with another one or other settings is refused.
    """
    _check(out, sampling)
    partial, record = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")
    asked = {"checkpoint": name, **asdict(sampling), "prompts": list(sampling.prompts)}
    done = files.read_json(record, "record of what was written") if record.is_file() else None
    if done is not None and done["asked"] != asked:
        raise UserError(f"{partial}: was begun with other settings; give another --out, or delete it")
    state = done or {"asked": asked, "batches": 0, "documents": 0, "tokens": 0, "bytes": 0}
    out.parent.mkdir(parents=True, exist_ok=True)
    ids = [writer.tokenizer.encode(prompt).ids or [writer.folder.separator_id] for prompt in sampling.prompts]
    try:
        with (
            open(partial, "ab") as file,
            Progress("generate", total=sampling.tokens, unit="tokens", quiet=quiet) as line,
        ):
            file.truncate(state["bytes"])
            while state["tokens"] < sampling.tokens:
                number = state["batches"]
                which = number % len(ids)
                texts, made = _batch(writer, ids[which], sampling, number)
                for row, text in enumerate(texts):
                    if text and not text.isspace():
                        found = {"id": f"self-{number:06d}-{row:03d}", "text": sampling.prompts[which] + text}
                        file.write(json.dumps(found, ensure_ascii=False).encode() + b"\n")
                        state["documents"] += 1
                file.flush()
                os.fsync(file.fileno())
                state = {**state, "batches": number + 1, "tokens": state["tokens"] + made, "bytes": file.tell()}
                files.write_json(record, state)
                line.update(state["tokens"])
        os.replace(partial, out)
        record.unlink()
    except OSError as error:
        raise files.explain(error, out) from error
    return {"out": str(out), "documents": state["documents"], "tokens": state["tokens"]}


def _check(out: Path, sampling: Sampling) -> None:
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: its name must end in .jsonl")
    if out.exists():
        raise UserError(f"{out}: exists already; give another --out, or delete it")
    if sampling.tokens < 1 or sampling.batch < 1:
        raise UserError(f"--tokens {sampling.tokens}, --batch {sampling.batch}: each must be 1 or more")
    if not 0 < sampling.temperature <= 100:
        raise UserError(f"--temperature {sampling.temperature}: must be above 0 for text that is not always the same")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"--top-p {sampling.top_p}: must be above 0 and at most 1 (all tokens)")


def _batch(writer: Writer, prompt: Sequence[int], sampling: Sampling, number: int) -> tuple[list[str], int]:
    """The texts of one batch, and how many tokens they took."""
    context = writer.model.config.context
    room = max(0, (context or len(prompt) + (sampling.length or 1024)) - len(prompt))
    room = min(room, sampling.length or room)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {context}: no room for more")
    generator = torch.Generator(writer.device).manual_seed(derive(sampling.seed, "self text", number))
    rows: list[list[int]] = [[] for _ in range(sampling.batch)]
    ended = [False] * sampling.batch
    with torch.autocast(writer.device.type, torch.bfloat16, enabled=writer.precision == "bf16"):
        for drawn in _draws(writer.model, prompt, room, sampling, generator, writer.device):
            for row, token in enumerate(drawn.tolist()):
                if ended[row] or token in writer.stop:
                    ended[row] = True
                else:
                    rows[row].append(token)
            if all(ended):
                break
    begun = writer.tokenizer.decode(list(prompt))
    texts = [writer.tokenizer.decode([*prompt, *made])[len(begun) :] for made in rows]
    return texts, sum(map(len, rows)) + sum(ended)


@torch.no_grad()
def _draws(
    model: Any, prompt: Sequence[int], room: int, sampling: Sampling, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """One token for each row, (B,), again and again; all rows are equally long, so that they share a cache."""
    ids = torch.tensor([list(prompt)] * sampling.batch, device=device)
    cache = KeyValueCache(model.config.layers, len(prompt) + room) if isinstance(model, Transformer) else None
    seen = ids
    for _ in range(room):
        hidden = model(ids, cache=cache) if cache is not None else model(seen)
        drawn = _chosen(model.logits(hidden[:, -1:])[:, 0].float(), sampling, generator)
        yield drawn
        ids = drawn.unsqueeze(1)
        seen = torch.cat((seen, ids), dim=1) if cache is None else seen


def _chosen(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    shares = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p == 1:
        return torch.multinomial(shares, 1, generator=generator)[:, 0]
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    kept = ordered * (ordered.cumsum(-1) - ordered < sampling.top_p)  # the likeliest is always kept
    return order.gather(1, torch.multinomial(kept, 1, generator=generator))[:, 0]


def number_of_tokens(text: str) -> int:
    """A number of tokens from '100', '1M' or '1M tokens'. Raises UserError."""
    from perennial.core.amounts import parse

    try:
        return (
            int(text) if text.isdigit() else round(parse(text if " " in text else f"{text} tokens", ("tokens",)).value)
        )
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from None
