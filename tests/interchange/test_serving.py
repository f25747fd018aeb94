"""The serving export, run by a process that has no model code of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.decoder.config import Tap
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import Steps, generate
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters
from mlp_memory.interchange.serving import export_serving
from mlp_memory.joint.gate import Gate
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

SPECIAL = {"bos": 1, "eos": 2}
# Refuses our package, wherever it may be found, and says what the model answers.
SCRIPT = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlp_memory":
            raise ImportError("there is no " + name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import served
model = served.Model(sys.argv[1])
print(json.dumps([model.generate(*call) for call in json.loads(sys.argv[2])]))
assert "mlp_memory" not in sys.modules and "flax" not in sys.modules
"""


def serve(folder: Path, calls: list) -> list:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def here(mixture: Mixture, prompts: list, config: GenerateConfig) -> list:
    texts = [[] for _ in prompts]
    for found in generate(Steps(mixture, Filters.of(config)), prompts, SPECIAL["eos"], config):
        for row, token in found:
            texts[row].append(token)
    return texts


@pytest.fixture
def mixture(make_decoder, decoder_config, randomize, rng) -> Mixture:
    shape = MemoryConfig(
        "llama", 2, 8, 16, input_dim=decoder_config.dim, vocab_size=decoder_config.vocab_size
    )
    memory, signals = randomize(lambda: Memory(shape, nnx.Rngs(0))), 4 + decoder_config.dim
    parts = (*rng.normal(size=(3, signals)), 0.3, 0.9)
    gate = Gate(*(np.abs(part).astype(np.float32) + 0.1 for part in parts))
    return Mixture(make_decoder(decoder_config), memory, gate, Tap(0, "residual"))


def test_a_process_without_this_package_says_the_same_tokens(mixture, tmp_path, rng):
    vocabulary = mixture.config.vocab_size
    prompts = [rng.integers(0, vocabulary, n).tolist() for n in (5, 1, 3)]
    drawn = GenerateConfig(max_tokens=6, temperature=0.8, top_k=9, repetition_penalty=1.3)
    for name, config in (("greedy", GenerateConfig(max_tokens=6)), ("drawn", drawn)):
        export_serving(Directory(tmp_path / name), mixture, config, 3, 7, SPECIAL)
        facts = json.loads((tmp_path / name / "serving.json").read_text())
        assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    wanted = here(mixture, prompts, GenerateConfig(max_tokens=6))
    found = serve(tmp_path / "greedy", [[prompts], [prompts[:1]], [prompts, 2], [[*prompts, prompts[1]]]])
    assert found[0] == wanted
    assert found[1] == wanted[:1]
    assert found[2] == [text[:2] for text in wanted]
    assert found[3] == [*wanted, wanted[1]]
    seeds = [here(mixture, prompts, GenerateConfig(**{**vars(drawn), "seed": seed})) for seed in (0, 5)]
    assert seeds[0] != seeds[1]
    assert serve(tmp_path / "drawn", [[prompts, None, seed] for seed in (0, 5)]) == seeds


def test_what_the_loader_cannot_do_is_one_line(mixture, tmp_path):
    export_serving(Directory(tmp_path), mixture, GenerateConfig(max_tokens=3), 2, 4, SPECIAL, ("cpu",))

    def refused(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, tmp_path / "served.py", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        )
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        return line

    assert "prompt 0 has 5 tokens: give 1 to 4" in refused("--prompt=1 1 1 1 1")
    assert "outside 0 to" in refused("--prompt=9999")
    weights = (tmp_path / "weights.safetensors").read_bytes()
    for damaged in (weights[:-4], weights[:-1] + bytes([weights[-1] ^ 1])):
        (tmp_path / "weights.safetensors").write_bytes(damaged)
        assert "is not what was exported" in refused("--prompt=1")
    (tmp_path / "step.stablehlo").unlink()
    assert "step.stablehlo cannot be read" in refused("--prompt=1")


@pytest.mark.parametrize(
    ("config", "batch", "prompt_tokens", "words"),
    [
        (GenerateConfig(beams=2), 1, 4, "beams"),
        (GenerateConfig(stop=("x",)), 1, 4, "stop texts"),
        (GenerateConfig(), 0, 4, "batch = 0"),
        (GenerateConfig(), 1, 0, "prompt_tokens = 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(mixture, tmp_path, config, batch, prompt_tokens, words):
    with pytest.raises(UserError, match=words):
        export_serving(Directory(tmp_path), mixture, config, batch, prompt_tokens, SPECIAL)
    assert not list(tmp_path.iterdir())


def test_learned_positions_bound_the_room(make_decoder, decoders, tmp_path):
    mixture = Mixture(make_decoder(decoders["gpt2"]), None, 0.0, Tap())
    with pytest.raises(UserError, match="positions: lower one"):
        export_serving(
            Directory(tmp_path), mixture, GenerateConfig(), 1, decoders["gpt2"].max_positions, SPECIAL
        )
