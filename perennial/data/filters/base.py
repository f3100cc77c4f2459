"""The contract of a filter: the reason to leave a document out, or None."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from perennial.core.settings import Settings
from perennial.data.documents import Document


class Filter(Settings, ABC):
    """Decides about one document at a time, by the document alone; any text, also an empty one, gets an answer."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]
    """Settings with which the conformance tests build the filter."""
    KEPT: ClassVar[list[str]]
    """Texts that the filter keeps under the first of the EXAMPLES."""
    DROPPED: ClassVar[list[str]]
    """Texts that it drops under them."""

    @abstractmethod
    def reason(self, document: Document) -> str | None:
        """Why the document is left out, in a few words without figures (they are counted), or None to keep it."""
