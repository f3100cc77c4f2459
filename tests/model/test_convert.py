"""Model folders converted: the same tensors in other files; pickles opened only on request, and never run."""

from __future__ import annotations

import collections
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from perennial.cli import main
from perennial.core import lineage
from perennial.core.errors import UserError
from perennial.model import convert as conversion
from perennial.model.convert import convert, parse_size
from perennial.model.huggingface import save_model
from perennial.model.storage import INDEX, WEIGHTS, StoredTensors, write_tensors
from perennial.train.checkpoint import verify
from tests.model.models import tiny_model

PICKLE = "pytorch_model.bin"
COMPANIONS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "generation_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "README.md": "---\nlicense: apache-2.0\n---\n",
    "LICENSE": "the terms",
    "NOTICE.txt": "whose work it is",
}
OTHERS = ["modeling_mine.py", "model.gguf", "tf_model.h5", "onnx/model.onnx", "training_args.bin", "optimizer.pt"]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Weights of no architecture in particular, with buffers."""
    return {
        "wte.weight": torch.randn(20, 8),
        "h.0.weight": torch.randn(8, 8),
        "h.0.rotary_emb.inv_freq": torch.rand(4),
        "h.0.mask": torch.ones(4, 4, dtype=torch.bool).tril(),
        "h.0.positions": torch.arange(9),
        "head.weight": torch.randn(20, 8),
    }


def folder_of(path: Path, tensors: dict[str, Tensor] | None, **config: Any) -> Path:
    """A model folder with everything that may lie in one."""
    for name, text in COMPANIONS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    for name in [*OTHERS, ".git/HEAD", "__pycache__/x.pyc"]:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"other")
    (path / "config.json").write_text(json.dumps({"model_type": "unheard-of", **config}))
    if tensors is not None:
        facts = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_tensors(path, facts, tensors.__getitem__)
    return path


def pickled(path: Path, content: Any, legacy: bool = False, **config: Any) -> Path:
    """A folder whose only weights are a pickle of `content`."""
    folder_of(path, None, **config)
    torch.save(content, path / PICKLE, _use_new_zipfile_serialization=not legacy)
    return path


def contents(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def refused(action: Callable[[], object], out: Path) -> str:
    """The message of the error; nothing may be left of `out`."""
    with pytest.raises(UserError) as caught:
        action()
    assert not list(out.parent.glob(f"{out.name}*"))
    return str(caught.value)


# Copying


@pytest.mark.parametrize("max_shard_bytes", [5e9, 300])
def test_everything_that_belongs_to_a_model_is_carried_over(
    max_shard_bytes: float, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source, out = folder_of(tmp_path / "in", tensors, dtype="float32"), tmp_path / "out"
    facts = convert(source, out, max_shard_bytes=max_shard_bytes)
    assert same(contents(out), tensors)
    assert (out / INDEX).exists() == (max_shard_bytes < 5e9)
    for name in [*COMPANIONS, "config.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    weights = {path.name for path in out.glob("model*")}
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        *COMPANIONS,
        "config.json",
        *weights,
    }
    assert facts["carried"] == sorted([*COMPANIONS, "config.json"])
    assert facts["left_out"] == sorted(OTHERS)
    assert facts["files"] == sorted(weights - {INDEX})
    assert facts["values"] == {"bool": 16, "float32": 388, "int64": 9}
    assert sorted(tmp_path.iterdir()) == [source, out]
    convert(out, tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_change_their_type_and_buffers_keep_it(
    dtype: torch.dtype, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    config = {"torch_dtype": "float64", "text_config": {"dtype": "float64", "vision_dtype": "x", "torch_dtype": None}}
    convert(folder_of(tmp_path / "in", tensors, **config), tmp_path / "out", dtype=dtype)
    found = contents(tmp_path / "out")
    for name in ("wte.weight", "h.0.weight", "head.weight"):
        assert torch.equal(found[name], tensors[name].to(dtype))
    for name in ("h.0.rotary_emb.inv_freq", "h.0.mask", "h.0.positions"):
        assert found[name].dtype == tensors[name].dtype
        assert torch.equal(found[name], tensors[name])
    word = str(dtype).removeprefix("torch.")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {
        "model_type": "unheard-of",
        "torch_dtype": word,
        "text_config": {"dtype": word, "vision_dtype": "x", "torch_dtype": None},
    }


def test_a_configuration_that_names_no_type_gets_one(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    convert(folder_of(tmp_path / "in", tensors), tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "unheard-of", "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_values_that_the_type_cannot_hold(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["h.0.weight"][0, 0] = 1e5
    source, out = folder_of(tmp_path / "in", tensors), tmp_path / "out"
    message = refused(lambda: convert(source, out, dtype=torch.float16), out)
    assert "h.0.weight has 1 of 64 weights that are too large for float16 (the largest is 65504)" in message
    assert "bfloat16" in message


def test_values_that_are_not_finite_are_copied_and_counted(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["h.0.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    facts = convert(folder_of(tmp_path / "in", tensors), tmp_path / "out", dtype=torch.float16)
    assert facts["not_finite"] == {"h.0.weight": 3}
    assert int(torch.isfinite(contents(tmp_path / "out")["h.0.weight"]).sum()) == 61


def test_quantised_weights_are_copied_but_not_converted(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    short = torch.randn(8, 8).to(torch.float8_e4m3fn)
    source, out = folder_of(tmp_path / "in", {**tensors, "short": short}), tmp_path / "out"
    assert "short has 8 bits" in refused(lambda: convert(source, out, dtype=torch.bfloat16), out)
    convert(source, out)
    assert torch.equal(contents(out)["short"].float(), short.float())
    other = folder_of(tmp_path / "other", tensors, quantization_config={"bits": 4})
    message = refused(lambda: convert(other, tmp_path / "x", dtype=torch.bfloat16), tmp_path / "x")
    assert "config.json has quantization_config" in message


def test_what_is_there_is_not_overwritten(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", tensors)
    (tmp_path / "full").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (source, tmp_path / "full", tmp_path / "link"):
        with pytest.raises(UserError, match="exists already"):
            convert(source, out)
    assert not list((tmp_path / "full").iterdir())


def test_a_copy_may_go_below_its_source(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", tensors)
    (source / "half.partial").mkdir()
    (source / "half.partial" / "old.txt").write_text("left by a kill")
    facts = convert(source, source / "half")
    assert "old.txt" not in "".join(path.name for path in (source / "half").iterdir())
    assert facts["tensors"] == 6


def test_a_folder_that_is_no_model(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(lambda: convert(tmp_path / "absent", out), out)
    source = folder_of(tmp_path / "in", tensors)
    (source / WEIGHTS).unlink()
    assert "no weights" in refused(lambda: convert(source, out), out)
    (source / "config.json").write_text("[]")
    assert "must be a JSON object" in refused(lambda: convert(source, out), out)


def test_a_full_disk_leaves_nothing(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        write_tensors(*arguments, **settings)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(conversion, "write_tensors", fail)
    source, out = folder_of(tmp_path / "in", tensors), tmp_path / "out"
    assert "the disk is full" in refused(lambda: convert(source, out), out)


def test_progress_is_reported_in_bytes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []
    facts = convert(folder_of(tmp_path / "in", tensors), tmp_path / "out", report=lambda *now: told.append(now))
    assert told[-1] == (facts["bytes"], facts["bytes"])
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5e9), ("1.5 gb", 1.5e9), ("20MB", 2e7), ("3KB", 3e3), ("1TB", 1e12)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5GiB", "1e9", "nan", "5 G B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="write it like 5GB"):
        parse_size(text)


# Pickles


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_read_on_request(legacy: bool, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = collections.OrderedDict(tensors, parameter=torch.nn.Parameter(torch.randn(3).bfloat16()))
    source, out = pickled(tmp_path / "in", content, legacy), tmp_path / "out"
    message = refused(lambda: convert(source, out), out)
    assert "Pickled weights" in message
    assert "--pickled" in message
    facts = convert(source, out, pickled=True)
    assert same(contents(out), {name: tensor.detach() for name, tensor in content.items()})
    assert PICKLE not in facts["left_out"]
    assert PICKLE not in facts["carried"]


def test_pickled_shards_and_their_index(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in", None), tmp_path / "out"
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:2], "pytorch_model-00002-of-00002.bin": names[2:]}
    for file, its_names in files.items():
        torch.save({name: tensors[name] for name in its_names}, source / file)
    listed = {name: file for file, its_names in files.items() for name in its_names}

    def with_map(weight_map: Any) -> str:
        (source / f"{PICKLE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return refused(lambda: convert(source, out, pickled=True), out)

    first = next(iter(files))
    assert f"lists more in {first}, which does not have it" in with_map({**listed, "more": first})
    assert f"does not list {names[0]}" in with_map({k: v for k, v in listed.items() if k != names[0]})
    assert "is not the name of a bin file" in with_map({**listed, names[0]: "model.safetensors"})
    assert "x.bin is missing" in with_map({**listed, names[0]: "x.bin"})
    (source / f"{PICKLE}.index.json").write_text(json.dumps({"weight_map": listed}))
    convert(source, out, pickled=True)
    assert same(contents(out), tensors)


def test_a_folder_without_pickles(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in", tensors), tmp_path / "out"
    assert "no pickled weights" in refused(lambda: convert(source, out, pickled=True), out)


@pytest.mark.parametrize(("stated", "times"), [(True, 1), (False, 2), (None, 2)])
def test_tied_weights_are_stored_once_where_they_will_be_tied_again(
    stated: bool | None, times: int, tmp_path: Path
) -> None:
    """An architecture that transformers does not know has no default: both are kept."""
    embedding = torch.randn(20, 8)
    content = {"embedding": embedding, "layer": torch.ones(3), "head": embedding, "part": embedding[:5]}
    config = {} if stated is None else {"tie_word_embeddings": stated}
    facts = convert(pickled(tmp_path / "in", content, **config), tmp_path / "out", pickled=True)
    assert facts["stored_once"] == ({"head": "embedding"} if times == 1 else {})
    found = contents(tmp_path / "out")
    assert ("head" in found) == (times == 2)
    for name, tensor in found.items():
        assert torch.equal(tensor, content[name])


@pytest.mark.parametrize(("model_type", "is_tied"), [("gpt2", True), ("gpt_neox", False), ("llama", False)])
def test_an_architecture_decides_where_the_configuration_does_not_say(
    model_type: str, is_tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    embedding = torch.randn(20, 8)
    source = pickled(tmp_path / "in", {"embedding": embedding, "head": embedding}, model_type=model_type)
    facts = convert(source, tmp_path / "out", pickled=True)
    assert facts["stored_once"] == ({"head": "embedding"} if is_tied else {})


class Harmful:
    """Unpickled without care, it makes a folder."""

    def __init__(self, call: Callable[..., object], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return self.call, self.arguments


class Plain:
    """A class that torch does not know."""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(legacy: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = {
        "posix.mkdir": Harmful(os.mkdir, str(trace)),
        "eval": Harmful(eval, f"__import__('os').mkdir({str(trace)!r})"),
        "torch.serialization.load": Harmful(torch.load, str(trace)),
        "tests.model.test_convert.Plain": Plain(),
    }
    for number, (name, harmful) in enumerate(calls.items()):
        content = {"x": torch.ones(3), "y": harmful}
        source, out = pickled(tmp_path / f"in{number}", content, legacy), tmp_path / "out"
        message = refused(lambda source=source, out=out: convert(source, out, pickled=True), out)
        assert message.startswith(f"{source / PICKLE}: refused: it holds more than weights: it asks for {name}")
        assert "weights_only" not in message
    assert not trace.exists()
    shutil.copytree(tmp_path / "in0", tmp_path / "careless")
    torch.load(tmp_path / "careless" / PICKLE, weights_only=False)
    assert trace.exists(), "the pickle was harmless, and the test above without worth"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.ones(3)], "must hold tensors by name, not a list"),
        (torch.ones(3), "must hold tensors by name, not a Tensor"),
        ({"x": torch.ones(3), "epoch": 3}, "'epoch' is a int"),
        ({"model": {"x": torch.ones(3)}}, "'model' is a dict"),
        ({3: torch.ones(3)}, "3 is a Tensor"),
        ({"x": torch.eye(3).to_sparse()}, "x is not a plain tensor"),
        ({"x": torch.empty(3, device="meta")}, "x is not a plain tensor"),
        ({"x": torch.ones(3, dtype=torch.complex64)}, "x is of type complex64"),
        ({"x": torch.ones(1).expand(10**6, 10**6)}, "x claims 1000000000000 values"),
    ],
)
def test_a_pickle_of_something_else(content: Any, named: str, tmp_path: Path) -> None:
    source, out = pickled(tmp_path / "in", content), tmp_path / "out"
    message = refused(lambda: convert(source, out, pickled=True), out)
    assert named in message
    assert str(source / PICKLE) in message


@pytest.mark.parametrize("legacy", [False, True])
def test_any_damage_to_a_pickle_is_an_error(legacy: bool, tmp_path: Path) -> None:
    source, out = pickled(tmp_path / "in", {"x": torch.ones(30), "y": torch.arange(4)}, legacy), tmp_path / "out"
    whole = (source / PICKLE).read_bytes()
    generator = torch.Generator().manual_seed(0)
    damaged = [
        b"",
        b"x",
        bytes(50),
        b"version https://git-lfs.github.com/spec/v1\n",
        whole[:-30],
        whole[: len(whole) // 2],
    ]
    for _ in range(150):
        changed = bytearray(whole)
        for place in torch.randint(0, len(whole), (3,), generator=generator).tolist():
            changed[place] = int(torch.randint(0, 256, (), generator=generator))
        damaged.append(bytes(changed))
    for number, content in enumerate(damaged):
        (source / PICKLE).write_bytes(content)
        try:
            convert(source, out, pickled=True)
        except UserError:
            assert not out.exists()
        else:
            assert number > 5, "damaged as a whole, yet read"
            shutil.rmtree(out)


# The command, and Perennial's own checkpoints


def test_the_command(tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**tensors, "head.weight": tensors["wte.weight"]}
    source, out = pickled(tmp_path / "in", content, tie_word_embeddings=True), tmp_path / "out"
    assert main.main(["convert", str(source), "--out", str(out)]) == 2
    assert "--pickled" in capsys.readouterr().err
    line = ["convert", str(source), "--out", str(out), "--pickled", "--dtype", "bfloat16", "--max-shard", "1KB"]
    assert main.main(line) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 5 tensors, 224 values as bfloat16, 16 values as bool" in printed
    assert "head.weight is the same as wte.weight, and stored once" in printed
    assert "left out: model.gguf, modeling_mine.py" in printed
    assert main.main(["convert", str(out), "--out", str(tmp_path / "again"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["files"] == [WEIGHTS]
    assert captured.err == ""
    assert main.main(["convert", str(out), "--out", str(tmp_path / "x"), "--max-shard", "5"]) == 2
    assert "'5' is not a size" in capsys.readouterr().err
    assert main.main(["convert", str(out), "--out", str(tmp_path / "x"), "--dtype", "bf16"]) == 2
    assert "bfloat16" in capsys.readouterr().err


def test_a_checkpoint_keeps_its_lineage_and_sheds_its_state(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "run" / "checkpoints" / "1000", tmp_path / "out"
    save_model(tiny_model(), checkpoint)
    record = lineage.Lineage(checkpoint="0123456789abcdef", stages=[])
    files = conversion.files
    files.write_json(checkpoint / "perennial" / "lineage.json", record.model_dump(mode="json"))
    files.write_json(checkpoint / "perennial" / "tasks.json", {"tasks": {"easy": {"accuracy": 0.5}}})
    files.write_json(checkpoint / "perennial" / "state.json", {})
    files.write_manifest(checkpoint, {"format": 1}, "perennial/manifest.json")
    facts = convert(tmp_path / "run", out, dtype=torch.bfloat16)
    assert facts["left_out"] == ["perennial/state.json"]
    assert sorted(path.name for path in (out / "perennial").iterdir()) == ["lineage.json", "manifest.json"]
    verify(out)
    found = lineage.read(out)
    assert found.checkpoint != record.checkpoint
    assert found.changes == [{"operation": "convert", "checkpoint": record.checkpoint, "dtype": "bfloat16"}]
    assert "tasks" not in found.evaluation  # what was measured was the folder before
    assert StoredTensors.open(out).dtype("model.norm.weight") == torch.bfloat16
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    message = refused(lambda: convert(checkpoint, tmp_path / "other"), tmp_path / "other")
    assert "the checkpoint is damaged: config.json" in message


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_transformers_opens_what_was_a_pickle(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "in" / PICKLE)
    convert(tmp_path / "in", tmp_path / "out", pickled=True, max_shard_bytes=20_000)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    inputs = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, model(inputs).logits)
