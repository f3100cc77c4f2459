"""Every native family against transformers: the same function, the same files, the same training.

The models are tiny and random, made by transformers itself, with every option of a family's configuration alone and in
pairs. Tolerances: logits of about 2 in size, fp32 1e-5; bf16 1e-1, and no more than 1.5 times what
transformers' own rounding costs; losses after training 1e-4.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.model.config import ModelConfig
from perennial.model.families.base import Entries
from perennial.model.folder_config import read_config
from perennial.model.huggingface import load_model, save_model
from perennial.model.transformer import Transformer
from perennial.objectives.next_token import NextToken
from perennial.optimizers.adamw import AdamW
from perennial.train.feeding import TorchBatch

transformers = pytest.importorskip("transformers")

FAMILIES = plugins.names("families")
CONTEXT = 64
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
LLAMA_SIZES = {**SIZES["gpt_neox"], "num_key_value_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


def options(family: str) -> list[dict[str, Any]]:
    """No option, each alone, and each two that can stand together."""
    alone = plugins.load("families", family).EXAMPLES
    pairs = [{**a, **b} for a, b in itertools.combinations(alone, 2) if not a.keys() & b.keys()]
    return [{}, *alone, *pairs]


def made_by_transformers(family: str, entries: dict[str, Any], seed: int = 0) -> Any:
    """A model with drawn weights, none of them 0 or 1, so that a forgotten or exchanged one shows."""
    sizes = {"vocab_size": 97, "max_position_embeddings": CONTEXT, **SIZES.get(family, LLAMA_SIZES), **IDS, **entries}
    if family == "gpt2":
        del sizes["max_position_embeddings"]
        sizes |= NO_DROPOUT
    config = transformers.CONFIG_MAPPING[family](**sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, plugins.load("families", family).architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def is_dynamic(entries: dict[str, Any]) -> bool:
    return entries.get("rope_parameters", {}).get("rope_type") == "dynamic"


@pytest.mark.filterwarnings("ignore")  # transformers has remarks on odd settings
@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_gives_the_same_logits_and_the_same_files(family: str, tmp_path: Path) -> None:
    for number, entries in enumerate(options(family)):
        theirs = made_by_transformers(family, entries)
        folder, back = tmp_path / f"{number}", tmp_path / f"{number}-back"
        theirs.save_pretrained(folder, max_shard_size="30KB")
        found = read_config(folder)
        assert not found.why_not_native, (entries, found.why_not_native)
        ours = load_model(folder)
        assert isinstance(ours, Transformer)
        # beyond the original context, where dynamic scaling begins
        inputs = torch.randint(0, 97, (2, 100 if is_dynamic(entries) else CONTEXT))
        with torch.no_grad():
            difference = (ours.logits(ours(inputs)) - theirs(inputs).logits).abs().max()
        assert difference < 1e-5, (entries, float(difference))
        save_model(ours, back, max_shard_bytes=30_000)
        before, after = tensors(folder), tensors(back)
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), (entries, name)
        assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Stored in 16 bits, read into 32 for training and written back: every byte is the same."""
    theirs = made_by_transformers(family, {}).to(dtype)
    theirs.save_pretrained(tmp_path / "in")
    save_model(load_model(tmp_path / "in"), tmp_path / "out")
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert {name: (t.dtype, t.view(torch.int16).numpy().tobytes()) for name, t in before.items()} == {
        name: (t.dtype, t.view(torch.int16).numpy().tobytes()) for name, t in after.items()
    }
    if dtype == torch.bfloat16:
        ours, exact = load_model(tmp_path / "in", dtype=dtype), load_model(tmp_path / "in")
        inputs = torch.randint(0, 97, (2, CONTEXT))
        with torch.no_grad():
            wanted = exact.logits(exact(inputs))
            our_error = (ours.logits(ours(inputs)).float() - wanted).abs().max()
            their_error = (theirs(inputs).logits.float() - wanted).abs().max()
        assert our_error < min(1e-1, 1.5 * their_error), (our_error, their_error)


