"""Loading a whole model holds its weights once, whatever the layout they are stored in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perennial.model.config import ModelConfig
from perennial.model.huggingface import save_model
from perennial.model.transformer import Transformer, initialise
from tests.model.models import VARIANTS

MEASURE = """
import sys
from pathlib import Path
from perennial.core.environment import tune_process
from perennial.model.huggingface import load_model

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))

tune_process()  # as every command does
load_model(Path(sys.argv[1]))  # what torch loads and starts at first use is not what is measured
before = peak()
model = load_model(Path(sys.argv[2]))
print((peak() - before) / sum(4 * parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_bf16_folder_is_loaded_into_fp32_without_a_second_copy(family: str, tmp_path: Path) -> None:
    """About 100 MB in fp32; less than 1.2 times that at the fullest moment."""
    shape = {"width": 512, "heads": 8, "mlp_width": 2048, "context": 128}
    for name, layers, vocabulary in (("small", 1, 100), ("large", 7, 8000)):
        sizes = {**shape, "layers": layers, "vocabulary_size": vocabulary}
        config = ModelConfig.model_validate({**VARIANTS[family], **sizes})
        save_model(initialise(Transformer(config), 0), tmp_path / name, dtype=torch.bfloat16)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2
