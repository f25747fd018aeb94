"""The shape of a decoder, where its hidden state is tapped, and how it is pretrained."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_choice, check_positive, check_whole
from mlp_memory.training.config import TrainConfig


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class Tap:
    """Which hidden state of the decoder is the key and the memory's input.

    Attributes:
      layer: index of the layer; negative counts from the end.
      kind: "ffn_input" (input of that layer's feed-forward, after its norm) or
        "residual" (the stream as it leaves that layer).
    """

    layer: int = -1
    kind: str = "ffn_input"

    def __post_init__(self):
        require(
            self.kind in ("ffn_input", "residual"), f"tap kind {self.kind!r}: use 'ffn_input' or 'residual'"
        )
        require(isinstance(self.layer, int), f"tap layer {self.layer!r}: give a whole number")

    def index(self, layers: int) -> int:
        """The layer counted from the front.

        Raises:
          UserError: no such layer.
        """
        require(
            -layers <= self.layer < layers,
            f"tap layer {self.layer} is outside a decoder of {layers} layers (0..{layers - 1}, or negative)",
        )
        return self.layer % layers


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm causal transformer.

    Attributes:
      layers, dim, heads: depth, width of the residual stream, query heads.
      kv_heads: key/value heads; 0 for as many as query heads.
      head_size: width of a head; 0 for dim / heads.
      ffn_dim: hidden width of the feed-forward; 0 for 4·dim (GELU) or 8/3·dim (SwiGLU),
        the latter rounded up to a multiple of 16.
      norm: "rmsnorm" or "layernorm".
      positions: "rotary" or "learned".
      activation: "swiglu" or "gelu".
      bias: which linear layers have one: "none", "qkv" (Qwen2), "attention" (its output
        too) or "all" (GPT-2).
      qk_norm: RMSNorm over each head's query and key before rotation (Qwen3).
      window: a position sees itself and the window − 1 before it (Mistral); 0 for all.
      window_from: the first layer that `window` holds for.
      tied: the head is the token embedding, transposed.
      max_positions: longest context with learned positions.
      rope_base: of the rotation's wavelengths.
      rope_scaling: "none", "linear" (all wavelengths times rope_factor) or "llama3" (long
        ones times rope_factor, those below rope_original / rope_high_factor as they are, and
        a smooth passage between, from rope_original / rope_low_factor on).
      rope_original: context the model was first trained on.
      vocab_size: 0 takes the corpus vocabulary's.
    """

    layers: int = 4
    dim: int = 192
    heads: int = 6
    kv_heads: int = 0
    head_size: int = 0
    ffn_dim: int = 0
    norm: str = "rmsnorm"
    positions: str = "rotary"
    activation: str = "swiglu"
    bias: str = "none"
    qk_norm: bool = False
    window: int = 0
    window_from: int = 0
    tied: bool = False
    max_positions: int = 1024
    rope_base: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    rope_original: int = 8192
    norm_epsilon: float = 1e-5
    vocab_size: int = 0

    def __post_init__(self):
        check_whole(self, dict.fromkeys(("layers", "dim", "heads", "max_positions", "rope_original"), 1))
        check_whole(
            self,
            dict.fromkeys(("kv_heads", "head_size", "ffn_dim", "vocab_size", "window", "window_from"), 0),
        )
        check_positive(
            self, "norm_epsilon", "rope_base", "rope_factor", "rope_low_factor", "rope_high_factor"
        )
        check_choice(
            self,
            {
                "norm": ("rmsnorm", "layernorm"),
                "positions": ("rotary", "learned"),
                "activation": ("swiglu", "gelu"),
                "bias": ("none", "qkv", "attention", "all"),
                "rope_scaling": ("none", "linear", "llama3"),
            },
        )
        require(
            self.head_size or self.dim % self.heads == 0,
            f"decoder.dim = {self.dim} does not divide by heads = {self.heads}: change one or give head_size",
        )
        require(
            self.heads % self.num_kv_heads == 0,
            f"decoder.heads = {self.heads} does not divide by kv_heads = {self.kv_heads}",
        )
        require(
            self.rope_scaling != "llama3" or self.rope_low_factor < self.rope_high_factor,
            f"decoder.rope_low_factor = {self.rope_low_factor} must be less than "
            f"rope_high_factor = {self.rope_high_factor}",
        )
        require(
            self.positions != "rotary" or self.head_dim % 2 == 0,
            f"rotary positions need an even head size, not {self.head_dim}",
        )

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Width inside the feed-forward."""
        return self.ffn_dim or default_ffn_dim(self.dim, self.activation)

    def with_vocabulary(self, size: int) -> "DecoderConfig":
        """This shape over a vocabulary of `size`.

        Raises:
          UserError: the config names a smaller one.
        """
        require(
            self.vocab_size in (0, size) or self.vocab_size > size,
            f"decoder.vocab_size = {self.vocab_size} is smaller than the corpus vocabulary's {size} pieces: "
            "leave it 0 or raise it",
        )
        return dataclasses.replace(self, vocab_size=max(self.vocab_size, size))

    def matmul_parameters(self) -> int:
        """Weights that multiply once per token (embedding look-ups and norms left out)."""
        attention = self.dim * self.head_dim * (2 * self.heads + 2 * self.num_kv_heads)
        return self.layers * (attention + self.ffn_parameters()) + self.dim * self.vocab_size

    def ffn_parameters(self) -> int:
        """Those of one layer's feed-forward."""
        return self.dim * self.hidden_dim * (3 if self.activation == "swiglu" else 2)

    def train_flops(self, tokens: int, context: int) -> int:
        """FLOPs of training on `tokens` tokens: 6 per weight and token, and attention's
        two products over the whole context, forward and backward."""
        attention = 2 * 2 * context * self.heads * self.head_dim * self.layers
        return 3 * tokens * (2 * self.matmul_parameters() + attention)


def default_ffn_dim(dim: int, activation: str) -> int:
    """4·dim for GELU; 8/3·dim rounded up to a multiple of 16 for SwiGLU (as many weights)."""
    return 4 * dim if activation == "gelu" else -(-(8 * dim) // (3 * 16)) * 16


@dataclasses.dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Training of a language model; one step reads batch_size windows of `context` tokens."""

    context: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, {"context": 2})


def equal_parameters(base: DecoderConfig, parameters: int) -> DecoderConfig:
    """A decoder like `base` with as close to `parameters` parameters as its shape allows.

    Same width, heads and vocabulary, untied head; depth first (as many layers as fit), then
    the feed-forward's width takes up the rest.
    """
    best = None
    for layers in range(1, 4 * max(1, parameters // max(1, base.dim * base.dim)) + 2):
        for step in range(1, 6 * base.dim // 16 + 1):
            candidate = dataclasses.replace(base, layers=layers, ffn_dim=16 * step, tied=False)
            size = parameter_count(candidate)
            # Of candidates as close as 1 %, the one nearest the family's usual proportions.
            usual = dataclasses.replace(candidate, ffn_dim=0).hidden_dim
            miss = abs(size - parameters) / parameters
            rank = (miss > 0.01, miss if miss > 0.01 else abs(candidate.hidden_dim / usual - 1), miss)
            if best is None or rank < best[0]:
                best = (rank, candidate)
        if parameter_count(dataclasses.replace(base, layers=layers, ffn_dim=16, tied=False)) > parameters:
            break
    return best[1]


def parameter_count(config: DecoderConfig) -> int:
    """Scalars in all parameters of that shape."""
    d, e = config.dim, config.head_dim
    queries, kvs, hidden = config.heads * e, config.num_kv_heads * e, config.hidden_dim
    ups = 2 if config.activation == "swiglu" else 1
    attention = 2 * d * queries + 2 * d * kvs + (2 * e if config.qk_norm else 0)
    biases = {
        "none": 0,
        "qkv": queries + 2 * kvs,
        "attention": queries + 2 * kvs + d,
        "all": queries + 2 * kvs + d + ups * hidden + d,
    }[config.bias]
    norm = 2 * d if config.norm == "layernorm" else d
    layer = attention + (ups + 1) * d * hidden + biases + 2 * norm
    ends = config.vocab_size * d * (1 if config.tied else 2) + norm
    positions = config.max_positions * d if config.positions == "learned" else 0
    return config.layers * layer + ends + positions
