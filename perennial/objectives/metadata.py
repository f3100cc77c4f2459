"""Predict each document given its metadata, such as its address or title (MeCo).

Formula: every document, and every part of one that opens a row, becomes  separator, prefix, text, separator,  with
    prefix = the template filled in with the document's metadata; total = sum over the tokens of text, and the separator
    behind it, of -ln p(token | what comes before it in the row). The prefix is read and not counted.
Source: Gao et al. 2025, "Metadata Conditioning Accelerates Language Model Pre-training", arXiv 2501.01956, section 2:
    "URL: ..." before the text, no loss on it, metadata for the first 90 % of training and plain text for the last 10 %
    ("cooldown") under the same schedule and optimizer state. Against it: Higuchi et al. 2025, "When Does Metadata
    Conditioning (NOT) Work for Language Model Pre-Training?", arXiv 2504.17562.
Differs: the prefix comes again where a row goes on with a document, since rows are short where models are small. The
    cooldown is a stage of its own with `next_token`, part of the same schedule, which goes on in the same order.
Limits: a row keeps its length, so that as many tokens at its end are left out (for this epoch) as the prefixes take;
    metadata of all documents are read when the stage begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from perennial.objectives.base import StageData
from perennial.objectives.next_token import NextToken

if TYPE_CHECKING:
    from perennial.data.loader import Arrangement


class Metadata(NextToken):
    """Next tokens of the text; documents without the fields of the template are taken as they are."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"template": "URL: {url}\n\n"},
        {"template": "{title} ({year})\n", "z_loss": 1e-3},
    ]

    template: str
    """The prefix, with the names of metadata fields in braces: 'URL: {url}\\n\\n'."""

    @field_validator("template")
    @classmethod
    def _has_fields(cls, template: str) -> str:
        from perennial.data.wrapping import fields_of

        if not fields_of(template):
            raise ValueError(f"{template!r} names no metadata field; put one in braces, as in 'URL: {{url}}\\n\\n'")
        return template

    def check(self, stage: StageData) -> None:
        """Raises UserError unless a corpus of the mixture has the fields."""
        from perennial.data.wrapping import check_fields

        check_fields(self.template, stage.corpora)

    def arrangement(self, stage: StageData) -> Arrangement | None:
        """Puts each document's prefix before it."""
        from perennial.data.wrapping import Wrapper

        return Wrapper(
            stage.corpora,
            stage.tokenizer(),
            self._around,
            counts_all=False,
            document_mask=stage.document_mask,
            quiet=stage.quiet,
        )

    def _around(self, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
        from perennial.data.wrapping import filled

        prefix = filled(self.template, metadata)
        return None if prefix is None else (prefix, "")
