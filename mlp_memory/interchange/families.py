"""config.json of the model families, in and out.

One decoder serves all of them; what tells them apart is in `DecoderConfig`. A setting that
would change the computation and that the decoder does not have is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.interchange.layout import OWN
from mlp_memory.memory.config import MemoryConfig

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# What a family takes where its config.json is silent, other than what all of them take.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
}


class _Settings:
    """A config.json whose settings are asked for by name."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self._config, self._defaults, self._where = config, defaults, where

    def get(self, name: str, default: Any = None) -> Any:
        return self._config.get(name, self._defaults.get(name, default))

    def need(self, name: str) -> Any:
        """Raises `UserError` where it is not given."""
        value = self.get(name)
        if value is None:
            raise UserError(f"{self._where}: {name} is missing: fetch the model's own config.json")
        return value

    def only(self, name: str, *allowed: Any, default: Any = None) -> None:
        """Raises `UserError` where a setting asks for what the decoder does not do."""
        value = self.get(name, default)
        if value not in allowed:
            shown = ", ".join(map(repr, allowed))
            raise UserError(f"{self._where}: {name} = {value!r} is not supported, only {shown}")


def read_config(config: Mapping[str, Any], where: str) -> tuple[str, DecoderConfig]:
    """The family and shape that a Hugging Face config.json describes.

    Args:
      config: the file's content.
      where: its name, for messages.

    Raises:
      UserError: another architecture, or a setting that the decoder does not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    settings = _Settings(config, _DEFAULTS[family], where)
    try:
        return family, _gpt2(settings) if family == "gpt2" else _llama_like(family, settings)
    except (UserError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where} describes no model: {error}") from error


def _gpt2(s: _Settings) -> DecoderConfig:
    s.only("activation_function", *_TANH_GELU, default="gelu_new")
    s.only("scale_attn_weights", True, default=True)
    s.only("scale_attn_by_inverse_layer_idx", False, default=False)
    s.only("add_cross_attention", False, default=False)
    return DecoderConfig(
        layers=s.need("n_layer"),
        dim=s.need("n_embd"),
        heads=s.need("n_head"),
        ffn_dim=s.get("n_inner") or 4 * s.need("n_embd"),
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias="all",
        tied=bool(s.get("tie_word_embeddings")),
        max_positions=s.get("n_positions", s.get("n_ctx", 1024)),
        norm_epsilon=float(s.get("layer_norm_epsilon", 1e-5)),
        vocab_size=s.need("vocab_size"),
    )


def _llama_like(family: str, s: _Settings) -> DecoderConfig:
    s.only("hidden_act", "silu", default="silu")
    s.only("partial_rotary_factor", 1, None, default=None)
    layers, heads = s.need("num_hidden_layers"), s.need("num_attention_heads")
    dim = s.need("hidden_size")
    window, window_from = _window(family, s, layers)
    head_size = s.get("head_dim") or 0
    return DecoderConfig(
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=s.get("num_key_value_heads") or 0,
        head_size=0 if head_size * heads == dim else head_size,
        ffn_dim=s.need("intermediate_size"),
        norm="rmsnorm",
        positions="rotary",
        activation="swiglu",
        bias=_bias(family, s),
        qk_norm=family == "qwen3",
        window=window,
        window_from=window_from,
        tied=bool(s.get("tie_word_embeddings", False)),
        max_positions=s.get("max_position_embeddings", 2048),
        norm_epsilon=float(s.get("rms_norm_eps", 1e-6)),
        vocab_size=s.need("vocab_size"),
        **_rope(s),
    )


def _bias(family: str, s: _Settings) -> str:
    if family == "qwen2":
        return "qkv"
    if family == "mistral":
        return "none"
    attention = bool(s.get("attention_bias", False))
    s.only("mlp_bias", *((False, True) if attention and family == "llama" else (False,)), default=False)
    if not attention:
        return "none"
    return "all" if s.get("mlp_bias", False) else "attention"


def _window(family: str, s: _Settings, layers: int) -> tuple[int, int]:
    """Size of the sliding window and the first layer that has it."""
    window = s.get("sliding_window") or 0
    if family == "llama" or (family != "mistral" and not s.get("use_sliding_window", False)):
        window = 0
    first = 0 if family == "mistral" else s.get("max_window_layers", 0)
    if types := s.get("layer_types"):
        first = types.index("sliding_attention") if "sliding_attention" in types else layers
        wanted = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        s.only("layer_types", wanted)
    return (window, first) if window and first < layers else (0, 0)


def _rope(s: _Settings) -> dict[str, Any]:
    """Rotary settings, in the older form (rope_theta, rope_scaling) or the newer (rope_parameters)."""
    given = s.get("rope_parameters") or s.get("rope_scaling") or {}
    found = {"rope_base": float(given.get("rope_theta", s.get("rope_theta", 10000.0)))}
    rope = _Settings(given, {}, f"{s._where}: rope scaling")
    kind = given.get("rope_type", given.get("type", "default"))
    rope.only("partial_rotary_factor", 1, None)
    if kind == "default":
        return found
    if kind not in ("linear", "llama3"):
        raise UserError(f"{s._where}: rope scaling {kind!r} is not supported, only 'linear' and 'llama3'")
    found |= {"rope_scaling": kind, "rope_factor": float(rope.need("factor"))}
    if kind == "llama3":
        found |= {
            "rope_low_factor": float(rope.need("low_freq_factor")),
            "rope_high_factor": float(rope.need("high_freq_factor")),
            "rope_original": rope.need("original_max_position_embeddings"),
        }
    return found


def family_of(config: DecoderConfig) -> str:
    """The family that computes what this shape computes; "mlp_memory" where there is none."""
    c = config
    plain = not (c.qk_norm or c.window or c.head_size) and c.num_kv_heads == c.heads
    if (c.norm, c.positions, c.activation, c.bias) == ("layernorm", "learned", "gelu", "all") and plain:
        return "gpt2"
    if (c.norm, c.positions, c.activation) != ("rmsnorm", "rotary", "swiglu"):
        return OWN
    if c.qk_norm:
        return "qwen3" if c.bias in ("none", "attention") else OWN
    if c.bias == "qkv":
        return "qwen2" if not c.head_size else OWN
    if c.window:
        return "mistral" if c.bias == "none" and not c.window_from else OWN
    return "llama"


def write_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """config.json of a decoder, for `transformers` where the family is one of its own.

    Args:
      config: the shape.
      dtype: of the weights.
    """
    family = family_of(config)
    if family == OWN:
        return {"model_type": OWN, "dtype": dtype, **dataclasses.asdict(config)}
    common = {
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
    }
    if family == "gpt2":
        return {
            **common,
            "n_layer": config.layers,
            "n_embd": config.dim,
            "n_head": config.heads,
            "n_inner": config.hidden_dim,
            "n_positions": config.max_positions,
            "n_ctx": config.max_positions,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": "gelu_new",
        }
    return {
        **common,
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        **_write_rope(config),
        **_write_window(family, config),
        **_write_bias(family, config),
    }


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": config.rope_base, "rope_scaling": None}
    if config.rope_scaling != "none":
        found["rope_scaling"] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        found["rope_scaling"] |= {
            "low_freq_factor": config.rope_low_factor,
            "high_freq_factor": config.rope_high_factor,
            "original_max_position_embeddings": config.rope_original,
        }
    return found


def _write_window(family: str, config: DecoderConfig) -> dict[str, Any]:
    if family == "llama":
        return {}
    found: dict[str, Any] = {"sliding_window": config.window or None}
    if family != "mistral":
        found |= {"use_sliding_window": config.window > 0, "max_window_layers": config.layers}
        if config.window:
            found["max_window_layers"] = config.window_from
    return found


def _write_bias(family: str, config: DecoderConfig) -> dict[str, Any]:
    if family == "llama":
        return {"attention_bias": config.bias in ("attention", "all"), "mlp_bias": config.bias == "all"}
    return {"attention_bias": config.bias == "attention"} if family == "qwen3" else {}


def read_memory_config(
    config: Mapping[str, Any], specs: Mapping[str, tuple[int, ...]], where: str
) -> MemoryConfig:
    """The shape of a memory in the reference layout, from its tensors; what config.json says must agree.

    Args:
      config: config.json.
      specs: shapes by tensor name.
      where: its name, for messages.

    Raises:
      UserError: neither style, or config.json says otherwise.
    """
    style = "gpt2" if any(name.startswith("h.") for name in specs) else "llama"
    first = {"gpt2": "h.0.mlp.c_fc.weight", "llama": "layers.0.mlp.down_proj.weight"}[style]
    for name in (first, "lm_head.weight"):
        if len(specs.get(name, ())) != 2:
            raise UserError(
                f"{where}: tensor {name!r} of shape {specs.get(name, 'none')} where a memory has a matrix: "
                "give a decoder's or a memory's folder"
            )
    dim, hidden = specs[first]  # [in, out] in GPT-2's style; down_proj is [dim, hidden] in Llama's
    numbers = {name.split(".")[1] for name in specs if name.startswith(("h.", "layers."))}
    layers = len(numbers)
    if numbers != {str(i) for i in range(layers)}:
        raise UserError(f"{where}: its layers are not 0 to {layers - 1}: fetch it again")
    vocab_size = specs["lm_head.weight"][0]
    input_dim = specs.get("embedding_transform.weight", (dim, dim))[-1]
    names = {
        "gpt2": ("n_layer", "n_embd", "n_inner", "layer_norm_epsilon"),
        "llama": ("num_hidden_layers", "hidden_size", "intermediate_size", "rms_norm_eps"),
    }[style]
    for name, value in zip((*names[:3], "vocab_size"), (layers, dim, hidden, vocab_size)):
        if config.get(name) not in (None, value):
            raise UserError(
                f"{where}: {name} = {config[name]!r}, its tensors say {value}: use the right config"
            )
    _Settings(config, {}, where).only("activation_function", None, *_TANH_GELU)
    _Settings(config, {}, where).only("hidden_act", None, "silu")
    epsilon = config.get(names[3]) or (1e-5 if style == "gpt2" else 1e-6)
    if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise UserError(f"{where}: {names[3]} = {epsilon!r} is no small number: use the right config")
    return MemoryConfig(
        style=style,
        layers=layers,
        dim=dim,
        ffn_dim=hidden,
        norm_epsilon=float(epsilon),
        input_dim=input_dim,
        vocab_size=vocab_size,
    )


def write_memory_config(config: MemoryConfig, dtype: str) -> dict[str, Any]:
    """config.json of a memory in the reference layout."""
    common = {
        "model_type": config.style,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "input_dim": config.input_dim,
        "tie_word_embeddings": False,
    }
    if config.style == "gpt2":
        return {
            **common,
            "n_layer": config.layers,
            "n_embd": config.dim,
            "n_inner": config.hidden_dim,
            "n_head": 1,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": "gelu_new",
            "resid_pdrop": config.dropout,
        }
    return {
        **common,
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": 1,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
    }
