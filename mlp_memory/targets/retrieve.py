"""The retrieve stage: every row's neighbours, turned into its sparse target."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlp_memory.artifacts import ArrayReader, ArraySpec, ChunkWriter, Directory, UserError, begin, config_dict
from mlp_memory.index.neighbors import exclude_self
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.knn import knn_distribution
from mlp_memory.targets.temperature import choose_temperature, median_spread
from mlp_memory.training.progress import Progress


class Stream(Protocol):
    """What the stage asks of the token stream (corpus/stream.py)."""

    vocab_size: int

    def __len__(self) -> int: ...

    def has_next(self, start: int, stop: int) -> np.ndarray: ...

    def labels(self, start: int, stop: int) -> np.ndarray: ...


class Index(Protocol):
    """What the stage asks of an index: `index.scann_index.ScannIndex`."""

    facts: dict[str, Any]

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


class Validation(NamedTuple):
    """Held-out positions that decide the temperature; any plain tuple of the three serves.

    Attributes:
      keys_QxD: float, their keys.
      base_log_prob_Q: the decoder's log probability of the next token, nats.
      next_token_Q: int, the token that does follow.
    """

    keys_QxD: np.ndarray
    base_log_prob_Q: np.ndarray
    next_token_Q: np.ndarray


def retrieve(
    directory: Directory,
    stream: Stream,
    keys_reader: ArrayReader,
    index: Index,
    parents: Mapping[str, str],
    config: RetrieveConfig,
    validation: Validation | tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> None:
    """Writes WORKDIR/targets; goes on where an earlier start stopped.

    Arrays, row i of the stream each, M = min(top_m, k):
      token_ids [N, M] uint16, uint32 where the vocabulary needs it: most probable first.
      probs [N, M] float16, renormalised over the M tokens. Rounding moves a value by at most
        2^-11 of itself, or 3e-8 where it is below 6e-5; so a row's sum is 1 within 2^-11.
      kept_mass [N] float32: the share of the full distribution that the M tokens hold.
      neighbours [N] uint16: neighbours found, the row itself excluded.
      support [N] uint16: tokens with a positive probability before the cut.
    A row without a next token, or without a neighbour, is zero in all of them.

    Facts: k, temperature, temperature_choice (how, and what the others gave), recall,
    mean_kept_mass, mean_support, rows_with_fewer_neighbours.

    Memory: the labels (4 bytes per row), and 30·k bytes per row of a chunk.

    Raises:
      UserError: temperature is "auto" and there is no validation sample; the folder holds
        targets made otherwise; keys and stream differ in length.
    """
    rows, top_m = len(stream), min(config.top_m, config.k)
    if keys_reader.shape[0] != rows:
        raise UserError(
            f"the datastore has {keys_reader.shape[0]} rows, the token stream {rows}: run embed again"
        )
    if config.temperature == "auto" and (validation is None or not len(validation[2])):
        raise UserError(
            'retrieve.temperature = "auto" needs a validation split and there is none: give a number'
        )
    arrays = {
        "token_ids": ArraySpec((rows, top_m), _token_dtype(stream.vocab_size), config.chunk_rows),
        "probs": ArraySpec((rows, top_m), "float16", config.chunk_rows),
        "kept_mass": ArraySpec((rows,), "float32", config.chunk_rows),
        "neighbours": ArraySpec((rows,), "uint16", config.chunk_rows),
        "support": ArraySpec((rows,), "uint16", config.chunk_rows),
    }
    manifest = begin(directory, "targets", config_dict(config), parents, arrays)
    if manifest.finished:
        return
    labels_N = stream.labels(0, rows)
    tau, choice = _temperature(index, labels_N, config, validation)
    writer = ChunkWriter(directory, manifest)
    missing = writer.missing()
    done = rows - sum(stop - start for start, stop in map(writer.rows, missing))
    with Progress("retrieve", rows, "rows", done) as progress:
        for chunk in missing:
            start, stop = writer.rows(chunk)
            targets = _chunk_targets(start, stop, stream, keys_reader, index, labels_N, tau, config)
            writer.write(chunk, **targets)
            progress.advance(stop - start)
    writer.finish(
        k=config.k,
        temperature=tau,
        temperature_choice=choice,
        recall=index.facts.get("recall"),
        **_summary(directory, stream, config),
    )


def _token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _temperature(
    index: Index, labels_N: np.ndarray, config: RetrieveConfig, validation: Any
) -> tuple[float, dict[str, Any]]:
    """τ, and how it came about; the same at every start, so that a resumed run agrees."""
    if config.temperature != "auto":
        return float(config.temperature), {"how": "given"}
    keys_QxD, base_log_prob_Q, next_token_Q = (np.asarray(part) for part in validation)
    # Spread over the whole split: neighbouring positions say much the same.
    count = min(config.validation_rows, len(next_token_Q))
    sample = np.arange(count) * len(next_token_Q) // count
    rows_Qxk, sqdist_Qxk = index.search(keys_QxD[sample], config.k)
    spread = median_spread(sqdist_Qxk)
    best = choose_temperature(
        sqdist_Qxk,
        labels_N[rows_Qxk],
        base_log_prob_Q[sample],
        next_token_Q[sample],
        [multiple * spread for multiple in config.temperatures],
    )
    how = f"least validation loss of the interpolation over {count} rows"
    return best.tau, {"how": how, "lambda": best.lam, "median_spread": spread, **best.table}


def _chunk_targets(
    start: int,
    stop: int,
    stream: Stream,
    keys_reader: ArrayReader,
    index: Index,
    labels_N: np.ndarray,
    tau: float,
    config: RetrieveConfig,
) -> dict[str, np.ndarray]:
    """One chunk of every array."""
    top_m = min(config.top_m, config.k)
    arrays = {
        "token_ids": np.zeros((stop - start, top_m), _token_dtype(stream.vocab_size)),
        "probs": np.zeros((stop - start, top_m), np.float16),
        "kept_mass": np.zeros(stop - start, np.float32),
        "neighbours": np.zeros(stop - start, np.uint16),
        "support": np.zeros(stop - start, np.uint16),
    }
    asking_Q = np.flatnonzero(stream.has_next(start, stop))
    if not len(asking_Q):
        return arrays
    queries_QxD = np.asarray(keys_reader[start:stop])[asking_Q].astype(np.float32)
    found = index.search(queries_QxD, config.k + 1)
    rows_Qxk, sqdist_Qxk = exclude_self(*found, asking_Q + start, config.k)
    targets = knn_distribution(rows_Qxk, sqdist_Qxk, labels_N[rows_Qxk], tau, top_m)
    probs_QxM = targets.probs_QxM.astype(np.float16)
    arrays["probs"][asking_Q] = probs_QxM
    arrays["token_ids"][asking_Q] = np.where(probs_QxM > 0, targets.token_ids_QxM, 0)
    arrays["kept_mass"][asking_Q] = targets.kept_mass_Q
    arrays["neighbours"][asking_Q] = (rows_Qxk >= 0).sum(axis=1)
    arrays["support"][asking_Q] = targets.support_Q
    return arrays


def _summary(directory: Directory, stream: Stream, config: RetrieveConfig) -> dict[str, Any]:
    """Means over the rows with a next token, read back so that resumed runs count all chunks."""
    valid_N = stream.has_next(0, len(stream))
    read = {
        name: ArrayReader(directory, name)[0 : len(stream)][valid_N]
        for name in ("kept_mass", "support", "neighbours")
    }
    count = max(len(read["support"]), 1)
    return {
        "mean_kept_mass": round(float(read["kept_mass"].sum(dtype=np.float64)) / count, 6),
        "mean_support": round(float(read["support"].sum(dtype=np.float64)) / count, 3),
        "rows_with_fewer_neighbours": int((read["neighbours"] < config.k).sum()),
    }
