"""Safetensors files: read back as written, bad ones named, and no more memory than the weights need."""

from __future__ import annotations

import json
import math
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perennial.core.errors import UserError
from perennial.model.storage import INDEX, WEIGHTS, StoredTensors, write_tensors

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
LARGE = 3_000_000  # elements: several pieces, several threads


def some_tensors() -> dict[str, Tensor]:
    """Every type, and the shapes that are easily forgotten."""
    tensors = {f"float.{dtype}": torch.randn(13, 7).to(dtype) for dtype in FLOATS}
    tensors |= {f"other.{dtype}": torch.arange(13).to(dtype) for dtype in OTHERS}
    return tensors | {"single": torch.tensor(1.5), "none": torch.empty(0, 4), "large": torch.randn(LARGE // 64, 64)}


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: float = 5e9) -> Path:
    """Writes them as they are."""
    facts = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(folder, facts, tensors.__getitem__, max_shard_bytes=max_shard_bytes)
    return folder


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A file from its parts; `header` may be the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(action: Callable[[], object], path: Path) -> str:
    """The message of the error, which must name the path."""
    with pytest.raises(UserError) as caught:
        action()
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Six tensors in three files."""
    return write(tmp_path / "sharded", {f"t{i}": torch.full((10,), float(i)) for i in range(6)}, max_shard_bytes=80)


# Reading


@pytest.mark.parametrize("max_shard_bytes", [5e9, 100])
def test_what_is_written_is_read(max_shard_bytes: float, tmp_path: Path) -> None:
    tensors = some_tensors()
    stored = StoredTensors.open(write(tmp_path, tensors, max_shard_bytes))
    assert sorted(stored.names) == sorted(tensors)
    assert stored.num_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert (stored.shape(name), stored.dtype(name)) == (list(tensor.shape), tensor.dtype)
        assert torch.equal(load_file(stored.path(name))[name], tensor)
        assert torch.equal(stored.read_unchecked(name), tensor)
        if not tensor.is_floating_point():
            continue
        assert torch.equal(stored.read(name, shape=list(tensor.shape)), tensor)
        for dtype in FLOATS:
            out = torch.full(tensor.shape, math.nan, dtype=dtype)
            stored.read_into(name, out)
            read = stored.read(name, dtype=dtype)
            assert read.dtype == dtype
            assert torch.equal(out, tensor.to(dtype))
            assert torch.equal(read, out)


def test_tensors_are_named_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    stored = StoredTensors.open(write(tmp_path, some_tensors(), 1000))
    places = [(stored.path(name).name, stored._entries[name].offset) for name in stored.names]
    assert places == sorted(places)


def test_memory_is_the_readers_own(tmp_path: Path) -> None:
    stored = StoredTensors.open(write(tmp_path, some_tensors()))
    first, second = stored.read("large"), stored.read("large")
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before)
    assert torch.equal(stored.read("large"), before)
    with torch.inference_mode():
        assert torch.equal(stored.read("large", dtype=torch.float64), before.double())
    parameter = torch.nn.Parameter(first)
    stored.read_into("large", parameter)
    assert torch.equal(parameter.detach(), before)
    assert parameter.requires_grad


def test_a_file_whose_bytes_are_not_aligned(tmp_path: Path) -> None:
    values = torch.randn(3, 5)
    header = {"x": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}
    for padding in range(4):
        text = json.dumps(header).encode() + b" " * padding
        write_raw(tmp_path / WEIGHTS, text, values.numpy().tobytes())
        assert torch.equal(StoredTensors.open(tmp_path).read("x"), values)


def test_links_to_files_are_followed(sharded: Path, tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    (tmp_path / "links").mkdir()
    for path in sharded.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert torch.equal(StoredTensors.open(tmp_path / "links").read("t3"), torch.full((10,), 3.0))


def test_an_output_that_cannot_be_filled(tmp_path: Path) -> None:
    stored = StoredTensors.open(write(tmp_path, {"x": torch.randn(4, 6)}))
    message = refused(lambda: stored.read_into("x", torch.empty(6, 4)), tmp_path)
    assert "x has shape [4, 6], but config.json asks for [6, 4]" in message
    assert "x has shape [4, 6]" in refused(lambda: stored.read("x", shape=[24]), tmp_path)
    for out in (torch.empty(6, 4).T, torch.empty(4, 6, dtype=torch.int32)):
        with pytest.raises(ValueError, match="contiguous tensor of floats"):
            stored.read_into("x", out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_are_read_onto_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(LARGE).to(dtype)
    stored = StoredTensors.open(write(tmp_path, {"x": values, "bad": values / 0}))
    for wanted in FLOATS:
        out = torch.empty(LARGE, dtype=wanted, device="cuda")
        stored.read_into("x", out)
        assert torch.equal(out.cpu(), values.to(wanted))
        assert "bad has" in refused(lambda out=out: stored.read_into("bad", out), tmp_path)


# Values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5,), (LARGE // 64, 64)])
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.ones(shape, dtype=dtype)
    flat = values.view(-1)
    flat[0], flat[-1], flat[2], flat[-2] = math.nan, math.inf, math.inf, -math.inf
    stored = StoredTensors.open(write(tmp_path, {"x": values}))
    expected = f"x has 4 of {values.numel()} weights that are NaN or infinite"
    assert expected in refused(lambda: stored.read("x"), tmp_path)
    for out in FLOATS:
        message = refused(lambda out=out: stored.read_into("x", torch.empty(shape, dtype=out)), tmp_path)
        assert expected in message
    assert torch.equal(stored.read_unchecked("x"), values) is False  # NaN differs from itself
    assert int(torch.isfinite(stored.read_unchecked("x")).sum()) == values.numel() - 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_values_whose_sum_is_infinite_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.full((5000,), torch.finfo(dtype).max, dtype=dtype)
    values[::2] *= -1
    values[:1000] = torch.finfo(dtype).max
    assert torch.equal(StoredTensors.open(write(tmp_path, {"x": values})).read("x"), values)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 65520.0), (torch.bfloat16, 3.4e38)])
def test_values_that_a_type_cannot_hold_are_refused(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    values = torch.ones(LARGE)
    values[1], values[-1] = value, -value
    stored = StoredTensors.open(write(tmp_path / "whole", {"x": values}))
    named = f"x has 2 of {LARGE} weights that are too large for {str(dtype).removeprefix('torch.')}"
    assert named in refused(lambda: stored.read("x", dtype=dtype), tmp_path)
    facts = {"x": ([LARGE], dtype)}
    with pytest.raises(UserError) as caught:
        write_tensors(tmp_path / "short", facts, lambda _: values)
    assert named in str(caught.value)
    assert not list((tmp_path / "short").iterdir())


@pytest.mark.parametrize("dtype", OTHERS)
def test_tensors_that_are_not_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = StoredTensors.open(write(tmp_path, {"x": torch.ones(3, dtype=dtype)}))
    message = refused(lambda: stored.read("x"), tmp_path)
    assert "x is stored as " in message
    assert message.endswith("supported: F64, F32, BF16, F16")
    assert "supported: F64" in refused(lambda: stored.read_into("x", torch.empty(3)), tmp_path)


def test_types_of_quantised_weights(tmp_path: Path) -> None:
    write_raw(tmp_path / WEIGHTS, {"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, b"1234")
    stored = StoredTensors.open(tmp_path)
    for action in (stored.read, stored.dtype, stored.read_unchecked):
        assert "x is stored as F8_E8M0; supported" in refused(lambda action=action: action("x"), tmp_path)
    values = torch.randn(5).to(torch.float8_e4m3fn)
    stored = StoredTensors.open(write(tmp_path, {"x": values}))
    assert "x is stored as F8_E4M3; supported" in refused(lambda: stored.read("x"), tmp_path)
    assert torch.equal(stored.read_unchecked("x").float(), values.float())


# Folders and files


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "no such model folder" in refused(lambda: StoredTensors.open(tmp_path / "absent"), tmp_path / "absent")
    assert "neither model.safetensors nor" in refused(lambda: StoredTensors.open(tmp_path), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = refused(lambda: StoredTensors.open(tmp_path), tmp_path)
    assert "Pickled weights (pytorch_model.bin) are not read" in message
    assert f"perennial convert {tmp_path} --pickled" in message


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    message = refused(lambda: StoredTensors.open(sharded), sharded)
    assert "There is model-00001-of-00003.safetensors, but no index" in message


def test_a_missing_shard_and_an_index_that_lies(sharded: Path, tmp_path: Path) -> None:
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert listed["t0"] == listed["t1"] != listed["t2"]
    first, second = listed["t0"], listed["t2"]

    def with_map(weight_map: Any) -> str:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refused(lambda: StoredTensors.open(sharded), sharded)

    assert f"lists t2 in {first}, which does not have it" in with_map({**listed, "t2": first})
    assert f"does not list t0, which is in {first}" in with_map({k: v for k, v in listed.items() if k != "t0"})
    many = {**listed, **{f"t{i}": first for i in range(6, 12)}}
    assert f"lists t10, t11, t6 and 3 more in {first}" in with_map(many)
    for file in (f"../{first}", f"/{first}", "x/y.safetensors", "config.json", "..", ""):
        assert "is not the name of a safetensors file" in with_map({**listed, "t0": file})
    for content in ([first], {}, {"t0": 3}, None, "x"):
        assert "must have a 'weight_map'" in with_map(content)
    for text in ("", "[]", "{", "\x00"):
        (sharded / INDEX).write_text(text)
        assert INDEX in refused(lambda: StoredTensors.open(sharded), sharded)
    long = "x" * 300 + ".safetensors"
    assert f"{long} is missing" in with_map({**listed, "t0": long})
    shutil.move(sharded / second, tmp_path / second)
    assert f"{second} is missing; {INDEX} lists 2 tensors in it" in with_map(listed)


def damaged(damage: str, content: bytes) -> bytes:
    """A file's content after an accident."""
    return {
        "empty": b"",
        "start only": content[:7],
        "header cut": content[:20],
        "data cut": content[:-1],
        "longer": content + b"\0",
        "header size": struct.pack("<Q", 1 << 62) + content[8:],
        "zeros": bytes(len(content)),
        "a git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    }[damage]


DAMAGES = ["empty", "start only", "header cut", "data cut", "longer", "header size", "zeros", "a git lfs pointer"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 80])
def test_a_damaged_file(damage: str, max_shard_bytes: float, tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": torch.ones(10) for i in range(4)}, max_shard_bytes)
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(damaged(damage, path.read_bytes()))
    message = refused(lambda: StoredTensors.open(tmp_path), path)
    assert "not a whole safetensors file" in message
    assert ("git lfs pull" in message) == (damage == "a git lfs pointer")


def test_a_file_that_is_cut_or_gone_after_opening(tmp_path: Path) -> None:
    stored = StoredTensors.open(write(tmp_path, {"x": torch.ones(LARGE), "y": torch.ones(3)}))
    path = tmp_path / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    assert "was cut" in refused(lambda: stored.read("x"), path)
    assert "was cut" in refused(lambda: stored.read_unchecked("y"), path)
    path.unlink()
    assert "cannot be read: No such file" in refused(lambda: stored.read("x"), path)


FILE_LENGTHS = st.integers(0, 80)
VALUES = st.one_of(st.integers(-(2**65), 2**65), st.integers(-2, 30), st.text(max_size=8), st.floats(), st.none())
ENTRIES = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "X"]), VALUES),
            "shape": st.one_of(st.lists(st.one_of(st.integers(0, 6), VALUES), max_size=3), VALUES),
            "data_offsets": st.one_of(st.lists(st.one_of(st.sampled_from([0, 4, 8, 24]), VALUES), max_size=3), VALUES),
            "more": VALUES,
        },
    ),
)
HEADERS = st.one_of(
    st.dictionaries(st.sampled_from(["x", "y", "__metadata__"]), ENTRIES, max_size=3).map(lambda h: json.dumps(h)),
    st.text(alphabet='{}[]":,0129xF3 ', max_size=60),
    st.sampled_from(
        [
            "[" * 5000,
            '{"x":' * 3000,
            '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[4,8]}}',
            '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            '{"x":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}',
            '{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        ]
    ),
)
FUZZ = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def agrees_with_the_library(folder: Path) -> None:
    """A file is refused, or every tensor in it is what the safetensors library says it is."""
    try:
        stored = StoredTensors.open(folder)
        found = {name: stored.read_unchecked(name) for name in stored.names}
    except UserError:
        return
    expected = load_file(folder / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@FUZZ
@given(header=HEADERS, length=FILE_LENGTHS)
def test_any_header_is_read_or_refused(header: str, length: int, tmp_path: Path) -> None:
    write_raw(tmp_path / WEIGHTS, header.encode("utf-8", "surrogatepass"), bytes(range(length)))
    agrees_with_the_library(tmp_path)


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_may_be_wrong(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(4).half(), "z": torch.arange(3)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (tmp_path / WEIGHTS).write_bytes(content)
    agrees_with_the_library(tmp_path)


@settings(FUZZ, max_examples=60)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(FLOATS + OTHERS)),
        min_size=1,
        max_size=8,
    ),
    max_shard_bytes=st.sampled_from([1, 100, 5e9]),
)
def test_any_tensors_agree_with_the_library(shapes: dict[str, Any], max_shard_bytes: float, tmp_path: Path) -> None:
    tensors = {name: (torch.rand(shape) * 100).to(dtype) for name, (shape, dtype) in shapes.items()}
    stored = StoredTensors.open(write(tmp_path, tensors, max_shard_bytes))
    assert sorted(stored.names) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(stored.read_unchecked(name), tensor)
        assert torch.equal(load_file(stored.path(name))[name], tensor)


