"""kNN-LM's half of a mixture: a search for each query, and what the neighbours' next tokens say."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mlp_memory.datastore.store import KeyStore
from mlp_memory.index.exact import ExactIndex, exact_search
from mlp_memory.targets.knn import SparseTargets, knn_distribution, knn_log_prob

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries [Q, D], k) -> rows [Q, k], squared distances [Q, k]."""

_FLOOR = -1e4
"""Stands for log 0 in the arrays, which hold finite numbers only; e^-10000 is 0."""


def temperatures(targets: dict[str, Any]) -> tuple[float, ...]:
    """τ tried for kNN-LM: what the targets' own choice was made from, or the one given."""
    return tuple(targets["temperature_choice"].get("temperatures", [targets["temperature"]]))


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """kNN-LM's part of what is compared.

    Attributes:
      keys, valid_N, labels_N: the datastore, its rows with a next token, and those tokens.
      scann: approximate search.
      k: neighbours.
      temperatures: τ grid.
      mesh: devices of exact search.
    """

    keys: KeyStore
    valid_N: np.ndarray
    labels_N: np.ndarray
    scann: Search
    k: int
    temperatures: tuple[float, ...]
    mesh: Mesh

    def exact(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact search over the datastore, queries in its searched space."""
        return exact_search(self.keys, self.valid_N, queries_QxD, k, self.mesh)

    def log_prob(self, search: Search, taps_QxD: np.ndarray, next_Q: np.ndarray) -> np.ndarray:
        """log p_kNN(next token), [Q, temperatures]."""
        rows_Qxk, sqdist_Qxk = search(self.keys.queries(taps_QxD), self.k)
        found = knn_log_prob(rows_Qxk, sqdist_Qxk, self.labels_N[rows_Qxk], self.temperatures, next_Q)
        return np.maximum(found, _FLOOR).T

    @functools.cached_property
    def resident(self) -> Search:
        """Exact search over keys that stay on the devices."""
        return ExactIndex(self.keys, self.valid_N, self.mesh).search

    def distribution(self, search: Search, taps_QxD: np.ndarray, tau: float) -> SparseTargets:
        """p_kNN whole: all tokens that any of the k neighbours has next."""
        rows_Qxk, sqdist_Qxk = search(self.keys.queries(taps_QxD), self.k)
        return knn_distribution(rows_Qxk, sqdist_Qxk, self.labels_N[rows_Qxk], tau, self.k)
