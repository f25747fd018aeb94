"""Every decoder family against `transformers`: logits, export, bytes (make parity)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from mlp_memory.artifacts import Directory
from mlp_memory.interchange import families
from mlp_memory.interchange.export import export_model
from mlp_memory.interchange.source import load, open_source

LENGTH, VOCAB = 64, 199
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 128,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 96}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(**_GPT2),
    "gpt2 untied, other width": transformers.GPT2Config(**_GPT2, tie_word_embeddings=False, n_inner=72),
    "llama": transformers.LlamaConfig(**_LLAMA),
    "llama tied GQA (SmolLM2)": transformers.LlamaConfig(
        **{**_LLAMA, "num_key_value_heads": 2, "rope_theta": 100000.0, "tie_word_embeddings": True}
    ),
    "llama MQA": transformers.LlamaConfig(**{**_LLAMA, "num_key_value_heads": 1}),
    "llama 3.1 rope": transformers.LlamaConfig(**_LLAMA, rope_scaling=_LLAMA3, rope_theta=500000.0),
    "llama linear rope": transformers.LlamaConfig(
        **_LLAMA, rope_scaling={"rope_type": "linear", "factor": 3.0}
    ),
    "llama attention biases": transformers.LlamaConfig(**_LLAMA, attention_bias=True),
    "llama all biases": transformers.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "llama head_dim": transformers.LlamaConfig(**_LLAMA, head_dim=12),
    "mistral window": transformers.MistralConfig(
        **{**_LLAMA, "num_key_value_heads": 2}, sliding_window=16, tie_word_embeddings=False
    ),
    "mistral no window": transformers.MistralConfig(
        **{**_LLAMA, "num_key_value_heads": 3}, sliding_window=None, tie_word_embeddings=True
    ),
    "qwen2 tied": transformers.Qwen2Config(**{**_LLAMA, "num_key_value_heads": 2}, tie_word_embeddings=True),
    "qwen2 untied": transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=False),
    "qwen2 window from layer 1": transformers.Qwen2Config(
        **_LLAMA, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3 tied": transformers.Qwen3Config(
        **{**_LLAMA, "num_key_value_heads": 2}, head_dim=16, tie_word_embeddings=True
    ),
    "qwen3 untied, biases": transformers.Qwen3Config(**_LLAMA, head_dim=8, attention_bias=True),
}


def random_model(config: transformers.PretrainedConfig, rng: np.random.Generator) -> torch.nn.Module:
    """A model in which no bias is 0 and no norm's weight is 1."""
    torch.manual_seed(int(rng.integers(1 << 31)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
            elif "weight" in name:
                value.copy_(0.08 * torch.randn_like(value))
    return model


def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(model: object, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model.logits(model(tokens)[0]))(tokens))


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                value = opened.get_tensor(name).contiguous()
                found[name] = str(value.shape).encode() + value.view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path, mesh, rng):
    theirs = random_model(CONFIGS[name], rng)
    theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB" if rng.random() < 0.5 else "5GB")
    tokens = rng.integers(0, VOCAB, (2, LENGTH))
    wanted = their_logits(theirs, tokens)
    assert wanted.std() > 0.1
    source = open_source(str(tmp_path / "m"))
    model = load(source, mesh)
    difference = np.abs(our_logits(model, tokens) - wanted).max()
    print(f"{name}: largest difference {difference:.2e} of logits up to {np.abs(wanted).max():.2f}")
    assert difference < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_imported_goes_out_with_the_same_bytes_and_logits(name, dtype, tmp_path, mesh, rng):
    random_model(CONFIGS[name], rng).to(getattr(torch, dtype)).save_pretrained(tmp_path / "m")

    def loaded(folder: Path) -> torch.nn.Module:
        # Not the model in memory: `.to(bfloat16)` rounds its rotary table, loading does not.
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=getattr(torch, dtype)
        )

    theirs = loaded(tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    model = load(source, mesh)
    for step, original in (("own config", None), ("their config", source.original)):
        folder = tmp_path / step.replace(" ", "_")
        export_model(Directory(folder), model, {}, {}, {}, original)
        assert tensors(folder) == tensors(tmp_path / "m"), step
        assert open_source(str(folder)).config == source.config, step
        tokens, again = rng.integers(0, VOCAB, (2, LENGTH)), loaded(folder)
        # Mistral without a window computes what Llama computes, and goes out as Llama.
        assert type(again) is type(theirs) or (name, step) == ("mistral no window", "own config")
        np.testing.assert_array_equal(their_logits(again, tokens), their_logits(theirs, tokens), err_msg=step)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3"])
def test_decoders_made_here_load_in_transformers(name, decoders, make_decoder, tmp_path, rng):
    model = make_decoder(decoders[name])
    assert families.family_of(model.config) != "mlp_memory"
    export_model(Directory(tmp_path / "m"), model, {}, {}, {"eos_token_id": 3})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    tokens = rng.integers(0, model.config.vocab_size, (2, 20))
    assert np.abs(our_logits(model, tokens) - their_logits(theirs, tokens)).max() < 1e-3
    assert json.loads((tmp_path / "m/config.json").read_text())["eos_token_id"] == 3
