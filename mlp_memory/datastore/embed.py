"""The datastore: one key for every row of the training stream."""

from jax.sharding import Mesh

from mlp_memory.artifacts import ArraySpec, ChunkWriter, Directory, Manifest, UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan
from mlp_memory.training.loop import compute_dtype
from mlp_memory.training.progress import Progress


def row_reader(config: EmbedConfig, decoder: Decoder, mesh: Mesh) -> RowReader:
    """Reads rows of any stream just as the datastore's rows are read."""
    plan = WindowPlan(config.context, config.stride)
    return RowReader(decoder, mesh, plan, config.tap, config.batch_windows, compute_dtype(config.dtype))


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
    if decoder.config.positions == "learned" and decoder.config.max_positions < config.context:
        raise UserError(
            f"embed.context = {config.context} is longer than the decoder's "
            f"{decoder.config.max_positions} learned positions"
        )
    writer, reader = ChunkWriter(directory, manifest), row_reader(config, decoder, mesh)
    missing = writer.missing()
    done = len(stream) - sum(b - a for a, b in map(writer.rows, missing))
    with Progress("embed", len(stream), "rows", done=done) as bar:
        for chunk in missing:
            start, stop = writer.rows(chunk)
            writer.write(chunk, keys=reader.taps(stream, start, stop))
            bar.advance(stop - start)
    return writer.finish(rows=len(stream), dim=decoder.config.dim)
