"""A checkpoint that goes on with texts: its tokenizer around `model.generation`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from perennial.core import lineage as lineages
from perennial.core.environment import tune_process
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.evals.parity import checked_parity
from perennial.model.folder_config import read_config
from perennial.model.foreign import check_vocabulary
from perennial.model.generation import generate, settings_not_applied, stop_ids
from perennial.model.huggingface import load_model

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes to for bytes that are not yet a whole character."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for one byte; the next one decides what it is a part of."""


class Writer:
    """A model and its tokenizer, loaded once. Raises UserError for a folder that is not a whole model."""

    def __init__(self, folder: Path, *, precision: str = "fp32") -> None:
        tune_process()
        self.device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.precision = precision
        self.folder = TokenizerFolder.open(folder)
        self.tokenizer = self.folder.encoder()
        config = read_config(folder).config
        check_vocabulary(config, self.folder.vocabulary_size, "the same folder", str(folder))
        if not lineages.has_lineage(folder):
            checked_parity(folder)
        self.model = load_model(folder, device=self.device).eval()
        self.stop = stop_ids(folder) or {self.folder.separator_id}
        self.not_applied = settings_not_applied(folder)

    def write(
        self, prompt: str, *, tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[str]:
        """The text that follows, in pieces as it comes; the prompt is cut as `transformers` cuts it."""
        ids = self.tokenizer.encode(prompt).ids or [self.folder.separator_id]
        made: list[int] = []
        done = 0
        settings = {"temperature": temperature, "top_p": top_p}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for token in generate(self.model, ids, tokens=tokens, seed=seed, stop=self.stop, **settings):
                made.append(token)
                text = self._following(ids, made)
                is_byte = _BYTE.fullmatch(self.tokenizer.id_to_token(token) or "")
                if len(text) > done and not text.endswith(_INCOMPLETE) and not is_byte:
                    yield text[done:]
                    done = len(text)
        if made and len(text := self._following(ids, made)) > done:
            yield text[done:]

    def _following(self, prompt: list[int], made: list[int]) -> str:
        """What `made` adds to the text; decoded together with the prompt, because a space may hang between them."""
        return self.tokenizer.decode([*prompt, *made])[len(self.tokenizer.decode(prompt)) :]
