"""The datastore: one key for every row of the training stream."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.arrays import ChunkWriter, written_chunks
from mlp_memory.artifacts import ArraySpec, Directory, Manifest, UserError, as_dtype, digest, peek
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.codec import CODEC_NAME, Codec, fit
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.store import finite_states
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan, spread
from mlp_memory.parallel.config import FleetConfig
from mlp_memory.parallel.fleet import run_units
from mlp_memory.training.loop import compute_dtype
from mlp_memory.training.progress import Progress


def row_reader(config: EmbedConfig, decoder: Decoder, mesh: Mesh) -> RowReader:
    """Reads rows of any stream just as the datastore's rows are read."""
    plan = WindowPlan(config.context, config.stride)
    return RowReader(decoder, mesh, plan, config.tap, config.batch_windows, compute_dtype(config.dtype))


def key_specs(config: EmbedConfig, rows: int, dim: int) -> dict[str, ArraySpec]:
    """The array of keys, [rows, key_dim], by name; none where none is kept.

    Raises:
      UserError: keys of more dimensions than a hidden state's `dim`.
    """
    if config.key_dim > dim:
        raise UserError(f"embed.key_dim = {config.key_dim} is more than the decoder's {dim} dimensions")
    if config.store == "none":
        return {}
    return {"keys": ArraySpec.in_blocks((rows, config.key_dim or dim), config.key_dtype, config.chunk_rows)}


class Inputs(NamedTuple):
    """What embed reads, and the devices it computes on."""

    decoder: Decoder
    stream: TokenStream
    mesh: Mesh


class Worker:
    """Does chunks of one `embed`, in any order, once or twice; each process has one.

    Windows are batched within a chunk, so its bytes do not depend on who computes it.

    Args:
      directory: WORKDIR/datastore, begun, its codec fitted.
      config: windows, tap and what is kept.
      inputs: what is read.

    Raises:
      UserError: no such tap, or positions too few.
    """

    def __init__(self, directory: Directory, config: EmbedConfig, inputs: Inputs):
        self._where, self._stream = f"{directory}/keys", inputs.stream
        self._writer = ChunkWriter(directory, peek(directory))
        self._reader = _checked_reader(config, inputs)
        self._codec, _ = fit_codec(directory, config, self._reader, inputs.stream)

    def __call__(self, chunk: int) -> None:
        """Writes the chunk unless that is done.

        Raises:
          UserError: a key is not finite.
        """
        if chunk in self._writer.missing():
            start, stop = self._writer.rows(chunk)
            states_NxD = finite_states(self._reader, self._stream, start, stop, self._where)
            self._writer.write(chunk, keys=self._codec.encode(states_NxD))


def embed(
    directory: Directory,
    manifest: Manifest,
    config: EmbedConfig,
    shape: tuple[int, int],
    open_inputs: Callable[[], Inputs],
    fleet: FleetConfig | None = None,
) -> Manifest:
    """Writes the key of every row of the stream; goes on where an earlier start stopped.

    Facts: rows, dim (of a hidden state), key_dim, bytes_per_token (of the stored keys),
    explained_variance and clip_share (of the sample that the codec was fitted on), codec (its
    digest, if there is one).

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun with the arrays of `key_specs`.
      config: windows, tap and what is kept.
      shape: [N, D] of all hidden states.
      open_inputs: opens what is read, once in each process that works; picklable for a fleet.
      fleet: who does the work; this process if None.

    Raises:
      UserError: no such tap, positions too few, or a key that is not finite.
    """
    fleet = fleet or FleetConfig()
    (rows, dim), key_dim = shape, config.key_dim or shape[1]
    if fleet.in_process:
        open_inputs = functools.cache(open_inputs)  # fitting and embedding are the same process's
    facts = {"rows": rows, "dim": dim, "key_dim": key_dim}
    if config.fitted:
        inputs = open_inputs()
        facts |= fit_codec(directory, config, _checked_reader(config, inputs), inputs.stream)[1]
        del inputs
    if config.store == "none":
        return artifacts.finish(directory, manifest, **facts, bytes_per_token=0)
    row_bytes = as_dtype(config.key_dtype).itemsize * key_dim
    writer = ChunkWriter(directory, manifest)  # makes the array, which workers then find
    missing = writer.missing()
    lengths = {chunk: stop - start for chunk in missing for start, stop in [writer.rows(chunk)]}
    with Progress("embed", rows, "rows", done=rows - sum(lengths.values())) as bar:
        run_units(
            "embed",
            functools.partial(_make_worker, directory.location, config, open_inputs),
            [missing],
            fleet,
            finished=lambda: written_chunks(directory),
            done=lambda chunk: bar.advance(lengths[chunk], written=lengths[chunk] * row_bytes),
            note=bar.note,
            notes=directory / "units/failures",
        )
    return ChunkWriter(directory, manifest).finish(**facts, bytes_per_token=row_bytes)


def _make_worker(location: str, config: EmbedConfig, open_inputs: Callable[[], Inputs]) -> Worker:
    return Worker(Directory(location), config, open_inputs())


def _checked_reader(config: EmbedConfig, inputs: Inputs) -> RowReader:
    shape = inputs.decoder.config
    if shape.positions == "learned" and shape.max_positions < config.context:
        raise UserError(
            f"embed.context = {config.context} is longer than the decoder's "
            f"{shape.max_positions} learned positions"
        )
    return row_reader(config, inputs.decoder, inputs.mesh)


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
