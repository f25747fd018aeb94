"""The datastore: one key for every row of the training stream."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.artifacts import ArraySpec, ChunkWriter, Directory, Manifest, UserError, as_dtype, digest
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.codec import CODEC_NAME, Codec, fit
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.store import finite_states
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan, spread
from mlp_memory.training.loop import compute_dtype
from mlp_memory.training.progress import Progress


def row_reader(config: EmbedConfig, decoder: Decoder, mesh: Mesh) -> RowReader:
    """Reads rows of any stream just as the datastore's rows are read."""
    plan = WindowPlan(config.context, config.stride)
    return RowReader(decoder, mesh, plan, config.tap, config.batch_windows, compute_dtype(config.dtype))


def key_specs(config: EmbedConfig, rows: int, dim: int) -> dict[str, ArraySpec]:
    """The array of keys, [rows, key_dim], by name; none where none is kept."""
    if config.store == "none":
        return {}
    return {"keys": ArraySpec((rows, config.key_dim or dim), config.key_dtype, config.chunk_rows)}


def embed(
    directory: Directory,
    manifest: Manifest,
    config: EmbedConfig,
    decoder: Decoder,
    stream: TokenStream,
    mesh: Mesh,
) -> Manifest:
    """Writes the key of every row of the stream; goes on where an earlier start stopped.

    Facts: rows, dim (of a hidden state), key_dim, bytes_per_token (of the stored keys),
    explained_variance and clip_share (of the sample that the codec was fitted on), codec (its
    digest, if there is one).

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun with the arrays of `key_specs`.
      config: windows, tap and what is kept.
      decoder: the model.
      stream: what is embedded.
      mesh: devices.

    Raises:
      UserError: no such tap, positions too few, more dimensions than there are, or a key that
        is not finite.
    """
    dim = decoder.config.dim
    if decoder.config.positions == "learned" and decoder.config.max_positions < config.context:
        raise UserError(
            f"embed.context = {config.context} is longer than the decoder's "
            f"{decoder.config.max_positions} learned positions"
        )
    if config.key_dim > dim:
        raise UserError(f"embed.key_dim = {config.key_dim} is more than the decoder's {dim} dimensions")
    reader = row_reader(config, decoder, mesh)
    codec, facts = fit_codec(directory, config, reader, stream)
    facts |= {"rows": len(stream), "dim": dim, "key_dim": codec.key_dim(dim)}
    if config.store == "none":
        return artifacts.finish(directory, manifest, **facts, bytes_per_token=0)
    writer = ChunkWriter(directory, manifest)
    missing = writer.missing()
    done = len(stream) - sum(b - a for a, b in map(writer.rows, missing))
    with Progress("embed", len(stream), "rows", done=done) as bar:
        for chunk in missing:
            start, stop = writer.rows(chunk)
            states_NxD = finite_states(reader, stream, start, stop, f"{directory}/keys")
            writer.write(chunk, keys=codec.encode(states_NxD))
            bar.advance(stop - start)
    return writer.finish(**facts, bytes_per_token=codec.key_dim(dim) * as_dtype(codec.dtype).itemsize)


def fit_codec(
    directory: Directory, config: EmbedConfig, reader: RowReader, stream: TokenStream
) -> tuple[Codec, dict[str, Any]]:
    """The codec of this datastore and its facts: fitted and stored once, read again on a resume."""
    if not config.fitted:
        return Codec(config.key_dtype), {}
    data = directory.read(CODEC_NAME)
    if data is None:
        ranges = spread(len(stream), config.projection_rows)
        taps_SxD = reader.taps_of(stream, ranges)
        bad_S = ~np.isfinite(taps_SxD).all(axis=1)
        if bad_S.any():
            rows_S = np.concatenate([np.arange(start, stop) for start, stop in ranges])
            raise UserError(f"{directory}/keys: row {rows_S[bad_S.argmax()]} is not finite")
        data = fit(config, taps_SxD).to_bytes()
        directory.write(CODEC_NAME, data)
    codec = Codec.from_bytes(config.key_dtype, data, f"{directory}/{CODEC_NAME}")
    facts = {"codec": digest(data)}
    if config.key_dim:
        facts["explained_variance"] = round(codec.explained, 6)
    if config.key_dtype == "int8":
        facts["clip_share"] = round(codec.clipped, 8)
    return codec, facts
