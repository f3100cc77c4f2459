"""Models run through transformers: its own loss, gradients and training; the same files out; bad folders refused.

Tolerances: losses 1e-5, losses after training 1e-4, gradients 1e-4 of the largest.
"""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from perennial.core.errors import UserError
from perennial.model import foreign
from perennial.model.folder_config import load_config, read_config
from perennial.model.huggingface import load_model, save_model
from perennial.model.through_transformers import TransformersModel, from_config
from perennial.objectives.next_token import NextToken
from perennial.optimizers.adamw import AdamW
from perennial.optimizers.muon import Muon
from perennial.train.feeding import TorchBatch
from perennial.train.parallel import Spread, World
from perennial.train.step import make_update
from tests.foreign import ARCHITECTURES, CONTEXT, VOCABULARY, made, stored

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every architecture's folder, in fp32."""
    root = tmp_path_factory.mktemp("foreign")
    return {name: stored(made(name), root / str(i)) for i, name in enumerate(ARCHITECTURES)}


@pytest.fixture
def mixtral(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to damage."""
    return shutil.copytree(folders["mixtral: experts"], tmp_path / "mixtral")


def edit(folder: Path, **entries: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def opened(folder: Path) -> TransformersModel:
    model = load_model(folder)
    assert isinstance(model, TransformersModel)
    return model


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))


def parts(ids: torch.Tensor) -> TorchBatch:
    return TorchBatch(ids[:, :-1], ids[:, 1:], None)


# The same function


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    model = opened(folders[name])
    assert (model.head_weight is not None) == ARCHITECTURES[name].is_plain
    reference = made(name)
    ids = tokens()
    expected = reference(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    found = NextToken().loss(model, parts(ids))
    (found.total / found.count).backward()
    assert found.nats.item() / int(found.count) == pytest.approx(expected.item(), abs=1e-5)
    assert found.nats.item() == pytest.approx(NextToken().evaluate(model, parts(ids))[0].item(), rel=1e-6)

    gradients = {f"network.{key}": parameter.grad for key, parameter in reference.named_parameters()}
    own = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert own.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for key, gradient in gradients.items():
        assert (own[key] is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(own[key], gradient, rtol=1e-3, atol=1e-4 * largest)
    logits = model.logits(model(ids))
    torch.testing.assert_close(logits, reference(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_five_updates_are_those_of_a_plain_loop(name: str, folders: dict[str, Path]) -> None:
    model, reference = opened(folders[name]), made(name)
    own = AdamW().build(model.named_parameters(), model.role_of)
    decays: dict[float, list[Any]] = {}
    for key, parameter in reference.named_parameters():
        decays.setdefault(0.1 if model.role_of(f"network.{key}") in ("matrix", "stack", "head") else 0.0, []).append(
            parameter
        )
    groups = [{"params": given, "weight_decay": decay} for decay, given in decays.items()]
    plain = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        ids = tokens(rows=4, seed=step)
        loss = reference(input_ids=ids, labels=ids, use_cache=False).loss
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        update = make_update(
            Spread(model.train(), World(0, 1, torch.device("cpu"))),
            own,
            NextToken(),
            _Rows(ids),  # type: ignore[arg-type]
            rate=1e-3,
            clip=1.0,
            precision="fp32",
            micro_batch=2,
            rows=4,
        ).finish()
        assert update.loss == pytest.approx(loss.item(), abs=1e-4)


class _Rows:
    """What `make_update` takes of a batch."""

    segments = None

    def __init__(self, ids: torch.Tensor) -> None:
        self.inputs, self.targets = ids[:, :-1].numpy(), ids[:, 1:].numpy()
        self.source = np.zeros(len(ids), np.int64)


@pytest.mark.parametrize("name", ["opt: learned positions", "gpt_bigcode: one key head", "starcoder2: biases"])
def test_dropout_stays_off_in_training(name: str, folders: dict[str, Path]) -> None:
    model, ids = opened(folders[name]), tokens()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).train()
    with torch.no_grad():
        assert not torch.equal(reference(input_ids=ids).logits, reference(input_ids=ids).logits), "has no dropout"
        first = model.eval()(ids)
        model.train()
        assert model.training
        assert torch.equal(model(ids), first)


def test_bf16_autocast_is_near_fp32_with_given_logits_too(folders: dict[str, Path]) -> None:
    for name in ("gemma2: capped logits", "mixtral: experts"):
        model, ids = opened(folders[name]), tokens()
        exact = NextToken().loss(model, parts(ids))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = NextToken().loss(model, parts(ids))
        rounded.total.backward()
        assert rounded.nats.item() == pytest.approx(exact.nats.item(), rel=1e-2)


# The same files


def assert_same_files(one: Path, other: Path) -> None:
    """Every tensor equal in name, type and bytes; config.json and generation_config.json with the same content."""
    a, b = (
        {k: v for file in sorted(f.glob("*.safetensors")) for k, v in load_file(file).items()} for f in (one, other)
    )
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), b[key].view(torch.uint8)), key
    for file in ("config.json", "generation_config.json"):
        assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ARCHITECTURES),
        *((name, dtype) for name in list(ARCHITECTURES)[2:4] for dtype in (torch.float32, torch.float16)),
    ],
)
def test_what_is_read_is_written_again_byte_for_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first = stored(made(name), tmp_path / "first", dtype)
    save_model(opened(first), tmp_path / "second")
    assert_same_files(first, tmp_path / "second")
    assert (tmp_path / "second/model.safetensors").stat().st_mode == (tmp_path / "second/config.json").stat().st_mode
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    ids = tokens()
    assert torch.equal(again(input_ids=ids).logits, opened(first).network(input_ids=ids).logits)


def test_all_can_be_stored_in_one_type(folders: dict[str, Path], tmp_path: Path) -> None:
    save_model(opened(folders["mixtral: experts"]), tmp_path, dtype=torch.bfloat16)
    again = opened(tmp_path)
    assert set(again.stored_dtypes.values()) == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path, dtype=torch.bfloat16)(tokens()).dtype == torch.bfloat16


def test_mixed_types_and_shards_are_kept(tmp_path: Path) -> None:
    network = made("deepseek_v3: latent attention, a buffer").to(torch.bfloat16)
    for key, parameter in network.named_parameters():
        if "norm" in key:
            parameter.data = parameter.data.float()
    for buffer in network.buffers():
        buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
    transformers.utils.logging.disable_progress_bar()
    network.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    model = opened(tmp_path / "first")
    assert {torch.bfloat16, torch.float32} == set(model.stored_dtypes.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save_model(model, tmp_path / "second", max_shard_bytes=20_000)
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 2
    assert_same_files(tmp_path / "first", tmp_path / "second")


def test_names_without_prefix_and_a_tied_head_that_is_stored_are_kept(tmp_path: Path) -> None:
    first = stored(made("bloom: relative positions"), tmp_path / "first")
    tensors = load_file(first / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    bare["lm_head.weight"] = bare["word_embeddings.weight"].clone()
    save_file(bare, first / "model.safetensors", metadata={"format": "pt"})
    model = opened(first)
    assert model.config.tied_embeddings
    save_model(model, tmp_path / "second")
    assert_same_files(first, tmp_path / "second")


def test_what_training_changed_is_written_and_read_again(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("mixtral: experts", "opt: learned positions"):
        model = opened(folders[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        save_model(copy.deepcopy(model), tmp_path / name)  # large models are saved from a copy while training goes on
        again = opened(tmp_path / name)
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_old_buffers_are_left_out_and_infinity_is_kept(tmp_path: Path) -> None:
    first = stored(made("gpt_bigcode: one key head"), tmp_path / "first")
    tensors = load_file(first / "model.safetensors")
    mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    more = {**tensors, "transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(more, first / "model.safetensors", metadata={"format": "pt"})
    edit(first, some_limit=[0.0, float("inf")])
    save_model(opened(first), tmp_path / "second")
    assert load_file(tmp_path / "second/model.safetensors").keys() == tensors.keys()
    assert json.loads((tmp_path / "second/config.json").read_text())["some_limit"] == [0.0, float("inf")]
    config = load_config(first)
    assert isinstance(config, foreign.TransformersConfig)
    assert from_config(config).network.config.some_limit == [0.0, float("inf")]
    assert foreign.parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


# What is known of it


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_configuration_says_what_the_model_is(name: str, folders: dict[str, Path]) -> None:
    found = read_config(folders[name])
    model = opened(folders[name])
    config = found.config
    assert isinstance(config, foreign.TransformersConfig)
    assert config == model.config
    assert foreign.parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert config.why == found.why_not_native != ""
    assert config.vocabulary_size == VOCABULARY
    assert config.context == (None if ARCHITECTURES[name].model_type in ("bloom", "mamba") else CONTEXT)
    assert (config.layers, config.width) == (2, 32)
    assert (config.heads is None) == (ARCHITECTURES[name].model_type == "mamba")
    assert foreign.num_parameters(config) == sum(p.numel() for p in model.network.parameters())
    assert config.tied_embeddings == ("head" not in config.parameters_by_role)
    assert "native" in foreign.notes(config)[0]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith(("mamba", "deepseek"))])
def test_flops_are_near_those_counted(name: str, folders: dict[str, Path]) -> None:
    model, ids = opened(folders[name]), tokens(rows=1, length=32)[:, :-1]
    model.network.set_attn_implementation("eager")
    model.network.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(ids))
    counted = counter.get_total_flops() / ids.numel()
    assert foreign.forward_flops_per_token(model.config, 32) == pytest.approx(counted, rel=0.02)
    assert foreign.flops_per_token(model.config, 32) == 3 * foreign.forward_flops_per_token(model.config, 32)


def test_a_token_goes_through_some_of_the_experts(folders: dict[str, Path]) -> None:
    config = load_config(folders["mixtral: experts"])
    assert isinstance(config, foreign.TransformersConfig)
    assert (config.experts, config.experts_per_token) == (4, 2)
    assert config.expert_parameters == config.parameters_by_role["stack"] == 2 * 4 * 3 * 32 * 48
    assert config.inactive_parameters == config.expert_parameters // 2
    assert any("auxiliary" in note for note in foreign.notes(config))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_role_and_both_optimizers_take_it(name: str, folders: dict[str, Path]) -> None:
    model = from_config(load_config(folders[name]))  # type: ignore[arg-type]
    for settings in (AdamW(), Muon()):
        optimizer = settings.build(model.named_parameters(), model.role_of)
        loss = NextToken().loss(model, parts(tokens()))
        (loss.total / loss.count).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert sum(changed) > len(changed) * 0.8
        if settings.roles and name == "mixtral: experts":
            roles = {n.partition("layers.0.")[2]: g["role"] for g in optimizer.param_groups for n in g["names"]}
            assert roles["mlp.experts.gate_up_proj"] == "stack"
            assert roles["mlp.gate.weight"] == roles["self_attn.q_proj.weight"] == "matrix"
            assert roles["input_layernorm.weight"] == "norm"


def test_roles_by_what_a_parameter_does(folders: dict[str, Path]) -> None:
    opt, mamba = opened(folders["opt: learned positions"]), opened(folders["mamba: no attention"])
    roles = {key.removeprefix("network.model.decoder."): opt.role_of(key) for key, _ in opt.named_parameters()}
    assert roles["embed_tokens.weight"] == roles["embed_positions.weight"] == "embedding"
    assert roles["project_in.weight"] == roles["layers.0.fc1.weight"] == "matrix"
    assert roles["layers.0.fc1.bias"] == roles["layers.0.final_layer_norm.bias"] == "bias"
    assert roles["layers.0.final_layer_norm.weight"] == "norm"
    layer = "network.backbone.layers.0.mixer."
    assert mamba.role_of(f"{layer}A_log") == mamba.role_of(f"{layer}D") == "norm"
    assert mamba.role_of(f"{layer}conv1d.weight") == "stack"
    with pytest.raises(ValueError, match="no such parameter"):
        mamba.role_of("A_log")


# What is refused


def test_rows_and_masks_that_it_cannot_do_are_refused(folders: dict[str, Path]) -> None:
    model = opened(folders["stablelm: partial rotary"])
    with pytest.raises(UserError, match=f"65 is longer than the model's context of {CONTEXT}"):
        model(tokens(length=65)[:, :-1])
    with pytest.raises(UserError, match="document_mask: true is not available.*stablelm"):
        model(tokens(), torch.zeros(2, 25))
    opened(folders["mamba: no attention"])(tokens(length=2 * CONTEXT))


def test_unknown_and_other_architectures_are_refused(mixtral: Path) -> None:
    with pytest.raises(UserError, match=r"model_type 'mixtrl' is not an architecture.*Did you mean 'mixtral'"):
        load_config(edit(mixtral, model_type="mixtrl"))
    with pytest.raises(UserError, match="model_type None is not an architecture"):
        load_config(edit(mixtral, model_type=None))
    with pytest.raises(UserError, match="'t5' is not a causal language model"):
        load_config(edit(mixtral, model_type="t5", architectures=["T5ForConditionalGeneration"]))
    with pytest.raises(UserError, match=r"an encoder-decoder \(bart\)"):
        load_config(edit(mixtral, model_type="bart", architectures=["BartForConditionalGeneration"]))
    with pytest.raises(UserError, match="this bert looks at the future"):
        load_config(edit(mixtral, model_type="bert", architectures=["BertForMaskedLM"]))
    with pytest.raises(UserError, match=r"\['MixtralForSequenceClassification'\] is not a causal.*MixtralForCausalLM"):
        load_config(edit(mixtral, model_type="mixtral", architectures=["MixtralForSequenceClassification"]))


def test_code_of_its_own_is_never_run_and_quantised_weights_are_refused(mixtral: Path) -> None:
    code = "from pathlib import Path\nPath('ran').touch()\n"
    (mixtral / "modeling_own.py").write_text(code)
    edit(mixtral, auto_map={"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"})
    for attempt in (load_config, load_model):
        with pytest.raises(UserError, match="auto_map: the folder brings code of its own"):
            attempt(mixtral)
    assert not Path("ran").exists()
    edit(mixtral, auto_map=None, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="quantised weights"):
        load_model(mixtral)


def test_configurations_that_transformers_cannot_use_are_refused(mixtral: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: transformers does not accept.*hidden_size"):
        load_config(edit(mixtral, hidden_size="large"))
    with pytest.raises(UserError, match=r"config.json: transformers cannot make this model"):
        load_config(edit(mixtral, hidden_size=32, num_attention_heads=0))


def test_without_transformers_it_says_what_to_install(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **given: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest, **given)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"model_type 'mixtral' is not native.*pip install 'perennial\[hf\]'"):
        load_config(mixtral)
    monkeypatch.undo()
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(UserError, match=r"from version 5 on, not 4\.57\.1"):
        load_config(mixtral)


def change_weights(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
"""As the folder spells it; in the network it is a part of a stack."""
DAMAGES: dict[str, tuple[Any, str]] = {
    "a missing matrix": (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), "lack.*layers.0.self_attn.q_proj"),
    "a missing expert": (lambda t: t.pop(EXPERT), f"the weights lack {EXPERT}"),
    "a missing head": (lambda t: t.pop("lm_head.weight"), "lack lm_head.weight.*tie_word_embeddings meant"),
    "an unknown tensor": (lambda t: t.update({"mtp.weight": torch.ones(2)}), "have mtp.weight, which.*no place"),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(33)}),
        r"model.norm.weight has shape \[33\].*asks for \[32\]",
    ),
    "NaN": (lambda t: t[EXPERT].view(-1)[5].fill_(torch.nan), f"{EXPERT} has 1 of 1536 weights that are NaN"),
    "infinity": (lambda t: t["model.norm.weight"][3:5].fill_(torch.inf), "2 of 32 weights that are NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(mixtral: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change_weights(mixtral, change)
    with pytest.raises(UserError, match=message):
        load_model(mixtral)


def test_missing_files_are_refused(mixtral: Path, tmp_path: Path) -> None:
    (mixtral / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(mixtral)
    transformers.utils.logging.disable_progress_bar()
    made("mixtral: experts").save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        load_model(tmp_path / "shards")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    first = stored(made("bloom: relative positions"), tmp_path / "first")
    change_weights(first, lambda t: t.update({"lm_head.weight": torch.ones(VOCABULARY, 32)}))
    with pytest.raises(UserError, match="the head differs from the embedding"):
        load_model(first)


def test_what_only_running_it_tells_is_found_out(tmp_path: Path) -> None:
    """XLNet's attention goes both ways though it is listed as causal; RWKV divides its weights as it runs."""
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    xlnet = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))
    with pytest.raises(UserError, match="XLNetLMHeadModel looks at the future"):
        load_model(stored(xlnet, tmp_path / "xlnet"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "rescale_every": 1}
    rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=VOCABULARY, **sizes))
    with pytest.raises(UserError, match="RwkvForCausalLM changes its own weights"):
        load_model(stored(rwkv, tmp_path / "rwkv"))
