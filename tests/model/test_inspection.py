"""What a folder stores, read from headers alone: without torch, and what is wrong said by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from perennial.core.errors import UserError
from perennial.model.inspection import TensorHeader, raw_config, stored_tensors, values_by_dtype, weight_files


def sharded(folder: Path) -> None:
    """Two shards with their index, and a file that is none of the model's."""
    one, two, other = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / one)
    save_file({"b": np.zeros(4, np.float16)}, folder / two)
    save_file({"c": np.zeros(4, np.float32)}, folder / other)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": two, "a": one}}))


def test_tensors_of_a_sharded_folder(tmp_path: Path) -> None:
    sharded(tmp_path)
    files = weight_files(tmp_path)
    assert [path.name for path in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = stored_tensors(files)
    assert tensors == {"a": TensorHeader((2, 3), "F32"), "b": TensorHeader((4,), "F16")}
    assert values_by_dtype(tensors) == {"F32": 6, "F16": 4}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        weight_files(tmp_path)
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        weight_files(tmp_path)


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"words")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        stored_tensors(weight_files(tmp_path))


def test_pickles_are_listed_but_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    assert stored_tensors(weight_files(tmp_path)) == {}


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a model configuration"):
        raw_config(tmp_path)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    script = (
        "import sys, pathlib; from perennial.model.inspection import *; "
        "print(stored_tensors(weight_files(pathlib.Path(sys.argv[1]))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "TensorHeader(shape=(2,), dtype='F32')" in done.stdout
    assert done.stdout.split()[-1] == "False"
