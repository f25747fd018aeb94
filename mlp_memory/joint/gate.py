"""The gate: how much of the memory to take, token by token, from what both models say at that step.

    λ_t = share · sigmoid(w · x_t + b)

x_t holds the entropy and the log of the largest probability of decoder and memory, and the state that
the memory reads. w and b are fitted to the mixture's likelihood on held-out text of the memory's own kind.
What is decided is decided by cross-fitting: each document's λ comes of a fit to the other folds' documents.

- Where that λ is not better than the best fixed one, at the upper end of a bootstrap interval of the
  difference, the gate is that fixed λ: w = 0.
- Guards, texts that the memory was not made for, count in the fit only as far as they would be harmed
  otherwise.
- The share is the largest that does no harm: on no text is the mixture worse than the decoder alone by more
  than a margin, at the upper end of an interval.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.windows import read, spread
from mlp_memory.joint.config import GateConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.score import memory_scores
from mlp_memory.statistics import bootstrap_mean, units_of
from mlp_memory.targets.interpolation import best_lambda, lambda_grid, mixture_rows
from mlp_memory.training.progress import Progress
from mlp_memory.training.sparse_head import Spread

SIGNALS = ("base_entropy", "base_most", "memory_entropy", "memory_most")
"""Of the signals the first; the state's coordinates follow."""

_SHARES = np.arange(20, -1, -1) / 20
_MOST = 1 - 2.0**-20


class Gate(NamedTuple):
    """A fitted gate over F signals, float32; a pytree, for use inside compiled steps.

    Attributes:
      center_F, width_F: of each signal on the text that it was fitted to: x̂ = (x − center) / width.
      weights_F, bias: of the logistic function.
      share: what λ is at most.
    """

    center_F: jax.Array
    width_F: jax.Array
    weights_F: jax.Array
    bias: jax.Array
    share: jax.Array


def gate_signals(base: Spread, memory: Spread, tap_NxD: jax.Array) -> jax.Array:
    """What a gate reads of each token, [N, 4 + D] float32."""
    columns = [x_N[:, None] for x_N in (*base, *memory)]
    return jnp.concatenate([*columns, tap_NxD.astype(jnp.float32)], axis=1)


def gate_weight(gate: Gate, base: Spread, memory: Spread, tap_NxD: jax.Array) -> jax.Array:
    """λ of each token, [N] float32 in [0, 1).

    Args:
      gate: fitted.
      base, memory: how sure both distributions are.
      tap_NxD: the memory's input.
    """
    x_NxF = (gate_signals(base, memory, tap_NxD) - gate.center_F) / gate.width_F
    logit_N = jnp.matmul(x_NxF, gate.weights_F, precision=jax.lax.Precision.HIGHEST) + gate.bias
    return jnp.minimum(gate.share * jax.nn.sigmoid(logit_N), _MOST)


class HeldOut(NamedTuple):
    """Rows of a text that nothing was trained on, as both models read them.

    Attributes:
      signals_NxF: see `gate_signals`.
      base_N, memory_N: log-probabilities of the next token.
      documents_N: the document of each row.
    """

    signals_NxF: np.ndarray
    base_N: np.ndarray
    memory_N: np.ndarray
    documents_N: np.ndarray


def held_out(reader: RowReader, memory: Memory, stream: TokenStream, rows: int) -> HeldOut:
    """About so many rows of a text, evenly spread; 0 for all."""
    ranges = spread(len(stream), rows)
    scored, documents_N = read(stream.has_next, ranges), read(stream.document_ids, ranges)
    found = reader.scores(stream, ranges)
    taps_NxD, base_N, base = jax.tree.map(lambda x_N: x_N[scored], found)
    labels_N = read(stream.labels, ranges)[scored]
    memory_N, of_memory = memory_scores(memory, taps_NxD, labels_N, reader.mesh)
    signals_NxF = np.asarray(gate_signals(base, of_memory, taps_NxD))
    return HeldOut(signals_NxF, base_N, memory_N, documents_N[scored])


