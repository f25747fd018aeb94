"""The datastore: one key for every row of the training stream."""

import dataclasses

from jax.sharding import Mesh

from mlp_memory.artifacts import ArraySpec, ChunkWriter, Directory, Manifest, UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan
from mlp_memory.training.loop import compute_dtype
from mlp_memory.training.progress import Progress


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
        if not 1 <= self.stride <= self.context:
            raise UserError(
                f"embed.stride = {self.stride} must lie between 1 and embed.context = {self.context}"
            )
        if self.key_dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"embed.key_dtype = {self.key_dtype!r}: use float32, float16 or bfloat16")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"embed.dtype = {self.dtype!r}: use auto, float32 or bfloat16")

    @property
    def tap(self) -> Tap:
        """The tapped state."""
        return Tap(self.tap_layer, self.tap_kind)

    def reader(self, decoder: Decoder, mesh: Mesh) -> RowReader:
        """Reads rows of any stream just as the datastore's rows were read."""
        plan = WindowPlan(self.context, self.stride)
        return RowReader(decoder, mesh, plan, self.tap, self.batch_windows, compute_dtype(self.dtype))


def key_spec(config: EmbedConfig, rows: int, dim: int) -> ArraySpec:
    """The array of keys, [rows, dim]."""
    return ArraySpec((rows, dim), config.key_dtype, config.chunk_rows)


def embed(
    directory: Directory,
    manifest: Manifest,
    config: EmbedConfig,
    decoder: Decoder,
    stream: TokenStream,
    mesh: Mesh,
) -> Manifest:
    """Writes the key of every row of the stream; goes on where an earlier start stopped.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun with the array of `key_spec`.
      config: windows and tap.
      decoder: the model.
      stream: what is embedded.
      mesh: devices.

    Raises:
      UserError: no such tap, positions too few, or a key that is not finite.
    """
    config.tap.index(decoder.config.layers)
    if decoder.config.positions == "learned" and decoder.config.max_positions < config.context:
        raise UserError(
            f"embed.context = {config.context} is longer than the decoder's "
            f"{decoder.config.max_positions} learned positions"
        )
    writer, reader = ChunkWriter(directory, manifest), config.reader(decoder, mesh)
    missing = writer.missing()
    done = len(stream) - sum(b - a for a, b in map(writer.rows, missing))
    with Progress("embed", len(stream), "rows", done=done) as bar:
        for chunk in missing:
            start, stop = writer.rows(chunk)
            writer.write(chunk, keys=reader.taps(stream, start, stop))
            bar.advance(stop - start)
    return writer.finish(rows=len(stream), dim=decoder.config.dim)
