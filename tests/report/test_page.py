"""The page: self-contained, well-formed, the same bytes each time, and honest in words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.records import Recorder
from perennial.report.comparison import Comparison, compare
from perennial.report.page import render, write_report

from .synthetic import BATCH, Draw, Plan, Written, demo, write_run

VOID = {"meta", "br", "input", "link", "img", "hr"}
TOKENS = 40 * BATCH


class Checker(HTMLParser):
    """Collects what a page is made of and that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.elements if attrs.get(name) is not None]


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.problems
    assert not checker.open
    return checker


def words(page: str) -> str:
    return re.sub(r"\s+", " ", "".join(checked(page).text))


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return render(comparison)


def test_every_section_has_something_to_say(page: str) -> None:
    ids = checked(page).attributes("id")
    for name in plugins.names("sections"):
        if name not in ("summary", "incidents", "tasks", "foretold", "switches"):
            assert name in ids, name
    assert 'class="lead"' in page
    assert 'id="incidents"' not in page
    assert 'id="tasks"' not in page


def test_nothing_comes_from_outside(page: str) -> None:
    checker = checked(page)
    assert "http" not in page
    assert "//" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "@import" not in page
    assert "url(http" not in page
    tags = {tag for tag, _ in checker.elements}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert all(target.startswith("#") for target in checker.attributes("href"))
    assert not checker.attributes("src")


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    checker = checked(page)
    ids = checker.attributes("id")
    assert len(ids) == len(set(ids))
    targets = [t[1:] for t in checker.attributes("href")]
    targets += [t for text in checker.attributes("aria-labelledby") for t in text.split()]
    targets += re.findall(r"url\(#([^)]+)\)", page)
    assert set(targets) <= set(ids)


