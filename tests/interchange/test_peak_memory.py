"""What an import holds in memory, by the real command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

REPOSITORY = Path(__file__).parents[2]
# The command, with the peak of its own resident size at the end.
PROGRAM = """
import re, sys
from mlp_memory.__main__ import main
main()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def write_llama(folder: Path, layers: int, dim: int, hidden: int, rng: np.random.Generator) -> int:
    """A Llama in bfloat16 -> bytes of its tensors."""

    def values(*shape: int) -> np.ndarray:
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & 0xBFFF  # below 2
        return bits.view(ml_dtypes.bfloat16).reshape(shape)

    tensors = {"model.embed_tokens.weight": values(256, dim), "model.norm.weight": values(dim)}
    for i in range(layers):
        for name, shape in (
            *((f"self_attn.{part}_proj", (dim, dim)) for part in "qkvo"),
            *((f"mlp.{part}_proj", (hidden, dim)) for part in ("gate", "up")),
            ("mlp.down_proj", (dim, hidden)),
            ("input_layernorm", (dim,)),
            ("post_attention_layernorm", (dim,)),
        ):
            tensors[f"model.layers.{i}.{name}.weight"] = values(*shape)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_attention_heads": 8,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_of_import(folder: Path, workdir: Path) -> int:
    words = ["import", f"--from={folder}", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_import_holds_the_model_and_a_parameter_and_no_second_model(tmp_path, rng):
    size = write_llama(tmp_path / "large", 24, 768, 3072, rng)
    write_llama(tmp_path / "small", 1, 64, 64, rng)
    without = peak_of_import(tmp_path / "small", tmp_path / "w")
    peak = peak_of_import(tmp_path / "large", tmp_path / "v") - without
    largest = 24 * 768 * 3072 * 2
    print(f"model {size / 1e6:.0f} MB, largest parameter {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert size < peak < 1.85 * size
