"""Folders to and from Hugging Face: transformers opens ours, we open theirs, and bad ones are named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perennial.core.errors import UserError
from perennial.model import folder_config
from perennial.model.config import ModelConfig
from perennial.model.folder_config import load_config, read_config
from perennial.model.huggingface import load_model, save_model
from perennial.model.transformer import Transformer
from tests.model.models import VARIANTS, tiny_config, tiny_model

MANY_FILES = 40_000  # bytes per file: several for a tiny model


def logits(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, Transformer):
            return model.logits(model(inputs))
        result: Tensor = model(inputs).logits
        return result


def edit(folder: Path, **changes: Any) -> None:
    """Sets entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several files."""
    save_model(tiny_model(), tmp_path / "sharded", max_shard_bytes=MANY_FILES)
    return tmp_path / "sharded"


# Both ways with transformers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_bytes", [5e9, MANY_FILES])
def test_transformers_opens_what_we_write(variant: str, max_bytes: float, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(**VARIANTS[variant])
    save_model(model, tmp_path, max_shard_bytes=max_bytes, extra_config={"eos_token_id": 3, "bos_token_id": 5})
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (3, 5)
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.bos_token_id) == (3, 5)
    inputs = torch.randint(0, 97, (2, 150))
    torch.testing.assert_close(logits(model, inputs), logits(theirs, inputs), atol=1e-5, rtol=0)
    one_document = torch.zeros_like(inputs)
    with torch.no_grad():
        masked = model.logits(model(inputs, one_document))
    torch.testing.assert_close(masked, logits(theirs, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_bytes", [5_000_000_000, MANY_FILES])
def test_we_open_what_transformers_writes(kind: str, tied: bool, max_bytes: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_bytes)
    ours = load_model(tmp_path / "theirs")
    assert ours.config.rope_theta == 500_000.0
    inputs = torch.randint(0, 97, (2, 150))
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), atol=1e-5, rtol=0)
    save_model(ours, tmp_path / "ours")
    stored = [_tensors(tmp_path / name) for name in ("theirs", "ours")]
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        assert tensor.numpy().tobytes() == stored[1][name].numpy().tobytes(), name


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# Writing


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_loaded(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    save_model(model, tmp_path, max_shard_bytes=MANY_FILES)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))


def test_numbers_can_be_stored_shorter(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in _tensors(tmp_path).values()} == {torch.bfloat16}
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.head_weight, model.head_weight.bfloat16().float())
    assert load_model(tmp_path, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_shards_are_listed_in_the_index(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in tiny_model().parameters())
    assert all((sharded / name).stat().st_size < MANY_FILES + 2000 for name in files)


def test_older_weights_do_not_stay_behind(sharded: Path) -> None:
    (sharded / "notes.txt").write_text("mine")
    save_model(tiny_model(seed=1), sharded)
    assert sorted(path.name for path in sharded.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert torch.equal(load_model(sharded).head_weight, tiny_model(seed=1).head_weight)


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_model(tiny_model(), tmp_path, max_shard_bytes=MANY_FILES)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_extra_entries_cannot_contradict_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        save_model(tiny_model(), tmp_path, extra_config={"hidden_size": 3})


def test_without_token_ids_none_are_invented(folder: Path) -> None:
    """transformers would take 1 and 2 for a Llama that does not say."""
    written = json.loads((folder / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (None, None)


def test_a_file_that_does_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    """The limit on file size stands for a full disk: the same path through safetensors."""
    code = (
        "import resource, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from perennial.core.errors import UserError; from perennial.model.huggingface import save_model\n"
        "from tests.model.models import tiny_model\n"
        "model = tiny_model(); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: save_model(model, Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tmp_path, root], capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout
    assert not list(tmp_path.glob("*.safetensors"))


# config.json


def test_a_configuration_of_transformers_4_is_understood(folder: Path) -> None:
    path = folder / "config.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("rope_parameters", "head_dim", "dtype")}
    path.write_text(json.dumps({**old, "rope_theta": 1234.0, "rope_scaling": None, "pretraining_tp": 1}))
    assert load_config(folder) == tiny_config(rope_theta=1234.0)


def test_what_a_configuration_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2}
    for kind in ("llama", "qwen3"):
        data = {"model_type": kind, **sizes, "num_attention_heads": 4, "num_key_value_heads": 4}
        (tmp_path / "config.json").write_text(json.dumps(data))
        ours, theirs = load_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
        assert ours.head_width == theirs.head_dim
        assert ours.context == theirs.max_position_embeddings
        assert ours.norm_epsilon == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama3"}, "Did you mean 'llama'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "mistral"}, "architectures ['LlamaForCausalLM']; supported for mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"hidden_size": None}, "hidden_size: is required"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused(changes: dict[str, Any], named: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError) as caught:
        load_config(folder)
    assert named in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def why_not(folder: Path) -> str:
    """Why a model is not native; where transformers cannot run it either, the error."""
    try:
        found = read_config(folder)
    except UserError as error:
        return str(error)
    assert not isinstance(found.config, ModelConfig)
    return found.why_not_native


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0}}, "rope_parameters of type 'longrope'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling of type 'su'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "mystery": 1}}, "rope_parameters.mystery"),
        ({"rope_parameters": "default"}, "rope_parameters 'default'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_our_network_does_not_compute_is_named(changes: dict[str, Any], why: str, folder: Path) -> None:
    """Such a model runs through transformers, or is refused where that cannot run it either."""
    edit(folder, **changes)
    assert why in why_not(folder)


def test_all_reasons_are_listed_at_once(folder: Path) -> None:
    edit(folder, hidden_act="mish", partial_rotary_factor=0.25)
    text = why_not(folder)
    assert "hidden_act" in text
    assert "partial_rotary_factor" in text


def test_dropout_is_left_out_and_said(folder: Path) -> None:
    assert read_config(folder).notes == ()
    edit(folder, attention_dropout=0.1)
    assert read_config(folder).notes == ("trained on without dropout, though config.json has attention_dropout 0.1",)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 128}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}, [None, 128]),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, [128, 128]),
        ({"layer_types": ["full_attention", "full_attention"]}, [None, None]),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [7, None],
        ),
    ],
)
def test_a_sliding_window_is_where_a_layer_uses_it(
    changes: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    save_model(tiny_model(qk_norm="head"), tmp_path)
    edit(tmp_path, **changes)
    config = load_config(tmp_path)
    assert isinstance(config, ModelConfig)
    assert [config.window_of(layer) for layer in range(2)] == windows


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gpt_neox", "gpt2"])
def test_any_value_in_a_configuration_is_read_or_refused(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a traceback. What is not native is another module's to read, and slow."""
    monkeypatch.setattr(folder_config, "_through_transformers", _not_native)
    save_model(tiny_model(**VARIANTS[variant]), tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text()) | {"layer_types": None, "rope_scaling": None, "partial_rotary_factor": None}
    for key in whole:
        for value in ("x", -1, 1.5, True, [], [1], {}, {"x": 1}, None, 10**400):
            path.write_text(json.dumps({**whole, key: value}))
            with contextlib.suppress(UserError):
                assert isinstance(load_config(tmp_path), ModelConfig)


