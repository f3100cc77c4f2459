"""Generation against transformers, and what the settings promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.model.cache import KeyValueCache
from perennial.model.generation import generate, stop_ids
from perennial.model.huggingface import load_model
from perennial.model.transformer import Transformer
from tests.model.models import VARIANTS, tiny_model
from tests.model.test_families import CONTEXT, made_by_transformers

CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in plugins.names("families")),
    ("mistral", {"sliding_window": 9}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
]


@pytest.mark.filterwarnings("ignore")  # transformers has remarks on odd settings
@pytest.mark.parametrize(("family", "entries"), CASES)
def test_greedy_is_what_transformers_generates(family: str, entries: dict[str, Any], tmp_path: Path) -> None:
    theirs = made_by_transformers(family, entries)
    theirs.save_pretrained(tmp_path)
    prompt, length = [5, 17, 80, 2, 33], 40
    inputs = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)[0, len(prompt) :].tolist()
    assert list(generate(load_model(tmp_path), prompt, tokens=length)) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_in_pieces_is_reading_at_once(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    inputs = torch.randint(0, 97, (3, 80))
    with torch.no_grad():
        cache = KeyValueCache(model.config.layers, 80)
        pieces = [model(part, cache=cache) for part in inputs.split([37, 1, 1, 41], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(inputs), atol=1e-5, rtol=1e-4)
    assert cache.length == 80


def test_through_transformers_it_is_the_same_function(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = transformers.OPTConfig(vocab_size=97, max_position_embeddings=CONTEXT, word_embed_proj_dim=32, **sizes)
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).eval().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = torch.tensor([[5, 17, 80, 2, 33]])
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)[0, 5:].tolist()
    ours = load_model(tmp_path)
    assert not isinstance(ours, Transformer)
    assert list(generate(ours, inputs[0].tolist(), tokens=20)) == expected


def test_draws_follow_the_probabilities() -> None:
    """Chi-square of 2000 first tokens against the softmax at a temperature, over the 9 likeliest; 99.9% limit."""
    model, prompt = tiny_model(), [3, 4]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt])))[0, -1]
    shares, order = torch.softmax(logits / 0.5, -1).sort(descending=True)
    drawn = [next(generate(model, prompt, tokens=1, temperature=0.5, seed=seed)) for seed in range(2000)]
    counts = torch.tensor([drawn.count(int(token)) for token in order[:9]])
    counts = torch.cat((counts, torch.tensor([2000 - int(counts.sum())])))
    expected = 2000 * torch.cat((shares[:9], 1 - shares[:9].sum(0, keepdim=True)))
    assert float(((counts - expected).square() / expected).sum()) < 27.9


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    model, prompt = tiny_model(), [3, 4]
    with torch.no_grad():
        shares, order = torch.softmax(model.logits(model(torch.tensor([prompt])))[0, -1], -1).sort(descending=True)
    top_p = float(shares[:4].sum()) - 1e-4  # three are not enough
    drawn = {next(generate(model, prompt, tokens=1, temperature=1, top_p=top_p, seed=seed)) for seed in range(200)}
    assert drawn == {int(token) for token in order[:4]}
    only = {next(generate(model, prompt, tokens=1, temperature=1, top_p=1e-9, seed=seed)) for seed in range(20)}
    assert only == {int(order[0])}


def test_a_seed_draws_the_same_whatever_else_drew() -> None:
    model = tiny_model()
    one = list(generate(model, [1], tokens=20, temperature=1, seed=7))
    torch.rand(5)
    assert one == list(generate(model, [1], tokens=20, temperature=1, seed=7))
    assert one != list(generate(model, [1], tokens=20, temperature=1, seed=8))


def test_it_stops_at_an_end_token_and_at_the_context(tmp_path: Path) -> None:
    model = tiny_model(context=12)
    made = list(generate(model, [1, 2], tokens=100))
    assert len(made) == 10
    first = made.index(made[4])
    assert list(generate(model, [1, 2], tokens=100, stop={made[4]})) == made[:first]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert stop_ids(tmp_path) == {3}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert stop_ids(tmp_path) == {3, 5}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokens": 0}, "tokens 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [1] * 12}, "the model's context is 12"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], named: str) -> None:
    given = {"prompt": [1], "tokens": 5, **settings}
    with pytest.raises(UserError, match=named):
        next(generate(tiny_model(context=12), given.pop("prompt"), **given))