def fit_gate(texts: Mapping[str, HeldOut], config: GateConfig) -> tuple[Gate, dict[str, Any]]:
    """A gate, and what was found on the way (the module's text says how it is chosen).

    Args:
      texts: by name; the first is of the memory's own kind, the others are guards.
      config: how.

    Returns:
      The gate, and facts: the signals it reads, the penalty chosen and each one's loss, the guards' weight,
      the share, what the gate gains over the best fixed λ of the first text (interval, nats), and for each
      text, by cross-fitting: nats of the decoder alone, at its best fixed λ and with the gate, the mean λ,
      and the interval of what the gate adds to the decoder's nats.

    Raises:
      UserError: a text is too short for folds.
    """
    rows, names, own = HeldOut(*map(np.concatenate, zip(*texts.values()))), list(texts), next(iter(texts))
    text_N = np.repeat(np.arange(len(names)), [len(t.base_N) for t in texts.values()])
    fold_N = np.concatenate([_folds(name, text, config.folds) for name, text in texts.items()])
    fixed = best_lambda(texts[own].base_N, texts[own].memory_N)[0]
    standard, folds = _standard(texts[own].signals_NxF), range(int(fold_N.max()) + 1)
    x_NxF = _standardised(rows, standard)

    def weights(of_guards: float) -> np.ndarray:
        """Of rows: those of the first text add up to 1, those of all guards to `of_guards`."""
        each = np.array([1.0, *(of_guards / (len(names) - 1) for _ in names[1:])])
        return (each / np.bincount(text_N))[text_N]

    def fit(
        of_guards: float, rows_N: np.ndarray, penalty: float, taps: bool, start: np.ndarray
    ) -> np.ndarray:
        """w and b from some rows."""
        weight_N = weights(of_guards)
        rows_N = rows_N & (weight_N > 0)
        part_NxF = x_NxF[rows_N, : _used(x_NxF, taps)]
        return _minimize(part_NxF, *(x[rows_N] for x in (*_likelihoods(rows), weight_N)), penalty, start)

    def cross_fitted(
        of_guards: float, penalty: float, taps: bool, starts: dict[int, np.ndarray]
    ) -> np.ndarray:
        """λ of each row by a fit to the other folds, which starts from `starts` and leaves its end there."""
        found_N = np.zeros(len(x_NxF))
        for fold in folds:
            starts[fold] = fit(of_guards, fold_N != fold, penalty, taps, starts[fold])
            here_N = fold_N == fold
            logit_N = _logit(x_NxF[here_N, : _used(x_NxF, taps)], starts[fold])
            found_N[here_N] = np.exp(-np.logaddexp(0, -logit_N))
        return found_N

    def by_penalty(of_guards: float) -> tuple[list[dict[str, Any]], float, bool, np.ndarray]:
        """Each penalty's loss; the best one, whether it reads the state, and its λ of each row."""
        losses, lambdas, weight_N = [], [], weights(of_guards)
        with Progress("gate", 2 * len(config.penalties), "cross-fits") as bar:
            for taps in (False, True):
                starts = dict.fromkeys(folds, _constant(fixed, _used(x_NxF, taps)))
                for penalty in sorted(config.penalties, reverse=True):  # each a good start for the next
                    lambdas.append(cross_fitted(of_guards, penalty, taps, starts))
                    nll_N = mixture_rows(rows.base_N, rows.memory_N, lambdas[-1])
                    nats = float(np.average(nll_N, weights=weight_N))
                    losses.append({"state": taps, "penalty": penalty, "nats": nats})
                    bar.advance(1)
        best = min(range(len(losses)), key=lambda number: losses[number]["nats"])
        return losses, losses[best]["penalty"], losses[best]["state"], lambdas[best]

    def of_text(lambda_N: np.ndarray) -> Callable[[str, float], np.ndarray]:
        return lambda name, share: np.minimum(share * lambda_N[text_N == names.index(name)], _MOST)

    guard_weight, (losses, penalty, taps, lambda_N) = 0.0, by_penalty(0.0)
    gained = _difference(texts[own], of_text(lambda_N)(own, 1.0), fixed, config)
    varies = gained[1] < 0
    if not varies:
        lambda_N = np.full(len(text_N), fixed)
    if names[1:] and not harmless(texts, of_text(lambda_N), _SHARES[:1], config):
        varies, (losses, penalty, taps, _) = True, by_penalty(1.0)
        starts = dict.fromkeys(folds, _constant(fixed, _used(x_NxF, taps)))
        for guard_weight in config.guard_weights:
            lambda_N = cross_fitted(guard_weight, penalty, taps, starts)
            if harmless(texts, of_text(lambda_N), _SHARES[:1], config):
                break
        gained = _difference(texts[own], of_text(lambda_N)(own, 1.0), fixed, config)
    share = harmless(texts, of_text(lambda_N), _SHARES, config)
    fitted = _constant(fixed, x_NxF.shape[1])
    if varies:
        start = _constant(fixed, _used(x_NxF, taps))
        found = fit(guard_weight, np.ones(len(x_NxF), bool), penalty, taps, start)
        fitted[: len(found) - 1], fitted[-1] = found[:-1], found[-1]
    facts = {
        "signals": [*SIGNALS, *(["state"] if taps else [])] if varies else [],
        "penalty": penalty,
        "losses": losses,
        "guard_weight": guard_weight,
        "share": share,
        "gained": list(gained),
        "harmless_lambda": harmless(texts, lambda _, weight: weight, lambda_grid()[::-1], config),
        "texts": {
            name: _figures(text, of_text(lambda_N)(name, share), config) for name, text in texts.items()
        },
    }
    return Gate(*map(jnp.float32, (*standard, fitted[:-1], fitted[-1], share))), facts