def test_tables_and_charts_can_be_read_aloud(page: str) -> None:
    checker = checked(page)
    headers = [attrs for tag, attrs in checker.elements if tag == "th"]
    assert headers
    assert all(attrs.get("scope") in ("row", "col", "colgroup") for attrs in headers)
    charts = [attrs for tag, attrs in checker.elements if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 1 + 2 * 2 + 2 + 2
    assert all(attrs.get("aria-labelledby") for attrs in charts)
    hidden = [attrs for tag, attrs in checker.elements if tag == "svg" and attrs.get("role") != "img"]
    assert all(attrs.get("aria-hidden") == "true" for attrs in hidden)


def test_rows_are_as_wide_as_their_head(page: str) -> None:
    for table in re.findall(r"<table.*?</table>", page, flags=re.DOTALL):
        head = re.findall(r"<tr>.*?</tr>", re.findall(r"<thead>.*?</thead>", table)[0])
        width = len(re.findall(r"<t[hd]", head[-1])) + (1 if len(head) == 2 else 0)
        if len(head) == 2:
            assert 1 + sum(int(n) for n in re.findall(r'colspan="(\d+)"', head[0])) == width
        for row in re.findall(r"<tr.*?</tr>", re.findall(r"<tbody>.*?</tbody>", table, flags=re.DOTALL)[0]):
            assert len(re.findall(r"<t[hd][ >]", row)) == width


def test_the_summary_in_words(page: str) -> None:
    lead = words(page)
    for sentence in (
        "c continued base for 1.23M tokens and took the loss on the new text from 6.100 to 4.110 nats/token",
        "the loss on the old text rose by 0.140.",
        "Trained on new text alone, b forgot 1.880; replay avoided 93% of that.",
        "The price is 0.030 on the new text against b.",
        "The update cost 50% less compute than training d from scratch on everything",
        "and its average loss is 0.010 lower than that run's",
        "with the parent's own training counted, the whole lineage cost the same.",
    ):
        assert sentence in lead, sentence


def test_the_summary_does_not_hide_a_loss(tmp_path: Path) -> None:
    base = write_run(
        tmp_path, Plan("base", {"old": (8.0, 4.5), "new": (8.0, 6.0)}, [Draw("old", 1)], TOKENS, (0, 1, 0))
    )
    plain = Plan("plain", {"old": (4.5, 5.0), "new": (6.0, 4.0)}, [Draw("new", 1.0)], TOKENS, (0, 1, 0))
    mixture = [Draw("new", 0.5), Draw("old", 0.5, "replay")]
    worse = Plan("worse", {"old": (4.5, 5.6), "new": (6.0, 3.2)}, mixture, TOKENS, (0, 1, 0))
    cheap = Plan(
        "cheap", {"old": (8, 4.2), "new": (8, 4.2)}, [Draw("old", 0.5), Draw("new", 0.5)], TOKENS // 2, (0, 1, 0)
    )
    folders = [base.folder, *(write_run(tmp_path, plan, parent=base).folder for plan in (plain, worse))]
    text = words(render(compare([*folders, write_run(tmp_path, cheap).folder])))
    assert "That is more than without replay: plain forgot 0.500." in text
    assert "cost 100% more compute than training cheap from scratch" in text
    assert "its average loss is 0.200 higher than that run's" in text
    assert "whole lineage cost 300% more" in text


def test_the_same_files_give_the_same_bytes(comparison: Comparison, page: str, runs: dict[str, Written]) -> None:
    assert render(comparison) == page
    assert render(compare([run.folder for run in runs.values()])) == page
    code = (
        "import sys; from perennial.report.comparison import compare; from perennial.report.page import render\n"
        "page = render(compare(sys.argv[1:])); assert 'torch' not in sys.modules; sys.stdout.write(page)"
    )
    folders = [str(run.folder) for run in runs.values()]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout == page, "in another process, and without torch"


def test_size(page: str) -> None:
    assert len(page) < 600_000


def test_names_are_only_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$\\frac{1}{0}$ #fd0001"
    runs = demo(tmp_path, tokens=20 * BATCH)
    for run in runs.values():
        for path in (p for p in run.folder.rglob("*") if p.is_file()):
            text = path.read_text(encoding="utf-8").replace('"main"', '"<b>main</b>"').replace("Example CPU", "<i>CPU")
            path.write_text(text.replace('"new"', '"<u>new&"'), encoding="utf-8")
    page = render(compare([run.folder for run in runs.values()], labels=[f"{evil} {name}" for name in runs]))
    checker = checked(page)
    assert not {tag for tag, _ in checker.elements} & {"script", "u"}
    assert "<b>main" not in page
    assert "<i>CPU" not in page
    assert f"{evil} c" in "".join(checker.text)
    assert "<u>new&" in "".join(checker.text)


def unusual(root: Path) -> Iterator[list[Path]]:
    base = write_run(root, Plan("base", {"old": (8.0, 4.5), "new": (8.0, 6.0)}, [Draw("old", 1)], TOKENS, (0, 1, 0)))
    plan = Plan("c", {"old": (4.5, 4.7), "new": (6.0, 4.1)}, [Draw("new", 1.0)], TOKENS, (1, 1, 1))
    yield [base.folder]
    yield [write_run(root / "begun", plan, parent=base, stop_at=0, saved=False).folder]
    yield [write_run(root / "half", plan, parent=base, stop_at=0.5).folder]
    yield [write_run(root / str(i), plan, parent=base).folder for i in range(12)]
    (root / "empty").mkdir()
    (root / "empty" / "events.jsonl").touch()
    yield [root / "empty"]


def test_unusual_sets_of_runs(tmp_path: Path) -> None:
    for folders in unusual(tmp_path):
        page = render(compare(folders))
        ids = checked(page).attributes("id")
        assert len(ids) == len(set(ids))
        assert "nan" not in words(page).lower().split()


def test_interruptions_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path, Plan("r", {"old": (8.0, 4.5)}, [Draw("old", 1.0)], TOKENS, (0, 1, 0)), stop_at=0.5)
    recorder = Recorder(run.folder / "events.jsonl", now=lambda: 0.0)
    recorder.write("spike", tokens=20 * BATCH, loss=9.5, expected=4.6)
    recorder.write("rollback", tokens=20 * BATCH, skipped_rows=[320, 336])
    recorder.write("stop", tokens=20 * BATCH, reason="asked to stop")
    recorder.write("resume", tokens=20 * BATCH)
    recorder.close()
    text = words(render(compare([run.folder])))
    assert "training loss 9.500, about 4.600 was expected" in text
    assert "rows 320 up to 336 passed over" in text
    assert "asked to stop" in text
    assert "went on from the checkpoint there" in text


def test_a_section_of_ones_own(comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    (tmp_path / "own_package" / "extra.py").write_text(
        "from perennial.report.sections.base import Section\n"
        "class Extra(Section):\n"
        "    POSITION = 25\n"
        "    TITLE = 'Extra'\n"
        "    def render(self, comparison):\n"
        "        return f'<p>{len(comparison.rows)} rows</p>'\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    page = render(comparison, sections=["own_package.extra"])
    assert page.index('id="results"') < page.index('id="own_package-extra"') < page.index('id="changes"')
    assert "<p>5 rows</p>" in page


def test_writing(comparison: Comparison, page: str, tmp_path: Path) -> None:
    out = write_report(comparison, tmp_path / "new folder" / "report.html")
    assert out.read_text(encoding="utf-8") == page
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="is a folder"):
        write_report(comparison, tmp_path)


@pytest.mark.parametrize("name", plugins.names("sections"))
def test_contract_of_every_section(name: str, comparison: Comparison) -> None:
    component = plugins.load("sections", name)
    positions = [plugins.load("sections", other).POSITION for other in plugins.names("sections")]
    assert len(positions) == len(set(positions))
    for example in component.EXAMPLES:
        section, problems = plugins.build("sections", {"name": name, **example})
        assert not problems
        assert section.render(comparison) == section.render(comparison)
