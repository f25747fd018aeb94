"""Every system's log-probability of the true next token, row by row of a held-out split."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.arrays import ArrayReader, ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import Ranges, cut, read
from mlp_memory.inference.next_token import Mixture, Predictor
from mlp_memory.joint.gate import Gate, gate_weight
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.score import memory_scores
from mlp_memory.targets.knn_lm import Neighbors
from mlp_memory.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Systems:
    """What is compared; what there is none of is None.

    Attributes:
      base, joint, baseline: readers of the decoders.
      decoder: the base model itself, for samples.
      memory: read with the taps of base and of joint; None where a decoder is scored alone.
      neighbors: kNN-LM's datastore and searches.
      gate, joint_gate: λ per token for base and for joint.
      mesh: devices.
    """

    decoder: Decoder
    base: RowReader
    joint: RowReader | None
    baseline: RowReader | None
    memory: Memory | None
    neighbors: Neighbors | None
    gate: Gate | None
    joint_gate: Gate | None
    mesh: Mesh

    def predictor(self, weight: float, embed: EmbedConfig) -> Predictor:
        """Base and memory at one λ, over the whole vocabulary."""
        return Predictor(Mixture(self.decoder, self.memory, weight, embed.tap), embed.context)


def arrays_of(
    num_temperatures: int, joint: bool, baseline: bool, gated: bool, rows: int, chunk_rows: int
) -> dict[str, ArraySpec]:
    """The arrays of a scored split; kNN-LM has one column per temperature, and none without."""
    names = [
        f"{decoder}{of}"
        for decoder in ("base", *(("joint",) if joint else ()))
        for of in ("", "_memory", *(("_gate",) if gated else ()))
    ]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (rows,))
    if num_temperatures:
        shapes |= dict.fromkeys(("knn_lm_exact", "knn_lm_scann"), (rows, num_temperatures))
    if baseline:
        shapes["decoder_equal_params"] = (rows,)
    return {name: ArraySpec(shape, "float32", chunk_rows) for name, shape in shapes.items()}


def score_split(
    directory: Directory,
    what: str,
    systems: Callable[[], Systems],
    arrays: dict[str, ArraySpec],
    stream: TokenStream,
    ranges: Ranges,
    config: dict[str, Any],
    parents: dict[str, str],
) -> dict[str, np.ndarray]:
    """Scores the rows of `ranges` of a split, or reads what an earlier start scored.

    Args:
      directory: where the log-probabilities are kept.
      what: the split's name.
      systems: makes the models; called only if something is missing.
      arrays: see `arrays_of`.
      stream: the split.
      ranges: which of its rows.
      config, parents: for the manifest.

    Returns:
      The arrays at the rows that have a next token, float32.
    """
    rows = sum(stop - start for start, stop in ranges)
    manifest = artifacts.begin(directory, "scored_rows", config, parents, arrays)
    if not manifest.finished:
        writer = ChunkWriter(directory, manifest)
        missing = writer.missing()
        done = rows - sum(b - a for a, b in map(writer.rows, missing))
        with Progress(f"evaluate: {what}", rows, "rows", done=done) as bar:
            for chunk in missing:
                start, stop = writer.rows(chunk)
                writer.write(chunk, **_score_rows(systems(), stream, cut(ranges, start, stop), arrays))
                bar.advance(stop - start)
        writer.finish()
    scored = read(stream.has_next, ranges)
    return {name: ArrayReader(directory, name)[0:rows][scored] for name in arrays}


def _score_rows(
    systems: Systems, stream: TokenStream, ranges: Ranges, arrays: dict[str, ArraySpec]
) -> dict[str, np.ndarray]:
    scored = read(stream.has_next, ranges)
    next_N = read(stream.labels, ranges)[scored]
    found = {}

    def mixed(name: str, reader: RowReader, gate: Gate | None) -> np.ndarray:
        """Scores of a decoder, of the memory on its states, and λ by the gate; the states."""
        rows = jax.tree.map(lambda x_N: x_N[scored], reader.scores(stream, ranges))
        found[name] = rows.log_prob_N
        if systems.memory is None:
            return rows.taps_NxD
        found[f"{name}_memory"], spread = memory_scores(systems.memory, rows.taps_NxD, next_N, systems.mesh)
        if gate is not None:
            found[f"{name}_gate"] = np.asarray(gate_weight(gate, rows.spread, spread, rows.taps_NxD))
        return rows.taps_NxD

    taps = mixed("base", systems.base, systems.gate)
    if (neighbors := systems.neighbors) is not None:
        found["knn_lm_exact"] = neighbors.log_prob(neighbors.exact, taps, next_N)
        found["knn_lm_scann"] = neighbors.log_prob(neighbors.scann, taps, next_N)
    if systems.joint is not None:
        mixed("joint", systems.joint, systems.joint_gate)
    if systems.baseline is not None:
        _, log_prob = systems.baseline.taps_and_log_probs(stream, ranges)
        found["decoder_equal_params"] = log_prob[scored]
    values = {}
    for name, spec in arrays.items():
        values[name] = np.zeros((len(scored), *spec.shape[1:]), np.float32)
        values[name][scored] = found[name]
    return values