# Writing


def test_shards_are_filled_in_order_and_indexed(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {f"t{i}": f"model-{i // 2 + 1:05d}-of-00003.safetensors" for i in range(6)}
    assert index["metadata"] == {"total_parameters": 60, "total_size": 240}


def test_each_tensor_is_converted_to_its_type(tmp_path: Path) -> None:
    asked: list[str] = []
    values = {"a": torch.randn(4, 6).T, "b": torch.randn(5), "c": torch.tensor([True, False])}

    def get(name: str) -> Tensor:
        asked.append(name)
        return values[name].requires_grad_(values[name].is_floating_point())

    facts = {"a": ([6, 4], torch.bfloat16), "b": ([5], torch.float16), "c": ([2], torch.bool)}
    write_tensors(tmp_path, facts, get)
    assert asked == ["a", "b", "c"]
    stored = StoredTensors.open(tmp_path)
    for name, (shape, dtype) in facts.items():
        assert (stored.shape(name), stored.dtype(name)) == (shape, dtype)
        assert torch.equal(stored.read_unchecked(name), values[name].detach().to(dtype))
    with pytest.raises(ValueError, match="b: has shape"):
        write_tensors(tmp_path, {"b": ([6], torch.float32)}, get)


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    tensors = {"whole": whole, "top": whole[:3], "bottom": whole[3:], "again": whole}
    stored = StoredTensors.open(write(tmp_path, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor)


def test_older_weights_do_not_stay_behind(sharded: Path) -> None:
    (sharded / "notes.txt").write_text("mine")
    write(sharded, {"x": torch.ones(3)})
    assert sorted(path.name for path in sharded.iterdir()) == [WEIGHTS, "notes.txt"]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    for mask, rights in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write(tmp_path / str(mask), some_tensors(), max_shard_bytes=1e6)
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / str(mask)).iterdir()} == {rights}


