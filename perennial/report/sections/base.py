"""What a section of the report page must define: where it stands, what it is called, and its HTML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from perennial.core.settings import Settings
from perennial.report.rows import Comparison


class Section(Settings, ABC):
    """One part of the page. It sees the comparison only, and says '' when it has nothing to show."""

    POSITION: ClassVar[int]
    """Sections stand in this order, from the top."""
    TITLE: ClassVar[str]
    """The heading; '' for a section that belongs to the head of the page."""
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}]
    """Settings for the conformance tests."""

    @abstractmethod
    def render(self, comparison: Comparison) -> str:
        """HTML without outside references; every text that comes from files is escaped."""
