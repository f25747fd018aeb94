"""What base, memory, mixture and teacher say after a few held-out contexts."""

from typing import Any

import numpy as np

from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.evaluation.score import Systems
from mlp_memory.inference.next_token import Predictor
from mlp_memory.targets.knn import knn_distribution

_TOP = 5
_SHOWN_TOKENS = 40


def sample_predictions(
    stream: TokenStream,
    rows: np.ndarray,
    predictor: Predictor,
    systems: Systems,
    tau: float | None,
    vocabulary: Vocabulary,
) -> list[dict[str, Any]]:
    """The most likely next tokens under each system at the given rows.

    Args:
      stream: a held-out split.
      rows: rows of it that have a next token.
      predictor: decoder and memory at the chosen λ.
      systems: for the exact teacher, where there are neighbours.
      tau: the teacher's temperature.
      vocabulary: names tokens.
    """
    return [_sample(stream, int(row), predictor, systems, tau, vocabulary) for row in rows]


def _sample(
    stream: TokenStream,
    row: int,
    predictor: Predictor,
    systems: Systems,
    tau: float | None,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    document = int(stream.document_ids(row, row + 1)[0])
    first = max(int(stream.bounds_D1[document]), row + 1 - predictor.context)
    tokens = stream.tokens[first : row + 1].astype(int).tolist()
    said = predictor(tokens)

    def top(log_prob_V: np.ndarray) -> list[list[Any]]:
        order = np.argsort(-log_prob_V, kind="stable")[:_TOP]
        return [[vocabulary.piece(int(t)), float(np.exp(log_prob_V[t]))] for t in order]

    sample = {
        "row": row,
        "context": vocabulary.decode(tokens[-_SHOWN_TOKENS:]),
        "next": vocabulary.piece(int(stream.labels(row, row + 1)[0])),
        "base": top(said.base_NxV),
        "memory": top(said.memory_NxV),
        "mixture": top(said.mixture_NxV),
    }
    if (neighbors := systems.neighbors) is not None:
        tap, _ = systems.base.taps_and_log_probs(stream, [(row, row + 1)])
        rows_1xk, sqdist_1xk = neighbors.exact(neighbors.keys.queries(tap), neighbors.k)
        teacher = knn_distribution(rows_1xk, sqdist_1xk, neighbors.labels_N[rows_1xk], tau, _TOP)
        kept = float(teacher.kept_mass_Q[0])
        sample["teacher"] = [
            [vocabulary.piece(int(t)), float(p) * kept]
            for t, p in zip(teacher.token_ids_QxM[0], teacher.probs_QxM[0])
            if p > 0
        ]
    return sample
