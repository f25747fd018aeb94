"""The training positions nearest to a state: their text, their documents, and what each weighs."""

from collections import Counter
from typing import Any

import numpy as np

from mlp_memory.datastore.store import KeyStore
from mlp_memory.targets.knn import knn_distribution, neighbour_weights
from mlp_memory.targets.knn_lm import Search
from mlp_memory.tracing.documents import Documents

_TOP = 5
_SHOWN_DOCUMENTS = 5


class Evidence:
    """What lies nearest to the decoder's states among all training positions.

    Args:
      documents: of the train stream.
      keys: of the datastore; takes states into the space that is searched.
      search: of the index.
      k: neighbours asked for, as in the targets.
      tau: the temperature of the targets.
      shown: positions told of, each with its text.
      supporting_first: whether those whose next token is the one asked about come first.
    """

    def __init__(
        self,
        documents: Documents,
        keys: KeyStore,
        search: Search,
        k: int,
        tau: float,
        shown: int = 5,
        supporting_first: bool = False,
    ):
        self._documents, self._keys, self._search = documents, keys, search
        self._k, self._tau, self._shown, self._supporting_first = k, tau, shown, supporting_first

    def __call__(self, taps_QxD: np.ndarray, tokens_Q: np.ndarray) -> list[dict[str, Any]]:
        """`described` of each state and the token asked about there; one search for all.

        Raises:
          UserError: a file of the index is missing or damaged.
        """
        if not len(taps_QxD):
            return []
        rows_Qxk, sqdist_Qxk = self._search(self._keys.queries(taps_QxD), self._k)
        return [
            described(
                rows_k, sqdist_k, int(token), self._documents, self._tau, self._shown, self._supporting_first
            )
            for rows_k, sqdist_k, token in zip(rows_Qxk, sqdist_Qxk, tokens_Q)
        ]


def described(
    rows_k: np.ndarray,
    sqdist_k: np.ndarray,
    token: int,
    documents: Documents,
    tau: float,
    shown: int,
    supporting_first: bool = False,
) -> dict[str, Any]:
    """One list of neighbours for people, plain JSON.

    Args:
      rows_k: int64 rows of the train stream, nearest first, -1 where there is none.
      sqdist_k: float32 squared distances, inf there.
      token: the one asked about.
      documents: of the train stream.
      tau, shown, supporting_first: see `Evidence`.

    Returns:
      "teacher": the likeliest next tokens of p_kNN, [piece, probability].
      "neighbours": how many there are.
      "support": the share of the weight whose next token is the one asked about.
      "documents": the documents with the largest shares of the weight, number, title and share;
        "other_documents" counts the rest.
      "drawn_on": positions (`Documents.position`) with rank from 1, weight (share of p_kNN), squared
        distance, and whether they support the token.
    """
    rows_n, sqdist_n = rows_k[rows_k >= 0], sqdist_k[rows_k >= 0]
    weights_n = neighbour_weights(rows_n[None], sqdist_n[None], tau)[0]
    labels_n = next_tokens(documents, rows_n)
    supports_n = labels_n == token
    teacher = knn_distribution(rows_n[None], sqdist_n[None], labels_n[None], tau, _TOP)
    shares: Counter[int] = Counter()
    for row, weight in zip(rows_n.tolist(), weights_n.tolist()):
        shares[documents.of_row(row)] += weight
    ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    order = np.argsort(~supports_n, kind="stable") if supporting_first else np.arange(len(rows_n))
    return {
        "teacher": [
            [documents.vocabulary.piece(int(t)), float(p) * float(teacher.kept_mass_Q[0])]
            for t, p in zip(teacher.token_ids_QxM[0], teacher.probs_QxM[0])
            if p > 0
        ],
        "neighbours": len(rows_n),
        "support": float(weights_n[supports_n].sum()),
        "documents": [
            {"document": number, "title": documents.title(number), "share": share}
            for number, share in ranked[:_SHOWN_DOCUMENTS]
        ],
        "other_documents": max(len(ranked) - _SHOWN_DOCUMENTS, 0),
        "drawn_on": [
            {
                **documents.position(int(rows_n[at])),
                "rank": int(at) + 1,
                "weight": float(weights_n[at]),
                "distance": float(sqdist_n[at]),
                "supports": bool(supports_n[at]),
            }
            for at in order[:shown]
        ],
    }


def next_tokens(documents: Documents, rows_n: np.ndarray) -> np.ndarray:
    """int32 [n]: the next token of each of these rows."""
    labels = (documents.stream.labels(row, row + 1) for row in rows_n.tolist())
    return np.concatenate([np.zeros(0, np.int32), *labels])