def _not_native(folder: Path, entries: dict[str, Any], why: str) -> Any:
    raise UserError(why)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_configuration_that_is_not_one(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(folder)


# Weights


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_folder_or_file(folder: Path, tmp_path: Path) -> None:
    assert "no such model folder" in refused(tmp_path / "absent")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no weights" in refused(folder)
    assert "pytorch_model.bin" in refused(folder)
    (folder / "config.json").unlink()
    assert "no such model configuration" in refused(folder)


def test_missing_and_unexpected_tensors(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "the weights lack model.layers.1.mlp.up_proj.weight" in refused(folder)
    save_model(tiny_model(), folder)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert "the weights have model.layers.0.self_attn.q_proj.bias" in refused(folder)
    save_model(tiny_model(layers=4), folder)
    edit(folder, num_hidden_layers=2)
    assert "and 15 more" in refused(folder)


def test_a_head_that_should_be_tied(folder: Path, tmp_path: Path) -> None:
    save_model(tiny_model(tied_embeddings=True), tmp_path / "tied")
    edit(tmp_path / "tied", tie_word_embeddings=False)
    assert "Is tie_word_embeddings meant to be true?" in refused(tmp_path / "tied")
    edit(folder, tie_word_embeddings=True)
    assert "lm_head.weight differs from the embedding" in refused(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(folder).lm_head is None


def test_what_follows_from_the_configuration_may_be_stored(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(folder)


def test_wrong_shape_type_and_values(folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(96, 63)}))
    assert f"{name} has shape [96, 63], but config.json asks for [96, 64]" in refused(folder)
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(96, 64, dtype=torch.int8)}))
    assert f"{name} is stored as I8" in refused(folder)
    for bad in (float("nan"), float("-inf")):
        change_tensors(folder, lambda tensors, bad=bad: tensors.update({name: torch.full((96, 64), bad)}))
        assert f"{name} has 6144 of 6144 weights that are NaN or infinite" in refused(folder)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file(damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    if damage == "cut":
        content = content[:-100]
    elif damage == "header":
        content = struct.pack("<Q", 1 << 62) + content[8:]
    else:
        content = b""
    path.write_bytes(content)
    assert "not a whole safetensors file" in refused(folder)


def test_a_missing_shard_and_an_index_that_lies(sharded: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    listed = index["weight_map"]
    shards = sorted(set(listed.values()), key=lambda file: -list(listed.values()).count(file))
    first, second = shards[:2]
    name, other = (next(tensor for tensor, file in listed.items() if file == shard) for shard in (first, second))

    def with_map(weight_map: Any) -> str:
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return refused(sharded)

    assert f"lists {name}.x in {first}, which does not have it" in with_map({**listed, f"{name}.x": first})
    assert "not" in with_map({**listed, other: first})  # both are true: listed where it is not, and not listed
    assert f"does not list {name}" in with_map({key: file for key, file in listed.items() if key != name})
    assert "is not the name of a safetensors file" in with_map({**listed, name: f"../{first}"})
    assert "must have a 'weight_map'" in with_map([first])
    assert "must have a 'weight_map'" in with_map({name: 3})
    shutil.move(sharded / second, tmp_path / second)
    assert f"{second} is missing" in with_map(listed)
