"""The token stream of one split, as every later stage reads it: NumPy and artifacts, nothing heavy."""

import hashlib

import numpy as np

from mlp_memory import artifacts
from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, Manifest, UserError

KIND = "corpus"
BOUNDS_NAME = "bounds.i64"
DELETED_NAME = "deleted.i64"
# Streams up to this many rows are read through when they are opened.
_CHECKED_ROWS = 1 << 22


class TokenReader(ArrayReader):
    """Rows of `tokens`; refuses ids that the vocabulary does not have.

    Raises:
      UserError: a chunk is damaged, or an id is not below the vocabulary's size.
    """

    def __init__(self, directory: Directory, vocab_size: int):
        super().__init__(directory, "tokens")
        self._vocab_size = vocab_size

    def __getitem__(self, rows: slice) -> np.ndarray:
        tokens_T = super().__getitem__(rows)
        if tokens_T.size and int(tokens_T.max()) >= self._vocab_size:
            raise UserError(
                f"{self._what} holds token {int(tokens_T.max())} of a vocabulary of {self._vocab_size}: "
                "delete its folder and run tokenize again"
            )
        return tokens_T


class TokenStream:
    """Tokens of one split and where its documents begin (the row rule of the design).

    Row i's next token is row i + 1 if that is in the same document; the last row of a
    document has none. A deleted document keeps its rows, so that every other row keeps its number;
    they hold token 0, and none of them has a next token.

    Attributes:
      manifest: of the split; `manifest.fingerprint` names it as a parent.
      tokens: reader of uint16 or uint32 [N]; `tokens[a:b]` is a NumPy array.
      bounds_D1: int64 [D + 1]; document d has rows bounds_D1[d] to bounds_D1[d + 1] - 1.
      deleted_D: bool [D], documents that have been deleted.
      vocab_size: every token is below it.
      words: of the text; `word_count` says how they were counted, "whitespace" or "wikitext"
        (see `split.count_words`).
      num_bytes: of the text in UTF-8.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokens: ArrayReader,
        bounds_D1: np.ndarray,
        deleted: np.ndarray | None = None,
    ):
        self.manifest, self.tokens, self.bounds_D1 = manifest, tokens, bounds_D1
        self.deleted_D = np.zeros(len(bounds_D1) - 1, np.bool_)
        self.deleted_D[[] if deleted is None else deleted] = True
        self._any_deleted = bool(self.deleted_D.any())
        self.vocab_size: int = manifest.facts["vocab_size"]
        self.words: int = manifest.facts["words"]
        self.word_count: str = manifest.facts.get("word_count", "whitespace")
        self.num_bytes: int = manifest.facts["bytes"]

    @classmethod
    def open(cls, directory: Directory) -> "TokenStream":
        """The finished stream in WORKDIR/corpus/SPLIT.

        Raises:
          UserError: it is missing, unfinished, damaged or no token stream.
        """
        manifest = artifacts.require(directory, "tokenize")
        if manifest.kind != KIND:
            raise UserError(f"{directory} is a {manifest.kind}, not a token stream: check --workdir")
        again = f"delete {directory} and run tokenize again"
        data = directory.read(BOUNDS_NAME)
        if data is None or hashlib.sha256(data).hexdigest() != manifest.facts.get("bounds_sha256"):
            state = "is missing" if data is None else "is damaged"
            raise UserError(f"{directory}/{BOUNDS_NAME} {state}: {again}")
        bounds_D1 = np.frombuffer(data[: len(data) // 8 * 8], "<i8").astype(np.int64)
        spec = manifest.arrays.get("tokens")
        if spec is None or len(spec.shape) != 1 or spec.dtype not in ("uint16", "uint32"):
            raise UserError(f"{directory} holds no tokens: {again}")
        rows = spec.shape[0]
        ends = bounds_D1[[0, -1]].tolist() if len(bounds_D1) else []
        if len(data) % 8 or ends != [0, rows] or (np.diff(bounds_D1) < 1).any():
            raise UserError(f"{directory}/{BOUNDS_NAME} does not fit {rows} tokens: {again}")
        counts = [manifest.facts[name] for name in ("vocab_size", "words", "bytes")]
        if not all(type(count) is int for count in counts):
            raise UserError(f"{directory}/manifest.json has counts {counts}: {again}")
        tokens = TokenReader(directory, manifest.facts["vocab_size"])
        stream = cls(manifest, tokens, bounds_D1, _read_deleted(directory, manifest, len(bounds_D1) - 1))
        # Reading runs the checks; a long stream gets them chunk by chunk as it is read.
        stream.tokens[0 : rows if rows <= _CHECKED_ROWS else 1]
        return stream

    def __len__(self) -> int:
        """N, the number of rows."""
        return int(self.bounds_D1[-1])

    @property
    def num_scored(self) -> int:
        """Rows that have a next token: all but one a document, deleted ones left out."""
        return int((np.diff(self.bounds_D1) - 1)[~self.deleted_D].sum())

    def has_next(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start]: whether row i has a next token in its document.

        Raises:
          IndexError: the rows are not within the stream.
        """
        self._check(start, stop)
        has_next_T = np.ones(stop - start, np.bool_)
        last_D = self.bounds_D1[1:] - 1
        first, end = np.searchsorted(last_D, [start, stop])
        has_next_T[last_D[first:end] - start] = False
        return has_next_T & ~self.is_deleted(start, stop)

    def is_deleted(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start]: whether row i is of a deleted document.

        Raises:
          IndexError: the rows are not within the stream.
        """
        if not self._any_deleted:
            self._check(start, stop)
            return np.zeros(stop - start, np.bool_)
        return self.deleted_D[self.document_ids(start, stop)]

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: the index, from 0, of each row's document.

        Raises:
          IndexError: the rows are not within the stream.
        """
        self._check(start, stop)
        rows_T = np.arange(start, stop)
        return (np.searchsorted(self.bounds_D1, rows_T, side="right") - 1).astype(np.int32)

    def labels(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: each row's next token, 0 where there is none.

        Raises:
          IndexError: the rows are not within the stream.
          UserError: a chunk is damaged.
        """
        has_next_T = self.has_next(start, stop)
        labels_T = np.zeros(stop - start, np.int32)
        next_T = self.tokens[min(start + 1, len(self)) : min(stop + 1, len(self))]
        labels_T[: len(next_T)] = next_T
        return np.where(has_next_T, labels_T, 0).astype(np.int32)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start}:{stop} of a stream of {len(self)} rows")


def _read_deleted(directory: Directory, manifest: Manifest, documents: int) -> np.ndarray:
    """Numbers of the deleted documents, int64, ascending.

    Raises:
      UserError: the file that names them is gone or damaged.
    """
    wanted = manifest.facts.get("deleted_sha256")
    if wanted is None:
        return np.zeros(0, np.int64)
    data = directory.read(DELETED_NAME)
    found = np.frombuffer(data, "<i8") if data is not None and len(data) % 8 == 0 else np.zeros(0)
    sound = data is not None and hashlib.sha256(data).hexdigest() == wanted
    if not sound or not len(found) or found.min() < 0 or found.max() >= documents:
        state = "is missing" if data is None else "is damaged"
        raise UserError(f"{directory}/{DELETED_NAME} {state}: delete {directory} and run `update` again")
    return found.astype(np.int64)
