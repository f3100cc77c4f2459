"""Leaves out documents that are shorter or longer than given numbers of UTF-8 bytes."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from perennial.data.documents import Document
from perennial.data.filters.base import Filter


class Length(Filter):
    """Keeps documents of min_bytes to max_bytes, both included."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{"min_bytes": 4, "max_bytes": 8}, {"min_bytes": 1}, {"max_bytes": 100}]
    KEPT: ClassVar[list[str]] = ["four", "\u00e4\u00f6\u00fc\u00df"]
    DROPPED: ClassVar[list[str]] = ["", "two", "\u00e4", "nine char"]

    min_bytes: int = Field(default=0, ge=0)
    """Shorter documents are left out."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Longer documents are left out; None: no limit."""

    @model_validator(mode="after")
    def _does_something(self) -> Length:
        if self.min_bytes == 0 and self.max_bytes is None:
            raise ValueError("set min_bytes or max_bytes; as it is this filter keeps everything")
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes {self.max_bytes} is below min_bytes {self.min_bytes}: nothing would be kept")
        return self

    def reason(self, document: Document) -> str | None:
        """'too short', 'too long' or None."""
        num_bytes = len(document.text.encode("utf-8", "surrogatepass"))
        if num_bytes < self.min_bytes:
            return "too short"
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            return "too long"
        return None