def test_a_file_that_does_not_fit_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The limit on file size stands for a full disk: the same path through safetensors."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from perennial.model.storage import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: write_tensors(Path(sys.argv[1]), {'x': ([99_999], torch.float32)}, lambda name: torch.ones(99_999))\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"27 {tmp_path / WEIGHTS}\n"
    assert not list(tmp_path.glob("*.safetensors"))


# Memory

MEASURE = """
import sys, torch
from pathlib import Path
from perennial.model.storage import StoredTensors, write_tensors

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

folder, dtype, action = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
stored = StoredTensors.open(folder)
small = torch.ones(1 << 18)
small.to(dtype).sum(), stored.read("last")  # what torch loads and starts at first use is not what is measured
before, anonymous = status("VmHWM"), status("RssAnon")
if action == "read":
    model = {name: stored.read(name, dtype=dtype) for name in stored.names}
else:
    model = {name: torch.empty(stored.shape(name), dtype=dtype) for name in stored.names}
    for name, out in model.items():
        stored.read_into(name, out)
size = sum(tensor.numel() * tensor.itemsize for tensor in model.values())
print((status("VmHWM") - before) / size, (status("RssAnon") - anonymous) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize(("stored", "action"), [("float32", "read"), ("bfloat16", "read_into")])
def test_weights_are_never_held_twice(stored: str, action: str, tmp_path: Path) -> None:
    """The embedding is more than half: a second copy of even one tensor would show."""
    dtype = getattr(torch, stored)
    number = 100_000_000 // 4
    tensors = {"embedding": torch.ones(number * 6 // 10, dtype=dtype)}
    tensors |= {f"layers.{i}": torch.ones(number // 25, dtype=dtype) for i in range(10)}
    write(tmp_path, {**tensors, "last": torch.ones(10, dtype=dtype)})
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "float32", action]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, anonymous = map(float, done.stdout.split())
    assert peak < 1.2, f"peak {peak:.3f} times the weights"
    assert anonymous < 1.2, f"{anonymous:.3f} times the weights stay"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_writing_holds_no_more_than_a_shard(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from perennial.model.storage import write_tensors\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "facts = {f't{i}': ([1000, 1000], torch.bfloat16) for i in range(40)}\n"
        "write_tensors(Path(sys.argv[1]), {'x': ([9], torch.bfloat16)}, lambda name: torch.ones(9)); before = peak()\n"
        "write_tensors(Path(sys.argv[1]), facts, lambda name: torch.ones(1000, 1000), max_shard_bytes=10e6)\n"
        "print((peak() - before) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6  # a shard of 10 MB and a tensor before its conversion; all of it is 80 MB


def test_the_library_reads_files_where_it_agrees_that_they_are_whole(tmp_path: Path) -> None:
    """What the fuzz tests lean on: the library does raise its own error for a header that lies."""
    write_raw(tmp_path / WEIGHTS, {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234")
    with pytest.raises(SafetensorError):
        load_file(tmp_path / WEIGHTS)