def harmless(
    texts: Mapping[str, HeldOut],
    weight: Callable[[str, float], float | np.ndarray],
    candidates: np.ndarray,
    config: GateConfig,
) -> float:
    """The first candidate under which no text's mixture is worse than the decoder alone.

    Worse is a difference in nats whose bootstrap interval ends above the margin.

    Args:
      texts: by name.
      weight: λ, or the λ of each row, of a text under a candidate.
      candidates: in order; 0, under which nothing changes, is taken where none will do.
      config: the margin, how often to resample, and the interval's level.
    """
    for candidate in candidates:
        added = (_added(text, weight(name, candidate), config) for name, text in texts.items())
        if all(high <= config.margin for _, high in added):
            return float(candidate)
    return 0.0


def _added(text: HeldOut, weight: float | np.ndarray, config: GateConfig) -> tuple[float, float]:
    """Interval of the nats that the mixture adds to the decoder's."""
    return _difference(text, weight, 0.0, config)


def _difference(
    text: HeldOut, weight: float | np.ndarray, other: float, config: GateConfig
) -> tuple[float, float]:
    """Interval of the mixture's nats at one λ less those at another."""
    nll_N, other_N = (mixture_rows(text.base_N, text.memory_N, one) for one in (weight, other))
    low, high, _ = bootstrap_mean(
        nll_N - other_N, text.documents_N, config.bootstrap, config.seed, config.level
    )
    return low, high


def _folds(name: str, text: HeldOut, folds: int) -> np.ndarray:
    """The fold of each row; documents stay whole."""
    unit_N, _ = units_of(text.documents_N)
    units = int(unit_N.max()) + 1
    if units < 2:
        raise UserError(
            f"gate: {name} has {unit_N.size} rows, too few for two folds: give it more text, or set "
            "gate.enabled = False"
        )
    return unit_N % min(folds, units)