def trained(model: Any, loss: Any, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The losses of some updates."""
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        value = loss(model, inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def their_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, targets.flatten())


def our_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return NextToken().loss(model, TorchBatch(inputs, targets, None)).total / targets.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_five_updates_give_the_same_losses_and_weights(family: str, tmp_path: Path) -> None:
    """AdamW at a rate that changes the loss a lot, on the same batch, with and without our code."""
    theirs = made_by_transformers(family, {}).train()
    theirs.save_pretrained(tmp_path / "in")
    ours = load_model(tmp_path / "in").train()
    rows = torch.randint(0, 97, (4, CONTEXT + 1))
    batches = [(rows[:, :-1], rows[:, 1:])] * 5  # one batch again and again: the loss falls fast
    plain = {"lr": 1e-2, "weight_decay": 0.0}
    expected = trained(theirs, their_loss, torch.optim.AdamW(theirs.parameters(), **plain), batches)
    found = trained(ours, our_loss, torch.optim.AdamW(ours.parameters(), **plain), batches)
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-4
    assert abs(expected[0] - expected[-1]) > 0.1
    save_model(ours, tmp_path / "out")
    theirs.save_pretrained(tmp_path / "theirs")
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "out")
    for name in before:
        if not name.endswith("bias"):  # those of keys change no score, so AdamW follows the rounding of their gradient
            torch.testing.assert_close(after[name], before[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_updates_train_every_parameter(family: str, tmp_path: Path) -> None:
    from perennial.optimizers.base import set_rate

    made_by_transformers(family, {}).save_pretrained(tmp_path)
    model = load_model(tmp_path).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW().build(model.named_parameters(), model.role_of)
    inputs, targets = torch.randint(0, 97, (2, 4, CONTEXT))
    our_loss(model, inputs, targets).backward()
    set_rate(optimizer, 1e-2)
    optimizer.step()
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    # A bias on all keys adds the same to all scores of a query, so its gradient is rounding; but it is not exactly 0.
    assert unchanged == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_leaves_out_is_what_transformers_assumes(family: str, tmp_path: Path) -> None:
    """A config.json with sizes alone and one written in full give the same fields."""
    sizes = {"vocab_size": 97, **SIZES.get(family, {**LLAMA_SIZES, "num_key_value_heads": 4})}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    full = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    settings = plugins.load("families", family)()
    short, long = (settings.read(Entries(entries, settings.defaults)) for entries in ({**sizes}, full))
    assert short == {**long, "context": short["context"]}
    assert short["context"] in (full.get("max_position_embeddings"), full.get("n_positions"))


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_first_gpt2_folders_leave_out_a_prefix_and_store_masks(prefixed: bool, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = made_by_transformers("gpt2", {})
    theirs.save_pretrained(tmp_path / "in")
    stored = tensors(tmp_path / "in")
    if not prefixed:
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    stored["transformer.h.0.attn.bias" if prefixed else "h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    save_file(stored, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    ours = load_model(tmp_path / "in")
    inputs = torch.randint(0, 97, (2, CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(inputs)), theirs(inputs).logits, atol=1e-5, rtol=0)
    save_model(ours, tmp_path / "out")
    back = tensors(tmp_path / "out")
    assert stored.keys() - back.keys() == {"transformer.h.0.attn.bias" if prefixed else "h.0.attn.bias"}
    assert back.keys() <= stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in back)


def test_a_tied_head_that_was_stored_is_stored_again(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made_by_transformers("llama", {"tie_word_embeddings": True}).save_pretrained(tmp_path / "in")
    stored = tensors(tmp_path / "in")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    save_model(load_model(tmp_path / "in"), tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == stored.keys()
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], stored["lm_head.weight"])


def test_an_original_context_beside_the_rotary_settings_counts(tmp_path: Path) -> None:
    """transformers gives the entry outside of rope_parameters priority."""
    rotary = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rotary |= {"original_max_position_embeddings": 32, "rope_theta": 500.0}
    made_by_transformers("llama", {"rope_parameters": rotary}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "original_max_position_embeddings": 16}))
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
    inputs = torch.randint(0, 97, (2, CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(inputs)), theirs(inputs).logits, atol=1e-5, rtol=0)


def test_a_changed_vocabulary_changes_one_entry(tmp_path: Path) -> None:
    """What a model has in common with the folder it came from stays as that folder says it."""
    made_by_transformers("gpt_neox", {}).save_pretrained(tmp_path / "in")
    model = load_model(tmp_path / "in")
    wider = Transformer(model.config.model_copy(update={"vocabulary_size": 128}))
    wider.source = model.source
    save_model(wider, tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert after == {**before, "vocab_size": 128}


def test_a_configuration_that_a_folder_could_not_say_is_refused() -> None:
    sizes = {"width": 64, "heads": 4, "layers": 2, "mlp_width": 96, "vocabulary_size": 97}
    with pytest.raises(ValueError, match="a folder of family 'llama' cannot say so"):
        ModelConfig(**sizes, parallel_residual=True)
    with pytest.raises(ValueError, match=r"no families component 'lama'.*Did you mean 'llama'"):
        ModelConfig(**sizes, family="lama")
    assert ModelConfig(**sizes, qk_norm="head").family == "qwen3"


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    made_by_transformers("llama", {}).half().save_pretrained(tmp_path / "in")
    model = load_model(tmp_path / "in")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    with pytest.raises(UserError, match=r"model\.norm\.weight.*float16"):
        save_model(model, tmp_path / "out")
