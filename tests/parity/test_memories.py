"""Memories in the reference layout against torch modules with those names (make parity)."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from mlp_memory.artifacts import Directory
from mlp_memory.interchange.export import export_model
from mlp_memory.interchange.source import load, open_source
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

DIM, VOCAB, LAYERS = 24, 53, 3


class Gpt2Block(torch.nn.Module):
    def __init__(self, config: transformers.GPT2Config):
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config.n_inner, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.ln_1(x))


class LlamaBlock(torch.nn.Module):
    def __init__(self, config: transformers.LlamaConfig):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.input_layernorm(x))


class TorchMemory(torch.nn.Module):
    """The reference layout: its names are the attributes' names."""

    def __init__(self, style: str, input_dim: int):
        super().__init__()
        if style == "gpt2":
            self.config = transformers.GPT2Config(
                n_embd=DIM, n_layer=LAYERS, n_inner=40, n_head=1, vocab_size=VOCAB, layer_norm_epsilon=1e-3
            )
            self.h = torch.nn.ModuleList(Gpt2Block(self.config) for _ in range(LAYERS))
            self.ln_f = torch.nn.LayerNorm(DIM, eps=1e-3)
        else:
            self.config = transformers.LlamaConfig(
                hidden_size=DIM,
                intermediate_size=40,
                num_hidden_layers=LAYERS,
                num_attention_heads=1,
                vocab_size=VOCAB,
                rms_norm_eps=1e-3,
            )
            self.layers = torch.nn.ModuleList(LlamaBlock(self.config) for _ in range(LAYERS))
            self.norm = LlamaRMSNorm(DIM, 1e-3)
        if input_dim != DIM:
            self.embedding_transform = torch.nn.Linear(input_dim, DIM)
        self.lm_head = torch.nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding_transform(x) if hasattr(self, "embedding_transform") else x
        for block in self.h if hasattr(self, "h") else self.layers:
            x = block(x)
        return self.lm_head(self.ln_f(x) if hasattr(self, "ln_f") else self.norm(x))


def our_logits(memory: Memory, h_NxD: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda h: memory(h) @ memory.head_kernel())(h_NxD))


@pytest.mark.parametrize("input_dim", [DIM, 17])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_memory_in_the_reference_layout_loads_and_gives_its_logits(style, input_dim, tmp_path, mesh, rng):
    theirs = TorchMemory(style, input_dim).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.2 * torch.randn_like(value))
    theirs.config.save_pretrained(tmp_path)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    h_NxD = rng.normal(size=(9, input_dim)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(h_NxD)).numpy()
    found = our_logits(load(open_source(str(tmp_path)), mesh), h_NxD)
    print(f"{style}: largest difference {np.abs(found - wanted).max():.2e}")
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("input_dim", [DIM, 17])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_memory_made_here_loads_there_by_name_and_gives_its_logits(
    style, input_dim, randomize, tmp_path, rng
):
    config = MemoryConfig(style, LAYERS, DIM, 40, 0.0, 1e-3, input_dim, VOCAB)
    memory = randomize(lambda: Memory(config, nnx.Rngs(0)))
    export_model(Directory(tmp_path / "m"), memory, {"tap": {"layer": -1, "kind": "ffn_input"}}, {}, {})
    theirs = TorchMemory(style, input_dim).eval()
    theirs.load_state_dict(load_file(tmp_path / "m/model.safetensors"), strict=True)
    h_NxD = rng.normal(size=(9, input_dim)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(h_NxD)).numpy()
    np.testing.assert_allclose(our_logits(memory, h_NxD), wanted, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "m/mlp_memory.json").read_text())["tap"]["layer"] == -1
