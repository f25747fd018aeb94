"""How hidden states become keys."""

import dataclasses

from mlp_memory.artifacts import UserError, later
from mlp_memory.decoder.config import Tap
from mlp_memory.settings import check_choice, check_whole


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """How hidden states become keys, and what of them is kept.

    Attributes:
      context: tokens of a window.
      stride: rows from one window to the next; every row then has at least
        context − stride rows before it, or all there are in its document.
      tap_layer, tap_kind: which state (see `decoder.config.Tap`).
      key_dtype: of a key: "float32", "float16", "bfloat16" or "int8" (with a scale per
        dimension, see `codec.fit`).
      dtype: of the computation.
      chunk_rows: rows per chunk of the array; with `store` "none", rows recomputed at once.
      batch_windows: windows computed at once.
      store: "array", or "none": no key is written, and whoever reads keys has the decoder
        compute them again.
      key_dim: dimensions of a key; 0 is the hidden state's, fewer are its principal ones.
      projection_rows: rows, spread over the stream, that projection and scales are fitted on.
    """

    context: int = 256
    stride: int = 128
    tap_layer: int = -1
    tap_kind: str = "ffn_input"
    key_dtype: str = "float32"
    dtype: str = "auto"
    chunk_rows: int = 16384
    batch_windows: int = 16
    store: str = later("array")
    key_dim: int = later(0)
    projection_rows: int = later(65536)

    def __post_init__(self):
        names = ("context", "stride", "chunk_rows", "batch_windows", "projection_rows")
        check_whole(self, dict.fromkeys(names, 1) | {"key_dim": 0})
        if self.stride > self.context:
            raise UserError(
                f"embed.stride = {self.stride} must lie between 1 and embed.context = {self.context}"
            )
        check_choice(
            self,
            {
                "key_dtype": ("float32", "float16", "bfloat16", "int8"),
                "dtype": ("auto", "float32", "bfloat16"),
                "store": ("array", "none"),
            },
        )
        if self.key_dim > self.projection_rows:
            raise UserError(
                f"embed.key_dim = {self.key_dim} cannot be fitted on embed.projection_rows = "
                f"{self.projection_rows} rows: give more rows"
            )
        _ = self.tap  # checks itself

    @property
    def tap(self) -> Tap:
        """The tapped state."""
        return Tap(self.tap_layer, self.tap_kind)

    @property
    def fitted(self) -> bool:
        """Whether keys need a projection or scales that are fitted first."""
        return self.key_dim > 0 or self.key_dtype == "int8"

    @property
    def keeps_states(self) -> bool:
        """Whether the stored keys are the hidden states themselves, rounded to `key_dtype`."""
        return self.store == "array" and not self.fitted
