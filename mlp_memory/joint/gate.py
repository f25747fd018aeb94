"""The gate: how much of the memory to take, token by token, from what both models say at that step.

    λ_t = share · sigmoid(w · x_t + b)

x_t holds the entropy and the log of the largest probability of decoder and memory, and the state that
the memory reads. w and b are fitted to the mixture's likelihood on one half of held-out text, and to that
of guards, texts that the memory was not made for, only as far as they would be harmed otherwise; the share
is the largest that, on the other half, does no harm: on no text is the mixture worse than the decoder
alone by more than a margin, at the upper end of a bootstrap interval.
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

    def of(self, rows_N: np.ndarray) -> "HeldOut":
        """The rows of a mask."""
        return HeldOut(*(x_N[rows_N] for x_N in self))


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
    """A gate, and what was found on the way.

    The fit is to the first text. If its λ does harm on another, the others count in the fit, with the least
    weight of `config.guard_weights` under which none is harmed; if that is not enough, λ is cut to a share.

    Args:
      texts: by name; the first is of the memory's own kind, the others are guards.
      config: how.

    Returns:
      The gate, and facts: the penalty chosen and each one's loss, the guards' weight, the share, and for each
      text, on the half that the gate was not fitted to: nats of the decoder alone, at the best fixed λ and
      with the gate, the mean λ, and the interval of what the gate adds to the decoder's nats.

    Raises:
      UserError: a text is too short to be halved.
    """
    fit, check = {}, {}
    for name, text in texts.items():
        fit[name], check[name] = _halves(name, text)
    first, *guards = fit.values()
    rows, standard = HeldOut(*map(np.concatenate, zip(*fit.values()))), _standard(first.signals_NxF)
    x_NxF, start = _standardised(rows, standard), best_lambda(first.base_N, first.memory_N)[0]
    fold_N = np.concatenate([units_of(text.documents_N)[0] % config.folds for text in fit.values()])

    def weights(of_guards: float) -> np.ndarray:
        each = [1.0, *(of_guards / len(guards) for _ in guards)]
        return np.concatenate([np.full(len(t.base_N), w / len(t.base_N)) for w, t in zip(each, fit.values())])

    def cross_validated(of_guards: float) -> tuple[float, bool, list[dict[str, Any]]]:
        weight_N = weights(of_guards)
        used_N = weight_N > 0
        arrays = (x_NxF, *_likelihoods(rows), weight_N, fold_N)
        return _cross_validated(*(x_N[used_N] for x_N in arrays), start, config)

    def fitted(of_guards: float, penalty: float, taps: bool) -> Gate:
        used_F = _used(x_NxF.shape[1], taps)
        found = _minimize(x_NxF[:, used_F], *_likelihoods(rows), weights(of_guards), penalty, start)
        weights_F = np.zeros(x_NxF.shape[1])
        weights_F[used_F] = found[:-1]
        return Gate(*map(jnp.float32, (*standard, weights_F, found[-1], 1.0)))

    def by_share(gate: Gate) -> Callable[[str, float], np.ndarray]:
        lambdas = {name: _lambdas(gate, text) for name, text in check.items()}
        return lambda name, share: share * lambdas[name]

    penalty, taps, losses = cross_validated(0.0)
    guard_weight, gate = 0.0, fitted(0.0, penalty, taps)
    if guards and not harmless(check, by_share(gate), _SHARES[:1], config):
        penalty, taps, losses = cross_validated(1.0)
        for guard_weight in config.guard_weights:
            gate = fitted(guard_weight, penalty, taps)
            if harmless(check, by_share(gate), _SHARES[:1], config):
                break
    weight = by_share(gate)
    share = harmless(check, weight, _SHARES, config)
    facts = {
        "signals": [*SIGNALS, "state"] if taps else [*SIGNALS],
        "penalty": penalty,
        "losses": losses,
        "guard_weight": guard_weight,
        "share": share,
        "harmless_lambda": harmless(check, lambda _, weight: weight, lambda_grid()[::-1], config),
        "texts": {
            name: _figures(fit[name], text, weight(name, share), config) for name, text in check.items()
        },
    }
    return gate._replace(share=jnp.float32(share)), facts


def _cross_validated(
    x_NxF: np.ndarray,
    base_N: np.ndarray,
    memory_N: np.ndarray,
    weight_N: np.ndarray,
    fold_N: np.ndarray,
    start: float,
    config: GateConfig,
) -> tuple[float, bool, list[dict[str, Any]]]:
    """The penalty with the least loss over folds of documents, whether the state is read, and all losses."""
    losses = []
    with Progress("gate", 2 * len(config.penalties) * config.folds, "fits") as bar:
        for taps in (False, True):
            part_NxF = x_NxF[:, _used(x_NxF.shape[1], taps)]
            for penalty in config.penalties:
                loss = 0.0
                for fold in range(config.folds):
                    out_N = fold_N == fold
                    arrays = [(x[~out_N], x[out_N]) for x in (part_NxF, base_N, memory_N, weight_N)]
                    found = _minimize(*(kept for kept, _ in arrays), penalty, start)
                    loss += _loss(found, *(left for _, left in arrays), 0.0)[0]
                    bar.advance(1)
                losses.append({"state": taps, "penalty": penalty, "nats": float(loss / weight_N.sum())})
    best = min(losses, key=lambda one: one["nats"])
    return best["penalty"], best["state"], losses


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
    added_N = mixture_rows(text.base_N, text.memory_N, weight) + text.base_N.astype(np.float64)
    low, high, _ = bootstrap_mean(added_N, text.documents_N, config.bootstrap, config.seed, config.level)
    return low, high


def _halves(name: str, text: HeldOut) -> tuple[HeldOut, HeldOut]:
    unit_N, _ = units_of(text.documents_N)
    if unit_N.max() < 1:
        raise UserError(f"gate: {name} has {unit_N.size} rows, too few for two halves: give it more text")
    return text.of(unit_N % 2 == 0), text.of(unit_N % 2 == 1)


def _standard(signals_NxF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each signal; 1 where it does not vary."""
    width_F = signals_NxF.std(0, dtype=np.float64)
    return signals_NxF.mean(0, dtype=np.float64), np.where(width_F > 1e-6, width_F, 1.0)


