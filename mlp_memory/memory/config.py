"""The shape of a memory, and how it is distilled."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import default_ffn_dim
from mlp_memory.settings import check_choice, check_number, check_positive, check_whole
from mlp_memory.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The shape of a memory.

    Attributes:
      style: "gpt2" (LayerNorm, GELU, biases) or "llama" (RMSNorm, SwiGLU, none).
      layers: blocks.
      dim: width; 0 takes the key's. Where it differs, a linear transform comes first.
      ffn_dim: width inside a block; 0 as in `DecoderConfig`.
      dropout: share of a block's output left out in training.
      input_dim, vocab_size: 0 until taken from the datastore and the corpus.
    """

    style: str = "llama"
    layers: int = 6
    dim: int = 0
    ffn_dim: int = 0
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    input_dim: int = 0
    vocab_size: int = 0

    def __post_init__(self):
        check_choice(self, {"style": ("gpt2", "llama")})
        check_whole(self, {"layers": 1, "dim": 0, "ffn_dim": 0, "input_dim": 0, "vocab_size": 0})
        check_number(self, {"dropout": (0.0, 1.0)})
        check_positive(self, "norm_epsilon")

    def resolved(self, input_dim: int, vocab_size: int) -> "MemoryConfig":
        """This shape for given keys and vocabulary."""
        return dataclasses.replace(
            self, input_dim=input_dim, vocab_size=vocab_size, dim=self.dim or input_dim
        )

    @property
    def activation(self) -> str:
        return "gelu" if self.style == "gpt2" else "swiglu"

    @property
    def hidden_dim(self) -> int:
        """Width inside a block."""
        return self.ffn_dim or default_ffn_dim(self.dim, self.activation)

    def matmul_parameters(self) -> int:
        """Weights that multiply once per row."""
        block = self.dim * self.hidden_dim * (2 if self.style == "gpt2" else 3)
        transform = self.input_dim * self.dim if self.input_dim != self.dim else 0
        return transform + self.layers * block + self.dim * self.vocab_size

    def train_flops(self, rows: int) -> int:
        """FLOPs of training on `rows` rows: 6 per weight and row."""
        return 6 * rows * self.matmul_parameters()


@dataclasses.dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Training of the memory; one step reads batch_size blocks of `block_rows` rows.

    Attributes:
      alpha: weight of the teacher; 1 − alpha is the weight of the true next token.
      block_rows: consecutive rows that are read, and shuffled, as one.
    """

    alpha: float = 0.4
    block_rows: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, {"block_rows": 1})
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise UserError(f"distill.alpha = {self.alpha!r} must lie in [0, 1]")
