"""Log-likelihoods of continuations under every interpolation at once.

What a decoder and its partners (the memory, kNN over a datastore) give a token does not depend on λ, and
neither do the bounds between which λ must lie for the token to be the likeliest. So one pass of the models
serves a whole curve over λ. Continuations of one beginning share its reading: what they have in common
is read once and kept in the decoder's cache.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.decoder.transformer import Cache
from mlp_memory.decoder.windows import WindowPlan
from mlp_memory.inference.next_token import Mixture
from mlp_memory.joint.gate import Gate
from mlp_memory.targets.interpolation import mixture_rows
from mlp_memory.targets.knn import SparseTargets

MEMORY = "memory"
"""The partner that every mixture with a memory has."""

_HEAD_ELEMENTS = 1 << 23
_HEAD_ROWS = 256
_TAILS = (16, 64, 256, 1024, 4096)
_ROOM = 64
"""Positions kept free after a beginning, whether it has tails or not: one program less for each length."""

_GATHERED = 64
_NEVER = 2.0


@dataclasses.dataclass(frozen=True)
class Partner:
    """What a decoder may be mixed with, at each scored token.

    Attributes:
      log_prob_T: natural log of its probability of the token, float32.
      weight_T: the gate's λ; NaN without a gate.
      least_T, most_T: the token is the mixture's likeliest where least ≤ λ ≤ most; never where least > most.
    """

    log_prob_T: np.ndarray
    weight_T: np.ndarray
    least_T: np.ndarray
    most_T: np.ndarray


_FIELDS = tuple(field.name for field in dataclasses.fields(Partner))


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of R continuations, T tokens in all, end to end.

    Attributes:
      counts_R: tokens of each.
      base_T: the decoder's natural-log probabilities, float32.
      greedy_T: whether the token is the decoder's likeliest.
      partners: by name.
    """

    counts_R: np.ndarray
    base_T: np.ndarray
    greedy_T: np.ndarray
    partners: Mapping[str, Partner]

    def at(self, partner: str | None, weight: float | str = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood [R] float64 in nats, and whether every token was the likeliest [R].

        Args:
          partner: its name; None for the decoder alone.
          weight: λ, or "gate" for each token's own.
        """
        of_T = np.repeat(np.arange(len(self.counts_R)), self.counts_R)
        log_prob_T, likeliest_T = self.base_T.astype(np.float64), self.greedy_T
        if partner is not None:
            found = self.partners[partner]
            weight_T = found.weight_T.astype(np.float64) if weight == "gate" else np.float64(weight)
            log_prob_T = -mixture_rows(self.base_T, found.log_prob_T, weight_T)
            likeliest_T = (found.least_T <= weight_T) & (weight_T <= found.most_T)
        total_R = np.bincount(of_T, log_prob_T, minlength=len(self.counts_R))
        missed_R = np.bincount(of_T, ~likeliest_T, minlength=len(self.counts_R))
        return total_R, missed_R == 0

    @classmethod
    def joined(cls, parts: Sequence["Scored"]) -> "Scored":
        """Several as one."""

        def end_to_end(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])

        partners = {
            partner: Partner(
                *(np.concatenate([getattr(p.partners[partner], name) for p in parts]) for name in _FIELDS)
            )
            for partner in parts[0].partners
        }
        return cls(end_to_end("counts_R"), end_to_end("base_T"), end_to_end("greedy_T"), partners)


class _Row(NamedTuple):
    """A token to score: where its distribution is read, and where its scores go."""

    position: int
    label: int
    slot: int


@dataclasses.dataclass
class _Group:
    """Tokens that are read once, and what goes on from there: `rows` are scored within them."""

    tokens: tuple[int, ...]
    rows: list[_Row]
    tails: list["_Group"]


class ContinuationScorer:
    """Scores continuations of any lengths, in batches of few shapes.

    Args:
      mixture: the decoder, and its memory if it has one; with a gate as weight its λ are found too.
      context: longest window; longer texts are read through windows that overlap by half.
      neighbors: further partners by name: taps [Q, D] float32 -> p_kNN.
      batch_tokens: read at once.
    """

    def __init__(
        self,
        mixture: Mixture,
        context: int,
        neighbors: Mapping[str, Callable[[np.ndarray], SparseTargets]] | None = None,
        batch_tokens: int = 8192,
    ):
        self.context = context
        self._mixture, self._neighbors, self._batch_tokens = mixture, dict(neighbors or {}), batch_tokens
        self._plan = WindowPlan(context, max(1, context // 2))
        fitting = max(1, _HEAD_ELEMENTS // mixture.config.vocab_size)
        self._head_rows = min(_HEAD_ROWS, 1 << (fitting.bit_length() - 1))
        self._begin = jax.jit(mixture.begin, static_argnames="capacity")
        self._go_on = jax.jit(self._extend)
        self._gather = jax.jit(lambda states, rows, positions: [x[rows, positions] for x in states])
        self._head = jax.jit(self._of_rows)
        self._knn_head = jax.jit(_of_neighbors)

    @property
    def partners(self) -> tuple[str, ...]:
        """Their names."""
        own = (MEMORY,) if self._mixture.parameters["memory"] is not None else ()
        return (*own, *self._neighbors)

    def is_long(self, sequence: Sequence[int]) -> bool:
        """Whether a text is read through more than one window."""
        return len(sequence) - 1 > self.context

    def __call__(self, requests: Sequence[tuple[Sequence[int], int]]) -> Scored:
        """Scores tokens[start:] of each (tokens, start); 1 ≤ start ≤ len(tokens)."""
        counts_R = np.array([len(tokens) - start for tokens, start in requests], np.int64)
        total = int(counts_R.sum())
        out = {"base": np.zeros(total, np.float32), "greedy": np.zeros(total, bool)}
        for partner in self.partners:
            out |= {f"{partner} {name}": np.zeros(total, np.float32) for name in _FIELDS}
        waiting = _Waiting(self._head_rows, lambda *rows: self._write(out, *rows))
        first_R = np.cumsum(counts_R) - counts_R
        for batch, room in self._batches(self._groups(requests, first_R)):
            self._score(batch, room, waiting)
        waiting.flush()
        partners = {p: Partner(*(out[f"{p} {name}"] for name in _FIELDS)) for p in self.partners}
        return Scored(counts_R, out["base"], out["greedy"], partners)

    def _groups(self, requests: Sequence[tuple[Sequence[int], int]], first_R: np.ndarray) -> list[_Group]:
        """What is to be read: texts that begin alike as one, long ones window by window."""
        groups, alike = [], collections.defaultdict(list)
        for (tokens, start), first in zip(requests, first_R):
            rows = [_Row(t - 1, tokens[t], int(first) + t - start) for t in range(start, len(tokens))]
            if not rows:
                continue
            if not self.is_long(tokens):
                alike[tuple(tokens[:start])].append((tuple(tokens[:-1]), rows))
                continue
            for window in self._plan.windows(start - 1, len(tokens) - 1, len(tokens) - 1):
                inside = [row for row in rows if window.first <= row.position < window.stop]
                moved = [row._replace(position=row.position - window.start) for row in inside]
                groups.append(_Group(tuple(tokens[window.start : window.stop]), moved, []))
        return groups + [_shared(texts) for texts in alike.values()]

    def _batches(self, groups: list[_Group]) -> list[tuple[list[_Group], int]]:
        """Groups of like lengths, and the room for their longest tail."""
        by_shape = collections.defaultdict(list)
        for group in groups:
            longest = max((len(tail.tokens) for tail in group.tails), default=0)
            shape = _length_of(len(group.tokens), self.context), max(_ROOM, _tail_of(longest))
            by_shape[shape].append(group)
        found = []
        for (length, room), alike in sorted(by_shape.items()):
            alike.sort(key=lambda group: (len(group.tails), len(group.tokens)))
            size = _batch_of(self._batch_tokens, length)
            found += [(alike[at : at + size], room) for at in range(0, len(alike), size)]
        return found

    def _score(self, groups: list[_Group], room: int, waiting: "_Waiting") -> None:
        length = _length_of(max(len(group.tokens) for group in groups), self.context)
        batch = _batch_of(self._batch_tokens, length)
        tokens_BxT = _padded([group.tokens for group in groups], batch, length)
        parameters = self._mixture.parameters
        *states, cache = self._begin(parameters, tokens_BxT, capacity=length + room)
        self._wait(states, [group.rows for group in groups], waiting)
        for k in range(max(len(group.tails) for group in groups)):
            # A row without a k-th tail is read as padding: the batch keeps its shape.
            tails = [group.tails[k] if k < len(group.tails) else _Group((), [], []) for group in groups]
            starts_B = np.zeros(batch, np.int32)
            starts_B[: len(groups)] = [len(group.tokens) for group in groups]
            width = _tail_of(max(len(one.tokens) for one in tails))
            tokens_BxT = _padded([one.tokens for one in tails], batch, width)
            states = self._go_on(parameters, tokens_BxT, starts_B, cache)
            self._wait(states, [one.rows for one in tails], waiting)

    def _wait(self, states: Sequence[jax.Array], rows_of: list[list[_Row]], waiting: "_Waiting") -> None:
        flat = [(b, row) for b, rows in enumerate(rows_of) for row in rows]
        for at in range(0, len(flat), _GATHERED):
            part = flat[at : at + _GATHERED]
            index_2xN = np.zeros((2, _GATHERED), np.int32)
            index_2xN[:, : len(part)] = [[b for b, _ in part], [row.position for _, row in part]]
            hidden_NxD, tap_NxD = (np.asarray(x)[: len(part)] for x in self._gather(states, *index_2xN))
            labels = np.array([row.label for _, row in part], np.int32)
            waiting.add(hidden_NxD, tap_NxD, labels, np.array([row.slot for _, row in part]))

    def _extend(
        self, parameters: dict[str, Any], tokens_BxT: jax.Array, starts_B: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array]:
        positions_BxT = starts_B[:, None] + jnp.arange(tokens_BxT.shape[1])
        hidden, tapped, _ = self._mixture.extend(parameters, tokens_BxT, positions_BxT, cache)
        return hidden, tapped

    def _of_rows(
        self, parameters: dict[str, Any], hidden_NxD: jax.Array, tap_NxD: jax.Array, labels_N: jax.Array
    ) -> dict[str, jax.Array]:
        said = self._mixture.next_token(parameters, hidden_NxD, tap_NxD)
        found = {"base": _taken(said.base_NxV, labels_N), "base_NxV": said.base_NxV}
        found["greedy"] = jnp.argmax(said.base_NxV, axis=1) == labels_N
        if said.memory_NxV is not None:
            gated = isinstance(parameters["weight"], Gate)
            weight_N = said.weight_N if gated else jnp.full(labels_N.shape, jnp.nan)
            least_N, most_N = _bounds(said.base_NxV, jnp.exp(said.memory_NxV), labels_N)
            values = (_taken(said.memory_NxV, labels_N), weight_N, least_N, most_N)
            found |= {f"{MEMORY} {name}": value for name, value in zip(_FIELDS, values)}
        if not self._neighbors:
            del found["base_NxV"]
        return found

    def _write(
        self,
        out: dict[str, np.ndarray],
        hidden_NxD: np.ndarray,
        tap_NxD: np.ndarray,
        labels_N: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        found = self._head(self._mixture.parameters, hidden_NxD, tap_NxD, labels_N)
        base_NxV = found.pop("base_NxV", None)
        for name, distribution in self._neighbors.items():
            said = distribution(tap_NxD.astype(np.float32))
            values = self._knn_head(base_NxV, said.token_ids_QxM, said.probs_QxM, labels_N)
            found |= {f"{name} {key}": value for key, value in values.items()}
        for name, value_N in found.items():
            out[name][slots] = np.asarray(value_N)[: len(slots)]


class _Waiting:
    """Rows that wait until there are enough of them for the vocabulary heads."""

    def __init__(self, rows: int, score: Callable[..., None]):
        self._rows, self._score = rows, score
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, *part: np.ndarray) -> None:
        self._parts.append(part)
        while sum(len(part[0]) for part in self._parts) >= self._rows:
            whole = [np.concatenate(column) for column in zip(*self._parts)]
            self._score(*(column[: self._rows] for column in whole))
            self._parts = [tuple(column[self._rows :] for column in whole)]

    def flush(self) -> None:
        whole = [np.concatenate(column) for column in zip(*self._parts)]
        if whole and len(whole[0]):
            *arrays, slots = whole
            missing = self._rows - len(slots)
            padded = [np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in arrays]
            self._score(*padded, slots)
        self._parts = []


def _shared(texts: list[tuple[tuple[int, ...], list[_Row]]]) -> _Group:
    """Texts that begin alike: their common beginning, and what each goes on with."""
    by_tokens = collections.defaultdict(list)
    for tokens, rows in texts:
        by_tokens[tokens] += rows
    common = functools.reduce(_common, by_tokens)
    group = _Group(common, [], [])
    for tokens, rows in sorted(by_tokens.items(), key=lambda item: len(item[0])):
        group.rows += [row for row in rows if row.position < len(common)]
        later = [row._replace(position=row.position - len(common)) for row in rows]
        if len(tokens) > len(common):
            tail = [row for row in later if row.position >= 0]
            group.tails.append(_Group(tokens[len(common) :], tail, []))
    return group


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that both begin with."""
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:same]


