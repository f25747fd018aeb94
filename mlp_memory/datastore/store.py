"""A datastore's keys, whatever is kept of them, and the hidden states they were made from."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from mlp_memory.arrays import ArrayReader, Rows
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.codec import Codec, open_codec
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.score import RowReader


class KeyStore:
    """Row i's key in the searched space, [N, E] float32 out of `[a:b]`.

    Held-out states go into that space by `queries`; they are not rounded as keys are.
    """

    def __init__(self, stored: Rows, codec: Codec):
        self._stored, self._codec = stored, codec
        self.shape: tuple[int, int] = stored.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._codec.decode(self._stored[rows])

    def queries(self, states_QxD: np.ndarray) -> np.ndarray:
        """Hidden states [Q, D] in the searched space, [Q, E] float32."""
        return self._codec.project(states_QxD)


class RecomputedRows:
    """Rows that are computed when asked for, whole chunks at a time; the last chunks are cached.

    A row's bytes do not depend on what range is asked for, and rows read in order are computed
    once. Threads may read at once.

    Args:
      compute: (start, stop) -> rows [stop − start, E].
      shape: [N, E].
      chunk_rows: rows computed at once.
      cache_bytes: of the chunks kept, at 4 bytes a value; two are kept at least.
    """

    def __init__(
        self,
        compute: Callable[[int, int], np.ndarray],
        shape: tuple[int, int],
        chunk_rows: int,
        cache_bytes: int = 1 << 30,
    ):
        self.shape, self.chunk_rows = shape, chunk_rows
        self._compute = compute
        self._cached_chunks = max(cache_bytes // (4 * chunk_rows * shape[1]), 2)
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows {rows}: only stretches of rows can be read")
        first, last = start // self.chunk_rows, max(stop - 1, start) // self.chunk_rows
        parts = []
        for chunk in range(first, last + 1):
            begin = chunk * self.chunk_rows
            parts.append(self._chunk(chunk)[max(start - begin, 0) : max(stop - begin, 0)])
        return np.concatenate(parts)

    def _chunk(self, chunk: int) -> np.ndarray:
        with self._lock:
            if chunk not in self._chunks:
                begin = chunk * self.chunk_rows
                self._chunks[chunk] = self._compute(begin, min(begin + self.chunk_rows, len(self)))
                if len(self._chunks) > self._cached_chunks:
                    self._chunks.popitem(last=False)
            self._chunks.move_to_end(chunk)
            return self._chunks[chunk]


def finite_states(reader: RowReader, stream: TokenStream, start: int, stop: int, where: str) -> np.ndarray:
    """Hidden states of rows start..stop, [stop − start, D] float32; zero on rows of deleted documents.

    Raises:
      UserError: one is not finite; it is named.
    """
    states_NxD = reader.taps(stream, start, stop)
    if (deleted_N := stream.is_deleted(start, stop)).any():
        states_NxD = np.where(deleted_N[:, None], np.float32(0), states_NxD)
    bad_N = ~np.isfinite(states_NxD).all(axis=1)
    if bad_N.any():
        raise UserError(f"{where}: row {start + int(bad_N.argmax())} is not finite")
    return states_NxD


def open_keys(
    directory: Directory,
    manifest: Manifest,
    config: EmbedConfig,
    stream: TokenStream,
    reader: Callable[[], RowReader],
) -> KeyStore:
    """The keys of a finished datastore; where none are kept, they are computed again by row.

    Args:
      directory, manifest: of the datastore.
      config: as it was made with.
      stream: what was embedded.
      reader: makes the reader of the decoder that embedded it; called when rows are first asked for.

    Raises:
      UserError: the codec is damaged.
    """
    codec = open_codec(directory, manifest)
    if config.store == "array":
        return KeyStore(ArrayReader(directory, "keys"), codec)

    def compute(start: int, stop: int) -> np.ndarray:
        return codec.encode(finite_states(reader(), stream, start, stop, f"{directory}/keys"))

    shape = (len(stream), codec.key_dim(manifest.facts["dim"]))
    return KeyStore(RecomputedRows(compute, shape, config.chunk_rows), codec)


def open_states(
    directory: Directory,
    manifest: Manifest,
    config: EmbedConfig,
    stream: TokenStream,
    reader: Callable[[], RowReader],
) -> Rows:
    """The hidden states of a finished datastore's rows, [N, D]: as stored, or computed again.

    Args are those of `open_keys`. Of what is computed again, chunks of 1 GiB are kept.
    """
    if config.keeps_states:
        return ArrayReader(directory, "keys")

    def compute(start: int, stop: int) -> np.ndarray:
        return finite_states(reader(), stream, start, stop, f"{directory}/states")

    shape = (len(stream), manifest.facts["dim"])
    return RecomputedRows(compute, shape, config.chunk_rows)
