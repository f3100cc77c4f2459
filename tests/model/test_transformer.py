"""The network against explicit formulas, and what training relies on."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perennial.core.errors import UserError
from perennial.model import blocks
from perennial.model.attention import attention, attention_mask
from perennial.model.config import ModelConfig
from perennial.model.operations import layer_norm, rms_norm, rotate
from perennial.model.roles import role_of
from perennial.model.rope import rotary_table
from perennial.model.transformer import Transformer, initialise
from tests.model.models import VARIANTS, tiny_config, tiny_model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length))


# Parts


def test_rms_norm_is_its_formula() -> None:
    x, weight = torch.randn(3, 5, 8), torch.randn(8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=1e-6, rtol=1e-5)


def test_layer_norm_is_its_formula() -> None:
    x, weight, bias = torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), expected, atol=1e-6, rtol=1e-5)


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    turned = rotate(x, rotary_table(tiny_config(heads=8), 7, x))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(7)[:, None] * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), atol=1e-12, rtol=0)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
    """Softmax over every allowed pair, one query head at a time."""
    length, shared_by = q.shape[1], q.shape[2] // k.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // shared_by].transpose(1, 2) / math.sqrt(q.shape[3])
        heads.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v[:, :, head // shared_by])
    return torch.stack(heads, 2)


@pytest.mark.parametrize("length", [1, 100, 300, 600])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_formula(length: int, kv_heads: int, masked: bool) -> None:
    q = torch.randn(2, length, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, length, kv_heads, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    segments = torch.cumsum(torch.rand(2, length) < 0.05, 1, dtype=torch.int32) if masked else None
    found, wanted = attention(q, k, v, attention_mask(length, segments, None)), explicit_attention(q, k, v, segments)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    direction = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, (q, k, v), direction) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_first_and_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences in fp64, with several blocks, with attention weights kept and computed again."""
    monkeypatch.setattr(blocks, "BLOCK", 2)

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight = double(2, 3, 4), double(4)
    table = rotary_table(tiny_config(heads=16, rope_theta=100.0), 3, x)
    q, k, v = double(2, 3, 2, 2), double(2, 3, 1, 2), double(2, 3, 1, 2)
    mask = attention_mask(3, torch.tensor([[0, 0, 1], [0, 1, 1]]), None)
    cases = [
        (lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight)),
        (lambda x: rotate(x[:, :, None], table), (x,)),
        (lambda q, k, v: attention(q, k, v, None), (q, k, v)),
        (lambda q, k, v: attention(q, k, v, mask), (q, k, v)),
    ]
    for keep_up_to in (blocks.KEEP_UP_TO, 0):
        monkeypatch.setattr(blocks, "KEEP_UP_TO", keep_up_to)
        for function, arguments in cases:
            assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_gradients_per_row() -> None:
    """torch.func sees through the CPU functions: the mean of the rows' gradients is the batch's."""
    model = tiny_model(qk_norm="head", kv_heads=2)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    inputs = tokens(3, 10)

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (row[None],)).square().mean()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, inputs)
    model(inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(per_row[name].mean(0), parameter.grad, atol=1e-6, rtol=1e-4)


# The whole


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "gpt2"])  # its positions are absolute
def test_a_document_is_read_as_if_it_were_alone(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    inputs = tokens(2, 200)
    segments = torch.stack((torch.arange(200) >= 90, torch.arange(200) >= 130)).int()
    with torch.no_grad():
        together = model.logits(model(inputs, segments))
        for row, start in enumerate((90, 130)):
            alone = model.logits(model(inputs[row : row + 1, start:]))
            torch.testing.assert_close(together[row : row + 1, start:], alone, atol=1e-5, rtol=1e-4)
            first = model.logits(model(inputs[row : row + 1, :start]))
            torch.testing.assert_close(together[row : row + 1, :start], first, atol=1e-5, rtol=1e-4)


def test_one_document_is_no_mask() -> None:
    model, inputs = tiny_model(), tokens(2, 150)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs, torch.ones_like(inputs)), model(inputs), atol=1e-6, rtol=0)