def _standard(signals_NxF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each signal; 1 where it does not vary."""
    width_F = signals_NxF.std(0, dtype=np.float64)
    return signals_NxF.mean(0, dtype=np.float64), np.where(width_F > 1e-6, width_F, 1.0)


def _standardised(text: HeldOut, standard: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return ((text.signals_NxF - standard[0]) / standard[1]).astype(np.float32)


def _likelihoods(text: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    return text.base_N.astype(np.float64), text.memory_N.astype(np.float64)


def _used(x_NxF: np.ndarray, taps: bool) -> int:
    return x_NxF.shape[1] if taps else len(SIGNALS)


def _constant(weight: float, signals: int) -> np.ndarray:
    """w = 0 and the b of a λ, [F + 1]."""
    weight = min(max(weight, 1e-4), 1 - 1e-4)
    return np.append(np.zeros(signals), np.log(weight / (1 - weight)))


def _logit(x_NxF: np.ndarray, parameters_F1: np.ndarray) -> np.ndarray:
    return (x_NxF @ parameters_F1[:-1].astype(x_NxF.dtype)).astype(np.float64) + parameters_F1[-1]


def _loss(
    parameters_F1: np.ndarray,
    x_NxF: np.ndarray,
    base_N: np.ndarray,
    memory_N: np.ndarray,
    weight_N: np.ndarray,
    penalty: float,
) -> tuple[float, np.ndarray]:
    """Σ weight · −log(λ p_M + (1 − λ) p_LM) + penalty/2 · |w|² · Σ weight, and its gradient.

    The gradient by the logit is λ minus the memory's part of the mixture, λ p_M / p.
    """
    w_F, logit_N = parameters_F1[:-1], _logit(x_NxF, parameters_F1)
    log_memory_N = -np.logaddexp(0, -logit_N)
    log_base_N = -np.logaddexp(0, logit_N)
    log_p_N = np.logaddexp(log_memory_N + memory_N, log_base_N + base_N)
    pull_N = weight_N * (np.exp(log_memory_N) - np.exp(log_memory_N + memory_N - log_p_N))
    total = weight_N.sum()
    loss = -(weight_N * log_p_N).sum() + penalty / 2 * (w_F @ w_F) * total
    slope_F = pull_N.astype(x_NxF.dtype) @ x_NxF + penalty * total * w_F
    return float(loss), np.append(slope_F.astype(np.float64), pull_N.sum())


def _minimize(
    x_NxF: np.ndarray,
    base_N: np.ndarray,
    memory_N: np.ndarray,
    weight_N: np.ndarray,
    penalty: float,
    start_F1: np.ndarray,
) -> np.ndarray:
    """The logistic function's weights and, last, its bias."""
    arguments = (x_NxF, base_N, memory_N, weight_N, penalty)
    return scipy.optimize.minimize(
        _loss, start_F1, arguments, "L-BFGS-B", jac=True, options={"maxiter": 300}
    ).x


def _figures(text: HeldOut, weight_N: np.ndarray, config: GateConfig) -> dict[str, Any]:
    best, fixed = best_lambda(text.base_N, text.memory_N)
    return {
        "rows": len(text.base_N),
        "base": float(-text.base_N.astype(np.float64).mean()),
        "fixed_lambda": best,
        "fixed": fixed,
        "gate": float(mixture_rows(text.base_N, text.memory_N, weight_N).mean()),
        "mean_lambda": float(weight_N.mean()),
        "added": list(_added(text, weight_N, config)),
    }


def gate_facts(gate: Gate) -> dict[str, Any]:
    """A gate as JSON."""
    return {name: np.asarray(value).tolist() for name, value in gate._asdict().items()}


def load_gate(directory: Directory, stage: str, decoder_dim: int) -> Gate:
    """The gate that a stage has fitted.

    Raises:
      UserError: it is missing, damaged or of another decoder.
    """
    facts = artifacts.require(directory, stage).facts.get("gate", {})
    signals, again = len(SIGNALS) + decoder_dim, f"delete {directory} and run {stage} again"
    try:
        gate = Gate(*(np.asarray(facts[name], np.float32) for name in Gate._fields))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory} holds no gate: {again}") from error
    shapes = [(signals,)] * 3 + [()] * 2
    if [x.shape for x in gate] != shapes or not all(np.isfinite(x).all() for x in gate):
        raise UserError(f"{directory} holds no gate over {signals} finite signals: {again}")
    return jax.tree.map(jnp.asarray, gate)