def _length_of(length: int, context: int) -> int:
    """The padded length of a beginning: multiples of 64, then 128, then 256, none beyond the context."""
    step = 64 if length <= 256 else 128 if length <= 512 else 256
    return min(-(-max(length, 1) // step) * step, max(context, length))


def _tail_of(length: int) -> int:
    """The padded length of a tail."""
    return 0 if not length else next((n for n in _TAILS if n >= length), length)


def _batch_of(tokens: int, length: int) -> int:
    return max(1, min(64, tokens // length))


def _padded(texts: list[tuple[int, ...]], batch: int, length: int) -> np.ndarray:
    tokens_BxT = np.zeros((batch, length), np.int32)
    for row, text in zip(tokens_BxT, texts):
        row[: len(text)] = text
    return tokens_BxT


def _taken(x_NxV: jax.Array, labels_N: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_NxV, labels_N[:, None], axis=1)[:, 0]


def _bounds(base_NxV: jax.Array, other_NxV: jax.Array, labels_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Between which λ no token of λ·other + (1 − λ)·base is likelier than the label, [N] each.

    Linear in λ, so each other token rules out one side: one that only the base finds likelier a lower one,
    one that only the other finds likelier an upper one, one that both do everything.

    Args:
      base_NxV: log probabilities.
      other_NxV: probabilities.
    """
    base_NxV = jnp.exp(base_NxV)
    ahead_b = base_NxV - _taken(base_NxV, labels_N)[:, None]
    ahead_o = other_NxV - _taken(other_NxV, labels_N)[:, None]
    crossing = ahead_b / jnp.where(ahead_b == ahead_o, 1.0, ahead_b - ahead_o)
    lower = jnp.where(ahead_b > 0, jnp.where(ahead_o > 0, _NEVER, crossing), 0.0)
    upper = jnp.where((ahead_b <= 0) & (ahead_o > 0), crossing, 1.0)
    return lower.max(1), upper.min(1)


def _of_neighbors(
    base_NxV: jax.Array, token_ids_NxM: jax.Array, probs_NxM: jax.Array, labels_N: jax.Array
) -> dict[str, jax.Array]:
    rows_Nx1 = jnp.arange(len(base_NxV))[:, None]
    knn_NxV = jnp.zeros_like(base_NxV).at[rows_Nx1, token_ids_NxM].add(probs_NxM)
    # Where there are no neighbours the decoder is alone, whatever λ.
    none_N = probs_NxM.sum(1) <= 0
    knn_NxV = jnp.where(none_N[:, None], jnp.exp(base_NxV), knn_NxV)
    least_N, most_N = _bounds(base_NxV, knn_NxV, labels_N)
    log_N = jnp.where(none_N, _taken(base_NxV, labels_N), jnp.log(_taken(knn_NxV, labels_N)))
    values = (log_N, jnp.full(log_N.shape, jnp.nan), least_N, most_N)
    return dict(zip(_FIELDS, values))