def test_the_future_is_not_seen() -> None:
    model, inputs = tiny_model(), tokens(1, 150)
    changed = inputs.clone()
    changed[0, 140] = (changed[0, 140] + 1) % 97
    with torch.no_grad():
        before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :140], after[:, :140])
    assert not torch.equal(before[:, 140:], after[:, 140:])


def loss_and_gradients(model: Transformer, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model.logits(model(inputs))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["llama grouped", "qwen3"])
def test_bf16_autocast_follows_fp32(variant: str) -> None:
    """Parameters and their gradients stay fp32; bf16 has 8 bits, hence 1.6e-2 for values and 5e-2 for gradients."""
    model, inputs = tiny_model(**VARIANTS[variant]), tokens(4, 150)
    loss, gradients = loss_and_gradients(model, inputs)
    gradients = copy.deepcopy(gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs).dtype == torch.bfloat16
        rough, rough_gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(rough, loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        assert (rough_gradients[name] - gradient).norm() <= 5e-2 * gradient.norm(), name


def test_autocast_leaves_fp64_alone() -> None:
    model, inputs = tiny_model(qk_norm="head").double(), tokens(2, 20)
    plain = model(inputs)
    assert plain.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), plain)


def test_same_inputs_same_bits() -> None:
    model, inputs = tiny_model(), tokens(4, 150)
    once, gradients = loss_and_gradients(model, inputs)
    gradients = copy.deepcopy(gradients)
    again, gradients_again = loss_and_gradients(model, inputs)
    assert torch.equal(once, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_the_compiler_takes_the_model_whole() -> None:
    """One graph, traced but not built: the plain formulas that a compiler sees agree with the CPU's functions."""
    model, inputs = tiny_model(qk_norm="head", kv_heads=2), tokens(2, 20)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(inputs), model(inputs), atol=1e-5, rtol=1e-5)


def test_a_row_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="row of 9 tokens is longer than the model's context of 8"):
        tiny_model(context=8)(tokens(1, 9))


# Initialisation and roles


def test_initialisation_depends_on_the_seed_alone() -> None:
    config = tiny_config(qk_norm="head")
    one = initialise(Transformer(config), 5)
    torch.manual_seed(1)
    same, other = initialise(Transformer(config), 5), initialise(Transformer(config), 6)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        assert torch.equal(parameter, other.get_parameter(name)) == (role_of(name) == "norm")


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    tiny_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_scales() -> None:
    config = ModelConfig.from_preset("1m", 4096, initial_std=0.05)
    for name, parameter in initialise(Transformer(config), 0).named_parameters():
        if role_of(name) == "norm":
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        shrunk = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.05 / math.sqrt(2 * config.layers) if shrunk else 0.05
        assert parameter.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_a_fresh_model_predicts_about_evenly() -> None:
    model, inputs = initialise(Transformer(tiny_config()), 0), tokens(4, 50)
    loss, _ = loss_and_gradients(model, inputs)
    assert loss.item() == pytest.approx(math.log(97), rel=0.02)


def test_before_it_is_filled_a_model_is_zero() -> None:
    assert not any(parameter.any() for parameter in Transformer(tiny_config()).parameters())


def test_every_parameter_has_a_role() -> None:
    roles = {
        name: role_of(name) for name, _ in Transformer(tiny_config(qk_norm="head"), device="meta").named_parameters()
    }
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.norm.weight"] == roles["model.layers.1.self_attn.k_norm.weight"] == "norm"
    assert roles["model.layers.0.mlp.down_proj.weight"] == "matrix"
    assert role_of("model.layers.0.self_attn.q_proj.bias") == "bias"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.scale", "weight", "", "model.adapter.weight"])
def test_a_parameter_without_a_role_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="has no role"):
        role_of(name)
