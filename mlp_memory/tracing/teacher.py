"""What a training row is taught, and the neighbours that it is taught by."""

from typing import Any

import numpy as np

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, peek
from mlp_memory.datastore.store import KeyStore
from mlp_memory.index.search import Index
from mlp_memory.index.shards import single_rows
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.exclusion import Exclusion, candidates
from mlp_memory.targets.knn import knn_distribution
from mlp_memory.tracing.documents import Documents
from mlp_memory.tracing.evidence import described, next_tokens
from mlp_memory.updating import choice

_TOP = 5


class Teacher:
    """The targets of training rows, and their neighbours found again as `retrieve` found them.

    Args:
      directory: WORKDIR/targets, finished.
      documents: of the train stream.
      keys: of the datastore.
      index: over them.
      shown: neighbours told of, each with its text.
    """

    def __init__(
        self, directory: Directory, documents: Documents, keys: KeyStore, index: Index, shown: int = 5
    ):
        manifest = peek(directory)
        self._config, self.tau = RetrieveConfig(**manifest.config), manifest.facts["temperature"]
        self._token_ids, self._probs = (ArrayReader(directory, name) for name in ("token_ids", "probs"))
        self._documents, self._keys, self._index, self._shown = documents, keys, index, shown
        chosen = choice.read(directory)  # an update's targets are of chosen rows alone
        self._starts_B = None if chosen is None else chosen.starts_B
        self._block_rows = manifest.facts.get("blocks", {}).get("rows", 1)

    def neighbours(self, rows_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows_Qxk int64 and sqdist_Qxk float32 of the rows' neighbours, after the targets' exclusions.

        Raises:
          UserError: a file of the index or a chunk of the keys is missing or damaged.
        """
        stream = self._documents.stream
        found = self._index.search(single_rows(self._keys, rows_Q), candidates(self._config, stream))
        return Exclusion(self._config, stream).exclude(*found, rows_Q)

    def __call__(self, rows_Q: np.ndarray) -> list[dict[str, Any]]:
        """Of each row, which must have a next token, `evidence.described` about its true next token.

        "teacher" are the tokens as stored; "difference" is the largest difference of a stored
        probability from the one that the neighbours found again give, cut to top_m as it is: some
        1e-4 of rounding where they are the same. Where an update made no teacher for the row, it is
        what the neighbours as they are now give.
        """
        if not len(rows_Q):
            return []
        rows_Qxk, sqdist_Qxk = self.neighbours(rows_Q)
        traced = []
        for row, rows_k, sqdist_k in zip(rows_Q.tolist(), rows_Qxk, sqdist_Qxk):
            label = int(self._documents.stream.labels(row, row + 1)[0])
            found = described(rows_k, sqdist_k, label, self._documents, self.tau, self._shown)
            again = self._again(rows_k, sqdist_k)
            stored = self.stored(row)
            stored = again if stored is None else stored
            difference = max(abs(stored.get(t, 0) - again.get(t, 0)) for t in {*stored, *again, 0})
            pieces = [[self._documents.vocabulary.piece(t), p] for t, p in list(stored.items())[:_TOP]]
            traced.append({**found, "teacher": pieces, "difference": difference})
        return traced

    def stored(self, row: int) -> dict[int, float] | None:
        """The row's target: token -> probability, the most probable first; None where there is none."""
        place = row
        if self._starts_B is not None:
            block = int(np.searchsorted(self._starts_B, row, side="right")) - 1
            if block < 0 or row - self._starts_B[block] >= self._block_rows:
                return None
            place = block * self._block_rows + row - int(self._starts_B[block])
        token_ids_M, probs_M = (reader[place : place + 1][0] for reader in (self._token_ids, self._probs))
        return {int(t): float(p) for t, p in zip(token_ids_M, probs_M) if p > 0}

    def _again(self, rows_k: np.ndarray, sqdist_k: np.ndarray) -> dict[int, float]:
        """The same from neighbours."""
        there_k = rows_k >= 0
        rows_n, sqdist_n = rows_k[there_k], sqdist_k[there_k]
        labels_n = next_tokens(self._documents, rows_n)
        top_m = self._probs.shape[1]
        found = knn_distribution(rows_n[None], sqdist_n[None], labels_n[None], self.tau, top_m)
        return {int(t): float(p) for t, p in zip(found.token_ids_QxM[0], found.probs_QxM[0]) if p > 0}
