"""Predict each document inside a prompt template, as a later task will present it (PCP).

Formula: with template = before + '{text}' + after, every document becomes  separator, before, text, after, separator;
    total = sum over its tokens of -ln p(token | what comes before it in the row), over those of the text (and the
    separator) alone with `counted` 'text'. Other names in braces are filled in with the document's metadata.
Source: Shi and Lipani 2023, "Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner", arXiv 2305.01711,
    section 3 (the template, with a label of the task where there is one, is part of what is pre-trained on).
Differs: next tokens in the place of masked ones; a label is a metadata field of the corpus (Shi and Lipani let a model
    give pseudo labels); `before` comes again where a row goes on with a document.
Limits: a row keeps its length, so that as many tokens at its end are left out as the template takes; a document that
    does not end within its row has no `after` there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from perennial.objectives.base import StageData
from perennial.objectives.next_token import NextToken

if TYPE_CHECKING:
    from perennial.data.loader import Arrangement

_TEXT = "{text}"


class PromptTemplate(NextToken):
    """Next tokens of template and text; documents without a field of the template are taken as they are."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"template": "Review: {text}\nThe review is"},
        {"template": "{text}\nTopic: {topic}", "counted": "text", "chunk_tokens": 7},
    ]

    template: str
    """The document's text as '{text}', once, and metadata fields in braces: 'Review: {text}\\nStars: {stars}'."""
    counted: Literal["all", "text"] = "all"
    """Whether the template's own tokens count as targets, as in the paper, or only those of the text."""

    @field_validator("template")
    @classmethod
    def _has_text(cls, template: str) -> str:
        from perennial.data.wrapping import fields_of

        if fields_of(template).count("text") != 1 or template.count(_TEXT) != 1 or template == _TEXT:
            raise ValueError(f"{template!r} must hold '{_TEXT}' once, and something around it")
        return template

    def check(self, stage: StageData) -> None:
        """Raises UserError unless a corpus of the mixture has the fields."""
        from perennial.data.wrapping import check_fields

        check_fields(self.template, stage.corpora, besides=["text"])

    def arrangement(self, stage: StageData) -> Arrangement | None:
        """Puts the template around each document."""
        from perennial.data.wrapping import Wrapper

        return Wrapper(
            stage.corpora,
            stage.tokenizer(),
            self._around,
            counts_all=self.counted == "all",
            document_mask=stage.document_mask,
            quiet=stage.quiet,
        )

    def _around(self, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
        from perennial.data.wrapping import filled

        before, after = (filled(part, metadata) for part in self.template.split(_TEXT))
        return None if before is None or after is None else (before, after)