def _standardised(text: HeldOut, standard: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return ((text.signals_NxF - standard[0]) / standard[1]).astype(np.float32)


def _likelihoods(text: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    return text.base_N.astype(np.float64), text.memory_N.astype(np.float64)


def _used(count: int, taps: bool) -> np.ndarray:
    return np.arange(count if taps else len(SIGNALS))


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
    w_F, bias = parameters_F1[:-1], parameters_F1[-1]
    logit_N = (x_NxF @ w_F.astype(x_NxF.dtype)).astype(np.float64) + bias
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
    start: float,
) -> np.ndarray:
    """The logistic function's weights and, last, its bias; it starts as the fixed λ `start`."""
    first = np.zeros(x_NxF.shape[1] + 1)
    first[-1] = np.log(start / (1 - start)) if 0 < start < 1 else -4.0
    arguments = (x_NxF, base_N, memory_N, weight_N, penalty)
    return scipy.optimize.minimize(_loss, first, arguments, "L-BFGS-B", jac=True, options={"maxiter": 300}).x


@jax.jit
def _of_signals(gate: Gate, signals_NxF: jax.Array) -> jax.Array:
    columns = [signals_NxF[:, i] for i in range(len(SIGNALS))]
    return gate_weight(gate, Spread(*columns[:2]), Spread(*columns[2:]), signals_NxF[:, len(SIGNALS) :])


def _lambdas(gate: Gate, text: HeldOut) -> np.ndarray:
    return np.asarray(_of_signals(gate, text.signals_NxF))


def _figures(fit: HeldOut, check: HeldOut, weight_N: np.ndarray, config: GateConfig) -> dict[str, Any]:
    best = best_lambda(fit.base_N, fit.memory_N)[0]
    return {
        "rows": len(check.base_N),
        "base": float(-check.base_N.astype(np.float64).mean()),
        "fixed_lambda": best,
        "fixed": float(mixture_rows(check.base_N, check.memory_N, best).mean()),
        "gate": float(mixture_rows(check.base_N, check.memory_N, weight_N).mean()),
        "mean_lambda": float(weight_N.astype(np.float64).mean()),
        "added": list(_added(check, weight_N, config)),
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
