"""New tokens for tokenizers of every kind: what was there stays, old text is cut as promised, and text comes back."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from perennial.core.errors import UserError
from perennial.data.prepare import PrepareSettings, prepare
from perennial.data.tokenizers.engine import ReferenceEngine, first_difference, open_engine
from perennial.data.tokenizers.extend import Extension, TextReading, extend_tokenizer, measure_fertility
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.data.tokenizers.merging import Pairs, Words, pair_key
from perennial.data.tokenizers.vocabulary import BONUS, Vocabulary, widths
from tests.data import foreign_tokenizers as foreign
from tests.data.foreign_tokenizers import GERMAN_TEXTS, GREEK_TEXTS, KINDS, OLD_TEXTS

ADD = 40


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts old.jsonl, de.jsonl and el.jsonl, and one tokenizer folder of each kind."""
    root = tmp_path_factory.mktemp("extend")
    for name, texts in (("old", OLD_TEXTS), ("de", GERMAN_TEXTS), ("el", GREEK_TEXTS)):
        write_texts(root / f"{name}.jsonl", texts)
    for kind, make in KINDS.items():
        make(root / kind)
    return root


@pytest.fixture(scope="module")
def extensions(root: Path) -> dict[str, Extension]:
    """Every tokenizer with 40 German tokens."""
    opened = {kind: TokenizerFolder.open(root / kind) for kind in KINDS}
    return {kind: extend_tokenizer(folder, {"de": root / "de.jsonl"}, add=ADD) for kind, folder in opened.items()}


def loaded(content: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(content))


