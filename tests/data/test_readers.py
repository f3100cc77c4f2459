"""Documents, splits, filters, and every reader: what they give, where they resume, what they say about bad files."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.data import sources
from perennial.data.documents import Document, Fields, Position, content_digest, cut, is_blank
from perennial.data.readers import jsonl, text
from perennial.data.readers.base import Reader
from perennial.data.sources import Place, documents, survey
from perennial.data.splits import TRAIN, VALIDATION, split_of

RECORDS = [
    {"text": "first", "id": "a", "year": 1900},
    {"text": "zweite \u00e4\u00f6\u00fc \u4f60\u597d\nline", "id": "b"},
    {"text": "", "id": "c", "year": None},
    {"text": "fourth\r\n\x00end", "id": 4, "year": 2000},
]
FIELDS = Fields("text", "id", ("year",))


def write_gzip(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data))


def write_zstd(path: Path, data: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)


def lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


WRITERS: dict[str, Callable[[Path, bytes], Any]] = {"": Path.write_bytes, ".gz": write_gzip, ".zst": write_zstd}


def build(name: str, **settings: Any) -> Reader:
    reader: Reader = plugins.load("readers", name)(**settings)
    return reader


def read(reader: Reader, path: Path, fields: Fields = FIELDS, start: Position | None = None) -> list[Any]:
    found = reader.read(path, path.name, fields, start) if start else reader.read(path, path.name, fields)
    return list(found)


def write_example(name: str, folder: Path) -> tuple[Path, Fields]:
    """A file with several records for each reader."""
    path = folder / {"jsonl": "file.jsonl", "parquet": "file.parquet", "text": "file.txt"}[name]
    if name == "jsonl":
        path.write_bytes(lines(RECORDS))
    elif name == "parquet":
        table = pa.table({"text": [r["text"] for r in RECORDS], "id": ["a", "b", "c", "4"], "year": [1, None, 2, 3]})
        pq.write_table(table, path, row_group_size=3)
    else:
        path.write_text("one paragraph\n\nanother one\n\nand the last of them", encoding="utf-8")
        return path, Fields()
    return path, FIELDS


# Documents


def test_digest_is_equal_for_copies_and_only_for_them() -> None:
    same = [b"a b\n c", b"a b\r\n c", b"a b\r c", b"\n a b\n c \n\n", b"\ta b\r\n c\r\n"]
    assert len({content_digest(utf8) for utf8 in same}) == 1
    others = [b"a b c", b"a  b\n c", b"a b\nc", b"A b\n c", b"a b\n c."]
    assert len({content_digest(utf8) for utf8 in [same[0], *others]}) == 1 + len(others)


def test_blank() -> None:
    assert is_blank("")
    assert is_blank(" \n\t\u3000")
    assert not is_blank(" . ")


def test_cut_loses_nothing_and_keeps_to_the_limit() -> None:
    generator = random.Random(1)
    alphabet = ["a", "word ", "\u00e4", "\u4f60", "\U0001f600", "\n", "\n\n", "\r\n\r\n", " "]
    for _ in range(300):
        content = "".join(generator.choices(alphabet, k=generator.randrange(1, 400)))
        limit = generator.randrange(8, 200)
        parts = cut(content, content.encode(), limit)
        assert "".join(parts) == content
        assert all(0 < len(part.encode()) <= limit for part in parts)


def test_cut_prefers_paragraphs_then_lines() -> None:
    content = "a" * 30 + "\n" + "b" * 30 + "\n\n" + "c" * 30 + "\n" + "d" * 30
    first, second = cut(content, content.encode(), 100)
    assert first.endswith("b\n\n")
    assert second.startswith("c")
    content = content.replace("\n\n", "\n")
    assert [part[-1] for part in cut(content, content.encode(), 70)][:-1] == ["\n"]
    assert cut("short", b"short", 5) == ["short"]


def test_split_depends_on_the_key_alone_and_grows_with_the_share() -> None:
    keys = [str(n).encode() for n in range(4000)]
    small = {key for key in keys if split_of(key, 0.05) == VALIDATION}
    large = {key for key in keys if split_of(key, 0.20) == VALIDATION}
    assert small < large
    assert 140 <= len(small) <= 260
    assert 700 <= len(large) <= 900
    assert split_of(b"x", 0.0) == TRAIN
    assert split_of(b"x", 1.0) == VALIDATION


# Readers


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_jsonl_gives_text_id_and_metadata(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.jsonl{suffix}"
    WRITERS[suffix](path, b"\xef\xbb\xbf" + lines(RECORDS[:2]) + b"\n  \r\n" + lines(RECORDS[2:]).rstrip(b"\n"))
    found = [document for document, _ in read(build("jsonl"), path)]
    assert [document.text for document in found] == [record["text"] for record in RECORDS]
    assert [document.id for document in found] == ["a", "b", "c", "4"]
    assert [document.metadata for document in found] == [{"year": 1900}, {}, {"year": None}, {"year": 2000}]
    assert [document.line for document in found] == [1, 2, 5, 6]
    assert read(build("jsonl"), path, Fields())[2][0].id == f"{path.name}:5"
    assert build("jsonl").fields(path) == ["text", "id", "year"]


def test_jsonl_lines_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 7)
    path = tmp_path / "file.jsonl"
    path.write_bytes(lines(RECORDS).replace(b"\n", b"\r\n"))
    assert [document.text for document, _ in read(build("jsonl"), path)] == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("name", ["jsonl", "parquet", "text"])
def test_reading_goes_on_from_every_position(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE_BYTES", 16)
    path, fields = write_example(name, tmp_path)
    everything = read(build(name), path, fields)
    assert len(everything) > 2
    assert everything[-1][1].consumed == path.stat().st_size
    for index, (_, position) in enumerate(everything):
        assert read(build(name), path, fields, position) == everything[index + 1 :]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_reading_goes_on(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.jsonl{suffix}"
    WRITERS[suffix](path, lines(RECORDS))
    everything = read(build("jsonl"), path)
    assert read(build("jsonl"), path, FIELDS, everything[1][1]) == everything[2:]


def broken_line(line: bytes) -> bytes:
    return lines(RECORDS[:2]) + line + b"\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"file\.jsonl:3: broken JSON: .* at position"),
        (b'{"text": "\\ud800"}', r"file\.jsonl:3: broken JSON"),
        (b'{"text": "caf\xe9", "id": 1}', r"file\.jsonl:3: not UTF-8: byte 0xe9 at position 14 of the line"),
        (b'["text"]', r"file\.jsonl:3: not a JSON object: the line is a list"),
        (b'{"txt": "x", "id": 1}', r"file\.jsonl:3: no field 'text' \(text_field\): .*'txt', 'id'.*Did you mean 'txt'"),
        (b'{"text": 7, "id": 1}', r"file\.jsonl:3: text is no string: field 'text' \(text_field\) is a number"),
        (b'{"text": null, "id": 1}', r"file\.jsonl:3: text is no string: .* is null"),
        (b'{"text": "x", "ids": 1}', r"file\.jsonl:3: no field 'id' \(id_field\)"),
    ],
)
def test_jsonl_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(broken_line(line))
    with pytest.raises(UserError, match=message):
        read(build("jsonl"), path)
    dropped = read(build("jsonl", broken="drop"), path)[2][0]
    assert dropped.problem
    assert dropped.text == ""
    assert dropped.line == 3
    assert not any(character.isdigit() for character in dropped.problem.replace("UTF-8", "")), "reasons are counted"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_cut_off_and_damaged_compressed_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.jsonl{suffix}"
    WRITERS[suffix](path, lines([{"text": f"document {n}"} for n in range(5000)]))
    whole = path.read_bytes()
    for content in (whole[:-3], whole[: len(whole) // 2], b"not compressed at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cut off or damaged"):
            read(build("jsonl"), path, Fields())


def test_jsonl_refuses_a_line_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"x" * (5 << 20))
    with pytest.raises(UserError, match="one JSON object a line"):
        read(build("jsonl"), path)


def test_parquet_gives_text_id_and_metadata(tmp_path: Path) -> None:
    path, fields = write_example("parquet", tmp_path)
    found = [document for document, _ in read(build("parquet"), path, fields)]
    assert [document.text for document in found] == [record["text"] for record in RECORDS]
    assert [document.id for document in found] == ["a", "b", "c", "4"]
    assert [document.metadata["year"] for document in found] == [1, None, 2, 3]
    assert build("parquet").fields(path) == ["text", "id", "year"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_parquet_string_types(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind)}), path)
    assert [document.text for document, _ in read(build("parquet"), path, Fields())] == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("txt", ["a"], r"no field 'text' \(text_field\): its fields are 'txt'. Did you mean 'txt'"),
        ("text", [1], r"field 'text' \(text_field\) holds int64, not strings"),
        ("text", ["a", None], r"file\.parquet:2: text is null"),
    ],
)
def test_parquet_bad_tables(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({column: values}), path)
    with pytest.raises(UserError, match=message):
        read(build("parquet"), path, Fields())


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())}), path)
    with pytest.raises(UserError, match=r"file\.parquet:2: not UTF-8: byte 0xe9 at position 4"):
        read(build("parquet"), path, Fields())
    assert [document.problem for document, _ in read(build("parquet", broken="drop"), path, Fields())] == [
        None,
        "not UTF-8",
    ]


def test_parquet_that_is_none_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(build("parquet"), path, Fields())
    with pytest.raises(UserError, match="no such file"):
        read(build("parquet"), tmp_path / "absent.parquet", Fields())


def test_text_file_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"\xef\xbb\xbfall of it\r\n\r\n\xc3\xa4")
    ((document, position),) = build("text").read(path, "folder/file.txt", Fields(metadata=("path", "folder")))
    assert document.text == "all of it\r\n\r\n\u00e4"
    assert document.id == "folder/file.txt"
    assert document.metadata == {"path": "folder/file.txt", "folder": "folder"}
    assert position.consumed == path.stat().st_size


def test_long_text_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PIECE_BYTES", 64)
    content = "\n\n".join("\u00e4\u4f60\U0001f600 paragraph " * 3 for _ in range(20))
    path = tmp_path / "file.txt"
    path.write_text(content, encoding="utf-8")
    found = [document for document, _ in read(build("text"), path, Fields())]
    assert "".join(document.text for document in found) == content
    assert max(len(document.text.encode()) for document in found) <= 64
    assert [document.id for document in found[:2]] == ["file.txt#0", "file.txt#1"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"na\xefve")
    with pytest.raises(UserError, match=r"file\.txt:1: not UTF-8: byte 0xef at offset 2"):
        read(build("text"), path, Fields())
    ((document, _),) = read(build("text", broken="drop"), path, Fields())
    assert document.problem == "not UTF-8"
    with pytest.raises(UserError, match="id_field 'id'"):
        read(build("text"), path, FIELDS)


# Inputs


def test_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.PY", "a/b/x.rst", ".hidden/h.txt", "__pycache__/p.py", ".h.txt", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [document.id for document, _ in documents(survey([tmp_path], "auto"), Fields())]
    assert found == ["a/b/x.rst", "a/y.PY", "a/z.md", "b.txt"]
    chosen = build("text", glob=["*.md", "a/b/*"])
    assert [document.id for document, _ in documents(survey([tmp_path], chosen), Fields())] == ["a/b/x.rst", "a/z.md"]


def test_stream_goes_on_from_every_place(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/one.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "folder/empty.jsonl").write_bytes(b"")
    (tmp_path / "two.jsonl").write_bytes(lines(RECORDS))
    inputs = survey([tmp_path / "folder", tmp_path / "two.jsonl"], "auto")
    everything = list(documents(inputs, FIELDS))
    assert len(everything) == 8
    for index, (_, place) in enumerate(everything):
        assert list(documents(inputs, FIELDS, place)) == everything[index + 1 :]
    assert everything[-1][1].done_bytes + everything[-1][1].position.consumed == sum(i.num_bytes for i in inputs)
    assert list(documents(inputs, FIELDS, Place(3))) == []


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "mixed/README.md").write_text("about")
    (tmp_path / "zero.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n")
    (tmp_path / "strange.xyz").write_text("text")
    for name, message in (
        ("absent", "no such file or folder"),
        ("empty", "the folder is empty"),
        ("mixed", r"several readers \(1 for 'jsonl', 1 for 'text'\)"),
        ("zero.jsonl", "is empty"),
        ("blank.jsonl", "no document in it"),
        ("strange.xyz", "does not say the format.*jsonl, parquet, text"),
    ):
        with pytest.raises(UserError, match=message):
            list(documents(survey([tmp_path / name], "auto"), Fields()))
    with pytest.raises(UserError, match="at least one"):
        survey([], "auto")
    with pytest.raises(UserError, match="no readers component 'jsonk'.*Did you mean 'jsonl'"):
        survey([tmp_path / "zero.jsonl"], "jsonk")
    assert len(list(documents(survey([tmp_path / "mixed"], "jsonl"), Fields()))) == 4
    assert len(list(documents(survey([tmp_path / "strange.xyz"], "text"), Fields()))) == 1


def test_misspelt_metadata_field_is_found_but_optional_ones_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(lines([{"text": "x"}, {"text": "x", "author": "A"}] * 3))
    inputs = survey([path], "auto")
    assert len(list(documents(inputs, Fields(metadata=("author",))))) == 6
    with pytest.raises(UserError, match=r"no field 'autor' \(metadata_fields\)"):
        list(documents(inputs, Fields(metadata=("autor", "author"))))
    monkeypatch.setattr(sources, "_METADATA_CHECK_DOCUMENTS", 1)
    with pytest.raises(UserError, match="author"):
        list(documents(inputs, Fields(metadata=("author",))))


def test_own_reader_by_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text("")
    (tmp_path / "own/reader.py").write_text(
        "from perennial.data.documents import FILE_START, Document, Position\n"
        "from perennial.data.readers.base import Reader\n"
        "class Shouting(Reader):\n"
        "    mark: str = '!'\n"
        "    def matches(self, relative):\n"
        "        return relative.endswith('.loud')\n"
        "    def fields(self, path):\n"
        "        return ['text']\n"
        "    def read(self, path, name, fields, start=FILE_START):\n"
        "        for n, line in enumerate(path.read_text().splitlines()):\n"
        "            if n >= start.records:\n"
        "                yield Document(line.upper() + self.mark, f'{name}:{n}', {}, '', n + 1), Position(n + 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "text.loud").write_text("one\ntwo\n")
    inputs = survey([tmp_path / "text.loud"], "own.reader")
    assert [document.text for document, _ in documents(inputs, Fields())] == ["ONE!", "TWO!"]


# Conformance of every reader and filter


@pytest.mark.parametrize("name", plugins.names("readers"))
def test_reader_contract(tmp_path: Path, name: str) -> None:
    component = plugins.load("readers", name)
    assert component.EXAMPLES
    path, fields = write_example(name, tmp_path)
    for example in component.EXAMPLES:
        reader, problems = plugins.build("readers", {"name": name, **example})
        assert not problems
        assert plugins.build("readers", plugins.dump(reader))[0] == reader
        once, again = (read(reader, path, fields) for _ in range(2))
        assert once == again
        assert all(isinstance(document, Document) for document, _ in once)
        consumed = [position.consumed for _, position in once]
        assert consumed == sorted(consumed)
        stream = reader.read(path, path.name, fields)
        next(stream)
        stream.close()  # type: ignore[attr-defined]


EDGE_TEXTS = [
    "",
    " ",
    "\n",
    "x",
    "x" * (1 << 20),
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\x00\x01\x1b[2J\x7f",
    "\ufeff",
    "\U0010ffff",
]


@pytest.mark.parametrize("name", plugins.names("filters"))
def test_filter_contract(name: str) -> None:
    component = plugins.load("filters", name)
    for index, example in enumerate(component.EXAMPLES):
        one, problems = plugins.build("filters", {"name": name, **example})
        assert not problems
        assert plugins.build("filters", plugins.dump(one))[0] == one
        for content in [*EDGE_TEXTS, *component.KEPT, *component.DROPPED]:
            document = Document(content, "id", {}, "file", 1)
            reason = one.reason(document)
            assert reason == one.reason(document)
            assert reason is None or (reason and not any(character.isdigit() for character in reason))
            if index == 0 and content in component.KEPT:
                assert reason is None
            if index == 0 and content in component.DROPPED:
                assert reason


def test_length_filter_that_would_do_nothing_is_refused() -> None:
    for settings, message in (({}, "keeps everything"), ({"min_bytes": 5, "max_bytes": 4}, "nothing would be kept")):
        _, problems = plugins.build("filters", {"name": "length", **settings})
        assert message in problems[0].message
