"""New rows: their number, what each way of filling them gives, and that nothing else of the model changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perennial.core.errors import UserError
from perennial.data.tokenizers.extend import Extension, NewToken, extend_tokenizer
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.huggingface import load_model, save_model
from perennial.model.transformer import Transformer
from perennial.surgery.vocabulary import (
    EMBEDDING,
    HEAD,
    INITS,
    Context,
    Occurrence,
    check_init,
    find_contexts,
    padded_rows,
    padding_multiple,
    to_first,
    to_last,
    with_new_rows,
    with_new_rows_in_state,
)
from tests.data import foreign_tokenizers as foreign
from tests.model.models import VARIANTS, tiny_model

TOKENS = [NewToken("ab", 90, (3, 4)), NewToken("abc", 91, (3, 4, 5)), NewToken("abcd", 92, (3, 4, 5, 6))]
"""The tiny models have 97 rows: as if the tokenizer had 90 ids."""


def tables(model: Transformer) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n in (EMBEDDING, HEAD)}


def contexts(length: int = 24, rows: int = 40) -> list[Context]:
    chance = np.random.default_rng(0)
    return [
        Context(ids, (Occurrence(0, 5, 7), Occurrence(1, 9, 12))) for ids in chance.integers(0, 90, size=(rows, length))
    ]


# Sizes


def test_the_multiple_of_rows_is_kept_and_spare_rows_are_used_first() -> None:
    assert [padding_multiple(rows) for rows in (50257, 151936, 32000, 4096, 65536, 98)] == [1, 128, 256, 512, 512, 2]
    assert padded_rows(4096, 8096) == (8192, 512)
    assert padded_rows(50257, 54257) == (54257, 1)
    assert padded_rows(151936, 151700) == (151936, 128)
    assert padded_rows(151936, 155646) == (155648, 128)
    assert padded_rows(50257, 54257, pad_to=64) == (54272, 64)
    assert padded_rows(100, 60, pad_to=64) == (128, 64)
    with pytest.raises(UserError, match="--pad-to 0: at least 1"):
        padded_rows(100, 60, pad_to=0)


def test_weights_by_position_double_towards_one_end() -> None:
    assert to_last(3) == [1 / 7, 2 / 7, 4 / 7]
    assert to_first(3) == [4 / 7, 2 / 7, 1 / 7]
    assert to_last(1) == [1.0]


def test_an_unknown_init_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--init 'meen': choose mean, .* Did you mean 'mean'"):
        check_init("meen")


# What stays


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_other_weight_and_every_old_row_stays_to_the_bit(variant: str, init: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grown = with_new_rows(model, TOKENS, rows=112, init=init, contexts=contexts())
    assert grown.config.vocabulary_size == 112
    assert grown.config.model_copy(update={"vocabulary_size": 97}) == model.config
    for name, parameter in grown.named_parameters():
        if name in (EMBEDDING, HEAD):
            assert parameter.shape == (112, 64)
            assert torch.equal(parameter[:90], before[name][:90])
            assert torch.equal(parameter[93:97], before[name][93:97])
            assert torch.isfinite(parameter).all()
        else:
            assert torch.equal(parameter, before[name])
    assert grown.training == model.training
    ids = torch.randint(90, (2, 20))
    assert torch.equal(grown(ids), model(ids))
    torch.testing.assert_close(
        grown.logits(grown(ids))[..., :90], model.logits(model(ids))[..., :90], rtol=0, atol=1e-5
    )


def test_a_folder_keeps_the_type_and_bytes_of_what_is_stored(tmp_path: Path) -> None:
    for variant in ("llama", "gpt2", "gpt_neox"):
        save_model(tiny_model(**VARIANTS[variant]), tmp_path / variant, dtype=torch.bfloat16)
        model = load_model(tmp_path / variant)
        assert isinstance(model, Transformer)
        save_model(with_new_rows(model, TOKENS, rows=104, init="mean"), tmp_path / f"{variant} new")
        config = [json.loads((tmp_path / f"{variant}{kind}/config.json").read_text()) for kind in ("", " new")]
        assert {key for key in config[0] if config[0][key] != config[1][key]} == {"vocab_size"}
        assert config[1]["vocab_size"] == 104
        before, after = (load_tensors(tmp_path / f"{variant}{kind}") for kind in ("", " new"))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype == torch.bfloat16
            kept = after[name][:90] if len(after[name]) == 104 and tensor.ndim == 2 else after[name]
            assert torch.equal(kept, tensor[: len(kept)])


def load_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# What new rows start as


@pytest.mark.parametrize("tied", [False, True])
def test_mean_is_the_mean_of_the_pieces(tied: bool) -> None:
    model = tiny_model(tied_embeddings=tied)
    grown = tables(with_new_rows(model, TOKENS, rows=97, init="mean"))
    assert grown.keys() == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    for name, table in tables(model).items():
        for token in TOKENS:
            torch.testing.assert_close(grown[name][token.id], table[list(token.pieces)].mean(0))


def test_position_leans_to_the_last_piece_in_and_to_the_first_out() -> None:
    model = tiny_model()
    grown, old = tables(with_new_rows(model, TOKENS, rows=97, init="position")), tables(model)
    torch.testing.assert_close(grown[EMBEDDING][90], old[EMBEDDING][3] / 3 + old[EMBEDDING][4] * 2 / 3)
    torch.testing.assert_close(grown[HEAD][90], old[HEAD][3] * 2 / 3 + old[HEAD][4] / 3)
    tied = tiny_model(tied_embeddings=True)
    [shared], [table] = tables(with_new_rows(tied, TOKENS, rows=97, init="position")).values(), tables(tied).values()
    torch.testing.assert_close(shared[91], table[3] * 5 / 14 + table[4] * 4 / 14 + table[5] * 5 / 14)


def test_zero_mean_and_padding_have_the_spread_of_the_old_rows_and_hang_on_the_seed() -> None:
    model = tiny_model()
    tokens = [NewToken(str(i), 90 + i, (i % 7, i % 5)) for i in range(400)]
    one, again, other = (tables(with_new_rows(model, tokens, rows=640, init="zero_mean", seed=s)) for s in (1, 1, 2))
    for name, table in tables(model).items():
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name][90:490], other[name][90:490])
        for rows in (one[name][90:490], one[name][490:]):
            assert float(rows.mean()) == pytest.approx(0, abs=0.1 * float(table.std()))
            assert float(rows.std()) == pytest.approx(float(table[:90].std()), rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_contexts_use_what_the_model_makes_of_the_text(tied: bool) -> None:
    model = tiny_model(tied_embeddings=tied)
    seen: list[str] = []
    grown = tables(
        with_new_rows(
            model,
            TOKENS,
            rows=97,
            init="contexts",
            contexts=contexts(),
            progress=lambda done, total, what: seen.append(f"{done}/{total}"),
        )
    )
    means = tables(with_new_rows(model, TOKENS, rows=97, init="mean"))
    assert seen[-1] == "40/40"
    for name, table in grown.items():
        assert torch.equal(table[92], means[name][92])  # it stood in no context
        assert not torch.allclose(table[90], means[name][90])
        # What there is to learn from random text is the mean row, and half of the row is the mean of the pieces.
    if not tied:
        old = tables(model)[EMBEDDING][:90].norm(dim=1).mean()
        torch.testing.assert_close(grown[EMBEDDING][90:92].norm(dim=1), old.expand(2))
    alone = tables(with_new_rows(model, TOKENS, rows=97, init="contexts"))
    assert all(torch.equal(alone[name], means[name]) for name in means)


def test_the_map_of_contexts_finds_rows_that_predict_the_token() -> None:
    """Old tokens 0..29 follow states of one kind each; a new token that follows the same states gets their row."""
    torch.manual_seed(0)
    from perennial.surgery.vocabulary import _mapped, _Pooled

    states, truth = torch.randn(90, 64), torch.randn(64, 64) * 0.1
    rows = states @ truth + 0.5
    new = torch.randn(3, 64)
    pooled = _Pooled(new, new, torch.ones(3), states, torch.full((90,), 20.0))
    found = _mapped(pooled, rows)
    expected = new @ truth + 0.5
    similarity = torch.nn.functional.cosine_similarity(found - rows.mean(0), expected - rows.mean(0))
    assert (similarity > 0.7).all()


def test_contexts_are_found_where_the_pieces_stand(tmp_path: Path) -> None:
    for kind in ("qwen2", "llama2", "unigram_with_bytes"):
        extension = german(kind, tmp_path)
        found = find_contexts(extension, foreign.GERMAN_TEXTS * 3, length=50, per_token=4)
        pieces = [token.pieces for token in extension.tokens]
        counts = np.zeros(len(pieces), int)
        for context in found:
            assert len(context.ids) <= 50
            for token, first, stop in context.found:
                assert first > 0
                assert tuple(context.ids[first:stop]) == pieces[token]
                counts[token] += 1
        assert counts.max() == 4
        assert (counts > 0).mean() > 0.4  # others are only parts of longer new tokens


def german(kind: str, folder: Path) -> Extension:
    text = folder / "de.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in foreign.GERMAN_TEXTS), encoding="utf-8")
    tokenizer = TokenizerFolder.open(foreign.KINDS[kind](folder / kind))
    return extend_tokenizer(tokenizer, {"de": text}, add=40)


# The optimizer's state


def test_moments_of_new_rows_are_zero_and_all_else_stays() -> None:
    state: dict[str, Any] = {
        f"{EMBEDDING}.exp_avg": torch.randn(97, 4),
        f"{EMBEDDING}.step": torch.tensor(7.0),
        f"{HEAD}.exp_avg_sq": torch.rand(97, 4),
        "model.norm.weight.exp_avg": torch.randn(97),
    }
    grown = with_new_rows_in_state(state, first=90, added=10, rows=(97, 104))
    assert grown.keys() == state.keys()
    for key in (f"{EMBEDDING}.exp_avg", f"{HEAD}.exp_avg_sq"):
        assert grown[key].shape == (104, 4)
        assert torch.equal(grown[key][:90], state[key][:90])
        assert not grown[key][90:].any()
    assert grown[f"{EMBEDDING}.step"] == 7
    assert torch.equal(grown["model.norm.weight.exp_avg"], state["model.norm.weight.exp_avg"])
