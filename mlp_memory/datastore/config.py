"""How hidden states become keys."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import Tap
from mlp_memory.settings import check_choice, check_whole


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """How hidden states become keys.

    Attributes:
      context: tokens of a window.
      stride: rows from one window to the next; every row then has at least
        context − stride rows before it, or all there are in its document.
      tap_layer, tap_kind: which state (see `decoder.config.Tap`).
      key_dtype: of the stored keys: "float32", "float16" or "bfloat16".
      dtype: of the computation.
      chunk_rows: rows per chunk of the array.
      batch_windows: windows computed at once.
    """

    context: int = 256
    stride: int = 128
    tap_layer: int = -1
    tap_kind: str = "ffn_input"
    key_dtype: str = "float32"
    dtype: str = "auto"
    chunk_rows: int = 16384
    batch_windows: int = 16

    def __post_init__(self):
        check_whole(self, dict.fromkeys(("context", "stride", "chunk_rows", "batch_windows"), 1))
        if self.stride > self.context:
            raise UserError(
                f"embed.stride = {self.stride} must lie between 1 and embed.context = {self.context}"
            )
        check_choice(
            self,
            {
                "key_dtype": ("float32", "float16", "bfloat16"),
                "dtype": ("auto", "float32", "bfloat16"),
            },
        )
        _ = self.tap  # checks itself

    @property
    def tap(self) -> Tap:
        """The tapped state."""
        return Tap(self.tap_layer, self.tap_kind)