def both(extension: Extension) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer before and after."""
    return Tokenizer.from_file(str(extension.source.path / "tokenizer.json")), loaded(extension.content)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return encoded


# Merging


def test_pairs_are_joined_as_a_plain_loop_over_the_words_does() -> None:
    chance = random.Random(0)
    words = Counter(
        bytes(np.array([chance.randrange(4) for _ in range(chance.randint(1, 9))], np.int32)) for _ in range(300)
    )
    pairs = Pairs(Words.counted(words))
    plain = [[np.frombuffer(word, np.int32).tolist(), count] for word, count in sorted(words.items())]
    for product in range(4, 30):
        counts = Counter[int]()
        for tokens, count in plain:
            for left, right in itertools.pairwise(tokens):
                counts[pair_key(left, right)] += count
        assert pairs.counts == dict(counts)
        left, right = chance.choice(
            [divmod(key, 1 << 32) for key in sorted(counts)]
            if product % 2
            else [divmod(counts.most_common(1)[0][0], 1 << 32)]
        )
        formed = pairs.join(left, right, product)
        for entry in plain:
            entry[0] = joined(entry[0], left, right, product)
        assert all(product in divmod(key, 1 << 32) for key in formed if pairs.counts[key])


def joined(tokens: list[int], left: int, right: int, product: int) -> list[int]:
    result: list[int] = []
    place = 0
    while place < len(tokens):
        if tokens[place : place + 2] == [left, right]:
            result.append(product)
            place += 2
        else:
            result.append(tokens[place])
            place += 1
    return result


# What stays and what comes


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_follow_the_largest(kind: str, extensions: dict[str, Extension]) -> None:
    extension = extensions[kind]
    before, after = both(extension)
    size = extension.source.vocabulary_size
    assert [after.id_to_token(number) for number in range(size)] == [
        before.id_to_token(number) for number in range(size)
    ]
    assert [token.id for token in extension.tokens] == list(range(size, size + ADD))
    assert [after.token_to_id(token.spelling) for token in extension.tokens] == [token.id for token in extension.tokens]
    assert after.get_vocab_size() == size + ADD
    control = [token["content"] for token in extension.content["added_tokens"]]
    assert [ids(after, text) for text in control] == [ids(before, text) for text in control]


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_text_takes_fewer_tokens_and_comes_back(kind: str, extensions: dict[str, Extension]) -> None:
    extension = extensions[kind]
    before, after = both(extension)
    [(name, measured)] = extension.fertility.items()
    assert name.startswith("de (")
    assert measured.after < 0.7 * measured.before
    assert measured.num_words == sum(len(text.split()) for text in GERMAN_TEXTS)  # nothing is held out of so little
    assert measured.before == sum(len(ids(before, text)) for text in GERMAN_TEXTS)
    assert measured.after == sum(len(ids(after, text)) for text in GERMAN_TEXTS)
    for text in [*GERMAN_TEXTS, *OLD_TEXTS, *GREEK_TEXTS[:5]]:
        if before.decode(ids(before, text), skip_special_tokens=False) == text:
            assert after.decode(ids(after, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_cut_is_the_old_one_with_new_tokens_in_the_places_of_their_pieces(
    kind: str, extensions: dict[str, Extension]
) -> None:
    extension = extensions[kind]
    before, after = both(extension)
    pieces = {token.id: list(token.pieces) for token in extension.tokens}
    for text in [*GERMAN_TEXTS, *OLD_TEXTS, *GREEK_TEXTS[:5]]:
        old, new = ids(before, text), ids(after, text)
        expanded = [piece for number in new for piece in pieces.get(number, [number])]
        if kind.startswith("unigram"):  # of cuts that score the same, another may have been taken
            scores = [score for _, score in extension.content["model"]["vocab"]]
            assert sum(scores[i] for i in expanded) == pytest.approx(sum(scores[i] for i in old), rel=1e-12)
        else:
            assert expanded == old


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_old_cut_of_the_token(kind: str, extensions: dict[str, Extension]) -> None:
    extension = extensions[kind]
    model = both(extension)[0].model
    for token in extension.tokens:
        if not token.spelling.startswith("##"):
            assert tuple(piece.id for piece in model.tokenize(token.spelling)) == token.pieces


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_new_tokens_is_cut_as_before(kind: str, extensions: dict[str, Extension]) -> None:
    extension = extensions[kind]
    before, after = both(extension)
    spellings = [token.spelling for token in extension.tokens]
    words = [word for text in OLD_TEXTS for word in text.split()]
    # A word cut alone is spelled as in the vocabulary (with its mark), whatever the kind of the tokenizer.
    spelled = {
        word: "".join(before.encode(word, add_special_tokens=False).tokens).replace("##", "") for word in set(words)
    }
    untouched = [w for w in set(words) if not any(s.removeprefix("##") in spelled[w] for s in spellings)]
    assert len(untouched) > 100
    assert all(ids(after, word) == ids(before, word) for word in untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_text_is_cut_exactly_as_before(kind: str, root: Path, extensions: dict[str, Extension]) -> None:
    folder = TokenizerFolder.open(root / kind)
    keep = {"old": root / "old.jsonl"}
    extension = extend_tokenizer(folder, {"de": root / "de.jsonl"}, add=15, keep=keep)
    before, after = both(extension)
    for text in OLD_TEXTS:
        assert ids(after, text) == ids(before, text)
    assert extension.fertility["old (kept)"].recut_words == 0
    assert extension.fertility["old (kept)"].before == sum(len(ids(before, text)) for text in OLD_TEXTS)
    # Without `keep` the exception is real, and measured.
    free = measure_fertility(extensions[kind], {"old": OLD_TEXTS})["old"]
    _, freely = both(extensions[kind])
    recut = sum(len(ids(freely, text)) != len(ids(before, text)) for text in OLD_TEXTS)
    assert (free.recut_words > 0) == (recut > 0)


@pytest.mark.parametrize("kind", ["llama2", "gemma", "unigram_with_bytes"])
def test_characters_spelled_in_bytes_become_tokens(kind: str, root: Path) -> None:
    folder = TokenizerFolder.open(root / kind)
    extension = extend_tokenizer(folder, {"el": root / "el.jsonl"}, add=120)
    before, after = both(extension)
    letters = {token.spelling for token in extension.tokens if len(token.spelling) == 1}
    assert len(letters) > 15
    assert all(len(token.pieces) == 2 for token in extension.tokens if token.spelling in letters)
    assert any(len(token.spelling.removeprefix("\u2581")) > 2 for token in extension.tokens)
    [measured] = extension.fertility.values()
    assert measured.after < 0.5 * measured.before
    for text in OLD_TEXTS[:5]:  # no Greek in it, but other pairs may be joined
        assert not letters & set(text)
        assert after.decode(ids(after, text), skip_special_tokens=False) == before.decode(
            ids(before, text), skip_special_tokens=False
        )


def test_letters_are_not_joined_with_other_characters_where_only_spaces_tell_words_apart(
    extensions: dict[str, Extension],
) -> None:
    for kind in ("llama2", "gemma", "unigram", "unigram_with_bytes"):
        for token in extensions[kind].tokens:
            text = token.spelling.removeprefix("\u2581")
            assert text.isalpha() or not any(character.isalnum() for character in text)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_of_every_cut_of_a_text_add_up_to_the_same(
    kind: str, extensions: dict[str, Extension], tmp_path: Path
) -> None:
    extension = extensions[kind]
    extension.write(tmp_path / "new")
    before, after = both(extension)
    old = widths(Vocabulary.of(extension.source))
    new = widths(Vocabulary.of(TokenizerFolder.open(tmp_path / "new")))
    for text in GERMAN_TEXTS:
        assert old[ids(before, text)].sum() == new[ids(after, text)].sum()


def test_a_unigram_piece_beats_its_parts_by_the_bonus(extensions: dict[str, Extension]) -> None:
    vocabulary = extensions["unigram"].content["model"]["vocab"]
    for token in extensions["unigram"].tokens:
        won = vocabulary[token.id][1] - sum(vocabulary[piece][1] for piece in token.pieces)
        assert won == pytest.approx(BONUS * (len(token.pieces) - 1), rel=1e-6)


def test_scores_stay_above_the_old_ones_where_the_cost_of_unknown_characters_decides(
    root: Path, tmp_path: Path
) -> None:
    folder = foreign.unigram(tmp_path / "orphan")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    floor = min(score for _, score in content["model"]["vocab"])
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<mask>"]
    content["model"]["vocab"].append(["\u2581\u00fcber", floor])  # a piece with a character that is none itself
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Vocabulary.of(TokenizerFolder.open(folder)).has_orphans()
    extension = extend_tokenizer(TokenizerFolder.open(folder), {"de": root / "de.jsonl"}, add=5)
    assert min(score for _, score in extension.content["model"]["vocab"]) == floor
    content["added_tokens"] = [
        {**content["added_tokens"][0], "id": len(content["model"]["vocab"]), "content": "<mask>"}
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="would change what unknown characters cost"):
        extend_tokenizer(TokenizerFolder.open(folder), {"de": root / "de.jsonl"}, add=5)


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_opens_in_transformers_and_in_the_fast_engine(
    kind: str, extensions: dict[str, Extension], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    extension = extensions[kind]
    left_out = extension.write(tmp_path / "new")
    assert left_out == (["vocab.json", "merges.txt"] if kind == "gpt2" else [])
    folder = TokenizerFolder.open(tmp_path / "new")
    assert folder.vocabulary_size == extension.source.vocabulary_size + ADD
    assert folder.separator_id == extension.source.separator_id
    engine = open_engine(folder, [*GERMAN_TEXTS, *OLD_TEXTS])
    reference = ReferenceEngine(folder.for_encoding(), "for comparison")
    texts = [*GERMAN_TEXTS, *OLD_TEXTS]
    assert first_difference(engine.encode_batch(texts), reference.encode_batch(texts)) is None
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    _, after = both(extension)
    for text in texts:
        assert automatic.encode(text, add_special_tokens=False) == ids(after, text)
    assert automatic.eos_token_id == folder.separator_id


def test_the_same_input_gives_the_same_bytes(root: Path, extensions: dict[str, Extension], tmp_path: Path) -> None:
    extensions["qwen2"].write(tmp_path / "one")
    again = extend_tokenizer(TokenizerFolder.open(root / "qwen2"), {"de": root / "de.jsonl"}, add=ADD)
    again.write(tmp_path / "two")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


# Text


def test_some_text_is_held_out_and_a_sample_is_enough(root: Path, tmp_path: Path) -> None:
    text = " ".join(f"{word}{number % 7}" for number, word in enumerate(" ".join(GREEK_TEXTS).split() * 8))
    (tmp_path / "long.txt").write_text("\n".join(text[i : i + 200] for i in range(0, len(text), 200)), encoding="utf-8")
    folder = TokenizerFolder.open(root / "gpt2")
    seen: list[tuple[float, float, str]] = []
    extension = extend_tokenizer(
        folder,
        {"el": tmp_path / "long.txt"},
        add=30,
        reading=TextReading(sample_bytes=len(text.encode()) // 2),
        progress=lambda done, total, what: seen.append((done, total, what)),
    )
    [(name, measured)] = extension.fertility.items()
    assert name == "el (held out)"
    assert 0 < measured.num_bytes < 0.2 * len(text.encode())
    assert any("merging" in what for _, _, what in seen)
    assert all(done <= total for done, total, _ in seen)


def test_prepared_corpora_are_read_too(root: Path, tmp_path: Path) -> None:
    settings = {"name": "de", "inputs": [str(root / "el.jsonl")], "tokenizer": str(root / "qwen2"), "validation": "10%"}
    prepare(PrepareSettings.model_validate(settings), tmp_path / "de")
    extension = extend_tokenizer(TokenizerFolder.open(root / "qwen2"), {"el": tmp_path / "de"}, add=20)
    assert next(iter(extension.fertility.values())).after < 1_000_000
    assert all(token.spelling.isascii() is False for token in extension.tokens[:5])


# What cannot be


@pytest.mark.parametrize("number", [0, -3])
def test_nothing_to_add_is_an_error(number: int, root: Path) -> None:
    with pytest.raises(UserError, match=f"--add {number}: at least 1"):
        extend_tokenizer(TokenizerFolder.open(root / "gpt2"), {"de": root / "de.jsonl"}, add=number)


def test_more_than_can_be_found_is_an_error_that_says_how_many(root: Path) -> None:
    with pytest.raises(UserError, match=r"--add 100000: .* gives only (\d+) tokens .* lower it to \1"):
        extend_tokenizer(TokenizerFolder.open(root / "gpt2"), {"de": root / "de.jsonl"}, add=100000)


def test_other_kinds_of_tokenizers_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    folder = TokenizerFolder.open(foreign.wordpiece(tmp_path / "wordpiece"))
    with pytest.raises(UserError, match="a WordPiece tokenizer cannot be extended; BPE and Unigram"):
        extend_tokenizer(folder, {"de": root / "de.jsonl"}, add=5)


def test_a_tokenizer_that_cuts_at_random_is_refused(root: Path, tmp_path: Path) -> None:
    path = foreign.gpt2(tmp_path / "random")
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.1
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="dropout of 0.1"):
        extend_tokenizer(TokenizerFolder.open(path), {"de": root / "de.jsonl"}, add=5)


def test_a_gap_in_a_unigram_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    path = foreign.unigram(tmp_path / "gap")
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][-1]["id"] += 3
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="belong to no token, and a Unigram vocabulary can have no gap"):
        extend_tokenizer(TokenizerFolder.open(path), {"de": root / "de.jsonl"}, add=5)


def test_text_without_content_is_refused(root: Path, tmp_path: Path) -> None:
    empty = write_texts(tmp_path / "empty.jsonl", ["", "  \n"])
    with pytest.raises(UserError, match=r"--data de=.*: there is no text in it"):
        extend_tokenizer(TokenizerFolder.open(root / "gpt2"), {"de": empty}, add=5)
    with pytest.raises(UserError, match=r"--keep en=.*: there is no text in it"):
        extend_tokenizer(TokenizerFolder.open(root / "gpt2"), {"de": root / "de.jsonl"}, add=5, keep={"en": empty})
