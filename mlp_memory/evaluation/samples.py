"""Which held-out contexts the report shows.

Some lie evenly over the split; others are those where the memory changed most.
"""

import numpy as np

from mlp_memory.corpus.stream import TokenStream


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
