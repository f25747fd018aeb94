"""The datastore: one key for every row of the training stream."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from mlp_memory.artifacts import (
    ArraySpec,
    ChunkWriter,
    Directory,
    Manifest,
    UserError,
    as_dtype,
    peek,
    written_chunks,
)
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan
from mlp_memory.parallel.config import FleetConfig
from mlp_memory.parallel.fleet import run_units
from mlp_memory.training.loop import compute_dtype
from mlp_memory.training.progress import Progress


def row_reader(config: EmbedConfig, decoder: Decoder, mesh: Mesh) -> RowReader:
    """Reads rows of any stream just as the datastore's rows are read."""
    plan = WindowPlan(config.context, config.stride)
    return RowReader(decoder, mesh, plan, config.tap, config.batch_windows, compute_dtype(config.dtype))


def key_spec(config: EmbedConfig, rows: int, dim: int) -> ArraySpec:
    """The array of keys, [rows, dim]."""
    return ArraySpec((rows, dim), config.key_dtype, config.chunk_rows)


class Inputs(NamedTuple):
    """What embed reads, and the devices it computes on."""

    decoder: Decoder
    stream: TokenStream
    mesh: Mesh


class Worker:
    """Does chunks of one `embed`, in any order, once or twice; each process has one.

    Windows are batched within a chunk, so its bytes do not depend on who computes it.

    Args:
      directory: WORKDIR/datastore, begun.
      config: windows and tap.
      inputs: what is read.

    Raises:
      UserError: no such tap, or positions too few.
    """

    def __init__(self, directory: Directory, config: EmbedConfig, inputs: Inputs):
        shape = inputs.decoder.config
        if shape.positions == "learned" and shape.max_positions < config.context:
            raise UserError(
                f"embed.context = {config.context} is longer than the decoder's "
                f"{shape.max_positions} learned positions"
            )
        self._stream = inputs.stream
        self._writer = ChunkWriter(directory, peek(directory))
        self._reader = row_reader(config, inputs.decoder, inputs.mesh)

    def __call__(self, chunk: int) -> None:
        """Writes the chunk unless that is done.

        Raises:
          UserError: a key is not finite.
        """
        if chunk in self._writer.missing():
            self._writer.write(chunk, keys=self._reader.taps(self._stream, *self._writer.rows(chunk)))


def embed(
    directory: Directory,
    manifest: Manifest,
    config: EmbedConfig,
    open_inputs: Callable[[], Inputs],
    fleet: FleetConfig | None = None,
) -> Manifest:
    """Writes the key of every row of the stream; goes on where an earlier start stopped.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun with the array of `key_spec`.
      config: windows and tap.
      open_inputs: opens what is read, once in each process that works; picklable for a fleet.
      fleet: who does the work; this process if None.

    Raises:
      UserError: no such tap, positions too few, or a key that is not finite.
    """
    fleet = fleet or FleetConfig()
    writer = ChunkWriter(directory, manifest)
    rows, dim = manifest.arrays["keys"].shape
    row_bytes = as_dtype(manifest.arrays["keys"].dtype).itemsize * dim
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
    return ChunkWriter(directory, manifest).finish(rows=rows, dim=dim)


def _make_worker(location: str, config: EmbedConfig, open_inputs: Callable[[], Inputs]) -> Worker:
    return Worker(Directory(location), config, open_inputs())
