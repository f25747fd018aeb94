"""Neighbour lists: their order, what is dropped from them, and recall@k.

A neighbour list is a pair rows_Qxk (int64 rows of the stream, -1 where there is none) and
sqdist_Qxk (float32 squared L2 distances, inf there), nearest first, ties by row.
"""

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)


def nearest_first(rows_QxC: np.ndarray, sqdist_QxC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders candidates by (distance, row) and keeps k.

    Args:
      rows_QxC: int64 rows, -1 where there is none; no row twice in a list.
      sqdist_QxC: float32, not negative, inf where there is none.
      k: length of the lists returned; short ones are padded.

    Returns:
      rows_Qxk int64 and sqdist_Qxk float32.
    """
    count = min(k, rows_QxC.shape[1])
    if rows_QxC.max(initial=-1) < int(_LOW):
        # A distance that is not negative orders as its bits do, so one integer sort does both keys.
        bits_QxC = np.ascontiguousarray(sqdist_QxC, np.float32).view(np.uint32)
        packed_QxC = bits_QxC.astype(np.uint64) << np.uint64(32)
        packed_QxC |= rows_QxC.astype(np.uint64) & _LOW
        packed_QxC.sort(axis=1)
        packed_QxC = packed_QxC[:, :count]
        sqdist = (packed_QxC >> np.uint64(32)).astype(np.uint32).view(np.float32)
        rows = (packed_QxC & _LOW).astype(np.int64)
    else:
        order_QxC = np.lexsort((rows_QxC, sqdist_QxC), axis=1)[:, :count]
        rows = np.take_along_axis(rows_QxC, order_QxC, axis=1)
        sqdist = np.take_along_axis(sqdist_QxC, order_QxC, axis=1).astype(np.float32)
    rows[np.isinf(sqdist)] = -1
    short = ((0, 0), (0, k - count))
    return np.pad(rows, short, constant_values=-1), np.pad(sqdist, short, constant_values=np.inf)


def drop(
    rows_QxC: np.ndarray, sqdist_QxC: np.ndarray, dropped_QxC: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k candidates of each list that are not marked, order kept; short lists are padded.

    Args:
      rows_QxC: int64 rows, -1 where there is none.
      sqdist_QxC: float32 distances.
      dropped_QxC: bool, True for what may not stay.
      k: neighbours kept.

    Returns:
      rows_Qxk int64 and sqdist_Qxk float32.
    """
    kept_QxC = ~dropped_QxC & (rows_QxC >= 0)
    rank_QxC = np.cumsum(kept_QxC, axis=1, dtype=np.int32)
    kept_QxC &= rank_QxC <= k
    filled_Qxk = np.arange(k) < kept_QxC.sum(axis=1)[:, None]
    rows_Qxk = np.full(filled_Qxk.shape, -1, np.int64)
    sqdist_Qxk = np.full(filled_Qxk.shape, np.inf, np.float32)
    rows_Qxk[filled_Qxk] = rows_QxC[kept_QxC]
    sqdist_Qxk[filled_Qxk] = sqdist_QxC[kept_QxC]
    return rows_Qxk, sqdist_Qxk


def exclude_self(
    rows_QxC: np.ndarray, sqdist_QxC: np.ndarray, query_rows_Q: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Drops each query's own row by identity, whatever its rank, and keeps k of the others.

    Rows with the very same key stay. Where the query's row was not found, the farthest goes.
    What else may not teach a row: targets/exclusion.py.

    Args:
      rows_QxC: int64 neighbour rows of a search for C = k + 1.
      sqdist_QxC: float32 distances.
      query_rows_Q: int64 row of each query.
      k: neighbours kept.

    Returns:
      rows_Qxk int64 and sqdist_Qxk float32, order kept.

    Raises:
      ValueError: C is not k + 1.
    """
    if rows_QxC.shape[1] != k + 1:
        raise ValueError(f"to keep {k} neighbours search for {k + 1}, not {rows_QxC.shape[1]}")
    return drop(rows_QxC, sqdist_QxC, rows_QxC == query_rows_Q[:, None], k)


def hits(found_rows_QxC: np.ndarray, true_rows_Qxk: np.ndarray) -> np.ndarray:
    """bool [Q, k]: which true neighbours of each query were found, by identity; -1 is none."""
    found = [np.isin(true_k, found_C) for found_C, true_k in zip(found_rows_QxC, true_rows_Qxk)]
    return (true_rows_Qxk >= 0) & np.stack(found)


def recall_at_k(found_rows_Qxk: np.ndarray, true_rows_Qxk: np.ndarray) -> float:
    """Mean share of the true neighbours that were found, by identity; -1 counts on neither side.

    Raises:
      ValueError: there is no true neighbour at all.
    """
    true_count_Q = (true_rows_Qxk >= 0).sum(axis=1)
    if not true_count_Q.any():
        raise ValueError("recall of no neighbours")
    hits_Q = hits(found_rows_Qxk, true_rows_Qxk).sum(axis=1)
    return float((hits_Q[true_count_Q > 0] / true_count_Q[true_count_Q > 0]).mean())
