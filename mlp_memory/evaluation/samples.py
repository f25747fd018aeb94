"""What base, memory, mixture and teacher say after a few held-out contexts, and whom the teacher asked.

Some contexts lie evenly over the split; others are those where the memory changed most.
"""

from typing import Any

import numpy as np

from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.evaluation.score import Systems
from mlp_memory.inference.next_token import Predictor
from mlp_memory.targets.knn import knn_distribution

_TOP = 5
_SHOWN_TOKENS = 40
_SHOWN_NEIGHBORS = 5
# Around a training position: what it had read, its own token the last, and what followed the next token.
_BEFORE, _AFTER = 24, 8


def spread_rows(stream: TokenStream, count: int) -> np.ndarray:
    """int64 [count]: rows with a next token, spread evenly over the stream."""
    scored = np.flatnonzero(stream.has_next(0, len(stream)))
    return scored[(np.arange(count) * 2 + 1) * len(scored) // (2 * count)]


def differing_rows(
    gain_N: np.ndarray, rows_N: np.ndarray, documents_N: np.ndarray, count: int
) -> dict[str, np.ndarray]:
    """The rows where the mixture is most above and most below the base, one of a document.

    Args:
      gain_N: log p_mixture − log p_base of the true next token, nats.
      rows_N: int64 row of each.
      documents_N: the document of each.
      count: rows of each kind, at most.

    Returns:
      "better" and "worse", int64 rows, the largest difference first and equal ones by row; fewer
      where there are not so many documents, or none that differs in that direction.
    """
    found, used = {"better": [], "worse": []}, set()
    ranked = {"better": np.lexsort((rows_N, -gain_N)), "worse": np.lexsort((rows_N, gain_N))}
    # By turns, so that few documents serve both kinds.
    waiting = {kind: iter(order_N.tolist()) for kind, order_N in ranked.items()}
    for _ in range(count):
        for kind, sign in (("better", 1), ("worse", -1)):
            for at in waiting[kind]:
                if sign * gain_N[at] <= 0:
                    break
                if documents_N[at] not in used:
                    used.add(documents_N[at])
                    found[kind].append(rows_N[at])
                    break
    return {kind: np.array(rows, np.int64) for kind, rows in found.items()}


def sample_predictions(
    stream: TokenStream,
    rows: np.ndarray,
    predictor: Predictor,
    systems: Systems,
    tau: float | None,
    vocabulary: Vocabulary,
    train: TokenStream | None = None,
) -> list[dict[str, Any]]:
    """The most likely next tokens under each system at the given rows.

    Args:
      stream: a held-out split.
      rows: rows of it that have a next token.
      predictor: decoder and memory at the chosen λ.
      systems: for the exact teacher, where there are neighbours.
      tau: the teacher's temperature.
      vocabulary: names tokens.
      train: what the neighbours' rows are rows of; None leaves out where the teacher looked.

    Returns:
      For each row its context, the next token, the likeliest tokens of "base", "memory" and
      "mixture" and `log_prob` of the next token under each, nats; with neighbours "teacher" too,
      and `drawn_on`, the nearest training positions with their weights in p_kNN.
    """
    if not len(rows):
        return []
    samples = [_sample(stream, int(row), predictor, vocabulary) for row in rows]
    if (neighbors := systems.neighbors) is None:
        return samples
    taps, _ = systems.base.taps_and_log_probs(stream, [(int(row), int(row) + 1) for row in rows])
    # One search for all: each goes through the whole datastore.
    rows_Qxk, sqdist_Qxk = neighbors.exact(neighbors.keys.queries(taps), neighbors.k)
    labels_Qxk = neighbors.labels_N[rows_Qxk]
    teacher = knn_distribution(rows_Qxk, sqdist_Qxk, labels_Qxk, tau, _TOP)
    # The same distribution with each neighbour a token of its own: its weight among the k.
    ranks_Qxk = np.broadcast_to(np.arange(neighbors.k, dtype=np.int32), rows_Qxk.shape)
    each = knn_distribution(rows_Qxk, sqdist_Qxk, ranks_Qxk, tau, _SHOWN_NEIGHBORS)
    for q, sample in enumerate(samples):
        kept = float(teacher.kept_mass_Q[q])
        sample["teacher"] = [
            [vocabulary.piece(int(t)), float(p) * kept]
            for t, p in zip(teacher.token_ids_QxM[q], teacher.probs_QxM[q])
            if p > 0
        ]
        if train is not None:
            kept = float(each.kept_mass_Q[q])
            sample["drawn_on"] = [
                {"weight": float(p) * kept, **_position(train, int(rows_Qxk[q, rank]), vocabulary)}
                for rank, p in zip(each.token_ids_QxM[q], each.probs_QxM[q])
                if p > 0
            ]
    return samples


def _sample(stream: TokenStream, row: int, predictor: Predictor, vocabulary: Vocabulary) -> dict[str, Any]:
    document = int(stream.document_ids(row, row + 1)[0])
    first = max(int(stream.bounds_D1[document]), row + 1 - predictor.context)
    tokens = stream.tokens[first : row + 1].astype(int).tolist()
    label = int(stream.labels(row, row + 1)[0])
    said = predictor(tokens)

    def top(log_prob_V: np.ndarray) -> list[list[Any]]:
        order = np.argsort(-log_prob_V, kind="stable")[:_TOP]
        return [[vocabulary.piece(int(t)), float(np.exp(log_prob_V[t]))] for t in order]

    log_probs = {"base": said.base_NxV, "memory": said.memory_NxV, "mixture": said.mixture_NxV}
    return {
        "row": row,
        "document": document,
        "context": vocabulary.decode(tokens[-_SHOWN_TOKENS:]),
        "next": vocabulary.piece(label),
        "log_prob": {name: float(log_prob_V[label]) for name, log_prob_V in log_probs.items()},
        **{name: top(log_prob_V) for name, log_prob_V in log_probs.items()},
    }


def _position(train: TokenStream, row: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """A training position: its document, the text before, its next token and the text after that."""
    document = int(train.document_ids(row, row + 1)[0])
    start, stop = (int(bound) for bound in train.bounds_D1[document : document + 2])
    before = train.tokens[max(start, row + 1 - _BEFORE) : row + 1].astype(int).tolist()
    after = train.tokens[min(row + 2, stop) : min(row + 2 + _AFTER, stop)].astype(int).tolist()
    return {
        "row": row,
        "document": document,
        "before": vocabulary.decode(before),
        "next": vocabulary.piece(int(train.labels(row, row + 1)[0])),
        "after": vocabulary.decode(after),
    }
